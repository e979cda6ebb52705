"""Joins remote peers to a kaspad that only listens: as its HTTP/2 client, one source address per peer.

`Joiner.carry` takes an overlay stream and does the rest: shakes hands in the right order, carries whole messages both
ways, and says in the end why it ended. kaspad needs no flag for this and no RPC: it sees inbound peers.

::

    async with open_node(config) as node:
        joiner = Joiner(KaspadAddress(), PoolSources(path=...))
        await node.serve(joiner.carry, protocol=...)                       # whoever comes
        ended = await joiner.carry(await node.connect(peer, protocol=...)) # whom we want

Which dialect a stream speaks stands in its metadata, and makes no difference here.
"""

from __future__ import annotations

import errno
import math
import socket
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace

import trio

from kas_libp2p import addresses
from kas_libp2p.errors import (
    AddressError,
    GrpcError,
    KasError,
    LocalProtocolError,
    ProtocolError,
    RemoteProtocolError,
    SessionLost,
)
from kas_libp2p.events import EventBus, KaspaPeerEnded, KaspaPeerJoined, LimitHit, PeerMisbehaved
from kas_libp2p.kaspa._join import (
    READY,
    AwaitPeer,
    Carry,
    End,
    Ended,
    GiveUp,
    JoinFailed,
    JoinKaspad,
    Meeting,
    Patience,
    Pending,
    Rival,
    Side,
    Step,
    TellPeer,
    VersionInfo,
    backoff,
    choose,
    close_code,
    parse_reject,
    parse_version,
    reject_reason,
    session_ended,
    told_by_peer,
)
from kas_libp2p.kaspa._messages import CloseCode
from kas_libp2p.kaspa.channel import MAX_MESSAGE, MessageChannel, PathHung
from kas_libp2p.kaspa.dialect import REFERENCE
from kas_libp2p.kaspa.grpc import GrpcChannel
from kas_libp2p.kaspa.messages import MessagesChannel, PeerClosed
from kas_libp2p.kaspa.pump import Flow, Pump, PumpEnd, Stuck
from kas_libp2p.kaspa.sources import PoolExhausted, Sources
from kas_libp2p.kaspa.tcp import KaspadStream
from kas_libp2p.kaspa.upload import UploadCap
from kas_libp2p.metadata import Dialect, Direction, OverlayStream, PathKind, PeerId, TransportMetadata

__all__ = [
    "End",
    "Ended",
    "JoinFailed",
    "JoinSettings",
    "Joined",
    "Joiner",
    "KaspadAddress",
    "Patience",
    "Side",
    "VersionInfo",
]

CONNECT_TIMEOUT = 1.0
"""Seconds for the TCP connection to kaspad (kaspad's own patience for a peer's), and for the look-up of its name."""

CLOSE_WITHIN = 0.25
"""Seconds for an orderly end towards kaspad, which is on this host or near; and of a stream while a newer one of its
peer waits: both kaspads miss each other meanwhile, and nobody needs what is still queued on it."""

RESERVE = 0.05
"""Seconds before the end of a handshake's budget at which another try after status 8 would come too late."""


@dataclass(frozen=True, slots=True)
class KaspadAddress:
    """Where our kaspad listens for peers.

    Attributes:
        host: IP address or name.
        port: TCP port; 16111 is mainnet's.
    """

    host: str = "127.0.0.1"
    port: int = 16111

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True, kw_only=True)
class JoinSettings:
    """How peers are joined.

    Attributes:
        max_joined: peers joined at once; below kaspad's inbound slots (128), as it evicts at random above them.
        max_pending: handshakes that kaspad has not finished, in all; kaspad has 32 places.
        max_pending_per_source: the same for one source address; kaspad has 2.
        max_pending_per_host: the same for the peers of one remote host (an IPv6 /64 counts as one). Those of an honest
            one, which take some milliseconds each, have them in turns.
        patience: how long each step of a handshake may take.
        kaspad_stuck_after: seconds for which a kaspad that is alive may take no data.
        max_message: bytes of one Kaspa message.
        compression: whether to compress between bridges where it pays.
        liveness: whether hung paths are found by the channel itself.
    """

    max_joined: int = 64
    max_pending: int = 16
    max_pending_per_source: int = 2
    max_pending_per_host: int = 4
    patience: Patience = field(default_factory=Patience)
    kaspad_stuck_after: float = 30.0
    max_message: int = MAX_MESSAGE
    compression: bool = True
    liveness: bool = True


