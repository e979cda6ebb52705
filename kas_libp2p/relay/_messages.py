"""The messages of circuit relay v2, hop and stop, as values. No I/O.

Decoding is total: whatever the bytes, it gives a value or raises `RemoteProtocolError`. What a message says that can be
left out is left out rather than refused: addresses that can't be read, a peer id that is none beside a status, numbers
of statuses and fields that we don't know. Zeros in a limit, and no limit at all, both mean that there is none.

Source: libp2p specs ``relay/circuit-v2.md``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum
from typing import TypeAlias

from google.protobuf.message import DecodeError

from kas_libp2p import addresses as addr
from kas_libp2p.errors import AddressError, RemoteProtocolError
from kas_libp2p.framing import frame
from kas_libp2p.metadata import PeerId
from kas_libp2p.pb import relay_pb2 as pb

HOP = "/libp2p/circuit/relay/0.2.0/hop"
"""Spoken to a relay: reserve, connect."""
STOP = "/libp2p/circuit/relay/0.2.0/stop"
"""Spoken by a relay to whom a circuit leads."""

MAX_MESSAGE = 4096
"""Bytes of one message, as everywhere."""
MAX_ADDRESSES = 16
"""Addresses of one message that are written or believed."""
_MAX_SECONDS, _MAX_BYTES = 2**32 - 1, 2**64 - 1


class Status(IntEnum):
    """How a request was answered; the name is what events and errors say."""

    UNUSED = 0
    """None, or one that we don't know."""
    OK = 100
    RESERVATION_REFUSED = 200
    RESOURCE_LIMIT_EXCEEDED = 201
    PERMISSION_DENIED = 202
    CONNECTION_FAILED = 203
    NO_RESERVATION = 204
    MALFORMED_MESSAGE = 400
    UNEXPECTED_MESSAGE = 401


@dataclass(frozen=True, slots=True)
class Limit:
    """What a relay allows one circuit.

    Attributes:
        seconds: how long it may last; ``None``: no limit.
        bytes: how many it may carry, in each direction by the specification, in both together as rust and js count;
            ``None``: no limit.
    """

    seconds: float | None = None
    bytes: int | None = None

    def __bool__(self) -> bool:
        return self.seconds is not None or self.bytes is not None


UNLIMITED = Limit()


@dataclass(frozen=True, slots=True)
class Peer:
    """A peer, and where the relay sees it.

    Attributes:
        addresses: multiaddrs as text; most relays tell none.
    """

    id: PeerId
    addresses: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Reservation:
    """A place that a relay keeps.

    Attributes:
        expire: seconds since the epoch, by the relay's clock.
        addresses: where the relay can be reached, its peer id included; multiaddrs as text.
        voucher: the relay's signature, see `kas_libp2p.relay._voucher`; ``None`` if it gave none, as rust.
    """

    expire: int
    addresses: tuple[str, ...] = ()
    voucher: bytes | None = None


@dataclass(frozen=True, slots=True)
class Reserve:
    """Hop: keep me a place."""


@dataclass(frozen=True, slots=True)
class Connect:
    """Hop: make a circuit to a peer. What addresses it may name are passed over: nobody is dialed for a circuit."""

    peer: PeerId


@dataclass(frozen=True, slots=True)
class HopStatus:
    """Hop: the relay's answer.

    Attributes:
        reservation: what was reserved; ``None`` for every other answer.
        limit: of each circuit, or of this one.
        peer: to whom the circuit leads; ``None`` if the relay does not say.
    """

    status: Status
    reservation: Reservation | None = None
    limit: Limit = UNLIMITED
    peer: Peer | None = None


@dataclass(frozen=True, slots=True)
class StopConnect:
    """Stop: a circuit from this peer is on this stream, if you take it."""

    source: Peer
    limit: Limit = UNLIMITED


@dataclass(frozen=True, slots=True)
class StopStatus:
    """Stop: whether the circuit is taken."""

    status: Status


HopMessage: TypeAlias = Reserve | Connect | HopStatus
StopMessage: TypeAlias = StopConnect | StopStatus


