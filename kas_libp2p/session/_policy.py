"""By which path a session goes, and when it moves to another one. No I/O.

What is preferred
    A direct path, once it has been proven: it costs no relay anything, and is mostly shorter. A circuit that lasts is
    left for it and for nothing else. Whoever prefers quiet leaves a circuit, too, which is as good as the direct path.

What is left
    A circuit that ends soon, for whatever lasts longer: a direct path, else another circuit. Where there is none yet,
    it is used to its end. A direct path is left only when it is lost, or hangs.

What is never done
    Flapping. A direct path that was lost before it had lasted `punch.steady` makes the next one wait: it has to live
    for `WAITS`, longer with each in a row, before it is moved to. One of these is forgiven per hour. From a move to
    the next by taste it is `DWELL` seconds. Between two direct paths, or two circuits that last, no session moves.

When the path is lost
    the best of what is there is taken at once, proven or not; what has just hung is not for `AVOID` seconds.

What is kept
    A direct connection that has still to show that it lasts (`spare`), though nobody uses it now. A circuit is not kept
    beside a direct path: the place on the relay is, and a dial through it takes little beside noticing a loss, while a
    circuit that nobody uses takes the relay's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from kas_libp2p.config import STEADY
from kas_libp2p.metadata import TAIL, CircuitLimits, PathKind, PeerId
from kas_libp2p.units import milliseconds, seconds

WAITS = (0.0, 10.0, 60.0, 600.0, 1800.0, 3600.0)
"""Seconds that the next direct path has to live before it is moved to, by how many were lost early. Like `FORGIVEN` for
the default of `punch.steady`, with which both change."""
FORGIVEN = 3600.0
"""Seconds without an early loss after which one of them is forgiven."""
DWELL = 5.0
"""Seconds from a move to the next by taste."""
AVOID = 10.0
"""Seconds for which a connection is left alone on which the session hung, or could not attach."""
PROOF = 30.0
"""Seconds after which a direct path that lives counts as proven: ten times what proving takes."""

PART_OF_TIME = 0.125
"""Of a circuit's time, the part that is left when it ends soon; of its bytes it is `TAIL`."""
LEAST_TIME, MOST_TIME = 15.0, 600.0
"""Seconds, at least and at most, that are left of its time then: a move takes a second, dialing the next one some."""
LONG = 600.0
"""Seconds of `CircuitLimits.lasts` from which on circuits differ no more by that."""
QUIET_RTT = 0.05
"""Seconds of a round trip through a relay that nobody would notice: a block takes longer to verify."""
QUIET_LASTS = 60.0
"""Seconds of `CircuitLimits.lasts` that a circuit must have left to be as good as a direct path."""
UNKNOWN_RTT = 0.3
"""Seconds that are assumed of a round trip nobody has measured."""
CHECK = 1.0
"""Seconds between two looks where bytes are counted and there is somewhere to go."""
TICK = 0.01
"""Seconds until a session is looked at again at the earliest: sums of floats may fall short of what they wait for."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A connection with the session's peer.

    Attributes:
        number: of the connection.
        kind: how it reaches the peer.
        relay: who carries it, or ``None``: only of a relayed one is it looked at.
        rtt: last measured round trip in seconds; ``None``: not known.
        age: seconds since it came up.
        proven: whether it has answered for long enough (`Node.on_direct`); of a circuit it does not matter.
        limits: what its relay allows; ``None`` where no relay does.
    """

    number: int
    kind: PathKind
    relay: PeerId | None = None
    rtt: float | None = None
    age: float = 0.0
    proven: bool = False
    limits: CircuitLimits | None = None

    @property
    def relayed(self) -> bool:
        """Whether a relay carries it."""
        return self.kind is PathKind.RELAYED


@dataclass(frozen=True, slots=True)
class Choice:
    """Where to move now.

    Attributes:
        number: of the connection.
        reason: why, in words, for `SessionMoved` and ``why``.
        at_once: whether the present path is lost or about to end, so that neither side should wait for the other.
    """

    number: int
    reason: str
    at_once: bool


def ends_soon(limits: CircuitLimits | None) -> str:
    """Why a session should leave a circuit, in words; empty if it has no reason to."""
    if limits is None:
        return ""
    return limits.scarce(_margin, lambda max_bytes: TAIL * max_bytes, "the circuit's ")


def _margin(max_seconds: float) -> float:
    return min(max(PART_OF_TIME * max_seconds, LEAST_TIME), MOST_TIME)


