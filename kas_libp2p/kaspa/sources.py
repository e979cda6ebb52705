"""Source addresses towards kaspad, kept in a file. The table is in ``_sources``; here is its shell."""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from kas_libp2p.kaspa._sources import DEFAULT_POOL, MAX_ENTRIES, Entry, PoolExhausted, SourceTable
from kas_libp2p.metadata import PeerId

__all__ = ["FixedSource", "PoolExhausted", "PoolSources", "Sources"]

MAX_FILE = 4 * 1024 * 1024
"""Bytes of a table that we read: several times what `MAX_ENTRIES` peers need."""


class Sources(ABC):
    """From which address a peer is joined."""

    @abstractmethod
    def lease(self, peer: PeerId) -> contextlib.AbstractContextManager[str | None]:
        """The peer's source address for the length of a ``with`` block; ``None`` leaves it to the system.

        Raises:
            PoolExhausted: none is free.
        """

    @abstractmethod
    def address_of(self, peer: PeerId) -> str | None:
        """The address that is assigned to a peer, or ``None``."""


class FixedSource(Sources):
    """One source address for all peers: a kaspad in a container, or on another host.

    kaspad then sees all peers under one IP address: it tells them apart by node id, a ban of one is a ban of all, and
    two handshakes can be pending at a time.

    Args:
        address: an IPv4 or IPv6 address of this machine; ``None`` leaves the choice to the system.
    """

    def __init__(self, address: str | None = None) -> None:
        self.address = address

    @contextmanager
    def lease(self, peer: PeerId) -> Iterator[str | None]:
        yield self.address

    def address_of(self, peer: PeerId) -> str | None:
        return self.address


class PoolSources(Sources):
    """One source address per peer, from a pool, remembered over restarts.

    The file is written anew whenever an address was assigned, and on `save`; a reader never sees half of it.

    Args:
        pool: IPv4 networks, see `SourceTable`. The default works where kaspad listens on this machine.
        path: the file; ``None`` forgets everything at the end.
        max_entries: peers that are remembered.

    Attributes:
        problem: what was wrong with the file when it was read, or with writing it; ``None`` if nothing was.

    Raises:
        ConfigError: the pool is not usable.
    """

    def __init__(
        self, pool: Iterable[str] = DEFAULT_POOL, *, path: Path | None = None, max_entries: int = MAX_ENTRIES
    ) -> None:
        self._table = SourceTable(pool, max_entries=max_entries)
        self._path = path
        self.problem: str | None = None
        if path is not None:
            self._load(path)

    def _load(self, path: Path) -> None:
        try:
            with path.open(encoding="utf-8") as file:
                text = file.read(MAX_FILE)
            left_out = self._table.load(text)
            if left_out:
                self.problem = f"{left_out} of the source addresses in {path} do not fit the pool and are assigned anew"
        except FileNotFoundError:
            return
        except (OSError, ValueError) as error:
            # The peers get new addresses, which costs a ban or two: better than not to start. The old file is kept.
            self.problem = f"{path} can't be read ({error}); source addresses are assigned anew"
            with contextlib.suppress(OSError):
                os.replace(path, path.with_name(path.name + ".damaged"))

    def save(self) -> None:
        """Write the file, as a whole or not at all. A failure is noted in ``problem``."""
        if self._path is None:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(prefix=self._path.name, suffix=".new", dir=self._path.parent)
            try:
                with os.fdopen(handle, "w", encoding="utf-8") as file:
                    file.write(self._table.dump())
                os.replace(name, self._path)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.unlink(name)
                raise
        except OSError as error:
            self.problem = f"source addresses can't be saved: {error}"

    @contextmanager
    def lease(self, peer: PeerId) -> Iterator[str]:
        address, new = self._table.take(peer, time.time())
        if new:
            self.save()
        try:
            yield address
        finally:
            self._table.give_back(peer, time.time())

    def address_of(self, peer: PeerId) -> str | None:
        return self._table.address_of(peer)

    def entries(self) -> dict[PeerId, Entry]:
        """All assignments, the least recently used first."""
        return self._table.entries()