def encode_hop(message: HopMessage) -> bytes:
    """A hop message behind its length."""
    match message:
        case Reserve():
            return frame(pb.HopMessage(type=pb.HopMessage.RESERVE).SerializeToString())
        case Connect(peer):
            return frame(pb.HopMessage(type=pb.HopMessage.CONNECT, peer=_peer(Peer(peer))).SerializeToString())
        case HopStatus(status, reservation, limit, peer):
            answer = pb.HopMessage(
                type=pb.HopMessage.STATUS,
                status=status.name,
                limit=_limit(limit),
                peer=_peer(peer) if peer is not None else None,
            )
            if reservation is not None:
                answer.reservation.CopyFrom(
                    pb.Reservation(
                        expire=reservation.expire, addrs=_written(reservation.addresses), voucher=reservation.voucher
                    )
                )
                while answer.ByteSize() > MAX_MESSAGE and answer.reservation.addrs:
                    answer.reservation.addrs.pop()
            return frame(answer.SerializeToString())


def encode_stop(message: StopMessage) -> bytes:
    """A stop message behind its length."""
    match message:
        case StopConnect(source, limit):
            connect = pb.StopMessage(type=pb.StopMessage.CONNECT, peer=_peer(source), limit=_limit(limit))
            return frame(connect.SerializeToString())
        case StopStatus(status):
            answer = pb.StopMessage(type=pb.StopMessage.STATUS, status=status.name)
            return frame(answer.SerializeToString())


def decode_hop(data: bytes) -> HopMessage:
    """Read a hop message, without its length.

    Raises:
        RemoteProtocolError: it is no such message, or lacks what it can't do without.
    """
    try:
        message = pb.HopMessage.FromString(data)
    except DecodeError:
        raise RemoteProtocolError("a hop message is no protobuf") from None
    if not message.HasField("type"):
        raise RemoteProtocolError("a hop message says not what it is")
    if message.type == pb.HopMessage.RESERVE:
        return Reserve()
    if message.type == pb.HopMessage.CONNECT:
        return Connect(_read_peer(message.peer).id)
    reservation = None
    if message.HasField("reservation"):
        found = message.reservation
        voucher = found.voucher if found.HasField("voucher") else None
        reservation = Reservation(found.expire, _read_addresses(found.addrs), voucher)
    try:
        peer = _read_peer(message.peer) if message.HasField("peer") else None
    except RemoteProtocolError:
        peer = None
    return HopStatus(Status(message.status), reservation, _read_limit(message.limit), peer)


def decode_stop(data: bytes) -> StopMessage:
    """Read a stop message, without its length.

    Raises:
        RemoteProtocolError: it is no such message, or lacks what it can't do without.
    """
    try:
        message = pb.StopMessage.FromString(data)
    except DecodeError:
        raise RemoteProtocolError("a stop message is no protobuf") from None
    if not message.HasField("type"):
        raise RemoteProtocolError("a stop message says not what it is")
    if message.type == pb.StopMessage.CONNECT:
        return StopConnect(_read_peer(message.peer), _read_limit(message.limit))
    return StopStatus(Status(message.status))


def _peer(peer: Peer) -> pb.Peer:
    return pb.Peer(id=addr.peer_id_to_bytes(peer.id), addrs=_written(peer.addresses))


def _read_peer(peer: pb.Peer) -> Peer:
    try:
        return Peer(addr.peer_id_from_bytes(peer.id), _read_addresses(peer.addrs))
    except AddressError as error:
        raise RemoteProtocolError(f"the peer of a relay message: {error}") from None


def _limit(limit: Limit) -> pb.Limit | None:
    # To go, a connection is a limited one as soon as there is this field, whatever is in it.
    if not limit:
        return None
    seconds, size = limit.seconds or 0, limit.bytes or 0
    return pb.Limit(duration=math.ceil(min(seconds, _MAX_SECONDS)), data=min(size, _MAX_BYTES))


def _read_limit(limit: pb.Limit) -> Limit:
    return Limit(float(limit.duration) or None, limit.data or None)


def _written(texts: Iterable[str]) -> list[bytes]:
    return [addr.parse(text).to_bytes() for text in texts][:MAX_ADDRESSES]


def _read_addresses(listed: Iterable[bytes]) -> tuple[str, ...]:
    found: dict[str, None] = {}
    for data in listed:
        try:
            found[addr.text_of(addr.parse(data))] = None
        except AddressError:
            continue
        if len(found) == MAX_ADDRESSES:
            break
    return tuple(found)
