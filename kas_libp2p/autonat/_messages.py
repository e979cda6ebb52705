"""The messages of AutoNAT v1 and v2 as values. No I/O.

What a peer sends is believed up to caps, and whatever its bytes are, decoding gives a value or `RemoteProtocolError`.

Left out by protobuf are zeros, as proto3 (which go and js use) never sends them: a v2 answer without a status is an
internal error, one without an index is about the first address. A status that we don't know reads as the same zero, so
it tells nothing, as the specification wants it.

Sources: libp2p specs ``autonat/autonat-v1.md`` and ``autonat/autonat-v2.md``; the schema is ``pb/autonat.proto``.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import TypeAlias

from google.protobuf.message import DecodeError

from kas_libp2p.errors import RemoteProtocolError
from kas_libp2p.framing import frame
from kas_libp2p.pb import autonat_pb2 as pb

V1 = "/libp2p/autonat/1.0.0"
DIAL_REQUEST = "/libp2p/autonat/2/dial-request"
DIAL_BACK = "/libp2p/autonat/2/dial-back"
STRANGER = "/kas-libp2p/autonat/stranger/1.0.0"
"""Asks a server to have another one dial back. The messages are those of v2; see `kas_libp2p.autonat.server`."""
STRANGER_DIAL = "/kas-libp2p/autonat/stranger-dial/1.0.0"
"""Asks a server to dial another peer back, which the address names. The messages are those of v2."""

MAX_MESSAGE = 8 * 1024
"""Bytes of one message that are read, as in go: 50 addresses, or 4 KiB of dial data and what another side adds."""
MAX_DIAL_BACK = 1024
"""Bytes of a dial-back that are read; it is a number."""
MAX_ADDRESSES = 50
"""Addresses of one request that are looked at, as in go."""
MAX_PIECE = 4096
"""Bytes of dial data in one message (specification)."""
MIN_PIECE = 100
"""Bytes of dial data that a message must bring, as in go: nearly empty ones would cost us, not the sender."""
MAX_TEXT = 256
"""Characters of a v1 server's words that are kept."""


class ResponseStatus(IntEnum):
    """How a v2 server answers a request."""

    E_INTERNAL_ERROR = 0
    E_REQUEST_REJECTED = 100
    E_DIAL_REFUSED = 101
    OK = 200


class DialStatus(IntEnum):
    """How the dial of a v2 server went."""

    UNUSED = 0
    E_DIAL_ERROR = 100
    E_DIAL_BACK_ERROR = 101
    OK = 200


class V1Status(IntEnum):
    """How a v1 server answers."""

    OK = 0
    E_DIAL_ERROR = 100
    E_DIAL_REFUSED = 101
    E_BAD_REQUEST = 200
    E_INTERNAL_ERROR = 300


@dataclass(frozen=True, slots=True)
class DialRequest:
    """v2: dial the first of these that you are willing to, and bring this number there.

    Attributes:
        addresses: multiaddrs as they came; at most `MAX_ADDRESSES`.
        nonce: 64 bits.
    """

    addresses: tuple[bytes, ...]
    nonce: int


@dataclass(frozen=True, slots=True)
class DialDataRequest:
    """v2: pay with so many bytes before the address with this index is dialed."""

    index: int
    size: int


@dataclass(frozen=True, slots=True)
class DialData:
    """v2: a piece of the payment."""

    data: bytes


@dataclass(frozen=True, slots=True)
class DialResponse:
    """v2: how it went. ``index`` and ``dial`` mean something only if ``status`` is OK."""

    status: ResponseStatus
    index: int = 0
    dial: DialStatus = DialStatus.UNUSED


V2Message: TypeAlias = DialRequest | DialDataRequest | DialData | DialResponse


@dataclass(frozen=True, slots=True)
class V1Dial:
    """v1: dial me at these.

    Attributes:
        peer: the multihash of the asker's peer id, as it says.
        addresses: multiaddrs as they came; at most `MAX_ADDRESSES`.
    """

    peer: bytes
    addresses: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class V1Response:
    """v1: how it went.

    Attributes:
        status: see `V1Status`.
        text: the server's words, made safe to show.
        address: which address was reached; empty if it did not say.
    """

    status: V1Status
    text: str = ""
    address: bytes = b""


