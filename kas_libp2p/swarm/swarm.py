"""py-libp2p's swarm with our transport in it: who is connected, who may be, and how a connection comes and goes.

What is py-libp2p's and what is ours
    py-libp2p 0.8.1's `libp2p.network.swarm.Swarm` is the base class, so that its services (BasicHost and what builds
    on it: pubsub, DHT …) take this swarm for one of theirs. Of it we keep the table of connections, the peerstore, the
    list of notifees, tags and protection. Everything that dials, listens, upgrades, registers, chooses, opens streams,
    closes or runs is replaced, as each of these has a defect that a user would see: inbound slots that are never
    released, fixed sleeps in dialing and closing, dials that nobody asked for, notifees that stall a dial, plaintext as
    a default, py-libp2p's own Yamux. Its connection gate, pruner, auto-connector, health monitor, resource manager and
    transports are made by the base class and never started.

One connection
    A `Ticket` of the admission (`kas_libp2p.swarm._admission`) is taken before anything is spent, and released in a
    ``finally`` around everything that follows. The task that did the upgrade of an inbound connection goes on to carry
    it; an outbound one gets a task when its dial has won. So a connection costs one task here, and the transport's own.
    `SwarmConnection` is at once py-libp2p's ``INetConn`` and ``IMuxedConn``: one small object.

Streams
    Inbound streams are negotiated by our own multistream-select, each in a task of its own. The table of handlers is
    ours; if a py-libp2p host sits on the swarm, its handlers are offered as well. Whatever a handler raises ends at its
    stream. A handler owns its stream until it returns, then the stream is closed, unless it was handed over.

Punching
    `kas_libp2p.transport.punch` dials; what comes in meanwhile takes the way of everything that comes in, in a place of
    its own, and is told to the punch once it has proven to be the peer.

Circuits
    A ``/p2p-circuit`` address is dialed as any other, once `Swarm.circuits` knows how to make a byte pipe of one.

The end
    Handlers are cancelled first, then every connection is closed in order (``Connection.aclose``, bounded), at the same
    time, but those on circuits before those that carry them. The connections are carried in a nursery that is shielded
    from the cancellation of its surroundings for this.
"""

from __future__ import annotations

import logging
import random
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import trio
from libp2p.abc import IHost, IMuxedConn, INetConn, INetStream, INotifee, IRawConnection
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.custom_types import StreamHandlerFn, TProtocol
from libp2p.network.config import ConnectionConfig
from libp2p.network.exceptions import SwarmException
from libp2p.network.stream import exceptions as stream_errors
from libp2p.network.swarm import Swarm as BaseSwarm
from libp2p.peer.id import ID
from libp2p.peer.peerstore import PeerStore, PeerStoreError
from libp2p.transport.upgrader import TransportUpgrader
from multiaddr import Multiaddr

from kas_libp2p import addresses
from kas_libp2p.config import Config
from kas_libp2p.errors import (
    AddressError,
    AddressFailure,
    ConnectionLost,
    DialError,
    KasError,
    ListenError,
    LocalProtocolError,
    PeerIdMismatch,
    Refused,
    RemoteProtocolError,
    Stage,
    StreamCode,
    StreamReset,
    UpgradeError,
)
from kas_libp2p.events import (
    AddressesChanged,
    AddressFailed,
    Banned,
    ConnectionClosed,
    ConnectionOpened,
    DialFailed,
    Dialing,
    EventBus,
    HandlerFailed,
    InboundRefused,
    InternalError,
    LimitHit,
    Listening,
    PeerMisbehaved,
    PunchTargetRefused,
    StreamFailed,
    UpgradeFailed,
)
from kas_libp2p.identity import Identity
from kas_libp2p.metadata import DIRECT, Path, PathKind, PeerId
from kas_libp2p.swarm._admission import Admission, Ticket
from kas_libp2p.swarm.connection import ListenerDoor, SwarmConnection, id_of, peer_of
from kas_libp2p.swarm.network import Listener, Network, TcpNetwork
from kas_libp2p.transport._noise import Static
from kas_libp2p.transport._punch import GREETED, MANY_TARGETS, MAX_TARGETS, OTHER_PEER, SILENCE, WINDOW, Target, sift
from kas_libp2p.transport.connection import Connection
from kas_libp2p.transport.punch import Punch, hear
from kas_libp2p.transport.race import race
from kas_libp2p.transport.raw import RawConnection
from kas_libp2p.transport.upgrade import NOTHING, Opening, upgrade
from kas_libp2p.transport.yamux.stream import YamuxStream

logger = logging.getLogger(__name__)

Handler = Callable[[YamuxStream], Awaitable[None]]
"""Serves one stream. The stream is closed when it returns, and reset if it raises."""
Circuits = Callable[[Multiaddr], Awaitable[tuple[RawConnection, Path]]]
"""Makes a byte pipe of a circuit address that ends with its target. Raises `KasError`."""

NOTIFEE_QUEUE = 256
"""Notifications that wait for one py-libp2p notifee. A notifee that is stuck loses what comes beyond."""
IDLE_CHECKS = 4
"""How often per idle timeout connections are looked at: one is closed at most a quarter late."""


@dataclass(slots=True)
class _Served:
    """A protocol that is served here."""

    handler: Handler
    max_streams: int
    max_per_peer: int
    hands_over: bool
    open: int = 0
    per_peer: dict[PeerId, int] = field(default_factory=dict)


class _Feed:
    """What one notifee is still to be told, in order. A task exists only while there is something to tell."""

    __slots__ = ("busy", "queue")

    def __init__(self) -> None:
        self.queue: deque[tuple[str, tuple[object, ...]]] = deque()
        self.busy = False


class _Attempt:
    """One dial that several callers may wait for."""

    __slots__ = ("done", "error", "result", "scope", "tried", "waiting")

    def __init__(self) -> None:
        self.done = trio.Event()
        self.scope = trio.CancelScope()
        self.result: SwarmConnection | None = None
        self.error: KasError | None = None
        self.tried: frozenset[str] = frozenset()
        self.waiting = 0


