"""A node: everything wired together, in one nursery.

::

    async with open_node(Config(listen=("/ip4/0.0.0.0/tcp/16117",))) as node:
        stream = await node.connect("/ip4/192.0.2.1/tcp/16117/p2p/12D3KooW…")

A node listens, identifies everybody who connects, answers pings, and serves what `Node.serve` is told to. It dials whom
it is asked to, and of its own accord only relays, to be reachable through them (``relay.target``), and peers that ask
whether they can be dialed (``autonat.serve``). Leaving the block ends every connection in order.
"""

from __future__ import annotations

import random
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

import trio
from multiaddr import Multiaddr

from kas_libp2p import __version__, addresses, identify, ping
from kas_libp2p._identify import PeerInfo, for_remote
from kas_libp2p.addresses import parse_target
from kas_libp2p.autonat.roles import Reachability
from kas_libp2p.config import Config, Role
from kas_libp2p.dcutr._messages import PROTOCOL as DCUTR
from kas_libp2p.dcutr.service import MAX_STREAMS as MAX_PUNCHES
from kas_libp2p.dcutr.service import MAX_STREAMS_PER_PEER as MAX_PUNCHES_PER_PEER
from kas_libp2p.dcutr.service import Dcutr
from kas_libp2p.errors import AddressError, ConfigError, Refused
from kas_libp2p.events import LimitHit, Subscription
from kas_libp2p.identity import Identity
from kas_libp2p.metadata import SESSION, Dialect, Direction, OverlayStream, Path, PathKind, PeerId
from kas_libp2p.portmap.service import PortMapper
from kas_libp2p.relay.client import STOP, STOPS_AT_ONCE, RelayClient
from kas_libp2p.relay.exchange import MAX_STREAMS as MAX_EXCHANGES
from kas_libp2p.relay.exchange import RELAYS, RelayExchange
from kas_libp2p.relay.pool import Probe, RelayPool
from kas_libp2p.relay.renewal import Ceiling, CircuitRenewal
from kas_libp2p.relay.renewal import Way as CircuitWay
from kas_libp2p.relay.server import HOP, RelayServer
from kas_libp2p.seams import KASPA, KaspaStreams, is_kaspa
from kas_libp2p.session._machine import ANSWER_WITHIN
from kas_libp2p.session.service import Sessions
from kas_libp2p.status import ConnectionStatus, Status, StreamStatus
from kas_libp2p.strategy._intent import PROTOCOL as INTENT
from kas_libp2p.strategy._plan import Known, Way
from kas_libp2p.strategy._why import Facts
from kas_libp2p.strategy.intent import MAX_STREAMS as MAX_INTENTS
from kas_libp2p.strategy.intent import MAX_STREAMS_PER_PEER as MAX_INTENTS_PER_PEER
from kas_libp2p.strategy.upgrader import Upgrader
from kas_libp2p.strategy.where import Whereabouts
from kas_libp2p.swarm import Candidate as Candidate
from kas_libp2p.swarm import Network, Swarm
from kas_libp2p.swarm import Policy as Policy
from kas_libp2p.swarm import SwarmConnection as SwarmConnection
from kas_libp2p.transport._punch import Target
from kas_libp2p.transport.connection import Connection
from kas_libp2p.transport.pipe import CircuitPipe
from kas_libp2p.transport.yamux.stream import YamuxStream

Handler = Callable[[OverlayStream], Awaitable[None]]

AGENT = f"kas-libp2p/{__version__}"
PROTOCOL_VERSION = f"/kaspad/libp2p/{__version__}"
"""The shape of kaspad's own overlay, with our version."""
BOOK_PEERS, BOOK_ADDRESSES = 1024, 16
"""Peers whose addresses are remembered, and addresses of each; the least recently seen are forgotten."""
TOLD_MARGIN = 0.005
"""Seconds before the instant of a punch at which everything has to be known: what comes in after it may be the peer."""
ROLE_TIME = 15.0
"""Seconds in which a node finds out whether it can be dialed: in a laboratory 4 if it can, else 9."""
ALIVE_WITHIN = ANSWER_WITHIN
"""Seconds for the answer of a relay's connection that a session needs: as for its paths."""
GONE_WITHIN = 1.0
"""The same of any connection from an address that this machine has no more: no answer comes unless it has that back."""
RELAY_PINGS = 3
"""Round trips that are measured to a relay; the shortest says most of the way."""
MAX_STREAMS, MAX_STREAMS_PER_PEER = 256, 16
"""Streams of one protocol that are served at once, unless `Node.serve` is told otherwise."""


