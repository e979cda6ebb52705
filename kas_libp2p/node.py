"""A node: everything wired together, in one nursery.

::

    async with open_node(Config(listen=("/ip4/0.0.0.0/tcp/16117",))) as node:
        stream = await node.connect("/ip4/192.0.2.1/tcp/16117/p2p/12D3KooW…")

A node listens, identifies everybody who connects, answers pings and the perf protocol, and serves what `Node.serve` is
told to. It dials nobody that it was not asked to. Leaving the block ends every connection in order.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import trio
from multiaddr import Multiaddr

from kas_libp2p import __version__, addresses, identify, perf, ping
from kas_libp2p._identify import PeerInfo
from kas_libp2p.addresses import parse_target
from kas_libp2p.config import Config, Limits
from kas_libp2p.errors import Refused
from kas_libp2p.events import LimitHit, Subscription
from kas_libp2p.identity import Identity
from kas_libp2p.metadata import Dialect, Direction, OverlayStream, Path, PeerId
from kas_libp2p.seams import KASPA, KaspaStreams, is_kaspa
from kas_libp2p.swarm import Network, Policy, Swarm, SwarmConnection
from kas_libp2p.transport.connection import Connection
from kas_libp2p.transport.yamux.stream import YamuxStream

Handler = Callable[[OverlayStream], Awaitable[None]]

AGENT = f"kas-libp2p/{__version__}"
PROTOCOL_VERSION = f"/kaspad/libp2p/{__version__}"
"""The shape of kaspad's own overlay, with our version."""
BOOK_PEERS, BOOK_ADDRESSES = 1024, 16
"""Peers whose addresses are remembered, and addresses of each; the least recently seen are forgotten."""
MAX_STREAMS, MAX_STREAMS_PER_PEER = 256, 16
"""Streams of one protocol that are served at once, unless `Node.serve` is told otherwise."""


@dataclass(frozen=True, slots=True)
class StreamStatus:
    """An open stream.

    Attributes:
        protocol: its id; empty while it is being agreed on.
        direction: who opened it.
        seconds: how long it has been open.
        received, sent: payload bytes.
    """

    protocol: str
    direction: Direction
    seconds: float
    received: int
    sent: int


@dataclass(frozen=True, slots=True)
class ConnectionStatus:
    """A connection.

    Attributes:
        number: counts the connections of this process.
        peer, path, direction: who, which way, who opened it.
        local_address, remote_address: multiaddrs as text.
        seconds: how long it has been up.
        rtt: last measured round trip in seconds.
        received, sent: bytes on the wire.
        agent, protocols: what the peer told; empty if it has not.
        observed: our address as the peer sees it.
        streams: what is open on it.
    """

    number: int
    peer: PeerId
    path: Path
    direction: Direction
    local_address: str
    remote_address: str
    seconds: float
    rtt: float | None
    received: int
    sent: int
    agent: str
    protocols: tuple[str, ...]
    observed: str | None
    streams: tuple[StreamStatus, ...]


@dataclass(frozen=True, slots=True)
class Status:
    """A node at one moment.

    Attributes:
        peer_id, agent: who we are.
        addresses: where we can be reached, our peer id included.
        protocols: what is served.
        connections: the oldest first.
        limits: what is allowed.
        in_use: how much of each limit is taken.
        limit_hits: how often each limit, list or gate said no.
        bans: what is banned, and for how many seconds more.
        known_peers: how many peers' addresses are remembered.
        events: how often each event occurred, as ``name`` or ``name/detail``.
        seconds: how long the node has been up.
    """

    peer_id: PeerId
    agent: str
    addresses: tuple[str, ...]
    protocols: tuple[str, ...]
    connections: tuple[ConnectionStatus, ...]
    limits: Limits
    in_use: Mapping[str, int]
    limit_hits: Mapping[str, int]
    bans: Mapping[str, float]
    known_peers: int
    events: Mapping[str, int]
    seconds: float


