"""The two messages of DCUtR as values. No I/O.

What a peer sends is believed up to caps, and whatever its bytes are, decoding gives a value or `RemoteProtocolError`.
Addresses that can't be read are passed over: a peer may list kinds that we don't know.

Source: libp2p specs ``relay/DCUtR.md``; the schema is ``pb/dcutr.proto``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from typing import TypeAlias

from google.protobuf.message import DecodeError

from kas_libp2p import addresses as addr
from kas_libp2p.errors import AddressError, RemoteProtocolError
from kas_libp2p.framing import frame
from kas_libp2p.pb import dcutr_pb2 as pb

PROTOCOL = "/libp2p/dcutr"
MAX_MESSAGE = 4096
"""Bytes of one message, without its length (specification)."""
MAX_LISTED = 32
"""Addresses of one message that are looked at; a host with many interfaces lists some twenty."""


@dataclass(frozen=True, slots=True)
class Connect:
    """Where its sender may be met.

    Attributes:
        addresses: as multiaddr texts, each once.
    """

    addresses: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Sync:
    """Now: who reads this dials, and who sent it does half a round trip later."""


Message: TypeAlias = Connect | Sync


def encode(message: Message) -> bytes:
    """A message as it goes over the wire, behind its length."""
    match message:
        case Connect(listed):
            addrs = [addr.parse(each).to_bytes() for each in listed]
            holepunch = pb.HolePunch(type=pb.HolePunch.CONNECT, addrs=addrs)
        case Sync():
            holepunch = pb.HolePunch(type=pb.HolePunch.SYNC)
    return frame(holepunch.SerializeToString())


def decode(data: bytes) -> Message:
    """Read a message, without its length.

    Raises:
        RemoteProtocolError: it is none.
    """
    try:
        message = pb.HolePunch.FromString(data)
    except DecodeError:
        raise RemoteProtocolError("a message of DCUtR is no protobuf") from None
    if message.type == pb.HolePunch.CONNECT:
        return Connect(_read(message.addrs))
    if message.type == pb.HolePunch.SYNC:
        return Sync()
    raise RemoteProtocolError("a message of DCUtR is neither CONNECT nor SYNC")


def _read(listed: Iterable[bytes]) -> tuple[str, ...]:
    found: dict[str, None] = {}
    for data in islice(listed, MAX_LISTED):
        try:
            found[addr.text_of(addr.parse(data))] = None
        except AddressError:
            continue
    return tuple(found)