class Node:
    """A running node. Made by `open_node`.

    Attributes:
        config, identity: as given.
        swarm: connections, one floor below; py-libp2p's services can be built on it.
        bus: where events go.
        reachability: who can dial us.
        relay_client: the places that we hold on relays, and circuits.
        relay_pool: which relays we know, and which of them we hold places on.
        relay_exchange: what peers tell us of relays, and we them.
        relay_server: what we carry for others, while we are a relay.
        dcutr: punches.
        upgrader: makes relayed connections direct.
        sessions: Kaspa streams that move between paths, as `kas_libp2p.session.stream.SessionStream`.
        on_direct: called with a peer when a connection with it that no relay carries has proven itself; none may block.
    """

    def __init__(self, swarm: Swarm) -> None:
        self.config: Config = swarm.config
        self.identity: Identity = swarm.identity
        self.swarm = swarm
        self.bus = swarm.events
        self._started = trio.current_time()
        self._book: OrderedDict[PeerId, dict[str, None]] = OrderedDict()
        self._seen: OrderedDict[str, PeerId] = OrderedDict()
        self.on_direct: list[Callable[[PeerId], None]] = []
        self._kaspa = KaspaStreams(lambda stream: self.sessions.talks(stream))
        self._announce = _parsed("announce", self.config.announce)
        self._dice = random.Random()  # noqa: S311 - spreads load, guards nothing
        self._nursery: trio.Nursery | None = None
        self._checking: set[int] = set()  # connections, once for all sessions that need them
        self._here: set[str] = set()  # IPs that we listened on when the interfaces were last looked at
        self._role: Role | None = None
        self._identify = identify.Identify(
            self.identity,
            self.bus,
            listen=self._told_addresses,
            protocols=self._told_protocols,
            agent=AGENT,
            protocol_version=PROTOCOL_VERSION,
            wall_clock=time.time,
        )
        self.reachability = Reachability(
            self.peer_id,
            self.config,
            self.bus,
            listen=swarm.listen_addresses,
            connections=lambda: [each.connection for each in self.connections],
            protocols_of=self._protocols_of,
            dial=swarm.network.dial_fresh,
        )
        self.reachability.on_changed.append(self._reachability_changed)
        self._port_mapper: PortMapper | None = None
        if self.config.port_mapping:
            secret = self.identity.sign(b"kas-libp2p port mapping")
            self._port_mapper = PortMapper(self.bus, listen=swarm.listen_addresses, dice=self._dice, secret=secret)
            self._port_mapper.on_changed.append(self._mappings_changed)
            swarm.on_addresses.append(self._port_mapper.network_changed)
        swarm.network.on_contact = self.reachability.contacted
        self.relay_client = RelayClient(
            self.identity,
            self.config.relay,
            self.bus,
            reach=self._reach_relay,
            upgrade=self._upgrade_circuit,
            admit=lambda peer: swarm.admission.check_peer(peer, trio.current_time()),
            wall_clock=time.time,
        )
        self.relay_client.on_changed.append(self._identify.changed)
        self.relay_server = RelayServer(
            self.identity,
            self.config.relay,
            self.bus,
            addresses=lambda connection: for_remote(self._listen(), connection.remote_address),
            offers_kaspa=self._offers_kaspa,
            wall_clock=time.time,
        )
        self._pinned: dict[PeerId, tuple[str, ...]] | None = None
        self.relay_pool = RelayPool(
            self.config.relay,
            self.bus,
            hold=self._hold,
            probe=self._visit_relay,
            in_use=self._relays_in_use,
            wall_clock=time.time,
            dice=self._dice,
            quiet=ROLE_TIME if self.config.role is Role.AUTO and self.config.listen else 0.0,
            allow_private=self.config.autonat.allow_private,
        )
        self.relay_exchange = RelayExchange(
            self.peer_id,
            self.bus,
            self.relay_pool,
            connections=self._best_connections,
            operator=self.config.relay.operator,
            free=self._free_places,
            dice=self._dice,
        )
        self.relay_client.on_made.append(self.relay_pool.made)
        self.relay_client.on_failed.append(self.relay_pool.failed)
        self.relay_client.on_lost.append(self.relay_pool.lost)
        self._where = Whereabouts(
            self.reachability,
            interfaces=swarm.listen_addresses,
            listen=self._listen,
            mapped=self._mapped,
            connections_to=lambda peer: [each.connection for each in swarm.connections_to(peer)],
            identified=self._addresses_of,
            shares_local=lambda peer: self.upgrader.shares_local(peer),
            allow_private=self.config.punch.allow_private,
        )
        self.dcutr = Dcutr(
            self.peer_id,
            self.bus,
            punch=self._punch,
            own=self._where.ours,
            known=self._where.theirs,
            identified=self._identify.wait,
            welcomes=lambda connection: self.upgrader.welcomes(connection),
            allow_private=self.config.punch.allow_private,
        )
        self.upgrader = Upgrader(
            self.config,
            self.bus,
            invite=self.dcutr.invite,
            abandon=self.dcutr.abandon,
            dial=swarm.dial_from_fresh_port,
            facts=self._where.nats,
            wall_clock=time.time,
            dice=self._dice,
        )
        self.dcutr.on_attempt_failed.append(self.upgrader.attempt_failed)
        self.dcutr.on_done.append(self.upgrader.punched)
        self.upgrader.on_proven.append(self._proven)
        self.sessions = Sessions(
            self.config,
            self.bus,
            connections=lambda peer: [each.connection for each in swarm.connections_to(peer) if not each.is_closed],
            reach=self._reach_again,
            proven=self.upgrader.proven,
            surplus=self._kaspa.is_surplus,
        )
        self.sessions.on_some = self._serve_sessions
        swarm.circuits = self.relay_client.dial
        self._renewal = CircuitRenewal(
            self.bus,
            connections=lambda: [each.connection for each in self.connections],
            dial=self._dial_beside,
            carries_session=self.sessions.carries,
            ways=self._circuit_ways,
            small_circuits=self.config.session.small_circuits,
        )
        self.relay_client.on_asked.append(self._renewal.asked)
        swarm.keeps += (self.relay_client.keeps, self.relay_server.keeps, self._renewal.keeps, self.sessions.keeps)
        swarm.on_connected.append(self._connected)
        swarm.on_disconnected.append(self._disconnected)
        swarm.on_addresses += (self._identify.changed, self.reachability.listening)
        swarm.on_addresses += (self.relay_client.network_changed, self.relay_pool.network_changed)
        swarm.on_addresses.append(self._network_changed)
        self._identify.on_identified.append(self._identified)
        swarm.handle(identify.ID, self._identify.handle, max_per_peer=2)
        swarm.handle(identify.PUSH, self._identify.handle_push, max_per_peer=1)
        swarm.handle(ping.ID, ping.handle, max_per_peer=ping.MAX_STREAMS_PER_PEER)
        swarm.handle(RELAYS, self.relay_exchange.handle, max_streams=MAX_EXCHANGES, max_per_peer=1)
        swarm.handle(STOP, self.relay_client.handle_stop, max_per_peer=STOPS_AT_ONCE, hands_over=True)
        if self.config.punch.enabled:
            swarm.handle(DCUTR, self.dcutr.handle, max_streams=MAX_PUNCHES, max_per_peer=MAX_PUNCHES_PER_PEER)
            swarm.handle(
                INTENT, self.upgrader.intents.handle, max_streams=MAX_INTENTS, max_per_peer=MAX_INTENTS_PER_PEER
            )
        for each in self.reachability.services:
            swarm.handle(each.protocol, each.handle, max_streams=each.max_streams, max_per_peer=each.max_per_peer)

    # Who and where

    @property
    def peer_id(self) -> PeerId:
        """Our peer id."""
        return self.identity.peer_id

    @property
    def addresses(self) -> tuple[str, ...]:
        """Where we can be reached, our peer id included: what was announced or we listen on, and through relays."""
        found = (*self._listen(), *self.relay_client.addresses())
        return tuple(str(addresses.with_peer(each, self.peer_id)) for each in found)

    @property
    def connections(self) -> tuple[SwarmConnection, ...]:
        """The connections that are up."""
        return tuple(each for each in self.swarm.all_connections() if not each.is_closed)

    def _listen(self) -> Sequence[Multiaddr]:
        """Where we can be dialed: what was announced; else what others could dial, and what we listen on.

        A firewall before a public address shows only by tests, and then that address would cost others a timeout.
        """
        if self._announce:
            return self._announce
        local = [each for each in self.swarm.listen_addresses() if not self.reachability.is_refuted(each)]
        found = (*self.reachability.public_addresses(), *local)
        return tuple(map(addresses.parse, dict.fromkeys(found)))

    def _told_addresses(self) -> Sequence[Multiaddr]:
        # Only so many are told, and of many interfaces most lead nowhere for most peers.
        return (*self.relay_client.addresses(), *self._listen())

    def _told_protocols(self) -> tuple[str, ...]:
        """What is served, but a punch only once there is an address to try it at, and sessions only for who opens one.
        Who asks all the same is answered."""
        told = {DCUTR: self.reachability.offers_dcutr, SESSION: self.sessions.handler is not None}
        return tuple(each for each in self.swarm.protocols() if told.get(each, True))

    async def listen(self, *on: str) -> None:
        """Listen on more addresses.

        Raises:
            ListenError: one can't be listened on; then none of them is.
            AddressError: one is no multiaddr.
        """
        await self.swarm.listen(*(addresses.parse(each) for each in on))

    def use_relays(self, *relays: str) -> None:
        """Hold a place on each of these relays from now on, and on no other, unless everybody can dial us anyway.

        Returns at once: events tell what comes of it, `addresses` and `status` how it stands.

        Args:
            relays: multiaddrs with the relays' peer ids.

        Raises:
            AddressError: one is none.
        """
        self._pinned = _relays(relays)
        self._choose_relays()

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
            the peer does not serve it. A Kaspa stream to a node of this project is a session
            (`kas_libp2p.session.stream`), which goes on by other connections when this one ends.

        Raises:
            AddressError: the target is none of these.
            DialError: no address led to the peer.
            Refused: a list, ban or limit of ours forbids it, or there is a Kaspa stream with the peer already.
            NegotiationError, UpgradeTimeout, ConnectionLost: no stream could be opened.
        """
        protocols = (protocol,) if isinstance(protocol, str) else tuple(protocol)
        if is_kaspa(protocols):
            return await self._connect_kaspa(target, protocols, addresses)
        connection = await self._reach(target, addresses)
        return await connection.open_stream(*protocols)

    async def _connect_kaspa(self, target: str, protocols: tuple[str, ...], more: Iterable[str]) -> OverlayStream:
        named = parse_target(target).peer
        if named is not None:
            self._check_alone(named)
        connection = await self._reach(target, more)
        peer = connection.peer
        self._check_alone(peer)
        usable = [each for each in self.swarm.connections_to(peer) if not each.is_closed]
        usable.sort(key=lambda each: (each.path.kind is PathKind.RELAYED, not each.connection.initiator, -each.lasts))
        if any(self._kaspa.busy(each.connection) for each in usable):
            raise _second(peer)
        for each in usable:
            offered = protocols
            if not each.connection.initiator:
                offered = await self._offered_as_responder(each.connection, protocols)
            if offered:
                each.last_used = trio.current_time()
                return await self._open_kaspa(each.connection, offered)
        fresh = await self._dial(peer, more, fresh=True)
        return await self._open_kaspa(fresh.connection, protocols)

    def _check_alone(self, peer: PeerId) -> None:
        if self.sessions.lives(peer):
            raise _second(peer)

    async def _open_kaspa(self, connection: Connection, protocols: tuple[str, ...]) -> OverlayStream:
        if Dialect.MESSAGES in protocols and self._may_open_session(connection.peer):
            place = protocols.index(Dialect.MESSAGES)  # whoever prefers the other dialect has its way
            protocols = (*protocols[:place], SESSION, *protocols[place:])
        self.sessions.make_way(connection)
        stream = await self._kaspa.open(connection, protocols)
        return self.sessions.open(stream) if stream.protocol == SESSION else stream

    def _may_open_session(self, peer: PeerId) -> bool:
        """Whether one is worth a proposal. Whoever has more than it may have takes a plain stream."""
        info = self._identify.peers.get(peer)
        if not self.config.session.enabled or (
            info is not None and is_kaspa(info.protocols) and SESSION not in info.protocols
        ):
            return False
        try:
            self.sessions.admit(peer)
        except Refused:
            return False
        return True

    async def connect_past_relay(self, peer: PeerId) -> OverlayStream:
        """Open a Kaspa stream on a connection that no relay carries, beside one that a relay does.

        For whoever moves from the one to the other: the peer's side, if it is of this project, ends the old stream when
        the new one has come. Sessions move by themselves.

        Raises:
            Refused: there is no such connection, it has a Kaspa stream, or the peer wants to open it itself.
            NegotiationError, UpgradeTimeout, ConnectionLost: no stream could be opened.
        """
        best = self.swarm.connection_to(peer)
        if best is None or best.path.kind is PathKind.RELAYED:
            raise Refused("no_direct_path", f"there is no connection with {peer} but through a relay")
        self._check_alone(peer)
        if self._kaspa.busy(best.connection):
            raise _second(peer)
        offered = KASPA if best.connection.initiator else await self._offered_as_responder(best.connection, KASPA)
        if not offered:
            raise Refused("initiator_opens", f"{peer} has to open the Kaspa stream on that connection")
        best.last_used = trio.current_time()
        return await self._open_kaspa(best.connection, offered)

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
            connection = await self._dial(peer, more)
        elif parsed.peer is not None:
            connection = await self._dial(parsed.peer, (str(parsed.address), *more))
        else:
            connection = await self.swarm.dial(None, [parsed.address])
        if connection.connection.direction is Direction.OUTBOUND:
            self._remember(connection.connection, [connection.connection.remote_address])
        return connection

    async def _dial(
        self, peer: PeerId, more: Iterable[str], *, fresh: bool = False, only: bool = False
    ) -> SwarmConnection:
        """Connect to a peer as `kas_libp2p.strategy._plan` says, at these addresses and those that are known, or at
        these only."""
        found = list(more) if only else self._known_addresses(peer, more)
        relays = {relay for each in found if (relay := addresses.relay_of(each)) is not None}
        ways = {relay: way for relay in relays if (way := self.swarm.connection_to(relay)) is not None}
        rtts = {relay: way.connection.rtt for relay, way in ways.items() if way.connection.rtt is not None}
        # Who keeps places on relays says that nobody can dial it.
        private = any(addresses.is_relayed(each) for each in self._book.get(peer, ()))
        known = Known(tuple(found), Role.PRIVATE if private else None, relay_rtts=rtts)
        plan = self.upgrader.strategy.connect(known)
        after = plan.start_of(Way.RELAYED)
        return await self.swarm.dial(
            peer,
            [each.address for each in plan.attempts],
            fresh=fresh,
            circuits_after=after if after < float("inf") else None,
        )

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
        protocols = (protocol,) if isinstance(protocol, str) else tuple(protocol)
        for each in protocols:
            guarded = self._kaspa.guard(handler, self._surplus) if each in KASPA else handler
            self.swarm.handle(each, guarded, max_streams=max_streams, max_per_peer=max_per_peer)
        if Dialect.MESSAGES in protocols:
            self.sessions.handler = handler
            self._serve_sessions()
        self._identify.changed()
        self.relay_pool.offer_changed()
        await trio.lowlevel.checkpoint()

    def withdraw(self, protocol: str | Sequence[str] = KASPA) -> None:
        """Serve protocols no longer. Streams that are open stay, and sessions that live move on."""
        protocols = (protocol,) if isinstance(protocol, str) else tuple(protocol)
        for each in protocols:
            self.swarm.unhandle(each)
        if Dialect.MESSAGES in protocols:
            self.sessions.handler = None
            self._serve_sessions()
        self._identify.changed()

    def _serve_sessions(self) -> None:
        """Streams of sessions are taken while Kaspa streams are served, and while there is a session."""
        wanted = self.config.session.enabled and (self.sessions.handler is not None or len(self.sessions) > 0)
        sessions, serving = self.sessions, SESSION in self.swarm.protocols()
        if wanted and not serving:
            limits = {"max_streams": sessions.max_streams, "max_per_peer": sessions.max_streams_per_peer}
            self.swarm.handle(SESSION, sessions.handle, hands_over=True, **limits)
        elif serving and not wanted:
            self.swarm.unhandle(SESSION)

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

    async def disconnect(self, peer: str, reason: str = "", *, hung: bool = False) -> int:
        """Close every connection with a peer in order, and end its sessions, which would make another one.

        Args:
            hung: whether nothing gets through any more, so that an orderly end would only take time.

        Returns:
            how many there were.

        Raises:
            AddressError: no peer id.
        """
        who = addresses.parse_peer_id(peer)
        self.sessions.end(who, reason or "the peer closed the connection")
        return await self.swarm.disconnect(who, reason, hung=hung)

    def ban(self, target: str, seconds: float) -> None:
        """Keep a peer id or IP out for a while, and end its connections at once, and sessions that have no other.

        Raises:
            AddressError: it is neither.
        """
        attached = {each for each in self.sessions if each.connection is not None}
        self.swarm.ban(target, seconds)
        hit = [each for each in self.sessions if each.peer == target or (each in attached and each.connection is None)]
        for peer in {each.peer for each in hit}:
            if self.swarm.connection_to(peer) is None:
                self.sessions.end(peer, "the peer was banned")

    def unban(self, target: str) -> bool:
        """Lift a ban. Returns whether there was one.

        Raises:
            AddressError: neither a peer id nor an IP.
        """
        return self.swarm.admission.unban(target)

    def why(self, peer: str) -> list[str]:
        """Why the path to a peer is what it is, in lines: what was tried, where that ended, and what would help.

        Raises:
            AddressError: no peer id.
        """
        who = addresses.parse_peer_id(peer)
        best = self.swarm.connection_to(who)
        intent = self.upgrader.theirs(who)
        relay = best.path.relay if best is not None else None
        facts = Facts(
            ours=self._where.nats()[0],
            theirs=intent.nat if intent is not None else None,
            path=best.path if best is not None else None,
            rtt=best.connection.rtt if best is not None else None,
            relay=next((each.operator for each in self.relay_pool.status() if each.peer == relay), ""),
            mapping=self._port_mapper.problem if self._port_mapper is not None else "it is off, see port-mapping",
            stays=next((each.status().reason for each in self.sessions.of(who) if not each.closed), ""),
        )
        lines, outlook = self.upgrader.why(who, facts), self._renewal.outlook(who)
        return [*lines, f"  {outlook}"] if outlook else lines

    def set_policy(self, policy: Policy | None) -> None:
        """Ask a function about every connection, see `kas_libp2p.swarm.Policy`; ``None`` to ask nobody."""
        self.swarm.admission.policy = policy

    def known_peer_at(self, ip: str, port: int) -> PeerId | None:
        """The peer that was last seen at an IP and port; ``None`` if none was.

        Seen is who was reached there, or said so from that very IP. What a peer says of other hosts moves nobody.
        """
        return self._seen.get(str(addresses.from_ip_port(ip, port)))

    def _known_addresses(self, peer: PeerId, more: Iterable[str]) -> list[str]:
        return [*more, *self._book.get(peer, ())]

    def _remember(self, connection: Connection, found: Iterable[str]) -> None:
        peer = connection.peer
        here = addresses.ip_port(connection.remote_address)
        known = self._book.pop(peer, {})
        for each in found:
            known.pop(each, None)
            known[each] = None
            where = addresses.ip_port(each)
            if where is not None and here is not None and where[0] == here[0]:
                self._seen[each] = peer
                self._seen.move_to_end(each)
        while len(self._seen) > BOOK_PEERS:
            self._seen.popitem(last=False)
        while len(known) > BOOK_ADDRESSES:
            del known[next(iter(known))]
        self._book[peer] = known
        if len(self._book) > BOOK_PEERS:
            self._book.popitem(last=False)

    # What goes on

    def events(self) -> Subscription:
        """What happens from now on, as an async iterator of frozen dataclasses. It ends with the node."""
        return self.bus.listen()

    def ceiling(self, peer: PeerId) -> Ceiling:
        """What a session with a peer can carry over circuits, given the relays of both, as far as they are known."""
        return self._renewal.ceiling(peer)

    def shortage(self, peer: PeerId) -> float:
        """Seconds until the session with a peer can have its next circuit; 0 if it does not wait for one."""
        return self._renewal.shortage(peer)

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
            reachability=self.reachability.status(),
            mappings=self._port_mapper.mappings if self._port_mapper is not None else (),
            mapping_problem=self._port_mapper.problem if self._port_mapper is not None else "",
            reservations=self.relay_client.reservations,
            relays=self.relay_pool.status(),
            relay=self.relay_server.status() if HOP in self.swarm.protocols() else None,
            upgrades=self.upgrader.status(),
            limits=self.config.limits,
            in_use=self.swarm.admission.in_use(),
            limit_hits=hits,
            bans=self.swarm.admission.bans(now),
            known_peers=len(self._book),
            events={f"{name}/{detail}" if detail else name: n for (name, detail), n in self.bus.counts.items()},
            seconds=now - self._started,
            sessions=tuple(each.status() for each in sorted(self.sessions, key=lambda each: each.opened_at)),
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
            limits=connection.circuit.limits if connection.circuit is not None else None,
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
            await nursery.start(self.upgrader.run)
            await nursery.start(self.sessions.run)
            nursery.start_soon(self._identify.push_changes, self._best_connections)
            await self.swarm.listen(*_parsed("listen", self.config.listen))
            await nursery.start(self.relay_client.run)
            self._take_role(self.reachability.role)
            await nursery.start(self.relay_pool.run)
            nursery.start_soon(self._renewal.run)
            nursery.start_soon(self.relay_exchange.run)
            nursery.start_soon(self.reachability.run)
            if self._port_mapper is not None:
                nursery.start_soon(self._port_mapper.run)
            self._identify.changed()
            task_status.started()

    def _take_role(self, role: Role) -> None:
        """Who everybody can dial is a relay if the operator wants that; all others hold places on relays."""
        self._role = role
        public = role is Role.PUBLIC
        serving = HOP in self.swarm.protocols()
        if public and self.config.relay.serve and not serving:
            server = self.relay_server
            self.swarm.handle(
                HOP, server.handle, max_streams=server.max_streams, max_per_peer=server.max_streams_per_peer
            )
        elif serving and not public:
            self.swarm.unhandle(HOP)
            self.relay_server.withdraw()
        self._choose_relays()
        self._identify.changed()

    def _choose_relays(self) -> None:
        """Who everybody can dial needs no relay."""
        wanted = self._role is not Role.PUBLIC
        self.relay_pool.target = self.config.relay.target if wanted and self._pinned is None else 0
        if self._pinned is not None:
            self.relay_client.hold(self._pinned if wanted else {})

    def _hold(self, relays: Mapping[PeerId, tuple[str, ...]]) -> None:
        if self._pinned is None:
            self.relay_client.hold(relays)

    def _relays_in_use(self) -> set[PeerId]:
        return {each.path.relay for each in self.connections if each.path.kind is PathKind.RELAYED and each.path.relay}

    async def _visit_relay(self, relay: PeerId, at: tuple[str, ...]) -> Probe:
        connection = await self._reach_relay(relay, at)
        info = await self._identify.wait(connection)
        rtt = min([await connection.ping() for _ in range(RELAY_PINGS)])
        if info is not None and RELAYS in info.protocols:
            await self.relay_exchange.ask(connection)  # who runs it, before a place there is wanted
        dialed = connection.direction is Direction.OUTBOUND
        return Probe(rtt, connection.remote_address, info is None or HOP in info.protocols, dialed)

    def _free_places(self) -> int | None:
        if HOP not in self.swarm.protocols():
            return None
        status = self.relay_server.status()
        return status.limits.max_reservations - status.in_use["max_reservations"]

    def _mappings_changed(self) -> None:
        self.reachability.mapped(self._mapped())

    def _mapped(self) -> list[str]:
        return [each.external for each in self._port_mapper.mappings] if self._port_mapper is not None else []

    # Punching

    async def _punch(
        self, peer: PeerId, targets: Sequence[Target], *, initiator: bool, relay: PeerId, at: float, window: float
    ) -> Connection:
        await self.upgrader.told(peer, at - TOLD_MARGIN)  # what its NAT does says where it can be met
        aimed = self.upgrader.aim(peer, targets)
        many = self.upgrader.tries_many(peer)
        made = await self.swarm.punch(peer, aimed, initiator=initiator, relay=relay, at=at, window=window, many=many)
        return made.connection

    def _reachability_changed(self) -> None:
        self.upgrader.changed()
        if self.reachability.role is not self._role:
            self._take_role(self.reachability.role)
        self._identify.changed()

    def _addresses_of(self, peer: PeerId) -> Sequence[Multiaddr]:
        info = self._identify.peers.get(peer)
        return info.addresses if info is not None else ()

    def _protocols_of(self, peer: PeerId) -> Sequence[str]:
        info = self._identify.peers.get(peer)
        return info.protocols if info is not None else ()

    async def _offers_kaspa(self, connection: Connection) -> bool:
        info = await self._identify.wait(connection)
        return info is not None and is_kaspa(info.protocols)

    async def _reach_again(self, peer: PeerId, beside: bool) -> Connection:
        """For a session that has lost its path: by any way, and beside the connections there are if they don't do.

        What took the path may have taken the connections with relays along, and nobody has noticed yet. A peer that
        came by itself has nobody else dialed: where it says it is may be somebody else, or in our own network.
        """
        found = self._known_addresses(peer, ())
        if not any(each.by_us for each in self.sessions.of(peer)):
            found = [each for each in found if self._is_its_own(each, peer)]
        for relay in {addresses.relay_of(each) for each in found}:
            way = self.swarm.connection_to(relay) if relay is not None else None
            if way is not None:
                self._check(way.connection, ALIVE_WITHIN, "when it was needed")
        return (await self._dial(peer, found, fresh=beside, only=True)).connection

    def _is_its_own(self, address: str, peer: PeerId) -> bool:
        """Whether it was seen there; or it is a relay's, whom we know there, or who is where a dial does no harm."""
        way, relay = addresses.relay_address(address), addresses.relay_of(address)
        if way is None or relay is None:
            return self._seen.get(address) == peer
        where = addresses.ip_port(way)
        public = addresses.is_public(way) or self.config.punch.allow_private
        at_large = public and where is not None and where[1] >= addresses.LEAST_PORT
        seen = self._seen.get(str(addresses.without_peer(way))) == relay
        return at_large or seen or self.swarm.connection_to(relay) is not None

    def _network_changed(self) -> None:
        here = {where[0] for each in self.swarm.listen_addresses() if (where := addresses.ip_port(each)) is not None}
        gone, self._here = self._here - here, here
        for each in self.connections:
            where = addresses.ip_port(each.connection.local_address)
            if where is not None and where[0] in gone and each.path.kind is not PathKind.RELAYED:
                self._check(each.connection, GONE_WITHIN, f"after this machine had lost its address {where[0]}")

    def _check(self, connection: Connection, within: float, why: str) -> None:
        if self._nursery is not None and connection.number not in self._checking:
            self._checking.add(connection.number)
            self._nursery.start_soon(self._check_alive, connection, within, why)

    async def _check_alive(self, connection: Connection, within: float, why: str) -> None:
        try:
            await connection.check_alive(within, f"it did not answer within {within:g} s, {why}")
        finally:
            self._checking.discard(connection.number)

    def _proven(self, peer: PeerId) -> None:
        for callback in (self.sessions.on_direct, *self.on_direct):
            callback(peer)

    async def _reach_relay(self, relay: PeerId, at: tuple[str, ...]) -> Connection:
        """A direct connection with a relay."""
        direct = [each for each in at or self._known_addresses(relay, ()) if not addresses.is_relayed(each)]
        connection = await self.swarm.dial(relay, direct)
        if connection.path.kind is PathKind.RELAYED:
            connection = await self.swarm.dial(relay, direct, fresh=True)
        return connection.connection

    async def _dial_beside(self, connection: Connection, through: PeerId | None) -> Connection:
        """Another circuit to a peer, through one relay, or through any of its others, too."""
        known = self._known_addresses(connection.peer, [connection.remote_address] if connection.initiator else ())
        circuits = [each for each in known if addresses.is_relayed(each)]
        if through is not None:
            circuits = [each for each in circuits if addresses.relay_of(each) == through]
        return (await self.swarm.dial(connection.peer, circuits, fresh=True)).connection

    def _circuit_ways(self, peer: PeerId) -> list[CircuitWay]:
        """The relays through which circuits with a peer can be made, by us or by the peer."""
        calls = {addresses.relay_of(each) for each in self._known_addresses(peer, ())}
        places = {each.relay: each for each in self.relay_client.reservations if each.held}
        return [
            CircuitWay(
                relay,
                calls=relay in calls,
                called=relay in places,
                foreign=RELAYS not in self._protocols_of(relay),
                limits=places[relay].limits if relay in places else None,
            )
            for relay in dict.fromkeys([*calls, *places])
            if relay is not None
        ]

    async def _upgrade_circuit(self, pipe: CircuitPipe, peer: PeerId, path: Path) -> None:
        await self.swarm.upgrade_raw(pipe, peer=peer, initiator=False, path=path)

    def _best_connections(self) -> list[Connection]:
        peers = {each.peer for each in self.connections}
        best = (self.swarm.connection_to(peer) for peer in peers)
        return [each.connection for each in best if each is not None]

    def _connected(self, connection: SwarmConnection) -> None:
        self.reachability.connected(connection.connection)
        self._renewal.changed(connection.connection)
        self.relay_client.connected(connection.connection)
        self.sessions.connected(connection.connection)
        self.upgrader.connected(connection.connection, map(str, self._addresses_of(connection.peer)))
        if self._nursery is not None:
            self._identify.expect(connection.connection)
            self._nursery.start_soon(self._identify.ask, connection.connection)

    def _identified(self, connection: Connection, info: PeerInfo) -> None:
        self._remember(connection, reversed(info.addresses[:BOOK_ADDRESSES]))
        self.reachability.identified(connection, info.observed)
        self.upgrader.identified(connection, map(str, info.addresses), info.protocols)
        if connection.path.kind is not PathKind.RELAYED:
            if HOP not in info.protocols:
                self.relay_client.withdrawn(info.peer)
            self.relay_pool.identified(
                info.peer,
                offers_hop=HOP in info.protocols,
                addresses=info.addresses,
                remote=connection.remote_address,
            )
        if RELAYS in info.protocols:
            self.relay_exchange.met(info.peer)

    def _disconnected(self, connection: SwarmConnection) -> None:
        self.reachability.disconnected(connection.connection)
        self.upgrader.disconnected(connection.connection)
        self.sessions.disconnected(connection.connection)
        self._renewal.changed(connection.connection)
        last = not self.swarm.connections_to(connection.peer)
        self._identify.forget(connection.connection, last=last)
        if last:
            self.relay_exchange.gone(connection.peer)
        other = self.swarm.connection_to(connection.peer)
        self.relay_server.forget(connection.connection, other.connection if other is not None else None)
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