class Swarm(BaseSwarm):
    """The connections of one node.

    Run it with `carry` in a nursery, or under py-libp2p's ``background_trio_service``.

    Args:
        identity: our key.
        config: limits, lists, timeouts. Its ``listen`` is for the node; here `listen` is called.
        events: where everything is told.
        network: where byte pipes come from; TCP if left out.

    Attributes:
        identity, config, events, network: as given.
        admission: the gate and the limits; set ``admission.policy`` to add a rule.
        on_connected, on_disconnected: called with each connection that comes and goes; must not block nor raise.
        on_addresses: called when the listen addresses changed.
        keeps: asked about a connection without streams before it is closed as idle; one that says yes is enough.
        circuits: how circuits are dialed; ``None``: not at all.
    """

    def __init__(
        self,
        identity: Identity,
        config: Config | None = None,
        *,
        events: EventBus | None = None,
        network: Network | None = None,
    ) -> None:
        config = config or Config()
        peerstore = PeerStore()
        # py-libp2p reads no ed25519 key in libp2p's own form; the seed is its first half.
        peerstore.add_key_pair(id_of(identity.peer_id), create_new_key_pair(identity.to_protobuf()[-64:-32]))
        limits = config.limits
        super().__init__(
            id_of(identity.peer_id),
            peerstore,
            cast(TransportUpgrader, None),  # nothing of ours upgrades through it
            connection_config=ConnectionConfig(
                max_connections=limits.max_connections,
                max_connections_per_peer=limits.max_per_peer,
                min_connections=0,
                low_watermark=0,
                high_watermark=limits.max_connections,
                outbound_stream_protocol_negotiation_timeout=config.dial.negotiation_timeout,
                inbound_stream_protocol_negotiation_timeout=config.dial.negotiation_timeout,
            ),
        )
        self.notifees.clear()  # the tag store would keep a record of every connection, for a pruner that never runs
        self.identity = identity
        self._static = Static(identity)
        self.config = config
        self.events = events if events is not None else EventBus(time.time)
        self.admission = Admission(limits, config.allow, config.deny)
        self.on_connected: list[Callable[[SwarmConnection], None]] = []
        self.on_disconnected: list[Callable[[SwarmConnection], None]] = []
        self.on_addresses: list[Callable[[], None]] = []
        self.keeps: list[Callable[[Connection], bool]] = []
        self.circuits: Circuits | None = None
        self.network: Network = network if network is not None else TcpNetwork(config.dial, self.events)
        self._served: dict[str, _Served] = {}
        self._host: IHost | None = None
        self._raw_handler: StreamHandlerFn | None = None
        self._attempts: dict[object, _Attempt] = {}
        self._punches: dict[PeerId, Punch] = {}
        self._dice = random.Random()  # noqa: S311 - keeps two sides from being in step, guards nothing
        self._feeds: dict[int, _Feed] = {}
        self._carrying: trio.Nursery | None = None
        self._tasks: trio.Nursery | None = None
        self._stop: trio.Event | None = None
        self._last_addresses: tuple[str, ...] = ()

    @property
    def peer(self) -> PeerId:
        """Our peer id."""
        return self.identity.peer_id

    # Running

    async def run(self) -> None:
        """Run as a service of py-libp2p."""
        await self.carry()

    async def carry(self, *, task_status: Any = trio.TASK_STATUS_IGNORED) -> None:
        """Run until cancelled or closed; then end everything in order, within about two seconds, circuits one more."""
        if self._stop is not None:
            raise RuntimeError("a swarm runs once")
        self._stop = stop = trio.Event()
        try:
            async with trio.open_nursery() as outer:
                await outer.start(self._carry_connections)
                try:
                    async with trio.open_nursery() as tasks:
                        self._tasks = self.background_nursery = tasks
                        try:
                            tasks.start_soon(self._close_idle)
                            self.event_background_nursery_created.set()
                            task_status.started()
                            await stop.wait()
                            tasks.cancel_scope.cancel()
                        finally:
                            self._tasks = self.background_nursery = None  # before it is closed
                finally:
                    self._closing = True
                    stop.set()
                    self._close_listeners()
        finally:
            self._carrying = None

    async def _carry_connections(self, *, task_status: Any) -> None:
        assert self._stop is not None
        with trio.CancelScope(shield=True):
            async with trio.open_nursery() as nursery:
                self._carrying = nursery
                task_status.started()
                await self._stop.wait()
                for relayed in (True, False):
                    async with trio.open_nursery() as closing:  # each is bounded by the transport
                        for connection in self.all_connections():
                            if (connection.path.kind is PathKind.RELAYED) is relayed:
                                closing.start_soon(connection.close, "this node is shutting down")
                nursery.cancel_scope.cancel()

    async def close(self) -> None:
        """End everything in order. May be called again."""
        self._closing = True
        self._close_listeners()
        if self._stop is not None:
            self._stop.set()
        manager = getattr(self, "_manager", None)
        if manager is not None:
            await manager.stop()

    # Listening

    async def listen(self, *multiaddrs: Multiaddr) -> bool:
        """Listen on all of the addresses.

        Raises:
            ListenError: one can't be listened on; then none of them is.
            AddressError: one is not for TCP.
        """
        await self.event_background_nursery_created.wait()
        listeners = await self.network.listen(multiaddrs)
        if self._tasks is None or self._closing:
            for listener in listeners:
                listener.close()
            raise ListenError("this node is shutting down")
        if listeners and not self.listeners:
            self._tasks.start_soon(self.network.watch, self._check_addresses)
        for listener in listeners:
            self.listeners[str(listener.address)] = ListenerDoor(listener)
            self._tasks.start_soon(self._accept, listener)
            for each in listener.addresses():
                self.events.emit(Listening(address=str(each)))
            self._notify_soon("listen", listener.address)
        self._check_addresses()
        return bool(listeners)

    def listen_addresses(self) -> tuple[str, ...]:
        """Where we listen, wildcards replaced by the addresses of the interfaces; without our peer id."""
        return self._last_addresses

    def _check_addresses(self) -> None:
        doors = [door for door in self.listeners.values() if isinstance(door, ListenerDoor)]
        now = tuple(dict.fromkeys(str(address) for door in doors for address in door.get_addrs()))
        if set(now) != set(self._last_addresses):
            self._last_addresses = now
            self.events.emit(AddressesChanged(addresses=now))
            for callback in self.on_addresses:
                callback()

    def _close_listeners(self) -> None:
        for door in self.listeners.values():
            assert isinstance(door, ListenerDoor)
            door.listener.close()
            self._notify_soon("listen_close", door.listener.address)
        self.listeners.clear()

    async def _accept(self, listener: Listener) -> None:
        while True:
            try:
                raw = await listener.accept()
            except trio.ClosedResourceError:
                return
            ip = _ip_of(raw.remote_address)
            try:
                ticket = self.admission.admit_inbound(ip, trio.current_time())
            except Refused as error:
                raw.abort()
                self.events.emit(InboundRefused(address=raw.remote_address, reason=error.limit))
                continue
            if self._carrying is None:
                ticket.release()
                raw.abort()
                return
            handshake = trio.CancelScope()
            ticket.evict = handshake.cancel
            self._carrying.start_soon(self._inbound, raw, ticket, handshake)

    async def _inbound(self, raw: RawConnection, ticket: Ticket, handshake: trio.CancelScope) -> None:
        started = trio.current_time()
        address = raw.remote_address
        expected = self._expected(address)
        try:
            connection: Connection | None = None
            try:
                with handshake:
                    connection = await (self._meet(raw, expected) if expected else self._upgrade(raw, initiator=False))
                if handshake.cancel_called:
                    raw.abort()
                    raise _evicted()
            except UpgradeError as error:
                self._missed(expected, address, error.stage)
                seconds = trio.current_time() - started
                self.events.emit(UpgradeFailed(address=address, stage=error.stage, reason=str(error), seconds=seconds))
                return
            if connection is None:
                self._missed(expected, address, OTHER_PEER)
                return
            punch = next((each for each in expected if each.peer == connection.peer), None)
            self._missed([each for each in expected if each is not punch], address, OTHER_PEER)
            if punch is not None:
                if punch.won:
                    connection.abort("another one was faster")
                    return
                connection.path = punch.path
            try:
                self._establish(ticket, connection)
            except Refused as error:
                self._missed([punch] if punch is not None else [], address, Stage.LIMITS)
                connection.abort(str(error))
                self.events.emit(InboundRefused(address=address, reason=error.limit))
                return
            if punch is not None:
                punch.adopted(*_endpoint(address), trio.current_time() - started)
            await self._carry(SwarmConnection(connection, ticket, self._notify_soon), trio.current_time() - started)
        except Exception as error:  # noqa: BLE001 - one connection is isolated from all others
            raw.abort()
            self._internal_error(None, "an inbound connection", error)
        finally:
            ticket.release()

    def _expected(self, address: str) -> list[Punch]:
        """The punches whose peer this may be. They are told of it."""
        if not self._punches or (where := addresses.ip_port(address)) is None:
            return []
        expected = [each for each in self._punches.values() if each.expects(where[0])]
        for each in expected:
            each.came(*where)
        return expected

    def _missed(self, expected: Iterable[Punch], address: str, reason: str) -> None:
        for each in expected:
            each.dropped(*_endpoint(address), reason)

    async def _meet(self, raw: RawConnection, expected: Sequence[Punch]) -> Connection | None:
        """Shake hands with whom a punch waits for, or who is behind the same NAT. ``None``: it came too late."""
        silent, opening = False, NOTHING
        if first := [each for each in expected if each.initiator]:
            foreseen = any(each.foresees(*_endpoint(raw.remote_address)) for each in first)
            silent, opening = await hear(raw, SILENCE, after_greeting=0.0 if foreseen else GREETED)
        waiting = [each for each in expected if silent and each.initiator and not each.over]
        if not waiting:
            return await self._upgrade(raw, initiator=False, opening=opening)
        with trio.CancelScope() as scope:

            def look() -> None:
                if all(each.over for each in waiting):
                    scope.cancel()

            for each in waiting:
                each.on_over.append(look)
            connection = await self._upgrade(raw, initiator=True, opening=opening)
        if scope.cancelled_caught:
            return None
        if all(each.peer != connection.peer for each in waiting):
            connection.abort("nobody waits for it")
            raise PeerIdMismatch(" or ".join(each.peer for each in waiting), connection.peer)
        return connection

    def _internal_error(self, peer: PeerId | None, where: str, error: Exception) -> None:
        logger.error("an internal error ended %s", where, exc_info=error)
        self.events.emit(InternalError(peer=peer, where=where, reason=f"{type(error).__name__}: {error}"))

    def _establish(self, ticket: Ticket, connection: Connection) -> None:
        if connection.peer == self.peer:
            raise Refused("self", "this node dialed itself")
        if self._closing:
            raise Refused("closing", "this node is shutting down")
        now = trio.current_time()
        try:
            ticket.establish(connection.peer, now, _ip_of(connection.remote_address))
        except Refused as error:
            # A peer that comes back after its network changed must not wait until we notice that its old one is dead.
            # But a relayed one does not end before what was punched through it has proven itself.
            idle = [
                each
                for each in self.connections_to(connection.peer)
                if not each.connection.streams
                and not (connection.path.kind is PathKind.PUNCHED and each.path.kind is PathKind.RELAYED)
            ]
            if error.limit != "max_per_peer" or not idle:
                raise
            replaced = min(idle, key=self._is_kept)
            replaced.ticket.release()
            replaced.connection.abort("it was replaced by a newer connection")
            ticket.establish(connection.peer, now)

    # One connection

    async def _carry(
        self,
        connection: SwarmConnection,
        seconds: float,
        *,
        task_status: Any = trio.TASK_STATUS_IGNORED,
    ) -> None:
        transport = connection.connection
        self.connections.setdefault(connection.peer_id, []).append(connection)
        self.events.emit(
            ConnectionOpened(
                connection=transport.number,
                peer=transport.peer,
                path=transport.path,
                direction=transport.direction,
                address=transport.remote_address,
                seconds=seconds,
            )
        )

        def on_stream(stream: YamuxStream) -> None:
            connection.last_used = trio.current_time()
            if self._tasks is None or self._closing:
                stream.reset(StreamCode.RESOURCES)
            else:
                self._tasks.start_soon(self._serve, connection, stream)

        def on_limit(limit: str) -> None:
            self.events.emit(LimitHit(reason=limit, peer=transport.peer, address=transport.remote_address))

        try:
            for callback in self.on_connected:
                callback(connection)
            punch = self._punches.get(transport.peer)
            if punch is not None and transport.path.kind is not PathKind.RELAYED:
                punch.met()
            self._notify_soon("connected", connection)
            await transport.run(on_stream, on_limit=on_limit, task_status=task_status)
        except Exception as error:  # noqa: BLE001 - one connection is isolated from all others
            transport.abort("an internal error")
            self._internal_error(transport.peer, "a connection", error)
        finally:
            self.remove_conn(connection)

    def remove_conn(self, swarm_conn: SwarmConnection) -> None:  # type: ignore[override]
        """A connection has ended. May be called again."""
        peer = swarm_conn.peer_id
        left = self.connections.get(peer, [])
        if swarm_conn not in left:
            return
        left.remove(swarm_conn)
        if not left:
            del self.connections[peer]
        swarm_conn.ticket.release()
        transport = swarm_conn.connection
        if transport.misbehaviour is not None:
            layer, what = transport.misbehaviour
            self.events.emit(
                PeerMisbehaved(peer=transport.peer, address=transport.remote_address, layer=layer, reason=what)
            )
        self.events.emit(
            ConnectionClosed(
                connection=transport.number,
                peer=transport.peer,
                reason=transport.close_reason or "it was cancelled on this side",
                seconds=trio.current_time() - transport.opened_at,
                received=transport.received,
                sent=transport.sent,
            )
        )
        for callback in self.on_disconnected:
            callback(swarm_conn)
        for stream in tuple(swarm_conn._net_streams or ()):
            swarm_conn.forget_stream(stream)
        self._notify_soon("disconnected", swarm_conn)

    async def _close_idle(self) -> None:
        timeout = self.config.limits.idle_timeout
        while True:
            await trio.sleep(timeout / IDLE_CHECKS)
            now = trio.current_time()
            for connection in self.all_connections():
                if connection.connection.streams or self._is_kept(connection):
                    connection.last_used = now
                elif now - connection.last_used >= timeout and self._tasks is not None:
                    reason = f"it was idle for {timeout:g} s"
                    self._tasks.start_soon(connection.close, reason)

    def _is_kept(self, connection: SwarmConnection) -> bool:
        transport = connection.connection
        return self.tag_store.is_protected(connection.peer_id) or any(keep(transport) for keep in self.keeps)

    # Streams that peers open

    def handle(
        self,
        protocol: str,
        handler: Handler,
        *,
        max_streams: int = 256,
        max_per_peer: int = 16,
        hands_over: bool = False,
    ) -> None:
        """Serve a protocol.

        Args:
            protocol: its id.
            handler: called with each stream, in a task of its own.
            max_streams: streams of this protocol that may be open at once.
            max_per_peer: of them with one peer.
            hands_over: whether the handler, when it returns, has closed the stream or given it another owner, as a
                circuit. Then neither limit counts it any more.

        Raises:
            ValueError: it is served already.
        """
        if protocol in self._served:
            raise ValueError(f"{protocol} is served already")
        self._served[protocol] = _Served(handler, max_streams, max_per_peer, hands_over)

    def unhandle(self, protocol: str) -> None:
        """Serve a protocol no longer. Streams that are open stay. Does nothing if it is not served."""
        self._served.pop(protocol, None)

    def protocols(self) -> tuple[str, ...]:
        """What is served here, a py-libp2p host's protocols included."""
        return tuple(
            dict.fromkeys([*self._served, *(str(protocol) for protocol in self._hosted_handlers() if protocol)])
        )

    def _hosted_handlers(self) -> dict[TProtocol | None, StreamHandlerFn | None]:
        return self._host.get_mux().handlers if self._host is not None else {}

    def set_stream_handler(self, stream_handler: StreamHandlerFn) -> None:
        """For py-libp2p's hosts: their protocols are served beside ours.

        A handler that is no host's gets every stream before anything is negotiated, as in py-libp2p.
        """
        super().set_stream_handler(stream_handler)
        host = getattr(stream_handler, "__self__", None)
        self._host = host if isinstance(host, IHost) else None
        self._raw_handler = stream_handler if self._host is None else None

    async def _serve(self, connection: SwarmConnection, stream: YamuxStream) -> None:
        try:
            await self._negotiate_and_serve(connection, stream)
        except Exception as error:  # noqa: BLE001 - one stream is isolated from all others
            stream.reset()
            self._internal_error(connection.peer, "a stream", error)

    async def _negotiate_and_serve(self, connection: SwarmConnection, stream: YamuxStream) -> None:
        if self._raw_handler is not None:
            return await self._isolate(connection, stream, self._hosted(connection, self._raw_handler))
        try:
            protocol = await connection.connection.accept(stream, self.protocols())
        except (UpgradeError, ConnectionLost, StreamReset) as error:
            self.events.emit(StreamFailed(peer=connection.peer, reason=str(error)))
            return None
        served = self._served.get(protocol)
        if served is None:
            handler = self._hosted_handlers().get(TProtocol(protocol))
            if handler is None:
                return stream.reset(StreamCode.NEGOTIATION)
            return await self._isolate(connection, stream, self._hosted(connection, handler))
        return await self._serve_ours(connection, stream, served)

    def _hosted(self, connection: SwarmConnection, handler: StreamHandlerFn) -> Handler:
        async def serve(stream: YamuxStream) -> None:
            wrapped = connection.net_stream(stream)
            try:
                await handler(wrapped)
            finally:
                connection.forget_stream(wrapped)

        return serve

    async def _serve_ours(self, connection: SwarmConnection, stream: YamuxStream, served: _Served) -> None:
        peer = connection.peer
        with_peer = served.per_peer.get(peer, 0)
        if served.open >= served.max_streams or with_peer >= served.max_per_peer:
            limit = "max_streams" if served.open >= served.max_streams else "max_streams_per_peer"
            stream.reset(StreamCode.RESOURCES)
            self.events.emit(LimitHit(reason=limit, peer=peer, address=connection.connection.remote_address))
            return
        served.open += 1
        served.per_peer[peer] = with_peer + 1
        try:
            await self._isolate(connection, stream, served.handler, hands_over=served.hands_over)
        finally:
            served.open -= 1
            served.per_peer[peer] -= 1
            if not served.per_peer[peer]:
                del served.per_peer[peer]

    async def _isolate(
        self, connection: SwarmConnection, stream: YamuxStream, handler: Handler, *, hands_over: bool = False
    ) -> None:
        """Run a handler so that whatever it raises ends at its stream."""
        done = False
        try:
            await handler(stream)
            if not hands_over:
                await stream.aclose()
            done = True
        except (ConnectionLost, StreamReset, stream_errors.StreamError):
            pass  # the stream ended under the handler, which is no fault of it
        except RemoteProtocolError as error:
            self.events.emit(
                PeerMisbehaved(
                    peer=connection.peer,
                    address=connection.connection.remote_address,
                    layer=stream.protocol or "stream",
                    reason=str(error),
                )
            )
        except Exception as error:  # noqa: BLE001 - the one place where a handler is isolated from everybody else
            self._handler_failed(connection, stream, error)
        except BaseExceptionGroup as group:  # failures and a cancellation at once
            failures, rest = group.split(Exception)
            if failures is not None:
                self._handler_failed(connection, stream, failures)
            if rest is not None:
                raise rest from None
        finally:
            if not done and not (hands_over and stream.closed):  # who ended it in order may have said why
                stream.reset()
            connection.last_used = trio.current_time()

    def _handler_failed(self, connection: SwarmConnection, stream: YamuxStream, error: Exception) -> None:
        self.events.emit(
            HandlerFailed(peer=connection.peer, protocol=stream.protocol, reason=f"{type(error).__name__}: {error}")
        )
        logger.warning("the handler of %s failed", stream.protocol, exc_info=error)

    # Dialing

    async def dial(
        self,
        peer: PeerId | None,
        to: Iterable[Multiaddr | str],
        *,
        fresh: bool = False,
        circuits_after: float | None = None,
    ) -> SwarmConnection:
        """Connect to a peer, or return the connection that there is.

        Everybody who wants the same peer at the same time shares one attempt. It ends when nobody waits for it.

        Args:
            peer: who must answer. ``None``: whoever does, at exactly one address.
            to: its addresses, best first.
            fresh: make another connection even if there is one.
            circuits_after: seconds that direct addresses have before circuits are dialed beside them; ``None``: these
                come last. See `kas_libp2p.transport.race`.

        Raises:
            DialError: no address led to it, or it is this node itself.
            Refused: a list, a ban or a limit of ours forbids it.
            AddressError: an address is malformed or another peer's.
            ConnectionLost: it was reached, and ended the connection at once; or this node is not running.
        """
        if peer == self.peer:
            raise DialError(str(peer), hint="that is this node itself")
        wanted = tuple(dict.fromkeys(addresses.text_of(_of_peer(address, peer)) for address in to))
        if peer is None and len(wanted) != 1:
            raise AddressError("without a peer id exactly one address can be dialed")
        key = (peer or wanted[0], fresh)
        while True:
            if not fresh and (known := self._known(peer, wanted)) is not None:
                return known
            attempt = self._attempts.get(key)
            if attempt is None:
                attempt = self._attempts[key] = _Attempt()
                attempt.tried = frozenset(wanted)
                if self._tasks is None:
                    del self._attempts[key]
                    raise ConnectionLost("this node is not running")
                self._tasks.start_soon(self._attempt, attempt, key, peer, wanted, circuits_after)
            attempt.waiting += 1
            try:
                await attempt.done.wait()
            finally:
                attempt.waiting -= 1
                if not attempt.waiting and not attempt.done.is_set():
                    attempt.scope.cancel()
                    if self._attempts.get(key) is attempt:
                        del self._attempts[key]
            if attempt.result is not None:
                if attempt.result.is_closed:  # not tried anew: who does this once does it each time
                    reason = attempt.result.connection.close_reason or "it takes no streams"
                    raise ConnectionLost(f"{key[0]} was reached, but the connection ended at once: {reason}")
                return attempt.result
            if attempt.tried.issuperset(wanted):
                raise _again(attempt.error)

    def _known(self, peer: PeerId | None, wanted: tuple[str, ...]) -> SwarmConnection | None:
        if peer is not None:
            return self.connection_to(peer)
        for connection in self.all_connections():
            transport = connection.connection
            if transport.initiator and transport.remote_address == wanted[0] and not connection.is_closed:
                return connection
        return None

    async def _attempt(
        self,
        attempt: _Attempt,
        key: object,
        peer: PeerId | None,
        wanted: tuple[str, ...],
        circuits_after: float | None,
    ) -> None:
        started = trio.current_time()
        target = peer or wanted[0]
        attempt.error = ConnectionLost("this node is shutting down")
        try:
            with attempt.scope:
                try:
                    attempt.result = await self._dial(peer, target, wanted, circuits_after)
                except KasError as error:
                    attempt.error = error
                    seconds = trio.current_time() - started
                    self.events.emit(DialFailed(target=target, reason=str(error).partition("\n")[0], seconds=seconds))
                except Exception as error:  # noqa: BLE001 - one dial is isolated from everything else
                    attempt.error = DialError(target, hint=f"an internal error: {type(error).__name__}: {error}")
                    self._internal_error(peer, "a dial", error)
        finally:
            if self._attempts.get(key) is attempt:
                del self._attempts[key]
            attempt.done.set()

    async def _dial(
        self, peer: PeerId | None, target: str, wanted: tuple[str, ...], circuits_after: float | None
    ) -> SwarmConnection:
        started = trio.current_time()
        ticket = self.admission.admit_dial(peer, started)
        kept = False
        winner: Connection | None = None
        try:
            if not wanted:
                raise DialError(target, hint="no address of it is known; give one, like /ip4/192.0.2.1/tcp/16117")
            self.events.emit(Dialing(target=target, addresses=wanted))
            named, plain = _named_and_plain(wanted)
            found, failures = self._usable(peer, plain)
            winner = await race(
                found,
                partial(self._dial_address, peer),
                self.config.dial.attempt_delay,
                discard=lambda connection: connection.abort("another address was faster"),
                target=target,
                max_addresses=self.config.dial.max_addresses,
                failures=failures,
                later=partial(self._resolve, peer, named) if named else None,
                circuits_after=circuits_after,
                peer=peer,
                events=self.events,
            )
            if peer is None and (known := self.connection_to(winner.peer)) is not None:
                return known  # only the handshake told who it is; the new connection is dropped below
            try:
                self._establish(ticket, winner)
            except Refused as error:
                if error.limit == "self":
                    raise DialError(target, hint="that is this node itself") from None
                raise
            assert self._carrying is not None
            connection = SwarmConnection(winner, ticket, self._notify_soon)
            await self._carrying.start(self._carry, connection, trio.current_time() - started)
            kept = True
            return connection
        finally:
            if not kept:
                ticket.release()
                if winner is not None:
                    winner.abort("it is not wanted any more")

    async def _resolve(
        self, peer: PeerId | None, named: Sequence[Multiaddr]
    ) -> tuple[list[Multiaddr], list[AddressFailure]]:
        """Names to addresses, as `_usable`."""
        return self._usable(peer, *await self.network.resolve(named))

    def _usable(
        self, peer: PeerId | None, found: Iterable[Multiaddr], failures: Iterable[AddressFailure] = ()
    ) -> tuple[list[Multiaddr], list[AddressFailure]]:
        """Addresses without the forbidden and unusable ones, which become failures; all failures are told."""
        failures = list(failures)
        usable: list[Multiaddr] = []
        for address in found:
            try:
                self._check_usable(address, peer)
                usable.append(address)
            except (Refused, AddressError) as error:
                failures.append(AddressFailure(str(address), Stage.GATE, error, 0.0))
        for each in failures:
            self.events.emit(
                AddressFailed(
                    peer=peer, address=each.address, stage=each.stage, reason=str(each.error), seconds=each.seconds
                )
            )
        return usable, failures

    def _check_usable(self, address: Multiaddr, peer: PeerId | None) -> None:
        _of_peer(address, peer)
        if addresses.is_relayed(address):
            return self._check_circuit(address, peer)
        where = addresses.ip_port(address)
        if where is None:
            raise AddressError("only TCP over IPv4 or IPv6 can be dialed, and circuits through such relays")
        if addresses.text_of(addresses.without_peer(address)) in self._last_addresses:
            raise AddressError("that is this node itself")
        return self.admission.check_address(where[0].partition("%")[0], peer, trio.current_time())

    def _check_circuit(self, address: Multiaddr, peer: PeerId | None) -> None:
        """What is wrong with the address; whether its relay can be reached shows when it is."""
        relay = addresses.relay_of(address)
        if self.circuits is None:
            raise AddressError("this node dials no circuits")
        if relay is None:
            raise AddressError("a circuit address names its relay: /…/p2p/RELAY/p2p-circuit/p2p/PEER")
        if peer is None:
            raise AddressError("a circuit address ends with whom to reach: /…/p2p/RELAY/p2p-circuit/p2p/PEER")
        if relay in (peer, self.peer):
            who = "this node itself" if relay == self.peer else "the peer itself"
            raise AddressError(f"its relay is {who}")
        way = addresses.relay_address(address)
        if way is not None and addresses.is_relayed(way):
            raise AddressError("no relay carries a circuit through another relay")

    async def _dial_address(self, peer: PeerId | None, address: Multiaddr) -> Connection:
        if addresses.is_relayed(address):
            assert self.circuits is not None
            assert peer is not None
            raw, path = await self.circuits(addresses.with_peer(address, peer))
        else:
            raw, path = await self.network.dial(addresses.without_peer(address)), DIRECT
        return await self._upgrade(raw, initiator=True, expected=peer, path=path)

    async def _upgrade(
        self,
        raw: RawConnection,
        *,
        initiator: bool,
        expected: PeerId | None = None,
        path: Path = DIRECT,
        opening: Opening = NOTHING,
    ) -> Connection:
        return await upgrade(
            raw,
            identity=self.identity,
            initiator=initiator,
            expected=expected,
            config=self.config,
            path=path,
            static=self._static,
            opening=opening,
        )

    # Punching

    async def punch(
        self,
        peer: PeerId,
        targets: Iterable[Target],
        *,
        initiator: bool,
        relay: PeerId,
        at: float,
        window: float = WINDOW,
        many: bool = False,
    ) -> SwarmConnection:
        """Make a connection through the NATs of both sides: the other does the same at the same instant.

        Nothing of this is told as the failure of an address, delays a dial, or waits for one. Whatever connection with
        the peer comes up meanwhile without a relay is the result. If cancelled, everything is closed.

        Args:
            peer: who has to be met.
            targets: where it may be, at most `MAX_TARGETS`; what must not be dialed is left out.
            many: at most `MANY_TARGETS`, as both sides agreed to it.
            initiator: whether we are the initiator of the connection, as agreed with the peer.
            relay: through which we agreed.
            at: when to dial, on trio's clock; in the past: at once.
            window: seconds from then on until it has failed; as the responder up to `GRACE` more, if the other side is
                in the middle of its handshake.

        Raises:
            PunchFailed: there is no connection; says what came of each target. Before the window ends only where
                nothing can be sent and so nothing can come in.
            Refused: a list, a ban or a limit of ours forbids it.
            ConnectionLost: the connection ended at once; or this node is not running.
            LocalProtocolError: there is a punch with this peer already.
        """
        if peer in self._punches:
            raise LocalProtocolError(f"there is a punch with {peer} already; wait for it to end")
        if self._carrying is None:
            raise ConnectionLost("this node is not running")
        at = max(at, trio.current_time())
        ticket = self.admission.admit_dial(peer, trio.current_time())
        kept = False
        winner: Connection | None = None
        try:
            found, refused = sift(
                targets,
                own=self._last_addresses,
                allow_private=self.config.punch.allow_private,
                gate=partial(self._gate, peer),
                most=MANY_TARGETS if many else MAX_TARGETS,
            )
            for each in refused:
                self.events.emit(PunchTargetRefused(peer=peer, address=each.address, reason=each.reason))
            punch = self._punches[peer] = Punch(
                peer,
                found,
                initiator=initiator,
                relay=relay,
                at=at,
                window=window,
                dial=self._dial_punch,
                upgrade=lambda raw, first, opening: self._upgrade(
                    raw, initiator=first, expected=peer, path=punch.path, opening=opening
                ),
                events=self.events,
                uniform=self._dice.uniform,
                refused=refused,
            )
            winner = await punch.run()
            if winner is None:
                met = self.connection_to(peer)
                if met is None or met.path.kind is PathKind.RELAYED:
                    raise ConnectionLost(f"{peer} was reached, but the connection ended at once")
                return met
            self._establish(ticket, winner)
            connection = SwarmConnection(winner, ticket, self._notify_soon)
            await self._carrying.start(self._carry, connection, trio.current_time() - at)
            kept = True
            return connection
        finally:
            self._punches.pop(peer, None)
            if not kept:
                ticket.release()
                if winner is not None:
                    winner.abort("it is not wanted any more")

    async def _dial_punch(self, address: Multiaddr, elsewhere: bool) -> RawConnection:
        at = addresses.without_peer(address)
        return await (self.network.dial_fresh(at) if elsewhere else self.network.dial_punch(at))

    def _gate(self, peer: PeerId, ip: str) -> str | None:
        try:
            self.admission.check_address(ip, peer, trio.current_time())
        except Refused as error:
            return error.limit
        return None

    # Looking up

    def all_connections(self) -> list[SwarmConnection]:
        """Every connection, those that are just ending included."""
        return [cast(SwarmConnection, each) for some in self.connections.values() for each in some]

    def connections_to(self, peer: PeerId) -> list[SwarmConnection]:
        """The connections to a peer, the oldest first."""
        return [cast(SwarmConnection, each) for each in self.connections.get(id_of(peer), ())]

    def connection_to(self, peer: PeerId) -> SwarmConnection | None:
        """The best connection to a peer that takes new streams.

        Direct or punched ones before relayed; of these the one whose circuit will last longest, so that new streams go
        to the next one when a circuit is about to end; then the busiest, then the newest.
        """
        usable = [each for each in self.connections_to(peer) if not each.is_closed]
        return max(usable, key=_rank, default=None)

    async def disconnect(self, peer: PeerId, reason: str = "", *, hung: bool = False) -> int:
        """Close every connection to a peer in order.

        Args:
            hung: whether nothing gets through any more. Then they end at once, without a word: the system would keep
                what is unsent, and the addresses and ports with it, for minutes, and no punch could use these.

        Returns:
            how many there were.
        """
        some = self.connections_to(peer)
        async with trio.open_nursery() as nursery:
            for connection in some:
                if hung:
                    connection.connection.abort(reason, broke=True)
                nursery.start_soon(connection.close, reason)
        return len(some)

    def ban(self, target: str, seconds: float) -> None:
        """Keep a peer or an IP out for a while, and end its connections at once.

        Args:
            target: peer id, or IP address (of an IPv6 address, its /64).
            seconds: for how long.

        Raises:
            AddressError: it is neither.
        """
        key = self.admission.ban(target, trio.current_time(), seconds)
        self.events.emit(Banned(target=key, seconds=seconds))
        for connection in self.all_connections():
            ip = connection.ticket.ip
            if key == connection.peer or (ip is not None and addresses.subnet_key(ip) == key):
                connection.connection.abort("the peer was banned")

    # What py-libp2p's services call

    async def dial_peer(self, peer_id: ID) -> list[INetConn]:
        """Connect to a peer at the addresses that the peerstore has."""
        try:
            known = self.peerstore.addrs(peer_id)
        except PeerStoreError:
            known = []
        try:
            return [await self.dial(peer_of(peer_id), known)]
        except (KasError, ValueError) as error:
            raise SwarmException(str(error)) from error

    async def dial_addr(self, addr: Multiaddr, peer_id: ID, source: tuple[str, int] | None = None) -> INetConn:
        """Connect to a peer at one address."""
        try:
            return await self.dial(peer_of(peer_id), [addr])
        except (KasError, ValueError) as error:
            raise SwarmException(str(error)) from error

    async def dial_peer_replacement(self, peer_id: ID) -> INetConn | None:
        """Connect anew, beside what there is."""
        try:
            return await self.dial(peer_of(peer_id), self.peerstore.addrs(peer_id), fresh=True)
        except (KasError, ValueError, PeerStoreError):
            return None

    async def new_stream(self, peer_id: ID) -> INetStream:
        """A bare stream to a peer; connects if need be."""
        connection = self.connection_to(peer_of(peer_id))
        if connection is None:
            connection = cast(SwarmConnection, (await self.dial_peer(peer_id))[0])
        return await connection.new_stream()

    async def close_peer(self, peer_id: ID) -> None:
        """Close every connection to a peer in order."""
        await self.disconnect(peer_of(peer_id))

    def _best_connection(self, connections: list[INetConn]) -> INetConn:
        return max(cast(list[SwarmConnection], connections), key=_rank)

    async def add_conn(self, muxed_conn: IMuxedConn, direction: str = "unknown") -> Any:
        """Refused: a connection of another transport knows none of our limits."""
        raise SwarmException("this swarm carries its own connections only")

    async def dial_addr_as_responder(self, *_: object, **__: object) -> Any:
        """Refused: roles are given with `upgrade_raw`."""
        raise SwarmException("use Swarm.upgrade_raw(..., initiator=False)")

    async def upgrade_outbound_raw_conn(self, raw_conn: IRawConnection, peer_id: ID, pre_scope: Any = None) -> Any:
        """Refused: see `upgrade_raw`."""
        raise SwarmException("use Swarm.upgrade_raw")

    async def upgrade_inbound_raw_conn(self, raw_conn: IRawConnection, maddr: Multiaddr, pre_scope: Any = None) -> Any:
        """Refused: see `upgrade_raw`."""
        raise SwarmException("use Swarm.upgrade_raw")

    async def upgrade_raw(
        self, raw: RawConnection, *, peer: PeerId | None, initiator: bool, path: Path = DIRECT
    ) -> SwarmConnection:
        """Make a connection of a byte pipe that was obtained in another way: a circuit, a punched hole.

        Args:
            raw: the pipe; closed if this fails.
            peer: who must be at the other end.
            initiator: our role, whoever dialed.
            path: the way that the pipe takes.

        Raises:
            Refused: a list or limit of ours forbids it.
            UpgradeError: the handshakes failed.
            ConnectionLost: this node is not running.
        """
        started = trio.current_time()
        if self._carrying is None:
            raw.abort()
            raise ConnectionLost("this node is not running")
        ip = _ip_of(raw.remote_address) if path.kind is not PathKind.RELAYED else None
        handshake = trio.CancelScope()
        try:
            if initiator:
                ticket = self.admission.admit_dial(peer, started)
            else:
                ticket = self.admission.admit_inbound(ip, started, path.relay)
                ticket.evict = handshake.cancel
        except Refused:
            raw.abort()
            raise
        kept = False
        connection: Connection | None = None
        try:
            with handshake:
                connection = await self._upgrade(raw, initiator=initiator, expected=peer, path=path)
            if handshake.cancel_called:
                raw.abort()
                raise _evicted()
            self._establish(ticket, connection)
            wrapped = SwarmConnection(connection, ticket, self._notify_soon)
            with trio.CancelScope(shield=True):  # who hears that it is up may cancel us, as we are not needed any more
                await self._carrying.start(self._carry, wrapped, trio.current_time() - started)
            kept = True
            return wrapped
        finally:
            if not kept:
                ticket.release()
                if connection is not None:
                    connection.abort("it was refused")

    async def dial_from_fresh_port(self, peer: PeerId, address: str) -> SwarmConnection:
        """Connect to a peer at one direct address, beside whatever else is under way with it: a punch needs the listen
        port for itself.

        Raises:
            DialError: nobody answers there.
            AddressError: the address is malformed, another peer's, or our own.
            Refused, UpgradeError, ConnectionLost: as `upgrade_raw`.
        """
        to = addresses.parse(address)
        self._check_usable(to, peer)
        try:
            raw = await self.network.dial_fresh(addresses.without_peer(to))
        except OSError as error:
            raise DialError(str(peer), hint=f"{address}: {error.strerror or error}") from error
        return await self.upgrade_raw(raw, peer=peer, initiator=True)

    # Notifees

    def _notify_soon(self, method: str, *arguments: object) -> None:
        """Tell every notifee, each in its own time and in order. Nobody waits for a notifee."""
        if self._tasks is None:
            return
        for notifee in self.notifees:
            feed = self._feeds.setdefault(id(notifee), _Feed())
            if len(feed.queue) >= NOTIFEE_QUEUE:
                self.events.emit(LimitHit(reason="notifee_queue", peer=None, address=""))
                continue
            feed.queue.append((method, arguments))
            if not feed.busy:
                feed.busy = True
                self._tasks.start_soon(self._feed, notifee, feed)

    async def _feed(self, notifee: INotifee, feed: _Feed) -> None:
        try:
            while feed.queue:
                method, arguments = feed.queue.popleft()
                try:
                    await getattr(notifee, method)(self, *arguments)
                except Exception:  # a notifee is another library's code, as a handler is
                    logger.exception("%s.%s failed", type(notifee).__name__, method)
        finally:
            feed.busy = False
            if not feed.queue:
                self._feeds.pop(id(notifee), None)

    async def _notify(self, method: str, *args: Any) -> None:
        self._notify_soon(method, *args)


