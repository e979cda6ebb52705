"""identify 1.0.0: what peers tell one another about themselves, and how often. No I/O.

Telling
    One message, behind its length: our key, where we listen, what we serve, at which address we see the peer, who we
    are, and the addresses once more in a record that is signed with our key. Rust reads one message of at most 4096
    bytes; a longer one is sent as two, of which the second holds the signed record, as go does it.

Hearing
    Messages until the peer ends the stream, at most 10 of 8 KiB (go's limits), merged as protobuf merges: lists grow,
    single values are replaced. What can't be true of the peer makes the whole of it worthless and is the peer's fault:
    another key, more protocols than any honest peer has, a text that is too long. A signed record that does not verify,
    or is of another peer, costs the peer its addresses, as in go, and is counted. Without a record the addresses count
    as unsigned. Addresses that we can't read are skipped: others know transports that we don't.

Pushing
    A change is pushed when nothing has changed for a second, but not later than some seconds after the first change,
    and not sooner after the last push than go lets a peer push. What a peer pushes is limited in the same way.

Sources: libp2p specs ``identify/README.md``, RFC 0002 and 0003.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from google.protobuf.message import DecodeError
from multiaddr import Multiaddr

from kas_libp2p import addresses as addr
from kas_libp2p.errors import AddressError, RemoteProtocolError, SecurityError
from kas_libp2p.framing import FrameDecoder, frame
from kas_libp2p.identity import MAX_PUBLIC_KEY_BYTES, Identity, open_envelope, peer_id_of, seal_envelope
from kas_libp2p.metadata import PeerId
from kas_libp2p.pb import identify_pb2 as pb

ID = "/ipfs/id/1.0.0"
PUSH = "/ipfs/id/push/1.0.0"

MAX_MESSAGE = 8 * 1024
"""Bytes of one message that are read."""
MAX_MESSAGES = 10
MAX_SENT = 4096
"""Bytes of one message that rust reads."""
MAX_PROTOCOLS = 512
"""Protocols of one peer; go, rust and js list 10 to 40."""
MAX_PROTOCOL_LENGTH = 256
MAX_ADDRESSES = 64
"""Addresses of one peer that are kept; it may list more."""
MAX_OWN_ADDRESSES = 16
"""Addresses that we tell: nobody tries more, and the message stays below `MAX_SENT`."""
MAX_TEXT = 256
"""Characters of agent and protocol version."""

RECORD_DOMAIN = "libp2p-peer-record"
RECORD_TYPE = b"\x03\x01"
RUST_RECORD_DOMAIN = "libp2p-routing-state"
RUST_RECORD_TYPE = b"/libp2p/routing-state-record"
"""rust-libp2p (up to 0.57 at least) seals the same record under names of its own, and passes over records in the
specified form. Both forms are believed; ours is the specified one, and rust then takes the addresses beside it."""

PUSH_BURST, PUSH_INTERVAL = 10, 5.0
"""Pushes of one peer at once, and seconds for each one beyond; go's limits, which we keep to and hold others to."""
QUIET = 1.0
"""Seconds without a change before it is pushed (js: 1 s): listeners come up one after the other."""
LONGEST_WAIT = 5.0
"""Seconds after the first change when it is pushed although more changes come."""


@dataclass(frozen=True, slots=True)
class PeerInfo:
    """What a peer told about itself.

    Attributes:
        peer: who.
        agent, protocol_version: as it calls itself; characters that could disturb a terminal are replaced.
        protocols: what it serves, sorted.
        addresses: where it says it can be reached, without its peer id.
        observed: our address as the peer sees it; ``None`` if it told none.
        signed: whether the addresses come from a record that it signed.
        seq: the record's sequence number, 0 without one.
    """

    peer: PeerId
    agent: str
    protocol_version: str
    protocols: tuple[str, ...]
    addresses: tuple[str, ...]
    observed: str | None
    signed: bool
    seq: int


