"""What peers tell one another of relays: the messages, whom to ask, and whom to answer. No I/O.

    asker                     peer
      | relays/1.0.0            |
      |  Request           ->   |   at most so many
      |   <-           Answer   |   who runs it and how many places it has left; relays that it knows

A node tells what it has seen for itself: of a relay on which it holds a place, or held one, where it has reached it.
Nothing that was only heard of is passed on. What the answer is worth is decided in `kas_libp2p.relay._pool`.

Each peer is asked soon after it has connected, as long as the pool has not enough to choose from, and again when there
are too few; never twice within `ASK_AGAIN`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from google.protobuf.message import DecodeError

from kas_libp2p import addresses as addr
from kas_libp2p._rates import Rates
from kas_libp2p.config import MAX_OPERATOR
from kas_libp2p.errors import AddressError, RemoteProtocolError
from kas_libp2p.framing import frame
from kas_libp2p.metadata import PeerId
from kas_libp2p.pb import relays_pb2 as pb
from kas_libp2p.relay._pool import Appetite, Dice, Told, network_of

RELAYS = "/kas-libp2p/relays/1.0.0"

MAX_RELAYS = 16
"""Relays in one answer."""
MAX_ADDRESSES = 2
"""Addresses of each: one of each IP version."""
MAX_MESSAGE = 8 * 1024
"""Bytes of one message that are read: an answer has 6.5 KiB at most, if every operator's name is as long as may be."""
MAX_FREE = 2**32 - 1
"""Places that can be told."""

JITTER = 5.0
"""Seconds within which a peer is asked that has connected, at random: everybody who was there comes back at once to a
relay that was restarted."""
ASK_AGAIN = 300.0
"""Seconds until a peer is asked again, at the least."""
ASK_PAUSE = 0.5
"""Seconds between two that are asked: a node that comes back to hundreds of peers has enough after a few."""

PEER_BURST, PEER_INTERVAL = 4, 60.0
"""Requests of one peer that are answered: it asks every five minutes, and a few times more if it is restarted."""
NETWORK_BURST, NETWORK_INTERVAL = 64, 1.0
"""Requests from one network, or through one relay."""
ALL_BURST, ALL_INTERVAL = 256, 0.1
"""Requests in all: an answer costs 1 ms at the most, so a hundredth of a core."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a peer tells.

    Attributes:
        operator: who runs the peer itself; empty if it does not say.
        free: places that it has left; ``None`` if it is no relay.
        relays: others that it knows, the best first; at most `MAX_RELAYS`.
    """

    operator: str = ""
    free: int | None = None
    relays: tuple[Told, ...] = ()


def origin_of(peer: PeerId, remote: str, relay: PeerId | None) -> str:
    """What peers have in common that may be one: a network; or the relay that they come through, as behind it anybody
    can be as many as he likes. Who is on this machine counts alone.

    Args:
        remote: its end of the connection.
        relay: which relay carries the connection.
    """
    return f"relay {relay}" if relay is not None else network_of(remote) or peer


# Messages


def encode_request(most: int = MAX_RELAYS) -> bytes:
    """Ask for at most so many relays, behind its length."""
    return frame(pb.Request(most=most).SerializeToString())


def decode_request(data: bytes) -> int:
    """How many relays are asked for; at most `MAX_RELAYS`.

    Raises:
        RemoteProtocolError: it is no request.
    """
    try:
        return min(pb.Request.FromString(data).most, MAX_RELAYS)
    except DecodeError:
        raise RemoteProtocolError("a request for relays is no protobuf") from None


def encode_answer(answer: Answer) -> bytes:
    """An answer behind its length."""
    relays = [
        pb.Relay(
            id=addr.peer_id_to_bytes(each.peer),
            addrs=[bytes(addr.parse(address)) for address in each.addresses[:MAX_ADDRESSES]],
            operator=each.operator.encode() or None,
            free=_free(each.free),
            age=min(max(round(each.age), 0), MAX_FREE),
        )
        for each in answer.relays[:MAX_RELAYS]
    ]
    out = pb.Answer(operator=answer.operator.encode() or None, free=_free(answer.free), relays=relays)
    return frame(out.SerializeToString())


def decode_answer(data: bytes) -> Answer:
    """Read an answer. A relay that is none is left out, and so is an address.

    Raises:
        RemoteProtocolError: it is no answer.
    """
    try:
        message = pb.Answer.FromString(data)
    except DecodeError:
        raise RemoteProtocolError("an answer about relays is no protobuf") from None
    relays = tuple(told for each in message.relays[:MAX_RELAYS] if (told := _told(each)) is not None)
    return Answer(_operator(message.operator), message.free if message.HasField("free") else None, relays)