OpenKaspad = Callable[[KaspadAddress, str | None, int], Awaitable[MessageChannel]]
"""From kaspad's address, a source address and the limit of a message to a channel that does not run yet."""


class Joined:
    """One peer, from its stream's first byte to its last. Read it for status; it changes while it lives.

    Attributes:
        peer: who.
        stream: the overlay stream; its ``metadata`` tells path, addresses and round trip.
        dialect: which dialect it speaks.
        opener: whether we opened the stream.
        source: the address from which kaspad sees the peer; ``None`` if the system chose, or not yet known.
        moved: whether it has replaced a stream of the same peer through a relay. What lives in a session needs no other
            stream for that.
        since: when it began, on trio's clock.
        ours, theirs: what both Versions said, once they came.
        ready_at: when both nodes were ready, or ``None`` while they shake hands.
        ended: why it ended, or ``None`` while it lives.
    """

    def __init__(self, peer: PeerId, stream: OverlayStream, dialect: Dialect, opener: bool) -> None:
        self.peer = peer
        self.stream = stream
        self.dialect = dialect
        self.opener = opener
        self.source: str | None = None
        self.moved = False
        self.since = trio.current_time()
        self.ours: VersionInfo | None = None
        self.theirs: VersionInfo | None = None
        self.ready_at: float | None = None
        self.ended: Ended | None = None
        self.channel: MessageChannel | None = None
        self.pump: Pump | None = None
        self._scope = trio.CancelScope()
        self._over = trio.Event()
        self._told_below = False  # whether the session below has said who broke it
        self._idle = Flow(self.since)

    @property
    def from_peer(self) -> Flow:
        """What came from the peer."""
        return self._idle if self.pump is None else self.pump.from_left

    @property
    def from_kaspad(self) -> Flow:
        """What went to the peer."""
        return self._idle if self.pump is None else self.pump.from_right

    @property
    def last_heard(self) -> float:
        """When anything came from the peer, on trio's clock."""
        if isinstance(self.channel, MessagesChannel | GrpcChannel):
            return self.channel.last_heard
        return self.since

    @property
    def relayed(self) -> bool:
        """Whether a relay carries it."""
        return self.stream.metadata.path.kind is PathKind.RELAYED

    @property
    def moves_itself(self) -> bool:
        """Whether it goes on by another path without a new stream: it lives in a session."""
        return self.stream.watches_paths

    @property
    def leaving(self) -> bool:
        """Whether it is over but for the goodbyes."""
        return self.ended is not None or (self.pump is not None and self.pump.ending) or self.stream.over

    def end(self, ended: Ended) -> None:
        """End it; the peer is told why. Returns at once."""
        if self.ended is None:
            self.ended = ended
            self._scope.cancel()

    async def wait_ended(self) -> None:
        """Wait until everything of it is gone."""
        await self._over.wait()


