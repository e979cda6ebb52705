"""TCP simultaneous open: which address is dialed when, and what each outcome means. No I/O.

Both sides dial each other from their listen ports at one instant, with the listeners open. What can come of a dial:

- It connects: the SYNs crossed, or the other side's listener took it.
- It is refused, by a reset or an ICMP error: our SYN came before the other side had sent its own, and its NAT answers
  strangers. It is dialed again after a short rest that both sides draw anew; with a fixed one they would stay in step.
- The four numbers are taken (EADDRNOTAVAIL): the other side's SYN was first, and is with our listener, or will be in a
  moment. Nothing leaves then, so asking again costs nothing, and finds out if that came to nothing.
- Nothing: its NAT drops strangers. The SYN stays under way, and the system sends it again. It must not be given up for
  a new one: the NATs remember its sequence number, and drop what does not follow it.

Refused or not, the other side may still come in, so a punch goes on until its window ends, unless there is no address
left from which it could.

Source: RFC 9293 section 3.5 (simultaneous open), RFC 5382 section 4; what NATs do was measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass

from multiaddr import Multiaddr

from kas_libp2p import addresses
from kas_libp2p.errors import PunchOutcome

WINDOW = 2.5
"""Seconds for a punch. A SYN that was lost is sent again after 1 s; to connect takes one round trip and the handshake
two: at 400 ms each that is 2.2 s. `DEADLOCK` on a round trip of that length ends just in time."""
GRACE = 0.8
"""Seconds for which the responder goes on when the window ends in a handshake that the other side has begun: two round
trips of 400 ms. That side has the connection once it has been answered, which we know half a round trip later."""
SHARE = 0.05
"""Of a round trip: how long, at most and at random, a refused target rests before it is dialed again. Two SYNs cross if
they leave within half a round trip, so with hardly a rest there is always one under way when the other's comes. It is
drawn anew each time, or two sides at the very edge would stay there. Measured with both NATs answering resets and one
side 30 ms late, at a round trip of 50 ms: 95 of 100 are verified within 0.17 s, with rests of 10 to 100 ms 0.5 s."""
BY_ICMP = frozenset({"EHOSTUNREACH", "ENETUNREACH"})
"""Answers after which there is no rest at all. Our own NAT still waits for the other side then, so a SYN of theirs gets
through to our listener, whose answer the NAT drops, as it is none to our SYN. That can't be undone. Routers send few
ICMP errors in a row, so this is over soon."""
SOONEST = 0.008
"""Seconds from one dial to the next at least, give or take half: near hosts need not be asked a thousand times a
second."""
QUICK_DIALS = 32
"""Dials of a target, half of its share at most, with such short rests; then there are long ones, for a peer that is
late."""
AGAIN = (0.01, 0.1)
"""Seconds of a long rest, at random."""
LOOK_AGAIN = 0.1
"""Seconds after which a target whose four numbers were taken is tried again: nothing is sent if they still are."""
DEADLOCK = 1.5
"""Seconds for which the responder waits to be spoken to on a connection that it dialed, before it speaks first itself.
The other side may have accepted it for an ordinary one, and wait likewise (rust-libp2p, where the NAT of the responder
changes ports). Longer than a SYN-ACK that is lost and sent again after 1 s, and two round trips of 200 ms."""
SILENCE = 0.04
"""Seconds for which the initiator listens on a connection that it accepted, before it speaks first. Whoever means to
speak first does so right behind the last segment of TCP's handshake, which takes a busy machine some milliseconds."""
AT_ONCE = 0.0005
"""Seconds for which the initiator listens on a connection that it dialed: one look. The other side is to be silent."""
GREETED = 0.5
"""Seconds for whoever has only greeted to go on, from when we have greeted as well: a round trip of nearly any path."""
MAX_TARGETS = 64
"""Targets of one punch: a handful of real ones and a window of predicted ports. Each takes a socket."""
MANY_TARGETS = 576
"""The same where both sides agreed to try many ports: half a thousand at a NAT that draws from all (measured: 17 of 20
with 256 sockets at the other side), and the rest."""
MAX_DIALS = 256
"""Dials of one punch, shared out evenly: one target of eight gets 32."""
UNTRUSTED_DIALS = 4
"""Dials of one punch to all untrusted targets together, each of one SYN: whoever they lead to has not asked for it."""
UNTRUSTED_PATIENCE = 0.5
"""Seconds until an untrusted dial is given up, and not made again: long enough for nearly any path, and well before the
system sends the SYN a second time, after 1 s."""
TAKEN = "EADDRNOTAVAIL"
IMPOSSIBLE = "impossible"
UNANSWERED = "unanswered"
OTHER_PEER = "other_peer"