class Hearing:
    """Takes what a peer sends on one stream.

    Args:
        peer: its proven id.
        public_key: its proven key.
    """

    def __init__(self, peer: PeerId, public_key: bytes) -> None:
        self._peer = peer
        self._public_key = public_key
        self._decoder = FrameDecoder(MAX_MESSAGE)
        self._message = pb.Identify()
        self._count = 0

    def receive(self, data: bytes) -> None:
        """Take bytes.

        Raises:
            RemoteProtocolError: too many or too large messages, or no protobuf.
        """
        self._decoder.feed(data)
        for message in self._decoder:
            self._count += 1
            if self._count > MAX_MESSAGES:
                raise RemoteProtocolError(f"more than {MAX_MESSAGES} identify messages")
            try:
                self._message.MergeFromString(message)
            except DecodeError:
                raise RemoteProtocolError("an identify message is no protobuf") from None

    def finish(self) -> tuple[PeerInfo, str | None]:
        """The peer ended the stream.

        Returns:
            what it told, and what was wrong with its signed record, if something was.

        Raises:
            RemoteProtocolError: it told nothing, or something that can't be true.
        """
        if not self._count or self._decoder.pending:
            raise RemoteProtocolError("identify ended before a whole message had come")
        message = self._message
        self._check_key(message.publicKey)
        protocols = list(message.protocols)
        if len(protocols) > MAX_PROTOCOLS:
            raise RemoteProtocolError(f"{len(protocols)} protocols, at most {MAX_PROTOCOLS} are believed")
        if any(len(protocol) > MAX_PROTOCOL_LENGTH for protocol in protocols):
            raise RemoteProtocolError(f"a protocol id of more than {MAX_PROTOCOL_LENGTH} characters")
        fault = None
        seq = 0
        listed: Iterable[bytes] = message.listenAddrs
        if message.signedPeerRecord:
            try:
                seq, listed = open_record(message.signedPeerRecord, self._peer)
            except SecurityError as error:
                fault, listed = str(error), ()
        info = PeerInfo(
            peer=self._peer,
            agent=_shown(message.agentVersion),
            protocol_version=_shown(message.protocolVersion),
            protocols=tuple(sorted(set(protocols))),
            addresses=_read_addresses(listed, self._peer),
            observed=_read_observed(message.observedAddr),
            signed=bool(message.signedPeerRecord) and fault is None,
            seq=seq,
        )
        return info, fault

    def _check_key(self, key: bytes) -> None:
        if not key or key == self._public_key:
            return
        if len(key) > MAX_PUBLIC_KEY_BYTES:
            raise RemoteProtocolError(f"a public key of {len(key)} bytes")
        if peer_id_of(key) != self._peer:
            raise RemoteProtocolError("the public key of another peer")


def statement(
    identity: Identity,
    *,
    agent: str,
    protocol_version: str,
    protocols: Sequence[str],
    listen: Sequence[Multiaddr],
    seq: int,
    observed: str | None,
    record: bytes | None = None,
) -> bytes:
    """What we tell a peer, ready to be sent.

    Args:
        listen: our addresses for this peer, without our peer id; the first `MAX_OWN_ADDRESSES` are told.
        seq: sequence number of the signed record; larger after each change.
        observed: the peer's address as we see it.
        record: the signed record of exactly these addresses, if it was made before.
    """
    listen = listen[:MAX_OWN_ADDRESSES]
    record = record if record is not None else seal_record(identity, listen, seq)
    message = pb.Identify(
        publicKey=identity.public_key,
        listenAddrs=[address.to_bytes() for address in listen],
        protocols=list(protocols),
        protocolVersion=protocol_version,
        agentVersion=agent,
    )
    if observed is not None:
        message.observedAddr = addr.parse(observed).to_bytes()
    whole = pb.Identify(signedPeerRecord=record)
    whole.MergeFrom(message)
    if whole.ByteSize() <= MAX_SENT:
        return frame(whole.SerializeToString())
    return frame(message.SerializeToString()) + frame(pb.Identify(signedPeerRecord=record).SerializeToString())


def seal_record(identity: Identity, listen: Iterable[Multiaddr], seq: int) -> bytes:
    """A peer record in a signed envelope (RFC 0003)."""
    record = pb.PeerRecord(peer_id=addr.peer_id_to_bytes(identity.peer_id), seq=seq)
    for address in listen:
        record.addresses.add(multiaddr=address.to_bytes())
    return seal_envelope(identity, RECORD_DOMAIN, RECORD_TYPE, record.SerializeToString())


