"""Does compression pay on this direction, now? Pure: times and counts are passed in.

To send a byte plain takes ``1 / rate`` of the link. Packed it takes ``ratio / rate`` of the link and ``1 / speed`` of
the processors at both ends. So packing pays where ``rate < speed * (1 - ratio)``, with all three measured here: the
link's rate only while it was the link that held us up (a peer that says it was busy and did not read is not the link),
speed and ratio on the very bytes that were packed. A fast link does not hold us up, or has a high rate: nothing is
packed for it.
"""

from __future__ import annotations

from kas_libp2p.kaspa._messages import HEADER

MIN_PLAIN = 512
"""Bytes below which a batch leaves as it is: a zstd frame around it would eat the gain, and a packet goes anyway."""

UNPACK_SHARE = 1.5
"""The other side's work per byte beside ours: unpacking costs about half of packing at the levels used."""

INTERVAL = 0.5
"""Seconds over which the link's rate is averaged before anything is decided."""

HELD_UP = 0.1
"""Share of an interval that we must have waited for the link to call it a bottleneck."""

KEEP = 30.0
"""Seconds without a bottleneck after which packing ends: bursts come again, and turning on costs an interval."""

RETRY = 60.0
"""Seconds after which a direction whose bytes did not pack is tried again."""

POOR = 0.95
"""Ratio above which bytes count as not packable."""


class Packing:
    """Decides for one direction. ``on`` says whether the next batch should be packed.

    Args:
        now: seconds on a monotonic clock.
        speed: bytes per second that a processor is thought to pack, until it was measured.
        ratio: packed over plain, until it was measured.
    """

    def __init__(self, now: float, *, speed: float = 150e6, ratio: float = 0.6) -> None:
        self.on = False
        self.rate: float | None = None
        """Bytes per second that the link took while it held us up, as last seen."""
        self.speed = speed
        self.ratio = ratio
        self._started = now
        self._waited = 0.0
        self._acknowledged = 0
        self._busy = 0
        self._held_at = now
        self._not_before = now

    def on_waited(self, seconds: float) -> None:
        """So long we waited for the link, or for the upload cap, to take what we had."""
        self._waited += seconds

    def on_packed(self, plain: int, packed: int, seconds: float, now: float) -> None:
        """A batch was packed, in so many seconds of a processor."""
        weight = min(1.0, plain / 262144) * 0.3
        self.ratio += weight * (packed / plain - self.ratio)
        if seconds > 0:
            self.speed += weight * (plain / seconds - self.speed)
        if self.ratio > POOR:
            self.on = False
            self._not_before = now + RETRY
            self.ratio = 0.6

    def on_alive(self, acknowledged: int, busy_ms: int, now: float, *, gap: bool = False) -> None:
        """The peer said how much it has, and how long it did not read.

        Args:
            gap: whether there was no link at all for a while, so that these times say nothing about it.
        """
        elapsed = now - self._started
        if elapsed < INTERVAL and not gap:
            return
        arrived = acknowledged - self._acknowledged
        busy = (busy_ms - self._busy) % (1 << 32) / 1000
        waited = self._waited
        self._started, self._waited, self._acknowledged, self._busy = now, 0.0, acknowledged, busy_ms
        if gap:
            return
        if waited >= HELD_UP * elapsed and busy < 0.5 * elapsed and arrived > 0:
            self._held_at = now
            # While we waited the link was full; outside of that it may have been idle.
            self.rate = arrived / max(waited, 0.5 * elapsed)
            worth = self.speed / UNPACK_SHARE * (1 - self.ratio)
            if self.on:
                self.on = self.rate < worth
            else:
                self.on = self.rate < worth / 2 and now >= self._not_before
        elif self.on and now - self._held_at > KEEP:
            self.on = False


def worth_sending(plain: int, packed: int) -> bool:
    """Whether a packed batch is enough smaller than the plain one to be worth unpacking."""
    return packed + HEADER + 4 < POOR * plain