@dataclass(frozen=True, slots=True)
class Target:
    """One address at which a peer may be met.

    Attributes:
        address: ``/ip4|ip6/…/tcp/…``; a ``/p2p`` at its end is ignored.
        trusted: whether somebody else than the peer saw it there. All others together get a few SYNs, whatever happens,
            as a peer could name a stranger's address.
        local: whether both sides agreed to meet in a network of ours, and the address is in it: it may be private.
        source: 0: it is dialed from the listen port. Each other number is a port that nobody knows: where our NAT draws
            its ports, each is one more that the peer may hit.
    """

    address: Multiaddr
    trusted: bool = True
    local: bool = False
    source: int = 0


def sift(
    targets: Iterable[Target],
    *,
    own: Collection[str] = (),
    allow_private: bool = False,
    gate: Callable[[str], str | None] = lambda ip: None,
    most: int = MAX_TARGETS,
) -> tuple[list[Target], list[PunchOutcome]]:
    """Which targets may be dialed, whoever names them, and why the others may not, in one word each.

    Args:
        own: our own addresses, as texts without a peer id.
        allow_private: for laboratories: private addresses may be dialed.
        gate: asked last, about the IP; returns why not.
        most: how many.

    Returns:
        What to dial, without duplicates (trusted if one is); and what not, at most `MAX_TARGETS`.
    """
    kept: dict[tuple[tuple[str, int], int], Target] = {}
    refused: list[PunchOutcome] = []
    for target in targets:
        where = addresses.ip_port(target.address)
        why = "not_tcp" if where is None else _forbidden(*where, own, target.local or allow_private) or gate(where[0])
        if where is not None and why is None:
            key = where, target.source
            if key in kept or len(kept) < most:
                known = kept.setdefault(key, target)
                if target.trusted and not known.trusted:
                    kept[key] = target
                continue
            why = "too_many"
        if len(refused) < MAX_TARGETS:
            refused.append(PunchOutcome(str(target.address), 0, why or "", 0.0))
    return list(kept.values()), refused


def _forbidden(ip: str, port: int, own: Collection[str], private: bool) -> str | None:
    if port < addresses.LEAST_PORT:
        return "port"
    if addresses.ip_port_text(ip, port) in own:
        return "own"
    if addresses.is_public(ip):
        return None
    if addresses.is_loopback(ip):
        return "loopback"
    if addresses.is_multicast(ip):
        return "multicast"
    if addresses.is_private(ip):
        return None if private else "private"
    return "reserved"


@dataclass(frozen=True, slots=True)
class Dial:
    """A dial to begin now.

    Attributes:
        number: of the target.
        address: where to.
        elsewhere: whether from a port that nobody knows, and not from the listen port.
        attempt: counts the dials to this target, from 1.
        patience: seconds until it has to be given up.
    """

    number: int
    address: Multiaddr
    elsewhere: bool
    attempt: int
    patience: float


@dataclass(slots=True)
class _State:
    """A target.

    Attributes:
        next: when it is dialed; ``None``: not before something changes.
        left: dials that it may have.
        since: when it was dialed last.
        held: connections from exactly there that our listener accepted and that are in their handshakes.
        dead: whether nothing can be sent there, and so nothing can come from there.
        reason, ended: the last outcome, and when that was.
    """

    target: Target
    next: float | None
    left: int
    dials: int = 0
    since: float = 0.0
    held: int = 0
    dead: bool = False
    reason: str = ""
    ended: float = 0.0