def open_record(data: bytes, peer: PeerId) -> tuple[int, list[bytes]]:
    """Verify the signed record of a peer.

    Returns:
        Sequence number and addresses.

    Raises:
        SecurityError: it is malformed or forged, or another peer's.
    """
    try:
        key, payload = open_envelope(data, RECORD_DOMAIN, RECORD_TYPE)
    except SecurityError as error:
        try:
            key, payload = open_envelope(data, RUST_RECORD_DOMAIN, RUST_RECORD_TYPE)
        except SecurityError:
            raise error from None
    if peer_id_of(key) != peer:
        raise SecurityError("the peer record is signed by another peer")
    try:
        record = pb.PeerRecord.FromString(payload)
    except DecodeError:
        raise SecurityError("the peer record is malformed") from None
    if record.peer_id != addr.peer_id_to_bytes(peer):
        raise SecurityError("the peer record is about another peer")
    return record.seq, [each.multiaddr for each in record.addresses]


def for_remote(listen: Iterable[Multiaddr], remote: str) -> list[Multiaddr]:
    """Of our addresses those that mean something where the peer is.

    A peer on this machine is told all; one in our site the private and public ones; one on the internet the public.
    Relayed addresses are judged by their relay.
    """
    if addr.is_loopback(remote):
        return list(listen)
    wanted = [address for address in listen if not addr.is_loopback(address)]
    if addr.is_private(remote):
        return wanted
    return [address for address in wanted if addr.is_public(address)]


def _read_addresses(listed: Iterable[bytes], peer: PeerId) -> tuple[str, ...]:
    found: dict[str, None] = {}
    for data in listed:
        if len(found) >= MAX_ADDRESSES:
            break
        try:
            address = addr.parse(data)
            owner = addr.peer_of(address)
            if owner not in (None, peer) or addr.is_wildcard(address):
                continue
            found[addr.text_of(addr.without_peer(address))] = None
        except AddressError:
            continue
    return tuple(found)


def _read_observed(data: bytes) -> str | None:
    if not data:
        return None
    try:
        return addr.text_of(addr.without_peer(addr.parse(data)))  # js names us at its end
    except AddressError:
        return None


def _shown(text: str) -> str:
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text[:MAX_TEXT])


class PushPlan:
    """When a change of ours is pushed.

    Rules: see the module. `next_deadline` is infinity while there is nothing to push.
    """

    def __init__(self) -> None:
        self._first: float | None = None
        self._latest = 0.0
        self._allowance = Allowance()

    def changed(self, now: float) -> None:
        """Something that peers are told has changed."""
        self._first = now if self._first is None else self._first
        self._latest = now

    def next_deadline(self, now: float) -> float:
        """When to call `on_timeout`."""
        if self._first is None:
            return float("inf")
        return max(min(self._latest + QUIET, self._first + LONGEST_WAIT), self._allowance.next_at(now))

    def on_timeout(self, now: float) -> bool:
        """Returns whether to push now."""
        if self._first is None or now < self.next_deadline(now):
            return False
        self._first = None
        return self._allowance.take(now)


class Allowance:
    """A token bucket: `PUSH_BURST` at once, then one per `PUSH_INTERVAL`."""

    __slots__ = ("_at", "_level")

    def __init__(self) -> None:
        self._level = float(PUSH_BURST)
        self._at = float("-inf")

    def take(self, now: float) -> bool:
        """Take one, if there is one."""
        self._refill(now)
        if self._level < 1:
            return False
        self._level -= 1
        return True

    def next_at(self, now: float) -> float:
        """When `take` succeeds again; minus infinity if it does now."""
        self._refill(now)
        return float("-inf") if self._level >= 1 else now + (1 - self._level) * PUSH_INTERVAL

    def _refill(self, now: float) -> None:
        if self._at > float("-inf"):
            self._level = min(float(PUSH_BURST), self._level + (now - self._at) / PUSH_INTERVAL)
        self._at = now