class PathPolicy:
    """Decides for one session.

    Args:
        quiet: whether a circuit that is as good is left as it is.
        steady: seconds that a direct path has to last to be trusted as it is (``punch.steady``).

    Attributes:
        look_at: when to call `choose` again if nothing is told before; on the clock that ``now`` comes from.
        reason: why it stays where it is, in words, as of the last `choose`; empty if that made a choice.
        spare: number of the connection that is to be kept beside the present one although nothing is on it; ``None`` if
            there is none, or none is needed.
    """

    __slots__ = (
        *("_at", "_avoided", "_early", "_early_at", "_lasted", "_quiet", "_since", "_stays_until", "_steady"),
        *("look_at", "reason", "spare"),
    )

    def __init__(self, *, quiet: bool = False, steady: float = STEADY) -> None:
        self.look_at = math.inf
        self.reason = ""
        self.spare: int | None = None
        self._quiet = quiet
        self._steady = steady
        self._at: Candidate | None = None  # as it was when the session moved there
        self._since = -math.inf
        self._stays_until = -math.inf
        self._early = 0
        self._early_at = -math.inf
        self._lasted = 0.0  # seconds that the last one lasted that was lost early
        self._avoided: dict[int, float] = {}

    # What is told

    def moved(self, to: Candidate, now: float) -> None:
        """The session goes by this one now, whichever side moved it, for the first time or again."""
        if self._at is not None and to.relayed:
            # The other side has seen it hang or end, and we have not.
            self._count_loss(now)
        if self._since > -math.inf:  # the beginning is no move
            self._stays_until = now + DWELL
        self._at, self._since = to, now
        self._avoided.pop(to.number, None)

    def lost(self, number: int, now: float) -> None:
        """A path was lost, or hung, or the session could not attach to it."""
        self._avoided = {each: until for each, until in self._avoided.items() if until > now}
        self._avoided[number] = now + AVOID
        if self._at is not None and self._at.number == number:
            self._count_loss(now)
            self._at = None

    def _count_loss(self, now: float) -> None:
        assert self._at is not None
        lasted = now - self._since
        if not self._at.relayed and lasted < self._steady:
            self._forgive(now)
            self._early = min(self._early + 1, len(WAITS) - 1)
            self._early_at, self._lasted = now, lasted

    def _forgive(self, now: float) -> None:
        after = FORGIVEN * self._steady / STEADY
        while self._early and now - self._early_at >= after:
            self._early -= 1
            self._early_at += after

    # What follows

    def choose(self, current: int | None, candidates: Sequence[Candidate], now: float) -> Choice | None:
        """Where the session should move now; ``None``: nowhere.

        Args:
            current: number of the connection by which it goes; ``None`` if it has no path.
            candidates: all connections with its peer that are up, the present one included.
        """
        self._forgive(now)
        self.look_at, self.reason = math.inf, ""
        here = next((each for each in candidates if each.number == current), None)
        others = [each for each in candidates if each.number != current and self._may(each, now)]
        others.sort(key=self._rank)
        self.spare = self._spare(here, others)
        if here is None:
            if others:
                return Choice(others[0].number, "the path was lost", at_once=True)
            self.reason = "there is no other path" if len(candidates) == 0 else "what is there has just failed"
            return None
        if not here.relayed:
            self.reason = "the path is direct"
            return None
        if ending := ends_soon(here.limits):
            found = next((each for each in others if self._lasts(each)), None)
            if found is not None:
                return Choice(found.number, ending, at_once=True)
            self.reason = f"{ending}, and there is no other path yet"
            for each in others:
                if not each.relayed:
                    self._look_within(PROOF - each.age, now)
            return None
        self._look_before_end(here, others, now)
        choice = self._prefer(here, others, now)
        if choice is None and all(each.relayed for each in others) and not all(each.relayed for each in candidates):
            self.reason = "the direct path has just failed"
        return choice

    def _prefer(self, here: Candidate, others: Sequence[Candidate], now: float) -> Choice | None:
        """Leave a circuit that lasts for a direct path, or not."""
        direct = next((each for each in others if not each.relayed), None)
        if direct is None:
            self.reason = "there is no direct path"
        elif wait := max(0.0, 0.0 if direct.proven else PROOF - direct.age, self._wait() - direct.age):
            self._look_within(wait, now)
            self.reason = "the direct path is not proven yet"
            if self._early and direct.proven:
                self.reason = f"the direct path has to live for {seconds(wait)} more: the last one was lost after "
                self.reason += seconds(self._lasted)
        elif self._quiet and (good := _as_good(here, direct)):
            self.reason = good
        elif (wait := self._stays_until - now) > 0:
            self._look_within(wait, now)
            self.reason = f"it has just moved, and stays for {seconds(wait)}"
        else:
            return Choice(direct.number, "the direct path has proven itself", at_once=False)
        return None

    def _may(self, each: Candidate, now: float) -> bool:
        until = self._avoided.get(each.number, now)
        if until > now:
            self._look_within(until - now, now)
        return until <= now

    def _wait(self) -> float:
        return WAITS[self._early] * self._steady / STEADY

    def _lasts(self, each: Candidate) -> bool:
        """Whether it can be counted on, as far as one knows."""
        if each.relayed:
            return not ends_soon(each.limits)
        return each.proven or each.age >= PROOF

    def _rank(self, each: Candidate) -> tuple[float, ...]:
        """The lower the better."""
        if each.relayed:
            lasts = each.limits.lasts if each.limits is not None else math.inf
            kind = 3 if ends_soon(each.limits) else 1
        else:
            lasts = each.age
            kind = 2 if not self._lasts(each) or each.age < self._wait() else 0
        return kind, -min(lasts, LONG), UNKNOWN_RTT if each.rtt is None else each.rtt

    def _spare(self, here: Candidate | None, others: Sequence[Candidate]) -> int | None:
        if here is None or not here.relayed:
            return None
        return next((each.number for each in others if not each.relayed), None)

    def _look_before_end(self, here: Candidate, others: Sequence[Candidate], now: float) -> None:
        limits = here.limits
        if limits is None or not others:
            return
        if limits.max_seconds is not None and limits.seconds_left is not None:
            self._look_within(limits.seconds_left - _margin(limits.max_seconds), now)
        if limits.max_bytes is not None:
            self._look_within(CHECK, now)

    def _look_within(self, after: float, now: float) -> None:
        self.look_at = min(self.look_at, now + max(after, TICK))


def _as_good(circuit: Candidate, direct: Candidate) -> str:
    """Why a circuit is as good as a direct path, in words; empty if it is not."""
    if circuit.rtt is None or (circuit.limits is not None and circuit.limits.lasts < QUIET_LASTS):
        return ""
    if circuit.rtt <= QUIET_RTT:
        return f"the relay's {milliseconds(circuit.rtt * 1000)} are good enough"
    if direct.rtt is not None and direct.rtt >= circuit.rtt:
        return f"the direct path is no shorter: {milliseconds(direct.rtt * 1000)}"
    return ""