class Joiner:
    """Joins peers to one kaspad.

    Args:
        kaspad: where it listens.
        sources: from which address each peer is joined.
        settings: see there.
        network: the Kaspa network (``kaspa-mainnet``), if it is known beforehand; else it is learned from kaspad.
        own_peer: our own peer id, to settle which stream stays when both sides opened one at once.
        upload: a cap on what goes to all peers together.
        events: where `KaspaPeerJoined`, `KaspaPeerEnded`, `PeerMisbehaved` and `LimitHit` are emitted.
        open_kaspad: how kaspad is reached; for a node that is reached in another way, such as one in this process.

    Attributes:
        node: what our kaspad's Version said last, or ``None`` before it was asked.
        kaspad_problem: why our kaspad could not be joined last; ``None`` once it could.
    """

    def __init__(
        self,
        kaspad: KaspadAddress,
        sources: Sources,
        *,
        settings: JoinSettings | None = None,
        network: str | None = None,
        own_peer: PeerId | None = None,
        upload: UploadCap | None = None,
        events: EventBus | None = None,
        open_kaspad: OpenKaspad | None = None,
    ) -> None:
        self.kaspad = kaspad
        self.sources = sources
        self.settings = settings or JoinSettings()
        self.node: VersionInfo | None = None
        self.kaspad_problem: Ended | None = None
        self._network = network
        self._own_peer = own_peer
        self._upload = upload
        self._events = events
        self._open_kaspad = open_kaspad or default_open_kaspad
        self._peers: dict[PeerId, Joined] = {}
        self._pending = Pending(
            in_all=self.settings.max_pending,
            per_source=self.settings.max_pending_per_source,
            per_host=self.settings.max_pending_per_host,
        )
        self._place_free = trio.lowlevel.ParkingLot()
        self._stopped = False

    # -- What the bridge reads and asks --------------------------------------------------------------------------------

    @property
    def network(self) -> str | None:
        """The Kaspa network: as set, or as our kaspad said."""
        return self._network or (self.node.network if self.node else None)

    @property
    def peers(self) -> Mapping[PeerId, Joined]:
        """Every peer that is joined or shaking hands. A copy."""
        return dict(self._peers)

    @property
    def pending(self) -> int:
        """Handshakes that our kaspad has not finished."""
        return self._pending.count

    def disconnect(self, peer: PeerId, reason: str = "") -> bool:
        """End a peer, by the operator's wish. False if it is not here."""
        joined = self._peers.get(peer)
        if joined is None:
            return False
        joined.end(Ended(End.DISCONNECTED, Side.US, reason))
        return True

    async def stop(self) -> None:
        """End every peer, tell each that we go away, and take no new ones. Waits until all are gone, about a second."""
        self._stopped = True
        for joined in tuple(self._peers.values()):
            joined.end(Ended(End.STOPPED, Side.US))
        for joined in tuple(self._peers.values()):
            await joined.wait_ended()

    async def look(self) -> VersionInfo:
        """Ask our kaspad who it is: join it, take its Version, leave. kaspad notes a handshake that was given up.

        Raises:
            JoinFailed: it can't be joined; ``ended`` says why, and its text what helps.
        """
        async with trio.open_nursery() as nursery:
            source = self.sources.address_of(PeerId("")) if self._shares_one_source() else None
            until = trio.current_time() + self.settings.patience.opener_wait
            try:
                channel, _, version, _ = await self._join_kaspad(nursery, source, until)
                await channel.aclose()
                failure = None
            except JoinFailed as error:
                failure = error
            nursery.cancel_scope.cancel()
        if failure is not None:
            raise failure
        return version

    def _shares_one_source(self) -> bool:
        return self.sources.address_of(PeerId("")) is not None

    # -- One peer, from beginning to end -------------------------------------------------------------------------------

    async def carry(self, stream: OverlayStream, *, on_ready: Callable[[Joined], None] | None = None) -> Ended:
        """Join the peer of a stream, and carry its messages until it ends. The stream is closed in the end.

        Args:
            stream: just opened, with one of the two Kaspa dialects; nothing was read from it or written to it.
            on_ready: called when both nodes are ready.

        Returns:
            why it ended. Nothing that a peer or kaspad does raises here.

        Raises:
            LocalProtocolError: the stream speaks no Kaspa dialect, or proves no peer.
        """
        metadata = stream.metadata
        dialect = metadata.dialect
        if dialect is None or metadata.peer is None:
            stream.reset()
            raise LocalProtocolError(f"a stream of {metadata.protocol or 'no protocol'} can't be joined to a kaspad")
        joined = Joined(metadata.peer, stream, dialect, metadata.direction is Direction.OUTBOUND)
        ended: Ended | None = None
        try:
            async with trio.open_nursery() as nursery:
                overlay = self._overlay_channel(joined)
                joined.channel = overlay
                await nursery.start(overlay.run)
                try:
                    with joined._scope:
                        ended = await self._live(joined, overlay, nursery, on_ready)
                    joined._told_below = joined.moves_itself and joined.stream.over
                    if joined.ended is None:
                        joined.ended = ended
                    assert joined.ended is not None
                    with trio.move_on_after(CLOSE_WITHIN if joined.ended.reason is End.SUPERSEDED else math.inf):
                        await _say_goodbye(overlay, joined.ended)
                finally:
                    nursery.cancel_scope.cancel()
        finally:
            if self._peers.get(joined.peer) is joined:
                del self._peers[joined.peer]
            if joined.ended is None:
                joined.ended = Ended(End.STOPPED, Side.US)
            joined._over.set()
            self._emit_ended(joined)
        return joined.ended

    async def _live(
        self,
        joined: Joined,
        overlay: MessageChannel,
        nursery: trio.Nursery,
        on_ready: Callable[[Joined], None] | None,
    ) -> Ended:
        try:
            await self._admit(joined)
            async with AsyncExitStack() as stack:
                joined.source = stack.enter_context(self.sources.lease(joined.peer))
                place = _Place(self, joined.source, _host_of(joined.stream.metadata))
                stack.callback(place.leave)
                kaspad = await self._meet(joined, overlay, nursery, stack, place)
                watch = _Handshake(self, joined, place, on_ready)
                pump = Pump(overlay, kaspad, watch=watch.see, right_stuck_after=self.settings.kaspad_stuck_after)
                joined.pump = pump
                return self._explain(await pump.run())
        except JoinFailed as failure:
            return failure.ended
        except PoolExhausted as error:
            self._limit("source addresses", joined)
            return Ended(End.BUSY, Side.US, str(error))

    async def _admit(self, joined: Joined) -> None:
        """Take the peer in, or say why not; settle with another stream of it."""
        old = self._peers.get(joined.peer)
        if old is not None:
            if not old.leaving:
                self._settle(old, joined)
            await old.wait_ended()
            if joined.peer in self._peers:
                raise JoinFailed(Ended(End.DUPLICATE, Side.US, "this peer has another stream"))
            joined.moved = old.relayed and not joined.relayed and old.ready_at is not None
        if self._stopped:
            raise JoinFailed(Ended(End.STOPPED, Side.US))
        if len(self._peers) >= self.settings.max_joined:
            self._limit("max_joined", joined)
            raise JoinFailed(Ended(End.BUSY, Side.US, "as many peers as are allowed"))
        self._peers[joined.peer] = joined

    def _settle(self, old: Joined, new: Joined) -> None:
        """Which of two streams of one peer stays."""
        from_relay = old.relayed and not new.relayed and not old.moves_itself
        choice = choose(
            ours=self._own_peer or "",
            theirs=new.peer,
            old_opener=old.opener,
            new_opener=new.opener,
            old_pending=old.ready_at is None,
            silence=trio.current_time() - old.last_heard,
            from_relay=from_relay,
        )
        if choice is Rival.REFUSE:
            raise JoinFailed(Ended(End.DUPLICATE, Side.US, "this peer has another stream"))
        old.end(Ended(End.SUPERSEDED, Side.US, "without a relay" if from_relay else ""))

    async def _meet(
        self,
        joined: Joined,
        overlay: MessageChannel,
        nursery: trio.Nursery,
        stack: AsyncExitStack,
        place: _Place,
    ) -> MessageChannel:
        """Shake hands as far as the two Versions, in the order that `Meeting` says."""
        meeting = Meeting(
            opener=joined.opener,
            patience=self.settings.patience,
            network=self.network or "",
            own_node=self.node.node_id if self.node else None,
        )
        kaspad: MessageChannel | None = None
        ours = theirs = b""
        step: Step = meeting.start(trio.current_time())
        while True:
            if isinstance(step, JoinKaspad):
                await place.enter(min(step.until, trio.current_time() + self.settings.patience.slot_wait), joined)
                kaspad, ours, version, asked_at = await self._join_kaspad(nursery, joined.source, step.until)
                stack.push_async_callback(_close_quickly, kaspad)
                step = meeting.on_kaspad_version(version, asked_at)
            elif isinstance(step, TellPeer):
                await self._to_peer(overlay, ours)
                step = meeting.on_told()
            elif isinstance(step, AwaitPeer):
                with trio.move_on_at(step.until) as scope:
                    theirs = await self._from_peer(overlay)
                step = meeting.on_timeout() if scope.cancelled_caught else self._greet(meeting, overlay, theirs)
            elif isinstance(step, Carry):
                assert kaspad is not None
                joined.ours, joined.theirs = meeting.ours, meeting.theirs
                try:
                    await kaspad.send(theirs)
                except (KasError, trio.BrokenResourceError) as error:
                    raise JoinFailed(_kaspad_ended(error)) from error
                if step.tell_peer:
                    await self._to_peer(overlay, ours)
                return kaspad
            else:
                assert isinstance(step, GiveUp)
                raise JoinFailed(step.ended)

    def _greet(self, meeting: Meeting, overlay: MessageChannel, message: bytes) -> Step:
        if isinstance(overlay, MessagesChannel) and overlay.peer_hello is not None:
            refusal = meeting.on_hello(overlay.peer_hello.network)
            if refusal is not None:
                return refusal
        try:
            theirs = parse_version(message)
        except RemoteProtocolError as error:
            return GiveUp(Ended(End.PEER_BROKE, Side.PEER, str(error)))
        if theirs is None:
            reject = parse_reject(message)
            if reject is not None:
                return GiveUp(Ended(reject_reason(reject), Side.PEER, reject))
            return GiveUp(Ended(End.PEER_BROKE, Side.PEER, "the first message is no Version"))
        known = any(
            other.theirs is not None and other.theirs.node_id == theirs.node_id for other in self._peers.values()
        )
        return meeting.on_peer_version(theirs, trio.current_time(), known)

    async def _to_peer(self, overlay: MessageChannel, message: bytes) -> None:
        try:
            await overlay.send(message)
        except (KasError, trio.BrokenResourceError) as error:
            raise JoinFailed(_overlay_ended(error)) from error

    async def _from_peer(self, overlay: MessageChannel) -> bytes:
        try:
            message = await overlay.receive()
        except (KasError, trio.BrokenResourceError) as error:
            raise JoinFailed(_overlay_ended(error)) from error
        if message is None:
            raise JoinFailed(_overlay_ended(None))
        return message

    # -- Our kaspad ----------------------------------------------------------------------------------------------------

    async def _join_kaspad(
        self, nursery: trio.Nursery, source: str | None, until: float
    ) -> tuple[MessageChannel, bytes, VersionInfo, float]:
        """Join our kaspad and take its Version, again after status 8, until the time is up.

        Returns:
            the channel, running in the nursery; the Version message as it came, and what it says; when it was asked.
        """
        attempt = 0
        while True:
            try:
                asked_at = trio.current_time()
                channel, message, version = await self._join_kaspad_once(nursery, source, until)
            except JoinFailed as failure:
                wait = backoff(attempt)
                attempt += 1
                if failure.ended.reason is End.KASPAD_BUSY and trio.current_time() + wait + RESERVE < until:
                    await trio.sleep(wait)
                    continue
                self.kaspad_problem = failure.ended
                raise
            self.node, self.kaspad_problem = version, None
            return channel, message, version, asked_at

    async def _join_kaspad_once(
        self, nursery: trio.Nursery, source: str | None, until: float
    ) -> tuple[MessageChannel, bytes, VersionInfo]:
        with trio.move_on_at(until):
            channel = await self._open_kaspad(self.kaspad, source, self.settings.max_message)
            try:
                await nursery.start(channel.run)
                message = await channel.receive()
                if message is None:
                    raise JoinFailed(Ended(End.NOT_KASPAD, Side.KASPAD, f"{self.kaspad} ended the stream at once"))
                version = parse_version(message)
                if version is None:
                    reject = parse_reject(message)
                    if reject is not None:
                        raise JoinFailed(Ended(reject_reason(reject), Side.KASPAD, reject))
                    raise JoinFailed(Ended(End.NOT_KASPAD, Side.KASPAD, "its first message is no Version"))
                return channel, message, version
            except (KasError, trio.BrokenResourceError) as error:
                await _close_quickly(channel)
                raise JoinFailed(_not_joined(error, self.kaspad)) from error
            except trio.Cancelled:
                await _close_quickly(channel)
                raise
        raise JoinFailed(Ended(End.KASPAD_SILENT, Side.KASPAD, f"{self.kaspad} did not say Version in time"))

    # -- Channels ------------------------------------------------------------------------------------------------------

    def _overlay_channel(self, joined: Joined) -> MessageChannel:
        if joined.dialect is Dialect.MESSAGES:
            return MessagesChannel(
                joined.stream,
                max_message=self.settings.max_message,
                network=self.network or "",
                compression=self.settings.compression,
                upload=self._upload,
                liveness=self.settings.liveness,
            )
        settings = replace(REFERENCE, max_message=self.settings.max_message, liveness=self.settings.liveness)
        # Not who opened the stream counts here, but who is the initiator of the connection under it.
        make = GrpcChannel.client if joined.stream.metadata.initiator else GrpcChannel.server
        return make(joined.stream, settings=settings, upload=self._upload)

    # -- How it ends ---------------------------------------------------------------------------------------------------

    def _explain(self, end: PumpEnd) -> Ended:
        if end.reject is not None:
            text, from_peer = end.reject
            return Ended(reject_reason(text), Side.PEER if from_peer else Side.KASPAD, text)
        return _overlay_ended(end.error) if end.by_left else _kaspad_ended(end.error)

    def _limit(self, name: str, joined: Joined) -> None:
        if self._events is not None:
            address = joined.stream.metadata.remote_address
            self._events.emit(LimitHit(reason=name, peer=joined.peer, address=address))

    def _emit_ended(self, joined: Joined) -> None:
        if self._events is None or joined.ended is None:
            return
        ended = joined.ended
        if ended.reason is End.PEER_BROKE and not joined._told_below:
            self._events.emit(
                PeerMisbehaved(
                    peer=joined.peer,
                    address=joined.stream.metadata.remote_address,
                    layer="messages" if joined.dialect is Dialect.MESSAGES else "http2",
                    reason=ended.text,
                )
            )
        self._events.emit(
            KaspaPeerEnded(
                peer=joined.peer,
                node_id=joined.theirs.node_id if joined.theirs else None,
                joined=joined.ready_at is not None,
                reason=ended.reason,
                by=ended.by,
                text=ended.text,
                seconds=trio.current_time() - joined.since,
                received=joined.from_peer.bytes,
                sent=joined.from_kaspad.bytes,
            )
        )

    def _emit_joined(self, joined: Joined) -> None:
        theirs = joined.theirs
        if self._events is None or theirs is None or joined.ready_at is None:
            return
        metadata = joined.stream.metadata
        self._events.emit(
            KaspaPeerJoined(
                peer=joined.peer,
                node_id=theirs.node_id,
                user_agent=theirs.user_agent,
                network=theirs.network,
                protocol_version=theirs.protocol_version,
                source=joined.source,
                direction=metadata.direction,
                dialect=joined.dialect,
                path=metadata.path,
                moved=joined.moved,
                seconds=joined.ready_at - joined.since,
            )
        )


