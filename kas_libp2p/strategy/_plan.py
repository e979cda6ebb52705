"""How we connect: from what is known of a peer to an ordered plan of attempts. The one place that says so. No I/O.

To reach a peer
    its direct addresses are dialed as RFC 8305 says, IPv6 and IPv4 by turns, each a moment after the one before. Its
    circuits are dialed beside them: at once if the peer is known to be private, as direct addresses that nobody can
    reach would cost seconds of silence; after a head start if nothing is known; and much later if it is public, when
    most likely something is wrong. The first connection whose peer is proven wins.

To make a relayed connection direct
    the side that was called through the relay dials what the peer claims, if somebody has seen it there, and punches.
    A punch does not wait for the end of a dial, which may be silent for seconds; it waits for a round trip, in which
    an open door opens.

An attempt is tagged with its way. Only `Way.DIRECT` and `Way.RELAYED` are dials as others are; a punch has bookkeeping
and limits of its own (`kas_libp2p.transport._punch`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import filterfalse

from multiaddr import Multiaddr

from kas_libp2p import addresses as addr
from kas_libp2p.config import DialConfig, PunchConfig, Role
from kas_libp2p.metadata import PeerId
from kas_libp2p.strategy._nat import NatFacts, Verdict, possible
from kas_libp2p.transport.race import CIRCUITS, in_order
from kas_libp2p.units import milliseconds

PUBLIC_HEAD_START = 1.0
"""Seconds that a public peer's direct addresses have before a circuit is dialed: a lost SYN is sent again by then."""
LEAST_HEAD_START, MOST_HEAD_START = 0.05, 0.5
"""Seconds between which the head start of a direct dial before a punch lies: a round trip is that long."""
UNKNOWN_RTT = 0.3
"""Seconds that are assumed of a round trip through a relay that nobody has measured."""
QUIET_RTT = 0.05
"""Seconds of a round trip through a relay that nobody would notice: a block takes longer to verify."""
QUIET_RECHECK = 300.0
"""Seconds until a relayed connection that was good enough is looked at again."""
QUIET_MOMENT = 10.0
"""Seconds that a circuit has to live before an operator who prefers quiet has it made direct: visits are over then."""


class Way(StrEnum):
    """A kind of attempt."""

    DIRECT = "direct"
    RELAYED = "relayed"
    PUNCH = "punch"


