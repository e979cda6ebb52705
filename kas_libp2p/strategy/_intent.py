"""Upgrade intent: whether one side wants a relayed connection to become direct, and what it knows of its NAT. No I/O.

Spoken between nodes of this project, on the relayed connection, beside DCUtR, so that it costs no round trip:

- Who was called through the relay, and so invites to punches, opens a stream ``/kas-libp2p/upgrade/1.0.0`` in the same
  flight as its CONNECT, and tells its own `Intent`, which says yes.
- The other side answers with its own, and that is all. What it says may be yes, no, or later; a no, and what the two
  NATs show to be hopeless, end the punch before a packet was sent outside the circuit.

Whatever a peer sends gives a value or `RemoteProtocolError`. What it tells of its NAT is a claim: it decides what is
tried with that peer, and nothing else.

The schema is ``pb/upgrade.proto``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import TypeVar

from google.protobuf.message import DecodeError

from kas_libp2p.autonat._observed import Mapping
from kas_libp2p.autonat._roles import Filtering
from kas_libp2p.errors import RemoteProtocolError
from kas_libp2p.framing import frame
from kas_libp2p.pb import upgrade_pb2 as pb
from kas_libp2p.strategy._nat import MAX_SIGHTINGS, Nat, NatFacts, Ports, Sighting, Unsolicited

PROTOCOL = "/kas-libp2p/upgrade/1.0.0"
MAX_MESSAGE = 1024
"""Bytes of one message; a full one has some 250."""
MAX_REASON = 32
"""Characters of the word for why not."""
MAX_WAIT = 3600.0
"""Seconds that a peer may ask us to wait: it can always say so again."""
MAX_LIFETIME = 86400.0
"""Seconds of a mapping's lifetime that are believed; beyond, it makes no difference."""
MAX_AGE = 3600.0
"""Seconds of a sighting's age that are told."""


class Answer(StrEnum):
    """What one side wants."""

    YES = "yes"
    NO = "no"
    LATER = "later"


@dataclass(frozen=True, slots=True)
class Intent:
    """What one side tells the other.

    Attributes:
        answer: whether it wants to.
        reason: why not, in one word; empty with yes.
        wait: seconds until it may be asked again, with later.
        nat: what it knows of its NATs.
        shares_local: whether it tells its local addresses to a peer behind the same router, if the peer does, too.
        predicts: whether it dials guessed ports of a NAT that counts them up.
        birthday: whether it agrees to many ports being tried at once.
    """

    answer: Answer
    reason: str = ""
    wait: float = 0.0
    nat: NatFacts = field(default_factory=NatFacts)
    shares_local: bool = False
    predicts: bool = False
    birthday: bool = False


_ANSWERS = {pb.Intent.YES: Answer.YES, pb.Intent.NO: Answer.NO, pb.Intent.LATER: Answer.LATER}
_MAPPINGS = {
    pb.Nat.NONE: Mapping.NONE,
    pb.Nat.INDEPENDENT: Mapping.INDEPENDENT,
    pb.Nat.DEPENDENT: Mapping.DEPENDENT,
}
_PORTS = {
    pb.Nat.KEPT: Ports.KEPT,
    pb.Nat.CHANGED: Ports.CHANGED,
    pb.Nat.SEQUENTIAL: Ports.SEQUENTIAL,
    pb.Nat.BLOCK: Ports.BLOCK,
    pb.Nat.RANDOM: Ports.RANDOM,
}
_FILTERING = {pb.Nat.OPEN: Filtering.OPEN, pb.Nat.ADDRESS: Filtering.ADDRESS, pb.Nat.PORT: Filtering.PORT}
_UNSOLICITED = {pb.Nat.DROPPED: Unsolicited.DROPPED, pb.Nat.REFUSED: Unsolicited.REFUSED}

N = TypeVar("N")
T = TypeVar("T")


def _number(names: dict[N, T], value: T) -> N | None:
    return next((number for number, each in names.items() if each == value), None)


def encode(intent: Intent) -> bytes:
    """An intent as it goes over the wire, behind its length."""
    message = pb.Intent(
        answer=_number(_ANSWERS, intent.answer),
        reason=intent.reason[:MAX_REASON],
        wait_s=round(min(max(intent.wait, 0.0), MAX_WAIT)),
        v4=_encode_nat(intent.nat.v4),
        v6=_encode_nat(intent.nat.v6),
        shares_local=intent.shares_local,
        predicts=intent.predicts,
        birthday=intent.birthday,
    )
    return frame(message.SerializeToString())


def _encode_nat(nat: Nat | None) -> pb.Nat | None:
    if nat is None:
        return None
    return pb.Nat(
        mapping=_number(_MAPPINGS, nat.mapping),
        ports=_number(_PORTS, nat.ports),
        filtering=_number(_FILTERING, nat.filtering),
        unsolicited=_number(_UNSOLICITED, nat.unsolicited),
        lifetime_s=0 if nat.lifetime is None else max(1, round(min(nat.lifetime, MAX_LIFETIME))),
        sightings=[
            pb.Nat.Sighting(age_ms=round(1000 * min(max(each.age, 0.0), MAX_AGE)), port=each.port)
            for each in nat.sightings[-MAX_SIGHTINGS:]
        ],
    )


def decode(data: bytes) -> Intent:
    """Read an intent.

    Raises:
        RemoteProtocolError: it is none.
    """
    try:
        message = pb.Intent.FromString(data)
    except DecodeError:
        raise RemoteProtocolError("an upgrade intent is no protobuf") from None
    answer = _ANSWERS.get(message.answer)
    if answer is None:
        raise RemoteProtocolError("an upgrade intent that says neither yes nor no nor later")
    return Intent(
        answer=answer,
        reason="".join(each for each in message.reason[:MAX_REASON] if each.isalnum() or each in "_- "),
        wait=min(float(message.wait_s), MAX_WAIT),
        nat=NatFacts(
            _decode_nat(message.v4) if message.HasField("v4") else None,
            _decode_nat(message.v6) if message.HasField("v6") else None,
        ),
        shares_local=message.shares_local,
        predicts=message.predicts,
        birthday=message.birthday,
    )


def _decode_nat(nat: pb.Nat) -> Nat:
    ages = [Sighting(each.age_ms / 1000, each.port) for each in nat.sightings[-MAX_SIGHTINGS:]]
    return Nat(
        mapping=_MAPPINGS.get(nat.mapping, Mapping.UNKNOWN),
        ports=_PORTS.get(nat.ports, Ports.UNKNOWN),
        filtering=_FILTERING.get(nat.filtering, Filtering.UNKNOWN),
        unsolicited=_UNSOLICITED.get(nat.unsolicited, Unsolicited.UNKNOWN),
        lifetime=min(float(nat.lifetime_s), MAX_LIFETIME) or None,
        sightings=tuple(each for each in ages if each.port <= 65535),
    )