class _Place:
    """A place among the pending handshakes of a joiner, held until both nodes are ready or it is over."""

    def __init__(self, joiner: Joiner, source: str | None, host: str | None) -> None:
        self._joiner = joiner
        self._source = source
        self._host = host
        self._held = False

    async def enter(self, until: float, joined: Joined) -> None:
        joiner = self._joiner
        with trio.move_on_at(until) as scope:
            while not joiner._pending.take(self._source, self._host):
                await joiner._place_free.park()
            self._held = True
        if scope.cancelled_caught:
            joiner._limit("max_pending", joined)
            raise JoinFailed(Ended(End.BUSY, Side.US, "too many handshakes are pending"))

    def leave(self) -> None:
        if self._held:
            self._held = False
            self._joiner._pending.give_back(self._source, self._host)
            self._joiner._place_free.unpark_all()


def _host_of(metadata: TransportMetadata) -> str | None:
    """The host at the other end; ``None`` for this one, and behind a relay, where nobody knows it."""
    try:
        if metadata.path.kind is PathKind.RELAYED or addresses.is_loopback(metadata.remote_address):
            return None
        return addresses.subnet_key(metadata.remote_address)
    except AddressError:
        return None


class _Handshake:
    """Watches the first messages that pass, until both nodes have said Ready."""

    ENOUGH = 16
    """Messages after which we stop looking: a handshake has four, and nothing else may pass before its end."""

    def __init__(
        self, joiner: Joiner, joined: Joined, place: _Place, on_ready: Callable[[Joined], None] | None
    ) -> None:
        self._joiner = joiner
        self._joined = joined
        self._place = place
        self._on_ready = on_ready
        self._ready: set[bool] = set()
        self._seen = 0

    def see(self, from_peer: bool, number: int | None) -> bool:
        self._seen += 1
        if number == READY:
            self._ready.add(from_peer)
        if len(self._ready) == 2:
            self._place.leave()
            self._joined.ready_at = trio.current_time()
            self._joiner._emit_joined(self._joined)
            if self._on_ready is not None:
                self._on_ready(self._joined)
            return False
        return self._seen < self.ENOUGH


