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
from collections import Counter
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
    PEER_STOPPED = "peer stopped"
    """Its bridge went away in order."""
    PEER_RESTARTED = "peer restarted"
    """Its bridge has started anew, and knows nothing of what was before."""
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
    PATH = "path"
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
        End.PEER_STOPPED,
        End.PEER_RESTARTED,
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
        CloseCode.STALLED: End.PEER_KASPAD,  # of a path that hangs nobody hears
    }
    if code == CloseCode.REJECTED:
        return Ended(reject_reason(text), Side.PEER, text)
    if code == CloseCode.GOING_AWAY and text == End.STOPPED:
        return Ended(End.PEER_STOPPED, Side.PEER)
    try:
        reason = reasons.get(CloseCode(code), End.PEER_CLOSED)
    except ValueError:
        reason = End.PEER_CLOSED
    return Ended(reason, Side.PEER, text)


_SESSION_ENDS = {
    "busy": End.PEER_BUSY,
    "refused": End.REFUSED,
    "stopped": End.PEER_STOPPED,
    "restarted": End.PEER_RESTARTED,
    "unknown": End.PEER_RESTARTED,
    "ended": End.PEER_CLOSED,
}
"""By the word of `kas_libp2p.events.SessionEnded`."""


def session_ended(code: str, by_peer: bool, text: str) -> Ended:
    """What the end of the session under a stream means.

    Args:
        code: why, in the word of `kas_libp2p.events.SessionEnded`.
        by_peer: whether the other side ended it.
        text: in words.
    """
    text = text[:MAX_TEXT]
    if code == "protocol":
        return Ended(End.PEER_CLOSED if by_peer else End.PEER_BROKE, Side.PEER, text)
    if code not in _SESSION_ENDS:
        return Ended(End.PATH_LOST, Side.PATH, text)
    reason = _SESSION_ENDS[code]
    if by_peer or reason is End.PEER_RESTARTED:
        return Ended(reason, Side.PEER, text)
    return Ended(End.REFUSED if reason is End.REFUSED else End.STOPPED, Side.US, text)


# -- Who waits for whom ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """Seconds that each step of a handshake may take. They fit inside one another, and inside kaspad's own 4 s.

    Attributes:
        opener_join: the opener's kaspad must have said Version. Below ``acceptor_wait``, or a busy kaspad on this side
            would look like a silent peer on the other.
        acceptor_wait: the acceptor cuts a stream that brings no Version.
        acceptor_join: the acceptor's kaspad must have said Version, counted from the peer's.
        opener_wait: the opener waits for the peer's Version, counted from its kaspad's, which ends the handshake
            itself after 4 s: the peer shall hear a reason, not a broken stream.
        slot_wait: an acceptor waits for a place among the pending handshakes before it answers busy.
    """

    opener_join: float = 1.2
    acceptor_wait: float = 1.5
    acceptor_join: float = 1.5
    opener_wait: float = 3.5
    slot_wait: float = 0.5


@dataclass(frozen=True, slots=True)
class JoinKaspad:
    """Dial our kaspad and take its Version; go on with `Meeting.on_kaspad_version`."""

    until: float


@dataclass(frozen=True, slots=True)
class TellPeer:
    """Send our kaspad's Version to the peer; go on with `Meeting.on_told`."""


@dataclass(frozen=True, slots=True)
class AwaitPeer:
    """Take the peer's Version; go on with `Meeting.on_peer_version` or `Meeting.on_timeout`."""

    until: float


@dataclass(frozen=True, slots=True)
class Carry:
    """Send the peer's Version to our kaspad, and ours to the peer if ``tell_peer``; then carry everything both ways."""

    tell_peer: bool


@dataclass(frozen=True, slots=True)
class GiveUp:
    """It does not work out."""

    ended: Ended


Step = JoinKaspad | TellPeer | AwaitPeer | Carry | GiveUp


