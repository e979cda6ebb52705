"""How two bridges let their kaspads meet, as pure values: what the first messages say, who speaks first, who waits.

::

    opener's kaspad     opener's bridge                     acceptor's bridge     acceptor's kaspad
          │  <── gRPC ────── │                                     │                     │
          │ ─── Version ──>  │  ── hello, Version ───────────────> │                     │
          │                  │                                     │ ──── gRPC ────────> │
          │                  │                                     │ <─── Version ────── │
          │  <── Version ─── │ <──────────────── hello, Version ── │ ──── Version ─────> │
          │                  │          everything after that is carried both ways       │

A kaspad gives each source address two pending handshakes and thirty-two to all, and holds one for 4 s. So the side that
opened the overlay stream joins its kaspad first, as it knows that it wants to; the other side touches its own only when
the Version has arrived, and a stranger who opens streams and says nothing costs it nothing but a timer.

This module knows of Kaspa's messages what stands in Version and Reject, and the number of every other.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from enum import StrEnum

from kas_libp2p.errors import KaspaError, RemoteProtocolError
from kas_libp2p.kaspa._messages import CloseCode

# -- What the messages say ---------------------------------------------------------------------------------------------

REJECT = 22
VERSION = 20
VERACK = 19
READY = 50
RESPONSE_ID = 101
REQUEST_ID = 102

MAX_HANDSHAKE_MESSAGE = 64 * 1024
"""Bytes of a Version or Reject that we parse. A real one has some hundred; kaspad keeps 2048 of a reject's reason."""

MAX_TEXT = 256
"""Characters of a user agent, network or reason that we keep: kaspad's own limit of a user agent."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VersionInfo:
    """What a Version message tells of a node.

    Attributes:
        node_id: the node's id in the form that kaspad's RPC shows (a UUID); new at every start of the node.
        network: for instance ``kaspa-mainnet``.
        user_agent: for instance ``/kaspad:2.1.0/``; at most `MAX_TEXT` characters, printable.
        protocol_version: of the Kaspa P2P protocol.
    """

    node_id: str
    network: str
    user_agent: str
    protocol_version: int

    @property
    def version(self) -> str:
        """kaspad's own version from the user agent (``2.1.0``), or the whole agent where it has another form."""
        name, _, rest = self.user_agent.strip("/").partition(":")
        return rest.partition("/")[0].partition("(")[0] if name and rest else self.user_agent


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if at >= len(data) or shift > 63:
            raise RemoteProtocolError("a Kaspa message is no valid protobuf")
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7


def _fields(data: memoryview) -> list[tuple[int, int | memoryview]]:
    """The fields of a protobuf message, in order: numbers as ``int``, everything with a length as a view."""
    fields: list[tuple[int, int | memoryview]] = []
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        number, kind = key >> 3, key & 7
        if kind == 0:
            value, at = _varint(data, at)
            fields.append((number, value))
            continue
        if kind == 2:
            length, at = _varint(data, at)
        elif kind in (1, 5):
            length = 8 if kind == 1 else 4
        else:
            raise RemoteProtocolError("a Kaspa message is no valid protobuf")
        if length > len(data) - at:
            raise RemoteProtocolError("a Kaspa message is no valid protobuf")
        if kind == 2:
            fields.append((number, data[at : at + length]))
        at += length
    return fields


def payload_number(start: bytes | memoryview) -> int | None:
    """Which message this is, from its first bytes alone: the field number of ``KaspadMessage.payload``.

    Looks past the two request ids, and no further: ``None`` where another field, or nothing, comes first.
    """
    data = memoryview(start)
    at = 0
    try:
        for _ in range(3):
            if at >= len(data):
                return None
            key, at = _varint(data, at)
            number, kind = key >> 3, key & 7
            if number not in (RESPONSE_ID, REQUEST_ID):
                return number if kind == 2 else None
            if kind != 0:
                return None
            _, at = _varint(data, at)
    except RemoteProtocolError:
        return None
    return None


def _payload(message: bytes | memoryview, number: int) -> memoryview | None:
    if len(message) > MAX_HANDSHAKE_MESSAGE or payload_number(message) != number:
        return None
    body: memoryview | None = None
    for field, value in _fields(memoryview(message)):
        if field == number and isinstance(value, memoryview):
            body = value
    return body


