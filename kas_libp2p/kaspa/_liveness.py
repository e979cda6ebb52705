"""Is the other side still there? Pure: ``now`` is passed in, and what to do comes out as values.

A stall is worse than a cut: a kaspad whose sync stalls waits 120 s, one whose connection was cut goes on in a fraction
of a second. So silence is noticed within seconds, and a busy peer is told apart from a dead path:

- Whoever receives says so: at most `TELL_AFTER` after something arrived, with the count of bytes taken from the stream.
- Whoever does not read, as what is behind it takes nothing more, says that it is alive every `TELL_AFTER`.
- Whoever has heard nothing for `PROBE_AFTER` asks, and is answered at once; without a word for `ANSWER_WITHIN` the path
  is hung. A side that does not read judges nobody: the answer may lie unread before it.
- Whoever sees that what it sent still moves towards the peer waits on: its question may lie behind a deep queue.
- Data moved within the last `OWED_FOR`: something may be owed in either direction. After that kaspad itself would have
  given up, and an idle connection is probed every `IDLE_PROBE_AFTER` only.
"""

from __future__ import annotations

from enum import Enum, auto

TELL_AFTER = 1.0
"""Seconds until the sender of bytes hears of their arrival: below `PROBE_AFTER`, so a one-way flow needs no probe."""

PROBE_AFTER = 2.0
"""Seconds of silence, while something may be owed, after which the peer is asked."""

ANSWER_WITHIN = 3.0
"""Seconds for the answer: a long relayed round trip (0.6 s at the 95th percentile) with room for a queue in its way."""

OWED_FOR = 120.0
"""Seconds after the last message for which an answer to it may be owed: kaspad's own patience (``DEFAULT_TIMEOUT``)."""

IDLE_PROBE_AFTER = 30.0
"""Seconds of silence on an idle connection after which the peer is asked."""

LATE = 1.0
"""Seconds by which a timer may be late before its silence counts for nothing: the process was stopped, not the path."""


class Act(Enum):
    """What to do."""

    TELL = auto()
    """Send an `Alive`."""
    PROBE = auto()
    """Send a `Probe`."""
    HUNG = auto()
    """Give the path up."""


class Liveness:
    """Watches one channel. What it learns of comes with ``now``; `next_deadline` and `on_timeout` drive it.

    Args:
        now: when the channel began.
        probe_after, idle_probe_after, answer_within: seconds; see the module for what they stand for.

    Attributes:
        sent: bytes of our direction handed to the stream.
        received: bytes of the other direction taken from the stream.
        acknowledged: bytes of ours that the peer has taken, as it told last.
        last_heard: when anything came from the peer.
    """

    def __init__(
        self,
        now: float,
        *,
        probe_after: float = PROBE_AFTER,
        idle_probe_after: float = IDLE_PROBE_AFTER,
        answer_within: float = ANSWER_WITHIN,
    ) -> None:
        self._probe_after = probe_after
        self._idle_probe_after = idle_probe_after
        self._answer_within = answer_within
        self.sent = 0
        self.received = 0
        self.acknowledged = 0
        self.last_heard = now
        self._moved = now  # when a message went or came
        self._untold = False  # whether data came since the last Alive; control frames alone are not answered
        self._tell_at: float | None = now + TELL_AFTER
        self._probed_at: float | None = None
        self._delivered = 0
        self._reading = False
        self._reading_since = now
        self._busy = 0.0
        self.hung = False

    def busy_ms(self, now: float) -> int:
        """Milliseconds in which we did not read, for `Alive`."""
        return int(1000 * (self._busy + (0.0 if self._reading else now - self._reading_since)))

    def on_reading(self, now: float) -> None:
        """We wait for bytes from here on."""
        if not self._reading:
            self._busy += now - self._reading_since
            self._reading, self._reading_since = True, now
            if not self._untold:
                self._tell_at = None

    def on_received(self, count: int, now: float) -> None:
        """Bytes came; we do not read until `on_reading` says so again."""
        self.received += count
        self.last_heard = now
        self._probed_at = None
        self._reading, self._reading_since = False, now
        if self._tell_at is None:
            self._tell_at = now + TELL_AFTER

    def on_data(self, now: float) -> None:
        """Among what was received were bytes of messages."""
        self._moved = now
        self._untold = True

    def on_moved(self, now: float) -> None:
        """A message, or a part of one, came or is on its way out."""
        self._moved = now

    def on_delivered(self, total: int, now: float) -> None:
        """So many bytes have reached the peer's host, as far as is known. Wants to be told every second or so."""
        if total != self._delivered:
            self._delivered = total
            if self._probed_at is not None:
                self._probed_at = now

    def on_sent(self, count: int) -> None:
        """Bytes were handed to the stream."""
        self.sent += count

    def on_alive(self, received: int) -> bool:
        """The peer told what it has. False if that can't be: bytes we have not sent, or fewer than before."""
        if not self.acknowledged <= received <= self.sent:
            return False
        self.acknowledged = received
        return True

    def tell_due(self, now: float) -> bool:
        """Whether an `Alive` is due, for who runs no timer and tells with the data that comes."""
        return self._tell_at is not None and now >= self._tell_at

    def on_told(self, now: float) -> None:
        """An `Alive` was made."""
        self._untold = False
        self._tell_at = None if self._reading else now + TELL_AFTER

    def _probe_at(self) -> float:
        owed = self.last_heard < self._moved + OWED_FOR
        return max(self.last_heard, self._reading_since) + (self._probe_after if owed else self._idle_probe_after)

    def next_deadline(self) -> float | None:
        """When `on_timeout` wants to be called, unless something happens before."""
        deadline = self._tell_at
        if self._reading and not self.hung:
            silence = self._probe_at() if self._probed_at is None else self._probed_at + self._answer_within
            deadline = silence if deadline is None else min(deadline, silence)
        return deadline

    def on_timeout(self, now: float) -> list[Act]:
        """What is due."""
        acts: list[Act] = []
        if self._tell_at is not None and now >= self._tell_at:
            self.on_told(now)
            acts.append(Act.TELL)
        if not self._reading or self.hung:
            return acts
        if self._probed_at is None:
            if now >= self._probe_at():
                self._probed_at = now
                acts.append(Act.PROBE)
        elif now >= self._probed_at + self._answer_within + LATE:
            self._probed_at = now
            acts.append(Act.PROBE)
        elif now >= self._probed_at + self._answer_within:
            self.hung = True
            acts.append(Act.HUNG)
        return acts
