"""How often something may be done, by whom. No I/O; ``now`` is passed in."""

from __future__ import annotations

from collections.abc import Hashable

MAX_KEYS = 8192
"""Keys remembered at once; beyond it the one that did nothing for the longest is forgotten, which is in its favour."""

NEVER = 1e9
"""Seconds that an infinite interval counts as: a sum with infinity would forbid nothing."""


class Rates:
    """For each key: ``burst`` at once, and one more every ``interval`` seconds.

    A key is one number: when it will have all of its burst again. Once that has passed it is as one that was never
    seen, and is dropped.

    Args:
        burst: how many at once.
        interval: seconds for each one beyond.
    """

    __slots__ = ("_full_at", "_interval", "_span")

    def __init__(self, burst: int, interval: float) -> None:
        self._interval = interval = min(interval, NEVER)
        self._span = (burst + 1e-6) * interval  # a sum of floats must not fall short of the last of a burst
        self._full_at: dict[Hashable, float] = {}  # the longest untouched first

    def __len__(self) -> int:
        return len(self._full_at)

    def allows(self, key: Hashable, now: float, count: int = 1) -> bool:
        """Whether `take` would succeed."""
        return max(self._full_at.get(key, now), now) + count * self._interval <= now + self._span

    def take(self, key: Hashable, now: float, count: int = 1) -> bool:
        """Take so many, if they are there."""
        full_at = self._full_at
        # What was touched a whole span ago is full again, so the first key tells whether there is anything to drop.
        while full_at and (len(full_at) >= MAX_KEYS or full_at[next(iter(full_at))] <= now):
            del full_at[next(iter(full_at))]
        if not self.allows(key, now, count):
            return False
        full_at[key] = max(full_at.pop(key, now), now) + count * self._interval
        return True