def _text(value: int | memoryview | None) -> str:
    if not isinstance(value, memoryview):
        return ""
    text = bytes(value[: 4 * MAX_TEXT]).decode("utf-8", "replace")[:MAX_TEXT]
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def parse_version(message: bytes | memoryview) -> VersionInfo | None:
    """What a Version message says, or ``None`` if the message is another one.

    Raises:
        RemoteProtocolError: it is a Version, but malformed.
    """
    body = _payload(message, VERSION)
    if body is None:
        return None
    fields = dict(_fields(body))
    node_id = fields.get(5)
    if not isinstance(node_id, memoryview) or len(node_id) != 16:
        raise RemoteProtocolError("a Version without a node id of 16 bytes")
    number = fields.get(1, 0)
    return VersionInfo(
        node_id=str(uuid.UUID(bytes=bytes(node_id))),
        network=_text(fields.get(10)),
        user_agent=_text(fields.get(6)),
        protocol_version=number if isinstance(number, int) else 0,
    )


def parse_reject(message: bytes | memoryview) -> str | None:
    """The reason that a Reject message gives, or ``None`` if the message is another one, or unreadable."""
    try:
        body = _payload(message, REJECT)
        return None if body is None else _text(dict(_fields(body)).get(1))
    except RemoteProtocolError:
        return None


# -- How it ends -------------------------------------------------------------------------------------------------------


class End(StrEnum):
    """Why a peer is not joined, or no longer. The same words in events, status and on the terminal."""

    # Our kaspad could not be joined
    NOT_RUNNING = "kaspad not running"
    """Nothing listens at kaspad's address."""
    UNREACHABLE = "kaspad unreachable"
    """The system has no way there, or none from the source address that was asked for."""
    NO_SOURCE = "source address not usable"
    """The source address is not one of this machine's."""
    NOT_KASPAD = "not a kaspad"
    """Something else listens there."""
    KASPAD_SILENT = "kaspad silent"
    """It took the connection and did not say Version in time."""
    KASPAD_BUSY = "kaspad busy"
    """Too many pending handshakes (gRPC status 8) for as long as we could wait."""
    # A kaspad said no
    BANNED = "banned"
    DUPLICATE = "duplicate"
    LOOPBACK = "loopback"
    VERSION = "protocol version"
    NETWORK = "network"
    USER_AGENT = "user agent"
    REJECTED = "rejected"
    """For another reason, which the text tells."""
    # The peer
    PEER_SILENT = "peer silent"
    """No Version from the other side in time."""
    PEER_BUSY = "peer busy"
    PEER_KASPAD = "peer's kaspad unavailable"
    PEER_BROKE = "peer broke the protocol"
    PEER_CLOSED = "closed by the peer"
    PATH_HUNG = "path hung"
    """Nothing came although something was owed."""
    PATH_LOST = "path lost"
    # We
    BUSY = "busy"
    """Too many handshakes pending, or as many joined peers as are allowed."""
    REFUSED = "refused"
    """By our own lists."""
    KASPAD_CLOSED = "closed by kaspad"
    KASPAD_STUCK = "kaspad takes no data"
    DISCONNECTED = "disconnected"
    """By the operator."""
    SUPERSEDED = "superseded"
    """By another stream of the same peer."""
    STOPPED = "stopped"
    """This bridge is going away."""


class Side(StrEnum):
    """Who ended it."""

    KASPAD = "kaspad"
    PEER = "peer"
    US = "us"


TRANSIENT = frozenset(
    {
        End.NOT_RUNNING,
        End.KASPAD_SILENT,
        End.KASPAD_BUSY,
        End.PEER_SILENT,
        End.PEER_BUSY,
        End.PEER_KASPAD,
        End.PEER_CLOSED,
        End.PATH_HUNG,
        End.PATH_LOST,
        End.BUSY,
        End.KASPAD_CLOSED,
        End.KASPAD_STUCK,
        End.UNREACHABLE,
        End.DUPLICATE,
    }
)
"""Ends after which a new attempt may work without anybody having changed a setting."""


