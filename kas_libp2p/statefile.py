"""A file of ours whose loss costs time and nothing else: read with care, written as a whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kas_libp2p.events import EventBus, FileDamaged

MAX_FILE = 2 * 1024 * 1024
"""Characters that are read: more than any such file has if all of its entries are as long as they may be."""


class StateFile:
    """One such file. Whatever goes wrong with it is told (`FileDamaged`), and nothing is raised.

    Args:
        path: where it is; its directory is made if missing.
        events: where damage is told.
        entries: what it holds, in words, as ``known relays``.
    """

    def __init__(self, path: Path, events: EventBus, entries: str) -> None:
        self._path = path
        self._events = events
        self._entries = entries

    def load(self, take: Callable[[str], int]) -> None:
        """Read it, if it is there. One that can't be read is kept beside, with ``.damaged`` behind its name.

        Args:
            take: is given the text; returns how many entries it left out as they are damaged. Raises ``ValueError`` if
                the text is no such file.
        """
        path = self._path
        try:
            with path.open(encoding="utf-8") as file:
                text = file.read(MAX_FILE)
            left_out = take(text)
        except FileNotFoundError:
            return
        except (OSError, ValueError) as error:
            with contextlib.suppress(OSError):
                os.replace(path, path.with_name(path.name + ".damaged"))
            self._tell(f"can't be read, and {self._entries} are found anew; it is kept as {path.name}.damaged: {error}")
        else:
            if left_out:
                self._tell(f"{left_out} of its {self._entries} are left out")

    def save(self, text: str) -> None:
        """Write it, as a whole or not at all."""
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(prefix=self._path.name, suffix=".new", dir=self._path.parent)
            try:
                with os.fdopen(handle, "w", encoding="utf-8") as file:
                    file.write(text)
                os.replace(name, self._path)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.unlink(name)
                raise
        except OSError as error:
            self._tell(f"{self._entries} can't be saved: {error}")

    def _tell(self, reason: str) -> None:
        self._events.emit(FileDamaged(path=str(self._path), reason=reason))


def read_entries(text: str, name: str, version: int, most: int, take: Callable[[Any], None]) -> int:
    """Read a list as such a file holds it: JSON with its ``format`` and, under a name, the entries.

    Args:
        name: of the list.
        version: the format that is read.
        most: entries that are read; those behind are ignored.
        take: is given each of them, as it comes from JSON. Raises ``KeyError``, ``TypeError``, ``ValueError`` or
            ``OverflowError`` if it is damaged.

    Returns:
        How many entries were damaged.

    Raises:
        ValueError: the text is no such list; says why.
    """
    try:
        values = json.loads(text)
        if values["format"] != version:
            raise ValueError(f"it has format {values['format']!r}, and {version} is read here")
        entries = [*values[name]][:most]
    except (KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"it is not a list of {name}: {error!r}") from None
    damaged = 0
    for each in entries:
        try:
            take(each)
        except (KeyError, TypeError, ValueError, OverflowError):
            damaged += 1
    return damaged