# -- Dialing kaspad ----------------------------------------------------------------------------------------------------


async def dial_kaspad(address: KaspadAddress, source: str | None) -> KaspadStream:
    """A TCP connection to kaspad from a given source address.

    Args:
        address: where it listens.
        source: an IP address of this machine, or ``None`` for the system's choice.

    Raises:
        JoinFailed: no connection; the text says what helps.
    """
    try:
        with trio.fail_after(CONNECT_TIMEOUT):
            found = await trio.socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
    except (OSError, trio.TooSlowError) as error:
        why = error.strerror if isinstance(error, OSError) else f"no answer within {CONNECT_TIMEOUT:g} s"
        raise JoinFailed(Ended(End.UNREACHABLE, Side.US, f"{address.host} does not resolve: {why}")) from error
    # A name such as localhost has IPv6 addresses as well; kaspad listens on IPv4 unless it was told otherwise.
    wanted = socket.AF_INET6 if source is not None and ":" in source else socket.AF_INET
    family, kind, protocol, _, target = next((each for each in found if each[0] == wanted), found[0])
    sock = trio.socket.socket(family, kind, protocol)
    try:
        if source is not None:
            try:
                # The port is chosen at connect, when the whole 4-tuple is known: thousands may share an address.
                if hasattr(socket, "IP_BIND_ADDRESS_NO_PORT"):
                    sock.setsockopt(socket.IPPROTO_IP, socket.IP_BIND_ADDRESS_NO_PORT, 1)
                await sock.bind((source, 0))
            except (OSError, ValueError) as error:
                text = f"{source} can't be used as a source address: {error}"
                raise JoinFailed(Ended(End.NO_SOURCE, Side.US, text)) from error
        with trio.move_on_after(CONNECT_TIMEOUT) as scope:
            await sock.connect(target)
        if scope.cancelled_caught:
            raise JoinFailed(_unreachable(address, source, f"no answer within {CONNECT_TIMEOUT:g} s"))
    except OSError as error:
        sock.close()
        if error.errno == errno.ECONNREFUSED:
            text = f"nothing listens on {address}; is kaspad running, and not with --connect or --maxinpeers=0?"
            raise JoinFailed(Ended(End.NOT_RUNNING, Side.KASPAD, text)) from error
        raise JoinFailed(_unreachable(address, source, error.strerror or str(error))) from error
    except BaseException:
        sock.close()
        raise
    return KaspadStream(sock)


