"""A cap on upload, shared by channels of either dialect. What it counts is in ``_bucket``."""

from __future__ import annotations

import trio

from kas_libp2p.kaspa._bucket import TokenBucket

UPLOAD_SLICE = 16 * 1024
"""Bytes that wait for the upload cap at a time: a tenth of a second at 160 kB/s, so that peers take turns finely."""


class UploadCap:
    """Bytes per second that may leave, shared by all channels it is given to.

    Args:
        rate: bytes per second.
        burst: bytes that may leave at once after a pause; a quarter of a second's worth by default.
    """

    def __init__(self, rate: float, burst: float | None = None) -> None:
        self._bucket = TokenBucket(rate, max(UPLOAD_SLICE, rate / 4 if burst is None else burst), trio.current_time())

    @property
    def rate(self) -> float:
        """Bytes per second."""
        return self._bucket.rate

    def reserve(self, count: int) -> float:
        """When ``count`` bytes may leave, on trio's clock. Whoever asked first goes first."""
        return self._bucket.reserve(count, trio.current_time())

    def charge(self, count: int) -> None:
        """Count bytes that do not wait, such as signs of life."""
        self._bucket.charge(count, trio.current_time())