def _evicted() -> UpgradeError:
    error = UpgradeError("max_pending_inbound: it was still shaking hands when another needed the place")
    error.stage = Stage.LIMITS
    return error


def _rank(connection: SwarmConnection) -> tuple[bool, float, int, int]:
    transport = connection.connection
    return transport.path.kind is not PathKind.RELAYED, connection.lasts, len(transport.streams), transport.number


def _ip_of(address: str) -> str | None:
    where = addresses.ip_port(address)
    return where[0].partition("%")[0] if where is not None else None


def _endpoint(address: str) -> tuple[str, int]:
    where = addresses.ip_port(address)
    assert where is not None, "a circuit is not accepted"
    return where


def _named_and_plain(wanted: Iterable[str]) -> tuple[list[Multiaddr], list[Multiaddr]]:
    parsed = [addresses.parse(each) for each in wanted]
    named = [each for each in parsed if addresses.name_of(each) is not None]
    return named, [each for each in parsed if addresses.name_of(each) is None]


def _of_peer(address: Multiaddr | str, peer: PeerId | None) -> Multiaddr:
    """The address, parsed.

    Raises:
        AddressError: it is malformed, or another peer's.
    """
    parsed = addresses.parse(address)
    owner = addresses.peer_of(parsed)
    if owner is not None and peer is not None and owner != peer:
        raise AddressError(f"{parsed} is an address of another peer than {peer}")
    return parsed


def _again(error: KasError | None) -> KasError:
    """The same failure, for one more of those who waited for it."""
    if isinstance(error, DialError):
        again: KasError = DialError(error.target, error.failures, error.hint)
    elif isinstance(error, Refused):
        again = Refused(error.limit, str(error))
    else:
        again = ConnectionLost(str(error))
    again.__cause__ = error
    return again