class Meeting:
    """The order of one handshake, from our bridge's side. Each call gives the one thing to do next.

    Args:
        opener: whether this side opened the overlay stream.
        patience: the waits.
        network: our network, as far as it is known before our kaspad was asked; else empty.
        own_node: our kaspad's node id as last seen, or ``None``.

    Attributes:
        ours, theirs: what the two Versions said, once they came.
    """

    def __init__(self, *, opener: bool, patience: Patience, network: str = "", own_node: str | None = None) -> None:
        self._opener = opener
        self._patience = patience
        self._network = network
        self._own_node = own_node
        self._deadline = 0.0
        self.ours: VersionInfo | None = None
        self.theirs: VersionInfo | None = None

    def start(self, now: float) -> Step:
        if self._opener:
            return JoinKaspad(now + self._patience.opener_join)
        return AwaitPeer(now + self._patience.acceptor_wait)

    def on_hello(self, network: str) -> Step | None:
        """The peer's hello named its network, which may end it before any kaspad is touched."""
        if network and self._network and network != self._network:
            return GiveUp(_other_network(self._network, network))
        return None

    def on_kaspad_version(self, ours: VersionInfo, asked_at: float) -> Step:
        """Our kaspad said Version; its patience began at ``asked_at``."""
        self.ours = ours
        self._network = ours.network
        self._own_node = ours.node_id
        if self._opener:
            self._deadline = asked_at + self._patience.opener_wait
            return TellPeer()
        return self._check() or Carry(tell_peer=True)

    def on_told(self) -> Step:
        return AwaitPeer(self._deadline)

    def on_peer_version(self, theirs: VersionInfo, now: float, known: bool = False) -> Step:
        """The peer said Version.

        Args:
            known: whether a node of this id is joined already.
        """
        self.theirs = theirs
        if known:
            return GiveUp(Ended(End.DUPLICATE, Side.US, "this node is joined already, by another way"))
        refusal = self._check()
        if refusal is not None:
            return refusal
        if self._opener:
            return Carry(tell_peer=False)
        return JoinKaspad(now + self._patience.acceptor_join)

    def on_timeout(self) -> Step:
        """The peer's Version did not come in time."""
        waited = self._patience.opener_wait if self._opener else self._patience.acceptor_wait
        return GiveUp(Ended(End.PEER_SILENT, Side.PEER, f"no Version within {waited:g} s"))

    def _check(self) -> Step | None:
        assert self.theirs is not None
        if self._own_node == self.theirs.node_id:
            return GiveUp(Ended(End.LOOPBACK, Side.US, "the peer's node is our own"))
        if self._network and self.theirs.network != self._network:
            return GiveUp(_other_network(self._network, self.theirs.network))
        return None


def _other_network(ours: str, theirs: str) -> Ended:
    return Ended(End.NETWORK, Side.US, f"we are on {ours}, the peer is on {theirs}")


class Pending:
    """Handshakes that our kaspad has not finished: a place for each, within what kaspad grants.

    Args:
        in_all: places; kaspad has 32, and other peers of it want some.
        per_source: places for one source address; kaspad has 2.
        per_host: places for one remote host, so that one that makes up peers without end leaves some for others.
    """

    def __init__(self, *, in_all: int = 16, per_source: int = 2, per_host: int = 4) -> None:
        self._in_all = in_all
        self._per_source = per_source
        self._per_host = per_host
        self._by_source: Counter[str | None] = Counter()
        self._by_host: Counter[str] = Counter()
        self.count = 0

    def take(self, source: str | None, host: str | None = None) -> bool:
        """Take a place if there is one.

        Args:
            source: the address from which kaspad will see the peer.
            host: where the peer is; ``None`` if that is not known, or no matter.
        """
        full = self.count >= self._in_all or self._by_source[source] >= self._per_source
        if full or (host is not None and self._by_host[host] >= self._per_host):
            return False
        self.count += 1
        self._by_source[source] += 1
        if host is not None:
            self._by_host[host] += 1
        return True

    def give_back(self, source: str | None, host: str | None = None) -> None:
        """The handshake is over, one way or the other."""
        self.count -= 1
        self._by_source -= Counter([source])  # what is zero is forgotten
        self._by_host -= Counter([host] if host is not None else [])


def backoff(attempt: int) -> float:
    """Seconds before another try after status 8: 20 ms, doubling to 160 ms. A place is held for 3 ms as a rule."""
    return min(0.02 * float(2 ** min(attempt, 3)), 0.16)


class Rival(StrEnum):
    """What to do with a second stream of a peer that has one."""

    REFUSE = "refuse"
    """Keep the old one."""
    REPLACE = "replace"
    """End the old one and take the new."""


STALE_AFTER = 3.0
"""Seconds of silence after which a peer that comes again is believed to have lost its old stream."""


def choose(
    *,
    ours: str,
    theirs: str,
    old_opener: bool,
    new_opener: bool,
    old_pending: bool,
    silence: float,
    from_relay: bool = False,
) -> Rival:
    """Which of two streams of one peer stays. Both sides come to the same answer where both see the same.

    Args:
        ours, theirs: the peer ids.
        old_opener, new_opener: whether we opened the stream.
        old_pending: whether the old one's handshake is not finished.
        silence: seconds since anything came on the old one.
        from_relay: whether the old one goes through a relay, and the new one does not.
    """
    if from_relay:
        return Rival.REPLACE
    if old_pending and old_opener != new_opener:
        # Both opened at once: the stream that the smaller peer id opened stays.
        new_stays = (ours < theirs) == new_opener
        return Rival.REPLACE if new_stays else Rival.REFUSE
    return Rival.REPLACE if silence > STALE_AFTER else Rival.REFUSE