@dataclass(frozen=True, slots=True)
class Ended:
    """Why and by whom it ended.

    Attributes:
        reason: one of the known reasons.
        by: whose doing it was.
        text: kaspad's or the peer's own words, or what helps; may be empty.
    """

    reason: End
    by: Side
    text: str = ""

    @property
    def transient(self) -> bool:
        """Whether trying again later may work by itself."""
        return self.reason in TRANSIENT

    def __str__(self) -> str:
        return f"{self.reason}: {self.text}" if self.text else str(self.reason)


class JoinFailed(KaspaError):
    """A peer could not be joined to a kaspad; ``ended`` says why."""

    def __init__(self, ended: Ended) -> None:
        super().__init__(str(ended))
        self.ended = ended


_REJECTS = (
    ("DUPLICATE_CONNECTION", End.DUPLICATE),
    ("LOOPBACK_CONNECTION", End.LOOPBACK),
    ("peer is banned", End.BANNED),
    ("P2P protocol version mismatch", End.VERSION),
    ("Network mismatch", End.NETWORK),
    ("peer user agent rejected", End.USER_AGENT),
)


def reject_reason(text: str) -> End:
    """Which of the known reasons a kaspad's reject text stands for.

    The texts are kaspad 2.1.0's (``ProtocolError`` in kaspa-p2p-lib). A reject that answers a reject quotes it ("got
    reject message: …"), so the words count wherever they stand.
    """
    lowered = text.lower()
    return next((end for words, end in _REJECTS if words.lower() in lowered), End.REJECTED)


_CODES = {
    End.NOT_RUNNING: CloseCode.NO_KASPAD,
    End.UNREACHABLE: CloseCode.NO_KASPAD,
    End.NO_SOURCE: CloseCode.NO_KASPAD,
    End.NOT_KASPAD: CloseCode.NO_KASPAD,
    End.KASPAD_SILENT: CloseCode.NO_KASPAD,
    End.KASPAD_STUCK: CloseCode.STALLED,
    End.KASPAD_BUSY: CloseCode.BUSY,
    End.BUSY: CloseCode.BUSY,
    End.BANNED: CloseCode.REJECTED,
    End.VERSION: CloseCode.REJECTED,
    End.USER_AGENT: CloseCode.REJECTED,
    End.REJECTED: CloseCode.REJECTED,
    End.DUPLICATE: CloseCode.DUPLICATE,
    End.SUPERSEDED: CloseCode.DUPLICATE,
    End.LOOPBACK: CloseCode.LOOPBACK,
    End.NETWORK: CloseCode.NETWORK,
    End.PEER_SILENT: CloseCode.NO_VERSION,
    End.PEER_BROKE: CloseCode.PROTOCOL,
    End.PATH_HUNG: CloseCode.STALLED,
    End.REFUSED: CloseCode.REFUSED,
    End.STOPPED: CloseCode.GOING_AWAY,
    End.DISCONNECTED: CloseCode.GOING_AWAY,
}


def close_code(reason: End) -> CloseCode:
    """What the other bridge is told."""
    return _CODES.get(reason, CloseCode.ENDED)


def told_by_peer(code: int, text: str) -> Ended:
    """What the other bridge's CLOSE means here."""
    text = text[:MAX_TEXT]
    reasons = {
        CloseCode.BUSY: End.PEER_BUSY,
        CloseCode.DUPLICATE: End.DUPLICATE,
        CloseCode.LOOPBACK: End.LOOPBACK,
        CloseCode.NETWORK: End.NETWORK,
        CloseCode.NO_VERSION: End.PEER_SILENT,
        CloseCode.NO_KASPAD: End.PEER_KASPAD,
        CloseCode.REFUSED: End.REFUSED,
        CloseCode.STALLED: End.PATH_HUNG,
    }
    if code == CloseCode.REJECTED:
        return Ended(reject_reason(text), Side.PEER, text)
    try:
        reason = reasons.get(CloseCode(code), End.PEER_CLOSED)
    except ValueError:
        reason = End.PEER_CLOSED
    return Ended(reason, Side.PEER, text)