def _relays(texts: Iterable[str]) -> dict[PeerId, tuple[str, ...]]:
    found: dict[PeerId, tuple[str, ...]] = {}
    for each in texts:
        relay = addresses.peer_of(each)
        if relay is None or addresses.is_relayed(each) or len(addresses.components(each)) == 1:
            raise AddressError(f"{each} leads to no relay; write /ip4/192.0.2.1/tcp/16117/p2p/12D3KooW…")
        found[relay] = (*found.get(relay, ()), str(addresses.without_peer(each)))
    return found


def _second(peer: PeerId) -> Refused:
    return Refused("one_kaspa_stream", f"there is a Kaspa stream with {peer} already")


def _parsed(setting: str, texts: Iterable[str]) -> tuple[Multiaddr, ...]:
    try:
        return tuple(map(addresses.parse, texts))
    except AddressError as error:
        raise ConfigError(f"{setting}: {error}") from None


def _unwrapped(group: BaseExceptionGroup[BaseException], problem: BaseException | None) -> BaseException | None:
    """The one exception that nurseries have put into groups; ``None`` if there are several."""
    error: BaseException = group
    while error is not problem and isinstance(error, BaseExceptionGroup):
        if len(error.exceptions) != 1:
            return None
        error = error.exceptions[0]
    return error
