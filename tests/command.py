"""Running ``kas-libp2p``, and other programs that print an event a line, as processes."""

from __future__ import annotations

import json
import queue
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

COMMAND = (str(Path(sys.executable).with_name("kas-libp2p")),)
PATIENCE = 60.0
"""Seconds that a test waits for another process before it fails: only reached when something is wrong."""

Json = dict[str, Any]


def events_of(text: str) -> list[Json]:
    """The events in the output of ``--json``."""
    return [json.loads(line) for line in text.splitlines()]


def run_command(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run ``kas-libp2p`` to its end."""
    command = [*COMMAND, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=PATIENCE)


class Running:
    """A process whose output is read while it runs. Ended, if it has not, at the end of the ``with`` block.

    Attributes:
        process: the process.
        lines: what it has printed so far.
    """

    def __init__(self, command: Sequence[str]) -> None:
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        self.lines: list[str] = []
        self._new: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        assert self.process.stdout is not None
        self._reader = threading.Thread(target=self._read, args=(self.process.stdout,))
        self._reader.start()

    def _read(self, output: IO[str]) -> None:
        for line in output:
            self._new.put(line)
        self._new.put(None)

    def _next(self) -> bool:
        line = self._new.get(timeout=PATIENCE)
        if line is not None:
            self.lines.append(line)
        return line is not None

    def wait_for_line(self, part: str) -> str:
        """The first line that has a text in it; it may have been printed already."""
        seen = 0
        while True:
            for line in self.lines[seen:]:
                if part in line:
                    return line.strip()
            seen = len(self.lines)
            if not self._next():
                raise AssertionError(f"no line with {part}; it said {self.text}")

    def wait_for(self, event: str, **fields: Any) -> Json:
        """The first event of this name and with these fields; it may have happened already."""
        seen = 0
        while True:
            for line in self.lines[seen:]:
                values: Json = json.loads(line)
                if values["event"] == event and fields.items() <= values.items():
                    return values
            seen = len(self.lines)
            if not self._next():
                raise AssertionError(f"no event {event} {fields}; it said {self.text}")

    @property
    def text(self) -> str:
        """What it has printed so far; all of it, once it has ended."""
        if self.process.poll() is not None:
            self._reader.join(PATIENCE)
        while not self._new.empty() and self._next():
            pass
        return "".join(self.lines)

    @property
    def started(self) -> Json:
        """Its event ``started``."""
        return self.wait_for("started")

    @property
    def address(self) -> str:
        """The first address at which it listens."""
        return str(self.started["addresses"][0])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            self.process.terminate()
        try:
            self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._reader.join(PATIENCE)
        assert self.process.stdout is not None
        self.process.stdout.close()


def running(*arguments: str | Path) -> Running:
    """``kas-libp2p``, running."""
    return Running([*COMMAND, *map(str, arguments)])