class Node:
    """A running node. Made by `open_node`.

    Attributes:
        config, identity: as given.
        swarm: connections, one floor below; py-libp2p's services can be built on it.
        bus: where events go.
    """

    def __init__(self, swarm: Swarm) -> None:
        self.config: Config = swarm.config
        self.identity: Identity = swarm.identity
        self.swarm = swarm
        self.bus = swarm.events
        self._started = trio.current_time()
        self._book: OrderedDict[PeerId, dict[str, None]] = OrderedDict()
        self._kaspa = KaspaStreams()
        self._announce = tuple(addresses.parse(each) for each in self.config.announce)
        self._nursery: trio.Nursery | None = None
        self._identify = identify.Identify(
            self.identity,
            self.bus,
            listen=self._listen,
            protocols=swarm.protocols,
            agent=AGENT,
            protocol_version=PROTOCOL_VERSION,
            wall_clock=time.time,
        )
        swarm.on_connected.append(self._connected)
        swarm.on_disconnected.append(self._disconnected)
        swarm.on_addresses.append(self._identify.changed)
        swarm.handle(identify.ID, self._identify.handle, max_per_peer=2)
        swarm.handle(identify.PUSH, self._identify.handle_push, max_per_peer=1)
        swarm.handle(ping.ID, ping.handle, max_per_peer=ping.MAX_STREAMS_PER_PEER)
        swarm.handle(perf.ID, perf.handle, max_streams=4, max_per_peer=2)

    # Who and where

    @property
    def peer_id(self) -> PeerId:
        """Our peer id."""
        return self.identity.peer_id

    @property
    def addresses(self) -> tuple[str, ...]:
        """Where we can be reached, our peer id included: what was announced, or what we listen on."""
        return tuple(str(addresses.with_peer(each, self.peer_id)) for each in self._listen())

    @property
    def connections(self) -> tuple[SwarmConnection, ...]:
        """The connections that are up."""
        return tuple(each for each in self.swarm.all_connections() if not each.is_closed)

    def _listen(self) -> Sequence[Multiaddr]:
        return self._announce or tuple(addresses.parse(each) for each in self.swarm.listen_addresses())

    async def listen(self, *on: str) -> None:
        """Listen on more addresses.

        Raises:
            ListenError: one can't be listened on; then none of them is.
            AddressError: one is no multiaddr.
        """
        await self.swarm.listen(*(addresses.parse(each) for each in on))

    # Streams

    async def connect(
        self,
        target: str,
        protocol: str | Sequence[str] = KASPA,
        *,
        addresses: Iterable[str] = (),
    ) -> OverlayStream:
        """Open a stream to a peer, over the connection that there is or a new one.

        Args:
            target: a multiaddr, with or without peer id; a peer id; or ``ip:port`` of a libp2p listener.
            protocol: one protocol id, or several in order of preference. Left out: a Kaspa stream, of which there is
                one per connection (see `kas_libp2p.seams`); the dialect agreed on stands in the stream's metadata.
            addresses: addresses of the peer beside those that are known.

        Returns:
            The stream. With one protocol, it is taken for agreed, and reading or writing raise `NegotiationError` if
            the peer does not serve it.

        Raises:
            AddressError: the target is none of these.
            DialError: no address led to the peer.
            Refused: a list, ban or limit of ours forbids it, or there is a Kaspa stream with the peer already. One that
                was closed here counts until the peer has closed it too.
            NegotiationError, UpgradeTimeout, ConnectionLost: no stream could be opened.
        """
        protocols = (protocol,) if isinstance(protocol, str) else tuple(protocol)
        if is_kaspa(protocols):
            return await self._connect_kaspa(target, protocols, addresses)
        connection = await self._reach(target, addresses)
        return await connection.open_stream(*protocols)

    async def _connect_kaspa(self, target: str, protocols: tuple[str, ...], more: Iterable[str]) -> YamuxStream:
        connection = await self._reach(target, more)
        peer = connection.peer
        usable = [each for each in self.swarm.connections_to(peer) if not each.is_closed]
        for each in sorted(usable, key=lambda each: not each.connection.initiator):
            if self._kaspa.busy(each.connection):
                raise Refused("one_kaspa_stream", f"there is a Kaspa stream with {peer} already")
        for each in sorted(usable, key=lambda each: not each.connection.initiator):
            offered = protocols
            if not each.connection.initiator:
                offered = await self._offered_as_responder(each.connection, protocols)
            if offered:
                each.last_used = trio.current_time()
                return await self._kaspa.open(each.connection, offered)
        fresh = await self.swarm.dial(peer, self._known_addresses(peer, more), fresh=True)
        return await self._kaspa.open(fresh.connection, protocols)

    async def _offered_as_responder(self, connection: Connection, protocols: tuple[str, ...]) -> tuple[str, ...]:
        if Dialect.MESSAGES not in protocols:
            return ()
        info = await self._identify.wait(connection)
        return (Dialect.MESSAGES,) if info is not None and Dialect.MESSAGES in info.protocols else ()

    async def _reach(self, target: str, more: Iterable[str]) -> SwarmConnection:
        parsed = parse_target(target)
        if parsed.address is None:
            peer = parsed.peer
            assert peer is not None
            connection = await self.swarm.dial(peer, self._known_addresses(peer, more))
        elif parsed.peer is not None:
            more = (str(parsed.address), *more)
            connection = await self.swarm.dial(parsed.peer, self._known_addresses(parsed.peer, more))
        else:
            connection = await self.swarm.dial(None, [parsed.address])
        if connection.connection.direction is Direction.OUTBOUND:
            self._remember(connection.peer, [connection.connection.remote_address])
        return connection

    async def serve(
        self,
        handler: Handler,
        protocol: str | Sequence[str] = KASPA,
        *,
        max_streams: int = MAX_STREAMS,
        max_per_peer: int = MAX_STREAMS_PER_PEER,
    ) -> None:
        """Serve protocols from now on. Returns at once; each stream gets a task of its own.

        Args:
            handler: gets each stream. When it returns, the stream is closed; if it raises, the stream is reset, a
                `HandlerFailed` event tells why, and nothing else is touched.
            protocol: one protocol id or several. Left out: Kaspa streams, of which surplus ones are reset.
            max_streams: streams that may be open at once, of each protocol.
            max_per_peer: of them with one peer.

        Raises:
            ValueError: a protocol is served already.
        """
        for each in (protocol,) if isinstance(protocol, str) else tuple(protocol):
            guarded = self._kaspa.guard(handler, self._surplus) if each in KASPA else handler
            self.swarm.handle(each, guarded, max_streams=max_streams, max_per_peer=max_per_peer)
        self._identify.changed()
        await trio.lowlevel.checkpoint()

    def withdraw(self, protocol: str | Sequence[str] = KASPA) -> None:
        """Serve protocols no longer. Streams that are open stay."""
        for each in (protocol,) if isinstance(protocol, str) else tuple(protocol):
            self.swarm.unhandle(each)
        self._identify.changed()

    def _surplus(self, stream: YamuxStream) -> None:
        connection = stream.connection
        self.bus.emit(LimitHit(reason="one_kaspa_stream", peer=connection.peer, address=connection.remote_address))

    # Peers

    async def ping(self, target: str, *, addresses: Iterable[str] = ()) -> float:
        """The round trip to a peer in seconds, through everything that a stream goes through.

        Connects if need be. For several pings over one stream see `kas_libp2p.ping.open_pinger`.

        Raises:
            AddressError, DialError, Refused: as `connect`.
            NegotiationError: the peer does not answer pings.
            trio.TooSlowError, ConnectionLost, RemoteProtocolError: it did not answer this one.
        """
        connection = await self._reach(target, addresses)
        connection.last_used = trio.current_time()
        async with ping.open_pinger(connection.connection) as pinger:
            await pinger.ping()  # agrees on the protocol
            return await pinger.ping()

    async def identify(self, target: str, *, addresses: Iterable[str] = ()) -> PeerInfo | None:
        """What a peer tells about itself; ``None`` if it tells nothing. Connects if need be.

        Raises:
            AddressError, DialError, Refused: as `connect`.
        """
        connection = await self._reach(target, addresses)
        return await self._identify.wait(connection.connection)

    def peer_info(self, peer: PeerId) -> PeerInfo | None:
        """What a connected peer has told about itself so far."""
        return self._identify.peers.get(peer)

    async def disconnect(self, peer: str, reason: str = "") -> int:
        """Close every connection with a peer in order.

        Returns:
            how many there were.

        Raises:
            AddressError: no peer id.
        """
        return await self.swarm.disconnect(addresses.parse_peer_id(peer), reason)

    def ban(self, target: str, seconds: float) -> None:
        """Keep a peer id or IP out for a while, and end its connections at once.

        Raises:
            AddressError: it is neither.
        """
        self.swarm.ban(target, seconds)

    def unban(self, target: str) -> bool:
        """Lift a ban. Returns whether there was one.

        Raises:
            AddressError: neither a peer id nor an IP.
        """
        return self.swarm.admission.unban(target)

    def set_policy(self, policy: Policy | None) -> None:
        """Ask a function about every connection, see `kas_libp2p.swarm.Policy`; ``None`` to ask nobody."""
        self.swarm.admission.policy = policy

    def known_peer_at(self, ip: str, port: int) -> PeerId | None:
        """The peer that was last known to be reachable at an IP and port; ``None`` if none was."""
        wanted = str(addresses.from_ip_port(ip, port))
        return next((peer for peer in reversed(self._book) if wanted in self._book[peer]), None)

    def _known_addresses(self, peer: PeerId, more: Iterable[str]) -> list[str]:
        return [*more, *self._book.get(peer, ())]

    def _remember(self, peer: PeerId, found: Iterable[str]) -> None:
        known = self._book.pop(peer, {})
        for each in found:
            known.pop(each, None)
            known[each] = None
        while len(known) > BOOK_ADDRESSES:
            del known[next(iter(known))]
        self._book[peer] = known
        if len(self._book) > BOOK_PEERS:
            self._book.popitem(last=False)

    # What goes on

    def events(self) -> Subscription:
        """What happens from now on, as an async iterator of frozen dataclasses. It ends with the node."""
        return self.bus.listen()

    def status(self) -> Status:
        """Everything at this moment."""
        now = trio.current_time()
        hits: dict[str, int] = {}
        for (name, detail), count in self.bus.counts.items():
            if name in ("limit-hit", "inbound-refused"):
                hits[detail] = hits.get(detail, 0) + count
        return Status(
            peer_id=self.peer_id,
            agent=AGENT,
            addresses=self.addresses,
            protocols=self.swarm.protocols(),
            connections=tuple(self._connection_status(each.connection, now) for each in self.connections),
            limits=self.config.limits,
            in_use=self.swarm.admission.in_use(),
            limit_hits=hits,
            bans=self.swarm.admission.bans(now),
            known_peers=len(self._book),
            events={f"{name}/{detail}" if detail else name: n for (name, detail), n in self.bus.counts.items()},
            seconds=now - self._started,
        )

    def _connection_status(self, connection: Connection, now: float) -> ConnectionStatus:
        info = self._identify.peers.get(connection.peer)
        return ConnectionStatus(
            number=connection.number,
            peer=connection.peer,
            path=connection.path,
            direction=connection.direction,
            local_address=connection.local_address,
            remote_address=connection.remote_address,
            seconds=now - connection.opened_at,
            rtt=connection.rtt,
            received=connection.received,
            sent=connection.sent,
            agent=info.agent if info is not None else "",
            protocols=info.protocols if info is not None else (),
            observed=self._identify.observed.get(connection.number),
            streams=tuple(
                StreamStatus(each.protocol, each.direction, now - each.opened_at, each.received, each.sent)
                for each in connection.streams
            ),
        )

    # Wiring

    async def _run(self, *, task_status: Any) -> None:
        async with trio.open_nursery() as nursery:
            await nursery.start(self.swarm.carry)
            self._nursery = nursery
            nursery.start_soon(self._identify.push_changes, self._best_connections)
            await self.listen(*self.config.listen)
            self._identify.changed()
            task_status.started()

    def _best_connections(self) -> list[Connection]:
        peers = {each.peer for each in self.connections}
        best = (self.swarm.connection_to(peer) for peer in peers)
        return [each.connection for each in best if each is not None]

    def _connected(self, connection: SwarmConnection) -> None:
        if self._nursery is not None:
            self._nursery.start_soon(self._get_to_know, connection.connection)

    async def _get_to_know(self, connection: Connection) -> None:
        await self._identify.ask(connection)
        info = self._identify.peers.get(connection.peer)
        if info is not None:
            self._remember(connection.peer, reversed(info.addresses[:BOOK_ADDRESSES]))

    def _disconnected(self, connection: SwarmConnection) -> None:
        last = not self.swarm.connections_to(connection.peer)
        self._identify.forget(connection.connection, last=last)
        self._kaspa.forget(connection.connection)