def _unreachable(address: KaspadAddress, source: str | None, why: str) -> Ended:
    text = f"{address} can't be reached" + (f" from {source}" if source else "") + f": {why}"
    if source is not None and source.startswith("127."):
        text += (
            "; sources of 127.x work only towards a kaspad on this host and outside of containers:"
            " use one source address, or a pool of addresses of this machine"
        )
    return Ended(End.UNREACHABLE, Side.US, text)


async def default_open_kaspad(address: KaspadAddress, source: str | None, max_message: int) -> MessageChannel:
    """A channel to kaspad, not yet running: HTTP/2 without gzip, which on loopback costs more than it saves. Only what
    comes compressed from a peer, and is large, is passed on so.

    Raises:
        JoinFailed: no connection.
    """
    stream = await dial_kaspad(address, source)
    return GrpcChannel.client(stream, authority=str(address), passes_gzip=True, max_message=max_message)


# -- Ends --------------------------------------------------------------------------------------------------------------

BUSY_STATUS = 8
"""gRPC RESOURCE_EXHAUSTED: what kaspad says when too many handshakes are pending."""


def _not_joined(error: Exception, address: KaspadAddress) -> Ended:
    """Why our kaspad gave no Version, from what its channel raised."""
    if isinstance(error, JoinFailed):
        return error.ended
    if isinstance(error, GrpcError):
        if error.status == BUSY_STATUS:
            return Ended(End.KASPAD_BUSY, Side.KASPAD, error.message)
        return Ended(End.NOT_KASPAD, Side.KASPAD, f"{address} answers with {error}")
    if isinstance(error, ProtocolError):
        return Ended(End.NOT_KASPAD, Side.KASPAD, f"{address} speaks something else than kaspad: {error}")
    return Ended(End.NOT_KASPAD, Side.KASPAD, f"{address} ended the connection before its Version: {error}")


