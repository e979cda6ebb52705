"""When the circuit under a connection is renewed, before its relay ends it. No I/O.

A circuit can't be made to last longer. What is renewed is the connection: beside it another circuit is made to the same
peer, new streams go there, and the old one is closed when it is idle, or ends by itself. So the peer is reachable
without a gap. The streams that are open on the old one are not moved; they end with it.

Who
    The side that asked for the circuit asks for the next one, too. The other side has only to keep it.

Which circuits
    Those on which something is open, when a tenth of their time is left (at least one minute, at most ten: room for
    some tries), or an eighth of their bytes. But only while there is no other way to the peer that lasts; and only
    those that have lasted for some minutes. What a relay gives for two minutes or 128 KiB, as the reference does, is
    spent faster than it may be asked for: rust gives a peer 30 circuits at once and one more every two minutes, over
    all whom it calls.

How often
    For one peer once a minute, and through one relay as `BURST` and `INTERVAL` say. A peer of another implementation
    may close a connection that nobody uses yet, as rust does after ten seconds: where that happened twice, the next one
    is made `BRIEF` seconds before the end.

A circuit that carries a session is another matter: see `kas_libp2p.relay._succession`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kas_libp2p._rates import Rates
from kas_libp2p.metadata import CircuitLimits, PeerId

PART_OF_TIME, LEAST_TIME, MOST_TIME = 0.1, 60.0, 600.0
"""Of the time that a circuit may last, the part that is left when it is renewed; and seconds, at least and at most."""
PART_OF_BYTES = 0.125
"""Of the bytes that it may carry, the part that is left when it is renewed: what has lasted for `LEAST_AGE` has then as
many bytes left as it took in 40 s."""
LEAST_AGE = 300.0
"""Seconds that a circuit must have lasted to be renewed."""
PAUSE = 60.0
"""Seconds between two tries for one peer."""
BURST, INTERVAL = 8, 120.0
"""Renewals through one relay at once, and seconds for each one more: a quarter of what rust gives, and as often. The
rest is for calls."""
KEPT_BADLY = 2
"""Next circuits of one peer that were made, and closed before they were needed, after which none is made early."""
LEAST_LOOK = 0.5
"""Seconds between two looks at least: a sum of floats may fall short of what it waits for, again and again."""
BRIEF = 8.0
"""Seconds for which rust, and so kaspad's own overlay, keeps a connection that nobody uses: ten, less a handshake."""
CHECK = 5.0
"""Seconds after which is looked again where bytes are counted, or a renewal is due that has to wait."""


@dataclass(frozen=True, slots=True)
class Line:
    """A connection with a peer, as far as it matters here.

    Attributes:
        number, peer: which, with whom.
        relay: through which relay; ``None`` if it is direct.
        ours: whether we asked for the circuit.
        age: seconds since it came up.
        busy: whether streams are open on it.
        limits: what the relay allows the circuit; ``None`` if it is direct.
        session: whether a session goes by it now.
    """

    number: int
    peer: PeerId
    relay: PeerId | None
    ours: bool
    age: float
    busy: bool
    limits: CircuitLimits | None
    session: bool = False


@dataclass(frozen=True, slots=True)
class Due:
    """A circuit to be renewed now.

    Attributes:
        line: the connection on it.
        reason: why, in words.
        relay: through which relay; ``None``: any.
    """

    line: Line
    reason: str
    relay: PeerId | None = None


def ends_soon(limits: CircuitLimits | None, share: float = 1.0) -> str:
    """Why a circuit can't be counted on any more, in words; empty if it can.

    Args:
        share: of the margins, so that not all are renewed at once.
    """
    if limits is None:
        return ""
    return limits.scarce(lambda most: _margin(most) * share, lambda most: PART_OF_BYTES * most * share)


def _margin(max_seconds: float) -> float:
    return min(max(PART_OF_TIME * max_seconds, LEAST_TIME), MOST_TIME)


def _until_brief(limits: CircuitLimits) -> float:
    """Seconds until a circuit lasts for no more than `BRIEF`; infinity where only bytes are counted."""
    return limits.seconds_left - BRIEF if limits.seconds_left is not None else float("inf")


def follows(line: Line, others: Sequence[Line]) -> bool:
    """Whether a connection, idle as it may be, is the next one of another that is about to end and in use.

    Both sides keep it for that, whoever made it.
    """
    if line.relay is None or ends_soon(line.limits):
        return False
    return any(
        other.peer == line.peer and other.number != line.number and other.busy and ends_soon(other.limits)
        for other in others
    )


class Renewals:
    """Decides over time which circuits are renewed.

    Args:
        spread: a number from 0 to 1, at random.

    Attributes:
        look_at: when to call `due` again, if nothing changes before; on the clock that ``now`` comes from.
    """

    def __init__(self, spread: Callable[[], float]) -> None:
        self.look_at = float("inf")
        self._spread = spread
        self._shares: dict[int, float] = {}
        self._tried: dict[PeerId, float] = {}
        self._made: dict[PeerId, int] = {}
        self._rates = Rates(BURST, INTERVAL)

    def due(self, lines: Sequence[Line], now: float) -> list[Due]:
        """What is to be renewed now. Each of them counts as a try.

        Args:
            lines: all connections.
        """
        ours = [line for line in lines if line.ours and line.relay is not None and not line.session]
        self._shares = {line.number: self._shares.get(line.number, 1 - self._spread() / 4) for line in ours}
        self._tried = {line.peer: self._tried[line.peer] for line in ours if line.peer in self._tried}
        self._made = {line.peer: self._made[line.peer] for line in ours if line.peer in self._made}
        self.look_at = float("inf")
        found = []
        for line in sorted(ours, key=self._last_try):
            assert line.limits is not None
            assert line.relay is not None
            share = self._shares[line.number]
            reason = ends_soon(line.limits, share)
            if not reason:
                self._look_within(now, self._until_soon(line.limits, share))
            elif line.age < LEAST_AGE:
                continue  # it is spent as fast as the next one would be
            elif self._stands_alone(line, lines):
                if self._made.get(line.peer, 0) >= KEPT_BADLY and (wait := _until_brief(line.limits)) > 0:
                    self._look_within(now, wait)
                    continue
                rested = now - self._last_try(line) >= PAUSE
                if line.busy and rested and self._rates.take(line.relay, now):
                    self._tried[line.peer] = now
                    found.append(Due(line, reason))
                self._look_within(now, CHECK)
        return found

    def made(self, peer: PeerId) -> None:
        """The next one with a peer was made."""
        self._made[peer] = self._made.get(peer, 0) + 1

    def _last_try(self, line: Line) -> float:
        return self._tried.get(line.peer, float("-inf"))

    def _stands_alone(self, line: Line, lines: Sequence[Line]) -> bool:
        return all(other.peer != line.peer or ends_soon(other.limits) for other in lines)

    def _until_soon(self, limits: CircuitLimits, share: float) -> float:
        if limits.max_bytes is not None:
            return CHECK
        if limits.max_seconds is None or limits.seconds_left is None:
            return float("inf")
        return limits.seconds_left - _margin(limits.max_seconds) * share

    def _look_within(self, now: float, after: float) -> None:
        self.look_at = min(self.look_at, now + max(after, LEAST_LOOK))
