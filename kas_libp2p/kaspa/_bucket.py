"""A cap on bytes per second, shared by whoever asks: pure, ``now`` is passed in."""

from __future__ import annotations


class TokenBucket:
    """Says when bytes may leave, so that in any span of t seconds at most ``rate * t + burst`` do.

    Who asks is served in the order of asking: each call reserves, and the next one comes after it. Callers that ask for
    at most ``burst`` at a time keep the bound exactly; a larger request leaves as a whole when the tokens for all of it
    have come together.

    Args:
        rate: bytes per second.
        burst: bytes that may leave at once after a pause.
        now: seconds on a monotonic clock.
    """

    def __init__(self, rate: float, burst: float, now: float) -> None:
        if rate <= 0 or burst <= 0:
            raise ValueError("rate and burst must be above zero")
        self.rate = rate
        self.burst = burst
        self._tokens = burst  # below zero: reserved ahead of time
        self._at = now

    def _refill(self, now: float) -> None:
        if now > self._at:
            self._tokens = min(self.burst, self._tokens + (now - self._at) * self.rate)
            self._at = now

    def reserve(self, count: int, now: float) -> float:
        """The time at which ``count`` bytes may leave: ``now``, or later. They count as gone from here on."""
        self._refill(now)
        self._tokens -= count
        return now if self._tokens >= 0 else now - self._tokens / self.rate

    def charge(self, count: int, now: float) -> None:
        """Count bytes that could not wait, such as a sign of life: those who ask later pay for them."""
        self._refill(now)
        self._tokens -= count