def _kaspad_ended(error: Exception | None) -> Ended:
    if isinstance(error, Stuck):
        return Ended(End.KASPAD_STUCK, Side.KASPAD, str(error))
    return Ended(End.KASPAD_CLOSED, Side.KASPAD, "" if error is None else str(error))


def _overlay_ended(error: Exception | None) -> Ended:
    if error is None:
        return Ended(End.PEER_CLOSED, Side.PEER)
    if isinstance(error, PeerClosed):
        return told_by_peer(error.code, error.reason)
    if isinstance(error, SessionLost):
        return session_ended(error.code, error.by_peer, str(error))
    if isinstance(error, PathHung):
        return Ended(End.PATH_HUNG, Side.PATH, str(error))
    if isinstance(error, GrpcError):
        reason = End.PEER_BUSY if error.status == BUSY_STATUS else End.PEER_CLOSED
        return Ended(reason, Side.PEER, error.message)
    if isinstance(error, LocalProtocolError):
        return Ended(End.PEER_BROKE, Side.PEER, str(error))
    if isinstance(error, ProtocolError):
        return Ended(End.PEER_BROKE, Side.PEER, str(error))
    return Ended(End.PATH_LOST, Side.PATH, str(error))


_OWN_WORDS = {End.NOT_RUNNING, End.UNREACHABLE, End.NO_SOURCE, End.NOT_KASPAD, End.KASPAD_SILENT, End.KASPAD_BUSY}
"""Ends whose text names addresses of ours: the peer is told the reason alone."""


async def _say_goodbye(overlay: MessageChannel, ended: Ended) -> None:
    """Close the peer's channel, and tell it why if that is its business."""
    if ended.by is Side.PATH:
        await overlay.aclose()
        return
    text = str(ended.reason) if ended.reason in _OWN_WORDS or not ended.text else ended.text
    if isinstance(overlay, MessagesChannel):
        code = close_code(ended.reason)
        # A peer that ended it by itself knows why, unless it was our kaspad's word against it.
        known = ended.by is Side.PEER and ended.reason is not End.PEER_SILENT and ended.reason is not End.PEER_BROKE
        await overlay.aclose("" if known else text, CloseCode.ENDED if known else code)
    else:
        await overlay.aclose(text)


async def _close_quickly(channel: MessageChannel) -> None:
    """Close kaspad's channel, even while being cancelled: its place among the pending handshakes is free 3 ms later."""
    with trio.CancelScope(deadline=trio.current_time() + CLOSE_WITHIN, shield=True):
        await channel.aclose()