def _told(relay: pb.Relay) -> Told | None:
    try:
        peer = addr.peer_id_from_bytes(relay.id)
    except AddressError:
        return None
    found = []
    for each in relay.addrs[:MAX_ADDRESSES]:
        try:
            found.append(str(addr.parse(each)))
        except AddressError:
            continue
    free = relay.free if relay.HasField("free") else None
    return Told(peer, tuple(found), _operator(relay.operator), free, float(relay.age))


def _operator(data: bytes) -> str:
    text = data[: 4 * MAX_OPERATOR].decode(errors="replace")[:MAX_OPERATOR]
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def _free(count: int | None) -> int | None:
    return None if count is None else min(max(count, 0), MAX_FREE)


# Asking


@dataclass(slots=True)
class _Peer:
    """One that can be asked, or was.

    Attributes:
        at: when it is its turn.
        fresh: whether it was not asked since it connected.
        here: whether it is connected.
        again_at: when it may be asked again.
    """

    at: float
    fresh: bool = True
    here: bool = True
    again_at: float = -math.inf


class Asking:
    """Whom to ask, and when.

    Args:
        dice: chance.

    Attributes:
        deadline: when to call `choose` again if nothing happens before.
    """

    def __init__(self, dice: Dice) -> None:
        self.deadline = math.inf
        self._dice = dice
        self._peers: dict[PeerId, _Peer] = {}
        self._last = -math.inf

    def met(self, peer: PeerId, now: float) -> None:
        """A peer is connected that answers."""
        known = self._peers.get(peer)
        soon = now + self._dice.uniform(0.0, JITTER)
        if known is None:
            self._peers[peer] = _Peer(soon)
        elif not known.here:
            known.here, known.fresh, known.at = True, True, max(known.again_at, soon)

    def gone(self, peer: PeerId, now: float) -> None:
        """It is connected no longer. That it was asked is remembered until it may be asked again."""
        if peer in self._peers:
            self._peers[peer].here = False
        for each in [each for each, known in self._peers.items() if not known.here and known.again_at <= now]:
            del self._peers[each]

    def may_ask(self, peer: PeerId, now: float) -> bool:
        """Whether it may be asked out of turn, as there is something else to do with it."""
        known = self._peers.get(peer)
        return known is None or known.again_at <= now

    def asked(self, peer: PeerId, now: float) -> None:
        """It is being asked."""
        self._last = now
        known = self._peers.setdefault(peer, _Peer(now))
        known.fresh = False
        known.at = known.again_at = now + ASK_AGAIN * self._dice.uniform(1.0, 1.2)

    def choose(self, appetite: Appetite, now: float) -> PeerId | None:
        """Whom to ask now, if anybody. Tell `asked`, and call it again."""
        self.deadline = math.inf
        if appetite is Appetite.NONE:
            return None
        wanted = [
            (not known.fresh, known.at, peer)
            for peer, known in self._peers.items()
            if known.here and (appetite is Appetite.HUNGRY or known.fresh)
        ]
        if not wanted:
            return None
        due = [each for each in wanted if each[1] <= now]
        if due and now >= self._last + ASK_PAUSE:
            return min(due)[2]
        self.deadline = max(self._last + ASK_PAUSE, min(at for _, at, _ in wanted))
        return None


# Answering


class Answering:
    """Whom to answer, and what."""

    def __init__(self) -> None:
        self._rates = (
            ("relays_per_peer", Rates(PEER_BURST, PEER_INTERVAL)),
            ("relays_per_network", Rates(NETWORK_BURST, NETWORK_INTERVAL)),
            ("relays_in_all", Rates(ALL_BURST, ALL_INTERVAL)),
        )

    def admit(self, peer: PeerId, origin: str, now: float) -> str | None:
        """Count a request. Returns the limit that forbids an answer, in which case nothing is counted."""
        keys = (peer, origin, None)
        for (name, rates), key in zip(self._rates, keys, strict=True):
            if not rates.allows(key, now):
                return name
        for (_, rates), key in zip(self._rates, keys, strict=True):
            rates.take(key, now)
        return None


def answer_to(asker: PeerId, most: int, known: tuple[Told, ...], *, operator: str, free: int | None) -> Answer:
    """What to tell: nobody needs to hear of itself, nor of who can't be reached.

    Args:
        most: relays that are asked for.
        known: what may be told, the best first.
        operator: who runs this node.
        free: places left here; ``None``: this is no relay.
    """
    others = tuple(each for each in known if each.peer != asker and each.addresses)
    return Answer(operator, free, others[:most])