@dataclass(frozen=True, slots=True)
class Attempt:
    """One of a plan.

    Attributes:
        way: see there.
        address: what is dialed; empty for a punch, which has many.
        start: seconds after the plan's beginning, at the latest: a dial starts as soon as the one before it has failed.
        reason: why at that time, in words.
    """

    way: Way
    address: str
    start: float
    reason: str


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be tried.

    Attributes:
        attempts: in the order of their starts.
        verdict: what the NATs allow, where that matters.
    """

    attempts: tuple[Attempt, ...]
    verdict: Verdict | None = None

    def of(self, way: Way) -> tuple[Attempt, ...]:
        """The attempts of one kind."""
        return tuple(each for each in self.attempts if each.way is way)

    def start_of(self, way: Way) -> float:
        """When the first attempt of a kind starts; infinite if there is none."""
        return min((each.start for each in self.of(way)), default=float("inf"))


@dataclass(frozen=True, slots=True)
class Known:
    """What is known of a peer.

    Attributes:
        addresses: the best first, direct ones and circuits; names are direct.
        role: whether everybody can dial it; ``None``: not known.
        relay_rtts: round trips to relays in seconds, as far as measured.
    """

    addresses: tuple[str, ...]
    role: Role | None = None
    relay_rtts: Mapping[PeerId, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Relayed:
    """What is known of a relayed connection that may become direct. We were called through the relay.

    Attributes:
        ours, theirs: what is known of the NATs; ``None``: they have not told.
        claimed: direct public addresses that the peer claims, at hosts where somebody else has seen it.
        rtt: of the circuit, in seconds; ``None``: not measured.
        direct_rtt: of an earlier direct connection with the peer; ``None``: there was none.
        seconds: how long the circuit has been up.
        predict, birthday: which techniques both sides have and agreed to.
    """

    ours: NatFacts
    theirs: NatFacts | None = None
    claimed: tuple[str, ...] = ()
    rtt: float | None = None
    direct_rtt: float | None = None
    seconds: float = 0.0
    predict: bool = True
    birthday: bool = False


class ConnectionStrategy:
    """Makes plans.

    Args:
        dial, punch: the settings.
    """

    def __init__(self, dial: DialConfig, punch: PunchConfig) -> None:
        self._dial = dial
        self._punch = punch

    def connect(self, known: Known) -> Plan:
        """How to reach a peer that is not connected.

        Raises:
            AddressError: an address is malformed.
        """
        delay, limit = self._dial.attempt_delay, self._dial.max_addresses
        direct = in_order(filterfalse(addr.is_relayed, known.addresses), limit)
        circuits = in_order(filter(addr.is_relayed, known.addresses), max(limit - len(direct), min(limit, CIRCUITS)))
        circuits.sort(key=lambda each: _relay_rtt(each, known.relay_rtts))
        del direct[limit - len(circuits) :]
        attempts = [
            Attempt(Way.DIRECT, str(each), index * delay, "IPv6 and IPv4 by turns") for index, each in enumerate(direct)
        ]
        head, reason = self._head_start(known, direct)
        attempts += [
            Attempt(Way.RELAYED, str(each), head + index * delay, reason) for index, each in enumerate(circuits)
        ]
        return Plan(tuple(sorted(attempts, key=lambda each: each.start)))

    def _head_start(self, known: Known, direct: Iterable[Multiaddr]) -> tuple[float, str]:
        if known.role is Role.PUBLIC:
            return PUBLIC_HEAD_START, "everybody can dial it"
        if known.role is Role.PRIVATE:
            return 0.0, "it is known to be private"
        if not any(addr.is_public(each) or addr.name_of(each) is not None for each in direct):
            return 0.0, "it has no public address"
        return self._dial.attempt_delay, "whether it can be dialed is not known"

    def upgrade(self, relayed: Relayed) -> Plan:
        """How to make a relayed connection direct. Without attempts if nothing can: the verdict says why."""
        verdict = possible(relayed.ours, relayed.theirs)
        attempts = [
            Attempt(Way.DIRECT, each, 0.0, "it says that it can be dialed there")
            for each in map(str, in_order(relayed.claimed, self._dial.max_addresses))
        ]
        if verdict.worth_trying(predict=relayed.predict, birthday=relayed.birthday):
            start, reason = 0.0, "nothing else is known to work"
            if attempts:
                rtt = UNKNOWN_RTT if relayed.rtt is None else relayed.rtt
                start, reason = min(max(rtt, LEAST_HEAD_START), MOST_HEAD_START), "a direct dial may be through by then"
            attempts.append(Attempt(Way.PUNCH, "", start, reason))
        return Plan(tuple(attempts), verdict)

    def leave_alone(self, relayed: Relayed) -> tuple[str, float]:
        """Why an operator who prefers quiet leaves a relayed connection as it is, and for how many seconds; empty if it
        is not left.
        """
        if not self._punch.quiet:
            return "", 0.0
        if relayed.seconds < QUIET_MOMENT:
            return "it may be gone in a moment", QUIET_MOMENT - relayed.seconds
        if relayed.rtt is not None and relayed.rtt <= QUIET_RTT:
            return f"the relay's {milliseconds(relayed.rtt * 1000)} are good enough", QUIET_RECHECK
        if relayed.rtt is not None and relayed.direct_rtt is not None and relayed.direct_rtt >= relayed.rtt:
            return f"the direct way was no shorter: {milliseconds(relayed.direct_rtt * 1000)}", QUIET_RECHECK
        return "", 0.0


def _relay_rtt(circuit: Multiaddr, rtts: Mapping[PeerId, float]) -> float:
    relay = addr.relay_of(circuit)
    return rtts.get(relay, UNKNOWN_RTT) if relay is not None else UNKNOWN_RTT