class Machine:
    """One punch.

    Args:
        targets: where the peer may be met, as `sift` has kept them.
        at: when dialing starts, in seconds of any clock.
        window: seconds from then on until it ends.
        uniform: returns a random number between two.

    Attributes:
        at, until: when it starts and ends.
    """

    def __init__(
        self, targets: Sequence[Target], *, at: float, window: float, uniform: Callable[[float, float], float]
    ) -> None:
        self.at = at
        self.until = at + window
        self._uniform = uniform
        self._share = max(1, MAX_DIALS // max(1, len(targets)))
        self._states = [_State(each, at, self._share) for each in targets]
        known = [(number, each) for number, each in enumerate(targets) if not each.source]
        self._numbers = {addresses.ip_port(each.address): number for number, each in known}
        self._hosts = {addresses.subnet_key(each.address) for each in targets}
        self._untrusted_left = UNTRUSTED_DIALS

    def expects(self, ip: str) -> bool:
        """Whether the peer may come from there. A host has many addresses in its IPv6 /64."""
        return addresses.subnet_key(ip) in self._hosts

    def is_target(self, ip: str, port: int) -> bool:
        """Whether it is exactly what is dialed."""
        return (ip, port) in self._numbers

    @property
    def hopeless(self) -> bool:
        """Whether the peer can neither be reached nor come in from any target."""
        return all(each.dead for each in self._states)

    def due(self, now: float) -> list[Dial]:
        """The dials to begin now. Each that does not end the punch is followed by `failed` or `impossible`."""
        dials: list[Dial] = []
        if now >= self.until:
            return dials
        for number, state in enumerate(self._states):
            if state.next is None or state.next > now or state.held:
                continue
            state.next = None
            target, trusted = state.target, state.target.trusted
            if not state.left or not (trusted or self._untrusted_left):
                state.reason = state.reason or "budget"
                continue
            state.left -= 1
            state.dials += 1
            state.since = now
            self._untrusted_left -= not trusted
            patience = math.inf if trusted else UNTRUSTED_PATIENCE
            dials.append(Dial(number, target.address, bool(target.source), state.dials, patience))
        return dials

    def wake_at(self) -> float:
        """When `due` has to be asked again."""
        return min([self.until, *(each.next for each in self._states if each.next is not None and not each.held)])

    def failed(self, dial: Dial, reason: str, now: float) -> bool:
        """A dial came to nothing.

        Args:
            reason: the system's name of the error; `UNANSWERED`: it was given up; the stage of the handshake at which
                the connection failed; or `OTHER_PEER`.

        Returns:
            whether that is news: not if the four numbers are still taken.
        """
        state = self._states[dial.number]
        news = state.reason != reason or reason != TAKEN
        state.reason, state.ended = reason, now
        if reason == TAKEN:  # nothing was sent
            state.next = now + LOOK_AGAIN
            state.left += 1
            state.dials -= 1
            self._untrusted_left += not state.target.trusted
        elif reason not in (UNANSWERED, OTHER_PEER):
            rest = self._uniform(*AGAIN)
            if state.dials <= min(QUICK_DIALS, self._share // 2):
                took = now - state.since
                rest = max(self._uniform(SHARE / 10, SHARE) * took, self._uniform(SOONEST / 2, SOONEST) - took)
                if reason in BY_ICMP:
                    rest = 0.0
            state.next = now + rest
        return news

    def impossible(self, dial: Dial, now: float) -> None:
        """Nothing can be sent there, as there is no route, or no listener of ours that could send it."""
        state = self._states[dial.number]
        state.dead = True
        state.reason, state.ended = IMPOSSIBLE, now

    def accepted(self, ip: str, port: int) -> None:
        """Our listener has a connection from there."""
        number = self._numbers.get((ip, port))
        if number is not None:
            self._states[number].held += 1

    def released(self, ip: str, port: int, reason: str, now: float) -> None:
        """That connection failed at a stage of its handshake."""
        number = self._numbers.get((ip, port))
        if number is not None:
            state = self._states[number]
            state.held -= 1
            state.reason, state.ended = reason, now
            if state.next is not None:
                state.next = max(state.next, now + self._uniform(*AGAIN))

    def outcomes(self, now: float) -> tuple[PunchOutcome, ...]:
        """What came of each target."""
        return tuple(
            PunchOutcome(
                address=str(each.target.address),
                dials=each.dials,
                reason=each.reason or (UNANSWERED if each.dials else "not dialed"),
                seconds=max(0.0, (each.ended if each.reason else now) - self.at) if each.dials else 0.0,
            )
            for each in self._states
        )