@asynccontextmanager
async def open_node(
    config: Config | None = None,
    *,
    identity: Identity | None = None,
    network: Network | None = None,
) -> AsyncIterator[Node]:
    """Run a node for the length of an ``async with`` block.

    Args:
        config: the settings; the defaults listen on every interface, at ports that the system chooses.
        identity: our key; from ``config.key_file`` if left out, else a new one.
        network: where byte pipes come from; TCP if left out.

    Raises:
        ConfigError, IdentityError: a setting or the key file is wrong.
        ListenError: an address can't be listened on.
    """
    config = config if config is not None else Config()
    if identity is None:
        identity = Identity.load_or_create(config.key_file) if config.key_file is not None else Identity.generate()
    node = Node(Swarm(identity, config, network=network))
    problem: BaseException | None = None
    try:
        async with trio.open_nursery() as nursery:
            await nursery.start(node._run)
            try:
                yield node
            except BaseException as error:
                problem = error
                raise
            nursery.cancel_scope.cancel()
    except BaseExceptionGroup as group:
        # Whoever uses a node has no nursery in mind: what was raised in the block leaves it as it was.
        lone = _unwrapped(group, problem)
        if lone is None:
            raise
        problem = lone
    finally:
        node.bus.close()
    if problem is not None:
        raise problem


def _unwrapped(group: BaseExceptionGroup[BaseException], problem: BaseException | None) -> BaseException | None:
    """The one exception that nurseries have put into groups; ``None`` if there are several."""
    error: BaseException = group
    while error is not problem and isinstance(error, BaseExceptionGroup):
        if len(error.exceptions) != 1:
            return None
        error = error.exceptions[0]
    return error
