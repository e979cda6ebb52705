"""How fast may a backlog go into kaspad? Pure: ``now`` is passed in.

kaspad sorts what comes into routes, most of which hold 256 messages; a peer that fills one is ended, even if that took
it a millisecond (an inventory is dropped instead; of transactions there may be 131 072). Usually the way to the peer is
slower than kaspad. After a gap, what has gathered for up to half a minute comes at once. Of two kaspads that is less
than a route holds, as they ask for little at a time; of other nodes it may be more.

So for as long as there is a backlog, each kind of message has a bucket, which kaspad is thought to empty at `RATE`.
Measured with kaspad 2.1.0: 300 Pings or requests at once end the peer; of each it takes 5000/s, one after the other.
"""

from __future__ import annotations

ROUTE = 128
"""Messages of one kind that kaspad is thought to hold at most: half of a route, as two kinds may share one."""

RATE = 1000.0
"""Messages of one kind per second that kaspad is thought to take: a fifth of what an idle one takes."""

LONGEST = 10.0
"""Seconds after which a backlog counts as over. What comes for longer than that is no backlog, but a sync that would be
held up."""

QUIET = 1.0
"""Seconds without anything from the peer after which the backlog is over. More than a long relayed round trip (0.6 s):
while a path is young, the backlog comes in flights of one round trip each, every one twice as large as the last."""

_UNBOUNDED = frozenset({3, 21})
"""Transaction and TransactionNotFound: as many as one inventory may name have a place."""

_KINDS = 128
"""Field numbers that are told apart. kaspad knows those up to 67; all others end the peer, however slowly they come."""


class Pacing:
    """Holds messages back while there is a backlog.

    Args:
        now: when the path was there again, in seconds on a monotonic clock.
    """

    def __init__(self, now: float) -> None:
        self._until = now + LONGEST
        self._empty_at: dict[int, float] = {}

    def over(self, now: float, waited: float) -> bool:
        """Whether there is no backlog any more.

        Args:
            waited: seconds for which nothing had come before what came now.
        """
        return waited >= QUIET or now >= self._until

    def admit(self, number: int | None, now: float) -> float:
        """Seconds until a message may pass: 0 if it passes now, which is counted; else ask again then.

        Args:
            number: field number of the message, ``None`` if it is not known.
        """
        if number in _UNBOUNDED:
            return 0.0
        kind = number if number is not None and number < _KINDS else 0
        empty_at = max(now, self._empty_at.get(kind, now))
        held = (empty_at - now) * RATE
        if held > ROUTE - 0.5:  # no place for one more; the half allows for rounding
            return (held - ROUTE / 2) / RATE  # half of them at a time: few pauses
        self._empty_at[kind] = empty_at + 1 / RATE
        return 0.0