def encode(message: V2Message) -> bytes:
    """A v2 message behind its length."""
    match message:
        case DialRequest(addresses, nonce):
            out = pb.V2(dialRequest=pb.DialRequest(addrs=addresses, nonce=nonce))
        case DialDataRequest(index, size):
            out = pb.V2(dialDataRequest=pb.DialDataRequest(addrIdx=index, numBytes=size))
        case DialData(data):
            out = pb.V2(dialDataResponse=pb.DialDataResponse(data=data))
        case DialResponse(status, index, dial):
            out = pb.V2(dialResponse=pb.DialResponse(status=status.name, addrIdx=index, dialStatus=dial.name))
    return frame(out.SerializeToString())


def decode(data: bytes) -> V2Message:
    """Read a v2 message.

    Raises:
        RemoteProtocolError: it is none.
    """
    try:
        message = pb.V2.FromString(data)
    except DecodeError:
        raise RemoteProtocolError("an AutoNAT message is no protobuf") from None
    match message.WhichOneof("msg"):
        case "dialRequest":
            request = message.dialRequest
            return DialRequest(tuple(request.addrs[:MAX_ADDRESSES]), request.nonce)
        case "dialDataRequest":
            return DialDataRequest(message.dialDataRequest.addrIdx, message.dialDataRequest.numBytes)
        case "dialDataResponse":
            return DialData(message.dialDataResponse.data)
        case "dialResponse":
            response = message.dialResponse
            return DialResponse(ResponseStatus(response.status), response.addrIdx, DialStatus(response.dialStatus))
    raise RemoteProtocolError("an AutoNAT message that holds nothing")


def encode_dial_back(nonce: int) -> bytes:
    """What the server brings to the address, behind its length."""
    return frame(pb.DialBack(nonce=nonce).SerializeToString())


def decode_dial_back(data: bytes) -> int:
    """The number that a server brought.

    Raises:
        RemoteProtocolError: it brought none.
    """
    try:
        return int(pb.DialBack.FromString(data).nonce)
    except DecodeError:
        raise RemoteProtocolError("a dial-back is no protobuf") from None


def encode_dial_back_response() -> bytes:
    """That the number has come, behind its length. The status is OK, the only one that there is."""
    return frame(pb.DialBackResponse(status=pb.DialBackResponse.OK).SerializeToString())


def check_dial_back_response(data: bytes) -> None:
    """Read the answer to a dial-back.

    Raises:
        RemoteProtocolError: it is none.
    """
    try:
        pb.DialBackResponse.FromString(data)
    except DecodeError:
        raise RemoteProtocolError("the answer to a dial-back is no protobuf") from None


def encode_v1(message: V1Dial | V1Response) -> bytes:
    """A v1 message behind its length."""
    if isinstance(message, V1Dial):
        peer = pb.V1.PeerInfo(id=message.peer, addrs=message.addresses)
        out = pb.V1(type=pb.V1.DIAL, dial=pb.V1.Dial(peer=peer))
    else:
        answer = pb.V1.DialResponse(
            status=message.status.name, statusText=message.text or None, addr=message.address or None
        )
        out = pb.V1(type=pb.V1.DIAL_RESPONSE, dialResponse=answer)
    return frame(out.SerializeToString())


def decode_v1(data: bytes) -> V1Dial | V1Response:
    """Read a v1 message.

    Raises:
        RemoteProtocolError: it is none.
    """
    try:
        message = pb.V1.FromString(data)
    except DecodeError:
        raise RemoteProtocolError("an AutoNAT message is no protobuf") from None
    if message.type == pb.V1.DIAL and message.HasField("dial"):
        peer = message.dial.peer
        return V1Dial(peer.id, tuple(peer.addrs[:MAX_ADDRESSES]))
    if message.type == pb.V1.DIAL_RESPONSE and message.HasField("dialResponse"):
        response = message.dialResponse
        if not response.HasField("status"):  # zero is OK here, and left out it must not pass for one
            raise RemoteProtocolError("an AutoNAT answer without a status that is known")
        text = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in response.statusText[:MAX_TEXT])
        return V1Response(V1Status(response.status), text, response.addr)
    raise RemoteProtocolError("an AutoNAT message that holds nothing")
