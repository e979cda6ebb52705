"""The bridge: keeps peers connected, joins whoever comes, and answers what the operator asks.

Everything that goes on with one peer happens in one task of its own, and ends with it: what one peer does is counted
and shown, and touches neither the others nor kaspad.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from pathlib import Path
from typing import Any

import trio
from trio import TaskStatus  # type: ignore[attr-defined,unused-ignore]  # libp2p brings stubs that lack it

from kas_bridge import _kaspad, reach
from kas_bridge._control import ActionError
from kas_bridge._kaspad import Comparison, Condition, JoinedFacts, KaspadState
from kas_bridge._keeper import Full, Keeper, Kept, KeptState
from kas_bridge.bans import Ban, Bans
from kas_bridge.config import Settings, parse_endpoint, parse_peer, parse_sources
from kas_bridge.daemon import STOP_WITHIN, VERSION, Daemon, DaemonNode, ip_of
from kas_bridge.events import (
    BridgeStarted,
    BridgeStopping,
    ListenerClosed,
    ListenerOpened,
    PeerFailed,
    PeerForgotten,
    PeerKept,
)
from kas_bridge.kaspad import KaspadWatch, Look, OpenFacts, look, open_facts
from kas_bridge.listeners import PING, LocalAddresses, ping, stay
from kas_bridge.views import ended_words, short
from kas_libp2p.addresses import is_relayed, relay_of
from kas_libp2p.errors import ConfigError, ConnectionLost, KasError, Refused, in_words
from kas_libp2p.events import StreamFailed
from kas_libp2p.kaspa.grpc import GrpcChannel
from kas_libp2p.kaspa.join import (
    End,
    Ended,
    Joined,
    Joiner,
    JoinFailed,
    JoinSettings,
    KaspadAddress,
    Side,
    default_open_kaspad,
)
from kas_libp2p.kaspa.sources import FixedSource, PoolExhausted, PoolSources, Sources
from kas_libp2p.kaspa.upload import UploadCap
from kas_libp2p.metadata import OverlayStream, PathKind, PeerId
from kas_libp2p.seams import OutboundConnector, serve_with_incoming
from kas_libp2p.session.status import SessionStatus

FIRST_LOOK = 1.0
"""Seconds that incoming peers wait for the first look at our kaspad, so as not to hear a no that is over at once."""

PEER_BACK_SOON = 5.0
"""Seconds before a peer is asked again at most, whose bridge answers but whose kaspad is away or busy: asking costs
one stream on a connection that is there."""

LEAVE_AGAIN = (1.0, 5.0, 30.0, 0.0)
"""Seconds until it is tried again to carry a peer on without its relay. What is in the way, a handshake or a peer that
takes no more streams, is over by then; else it goes on when the next direct way has proven itself."""

_KASPADS_DIAL: ContextVar[GrpcChannel | None] = ContextVar("kaspads_dial", default=None)
"""The channel on which our kaspad dialed the peer whose stream this task carries; ``None`` where we dial kaspad."""

_BLOCKING = frozenset(
    {Condition.SEARCHING, Condition.WRONG_NETWORK, Condition.TOO_OLD, Condition.SEVERAL, Condition.NOT_KASPAD}
)
"""Conditions in which no peer is joined even if kaspad's port answers."""

_QUIET = frozenset({End.SUPERSEDED, End.STOPPED, End.DISCONNECTED})
"""Our own doing: not a failure of the peer."""


def make_sources(settings: Settings) -> Sources:
    """From which addresses kaspad is dialed, by the settings.

    Raises:
        ConfigError: a pool is not usable.
    """
    networks = parse_sources(settings.source)
    if networks is None:
        return FixedSource(None)
    host = parse_endpoint(settings.kaspad)[0] if settings.kaspad else "127.0.0.1"
    path = settings.data_dir / "sources.json"
    if networks:
        if len(networks) == 1 and networks[0].num_addresses == 1:
            return FixedSource(str(networks[0].network_address))
        return PoolSources([str(network) for network in networks], path=path)
    if ":" not in host and _kaspad.ipaddress_is_loopback(host):
        return PoolSources(path=path)
    return FixedSource(None)


class _Leases(Sources):
    """Source addresses for those peers that we join: one that kaspad dialed by itself needs none."""

    def __init__(self, sources: Sources) -> None:
        self._sources = sources

    @contextmanager
    def lease(self, peer: PeerId) -> Iterator[str | None]:
        if _KASPADS_DIAL.get() is not None:
            yield None
            return
        with self._sources.lease(peer) as address:
            yield address

    def address_of(self, peer: PeerId) -> str | None:
        return self._sources.address_of(peer)


class Bridge(Daemon):
    """One bridge in front of one kaspad.

    Args:
        settings: see there.
        node: the overlay, running.
        control: where the control socket is, for those who ask.
        bans: who is kept out; from the data directory if left out.
        look, open_facts, open_kaspad: how kaspad is reached; other ones in tests.
        wall_clock: seconds since the epoch.
        random: gives a number from 0 up to 1, for jitter.

    Raises:
        ConfigError, BansError: a pool of source addresses or the list of bans is not usable.
    """

    mode = "bridge"

    def __init__(
        self,
        settings: Settings,
        node: DaemonNode,
        *,
        control: Path | None = None,
        bans: Bans | None = None,
        look: Look = look,
        open_facts: OpenFacts = open_facts,
        open_kaspad: Any = default_open_kaspad,
        wall_clock: Callable[[], float] = time.time,
        random: Callable[[], float] = random.random,
    ) -> None:
        super().__init__(settings, node, control=control, bans=bans, wall_clock=wall_clock)
        self.settings = settings
        self.sources = make_sources(settings)
        self.keeper = Keeper(random)
        self.watch = KaspadWatch(
            settings, self.sources, self.events, joined=self._count_joined, look=look, open_facts=open_facts
        )
        self.watch.on_change = self._kaspad_changed
        rate = settings.upload_rate
        self.joiner = Joiner(
            KaspadAddress(),
            _Leases(self.sources),
            settings=JoinSettings(
                max_joined=settings.max_joined,
                max_pending=settings.max_pending,
                max_pending_per_source=settings.max_pending_per_source,
                max_pending_per_host=settings.max_pending_per_host,
                compression=settings.compress,
            ),
            network=settings.network.kaspa_name if settings.network else None,
            own_peer=node.peer_id,
            upload=UploadCap(rate) if rate else None,
            events=self.events,
            open_kaspad=self._open_kaspad,
        )
        self.connector = OutboundConnector(node)
        self.local: LocalAddresses | None = None
        if settings.kaspad_dials:
            self.local = LocalAddresses(settings.data_dir / "listeners.json", settings.listener_port)
        self.listening: dict[PeerId, str] = {}
        """Local addresses that are open, by peer."""
        self.dialed: set[PeerId] = set()
        """Peers that kaspad dialed at their local addresses."""
        self._open = open_kaspad
        self._kick = trio.Event()
        self.ends: Counter[str] = Counter()
        """How often a peer was not, or no longer, joined, by `End` reason."""
        self.carried = [0, 0]
        """Bytes of Kaspa messages from and to peers that have gone."""

    # -- Running -------------------------------------------------------------------------------------------------------

    async def run(self, *, task_status: TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until `stop` is called or it is cancelled; ends every peer in order then."""
        now = trio.current_time()
        for address in self.settings.peer:
            self._keep_peer(address, "settings", now)
        self.node.set_policy(self._policy)
        if self.local is not None:
            # kaspad comes to us: whether it listens for peers of its own is no concern of theirs.
            self.keeper.set_open(True, now)
        # Before anything else: a relay that is there for the overlay looks at what we serve before it lets us in.
        await serve_with_incoming(self.node, self._inbound)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._isolated, "kaspad", self.watch.run)
            nursery.start_soon(self._keep, nursery)
            leave = partial(nursery.start_soon, self._leave_relay)
            self.node.on_direct.append(leave)
            try:
                await self._work(task_status)
            finally:
                self.node.on_direct.remove(leave)
            nursery.cancel_scope.cancel()

    async def _work(self, task_status: TaskStatus[None]) -> None:
        with trio.move_on_after(FIRST_LOOK):
            await self.watch.wait_looked()
        self.events.emit(
            BridgeStarted(
                version=VERSION,
                peer_id=self.node.peer_id,
                addresses=self.node.addresses,
                control=str(self.control or ""),
                kept=len(self.keeper),
            )
        )
        task_status.started()
        await self._stop.wait()
        self.events.emit(BridgeStopping(reason=self._stop_reason or ""))
        self.keeper.set_open(False, trio.current_time())
        self.node.withdraw()
        with trio.move_on_after(STOP_WITHIN):
            await self.joiner.stop()

    async def _isolated(self, where: str, part: Callable[[], Any]) -> None:
        """Run one part again when it fails: a fault in one must not end the rest."""
        while True:
            try:
                await part()
                return
            except Exception as error:  # noqa: BLE001 - the one place where the bridge's own parts are isolated
                self.trouble(where, error)
                await trio.sleep(1)

    async def wait_looked(self) -> None:
        """Wait until it was seen whether there is a kaspad, and what the first relays answered."""
        await self.watch.wait_looked()
        await super().wait_looked()

    def _kaspad_changed(self, state: KaspadState) -> None:
        if state.up and self.watch.address is not None:
            self.joiner.kaspad = self.watch.address
            self.joiner.node = self.watch.version
        if self.local is None:
            self.keeper.set_open(state.up and not self.stopping, trio.current_time())
            self._kick.set()

    async def _open_kaspad(self, address: KaspadAddress, source: str | None, max_message: int) -> Any:
        dialed = _KASPADS_DIAL.get()
        if dialed is not None:
            return dialed
        state = self.watch.state
        if state.condition in _BLOCKING:
            raise JoinFailed(Ended(End.NOT_RUNNING, Side.KASPAD, state.problem or "no kaspad was found yet"))
        return await self._open(address, source, max_message)

    # -- Peers ---------------------------------------------------------------------------------------------------------

    async def _keep(self, nursery: trio.Nursery) -> None:
        while True:
            for kept in self.keeper.take_due(trio.current_time()):
                nursery.start_soon(self._attempt, kept)
            deadline = self.keeper.next_deadline()
            with trio.CancelScope(deadline=float("inf") if deadline is None else deadline):
                await self._kick.wait()
            self._kick = trio.Event()

    async def _attempt(self, kept: Kept) -> None:
        """One attempt at a kept peer, and its whole stay if it works."""
        peer = kept.peer
        try:
            if self.local is not None:
                await self._hold(kept, self.local)
                return
            if peer in self.joiner.peers:
                return
            stream = await self.connector.connect(peer, addresses=kept.addresses)
            if self.keeper.get(peer) is None:
                stream.reset()  # the operator has let it go meanwhile
                return
            await self._carry(stream)
        except Refused as error:
            # There is a stream with it already, or our own lists say no.
            self._over(peer, in_words(error), standing=error.limit != "one_kaspa_stream")
        except (KasError, PoolExhausted) as error:
            self._over(peer, in_words(error))
        except Exception as error:  # noqa: BLE001 - the one place where kept peers are isolated from each other
            self.trouble(f"peer {peer}", error)
            self._over(peer, f"{type(error).__name__}: {error}")
        finally:
            self._kick.set()

    async def _hold(self, kept: Kept, local: LocalAddresses) -> None:
        """Stay connected to a kept peer, and let kaspad dial it at a local address as long as it answers.

        Raises:
            KasError, PoolExhausted: it can't be reached, or no longer.
        """
        peer = kept.peer
        stream = await self.node.connect(peer, PING, addresses=kept.addresses)
        try:
            await ping(stream)
            async with local.listening(peer, partial(self._dialed, peer)) as address:
                self.listening[peer] = address
                self.keeper.is_here(peer)
                self.events.emit(ListenerOpened(peer=peer, address=address))
                try:
                    while self.keeper.get(peer) is not None:
                        await stay(stream)
                        await ping(stream)
                finally:
                    del self.listening[peer]
                    self.events.emit(ListenerClosed(peer=peer, address=address))
        except trio.TooSlowError:
            raise ConnectionLost("it did not answer a ping in time") from None
        finally:
            stream.reset()

    async def _dialed(self, peer: PeerId, tcp: trio.SocketStream) -> None:
        """Our kaspad dialed the local address of a peer: join the two, the other way round than usual."""
        try:
            if peer in self.joiner.peers:
                return
            stream = await self.connector.connect(peer)
            _KASPADS_DIAL.set(GrpcChannel.server(tcp, max_message=self.joiner.settings.max_message))
            self.dialed.add(peer)
            await self._carry(stream)
        except KasError as error:
            self.events.emit(PeerFailed(peer=peer, problem=in_words(error), left=False, retry_in=0.0))
        except Exception as error:  # noqa: BLE001 - one dial of kaspad's is isolated from the peer's other ones
            self.trouble(f"peer {peer}", error)
        finally:
            self.dialed.discard(peer)
            await trio.aclose_forcefully(tcp)

    async def _leave_relay(self, peer: PeerId) -> None:
        """Carry a peer on without its relay, now that there is such a way. Who opened its stream opens the new one.

        kaspad misses the peer for as long as a handshake takes: the new stream is there before the old one ends.
        """
        for pause in LEAVE_AGAIN:
            joined = self.joiner.peers.get(peer)
            if joined is None or not joined.relayed or not joined.opener or joined.moves_itself or self.stopping:
                return  # what lives in a session moves by itself
            try:
                await self._carry(await self.node.connect_past_relay(peer))
                return
            except KasError as error:
                self.events.emit(StreamFailed(peer=peer, reason=in_words(error)))
            except Exception as error:  # noqa: BLE001 - one peer is isolated from the others
                self.trouble(f"peer {peer}", error)
                return
            await trio.sleep(pause)

    async def _inbound(self, stream: OverlayStream) -> None:
        with trio.move_on_at(self.started_at + FIRST_LOOK):
            await self.watch.wait_looked()
        await self._carry(stream)

    async def _carry(self, stream: OverlayStream) -> None:
        peer, path = stream.metadata.peer, stream.metadata.path
        assert peer is not None
        seen: list[Joined] = []

        def on_ready(joined: Joined) -> None:
            seen.append(joined)
            self.keeper.is_here(peer)
            if joined.ours is not None:
                self.watch.met(joined.ours)

        ended = await self.joiner.carry(stream, on_ready=on_ready)
        self.ends[ended.reason] += 1
        plain = not stream.watches_paths
        if ended.reason is End.PATH_HUNG and plain and peer not in self.joiner.peers:
            # A new stream on the same connection would hang as well.
            await self.node.disconnect(peer, "the path hung", hung=True)
        if ended.by is Side.KASPAD:
            self.watch.suspect()
        joined_for = None
        if seen:
            joined = seen[0]
            self.carried[0] += joined.from_peer.bytes
            self.carried[1] += joined.from_kaspad.bytes
            if joined.ready_at is not None:
                joined_for = trio.current_time() - joined.ready_at
        if ended.reason is End.SUPERSEDED:
            return  # what comes of the peer is told when the newer stream ends
        self._over(
            peer,
            ended_words(ended.reason, ended.by, ended.text),
            joined_for=joined_for,
            standing=not ended.transient and ended.reason not in _QUIET and ended.reason is not End.PEER_BROKE,
            soon=ended.reason in (End.PEER_KASPAD, End.PEER_BUSY),
            # Its relay may have gone, or have ended the circuit: the peer itself is there, by another way. Of a session
            # all ways were tried for long enough.
            at_once=ended.reason is End.PEER_RESTARTED
            or (plain and path.kind is PathKind.RELAYED and ended.by is Side.PATH),
        )

    def _over(
        self,
        peer: PeerId,
        problem: str,
        *,
        joined_for: float | None = None,
        standing: bool = False,
        soon: bool = False,
        at_once: bool = False,
    ) -> None:
        if self.stopping:
            return
        if peer in self.listening:
            return
        other = self.joiner.peers.get(peer)
        if other is not None:
            if other.ready_at is not None:
                self.keeper.is_here(peer)
            return
        delay = self.keeper.ended(
            peer,
            trio.current_time(),
            joined_for=joined_for,
            standing=standing,
            problem=problem,
            longest=PEER_BACK_SOON if soon else None,
            at_once=at_once,
        )
        if delay is not None:
            left = joined_for is not None
            self.events.emit(PeerFailed(peer=peer, problem=problem, left=left, retry_in=delay))
            self._kick.set()

    def _count_joined(self) -> int:
        return sum(joined.ready_at is not None for joined in self.joiner.peers.values())

    def _keep_peer(self, address: str, origin: str, now: float) -> Kept:
        peer = PeerId(parse_peer(address))
        if peer == self.node.peer_id:
            raise ActionError(f"{short(peer)} is this bridge itself")
        return self.keeper.add(peer, address, origin, now)

    # -- What the operator asks ----------------------------------------------------------------------------------------

    def _known(self) -> Iterable[PeerId]:
        return [*self.joiner.peers, *(kept.peer for kept in self.keeper.all())]

    def connect(self, address: str) -> dict[str, Any]:
        """Keep a peer connected from now on, until the bridge stops.

        Raises:
            ActionError: the address does not name a peer, the peer is banned, or too many are kept.
        """
        try:
            if "/" not in address:
                raise ActionError(f"{address} is no multiaddr; it looks like /ip4/192.0.2.1/tcp/16117/p2p/12D3KooW…")
            peer = PeerId(parse_peer(address))
            if self._banned(peer, None) is not None:
                raise ActionError(f"{short(peer)} is banned; lift it with kas-bridge unban {peer}")
            new = self.keeper.get(peer) is None
            self._keep_peer(address, "control", trio.current_time())
        except (ConfigError, Full) as error:
            raise ActionError(str(error)) from None
        if new:
            self.events.emit(PeerKept(peer=peer, address=address))
        self._kick.set()
        joined = self.joiner.peers.get(peer)
        state = "joined" if joined is not None and joined.ready_at is not None else "trying"
        return {"peer_id": peer, "state": state, "new": new, "kaspad": self.watch.state.condition}

    async def disconnect(self, text: str) -> dict[str, Any]:
        """End a peer and keep it no longer.

        Raises:
            ActionError: no such peer.
        """
        peer = self.find_peer(text)
        kept = self.keeper.remove(peer)
        if kept:
            self.events.emit(PeerForgotten(peer=peer))
        joined = self.joiner.peers.get(peer)
        if joined is not None:
            self.joiner.disconnect(peer, "by the operator of the other side")
            with trio.move_on_after(STOP_WITHIN):
                await joined.wait_ended()
        closed = await self.node.disconnect(peer, "by the operator")
        return {"peer_id": peer, "was_joined": joined is not None, "was_kept": kept, "connections": closed}

    async def _end(self, ban: Ban, peers: Sequence[PeerId]) -> None:
        for kept in self.keeper.all():
            if kept.peer == ban.target and kept.state is KeptState.WAITING:
                self.keeper.ended(kept.peer, trio.current_time(), standing=True, problem="banned here")
        joined = [self.joiner.peers[peer] for peer in peers if peer in self.joiner.peers]
        for each in joined:
            each.end(Ended(End.REFUSED, Side.US, "banned"))
        with trio.move_on_after(STOP_WITHIN):
            for each in joined:
                await each.wait_ended()

    def _connected(self) -> dict[PeerId, set[str | None]]:
        found = super()._connected()
        for peer, joined in self.joiner.peers.items():
            found.setdefault(peer, set()).add(ip_of(joined.stream.metadata.remote_address))
        return found

    def unban(self, target: str) -> dict[str, Any]:
        """Lift a ban, and try the kept peers again.

        Raises:
            ActionError: there is none.
        """
        answer = super().unban(target)
        # Whom it kept out is tried at once; of an IP nobody knows who that was, and an attempt costs little.
        for kept in self.keeper.all():
            if kept.state is KeptState.WAITING:
                kept.next_at = trio.current_time()
        self._kick.set()
        return answer

    # -- What the operator sees ----------------------------------------------------------------------------------------

    def compare(self) -> Comparison:
        """What kaspad's RPC says of our peers; nothing if it does not answer."""
        facts = self.watch.rpc
        if facts is None or facts.problem:
            return Comparison()
        joined = {
            peer: JoinedFacts(each.theirs.node_id, each.source, each.ready_at)
            for peer, each in self.joiner.peers.items()
            if each.theirs is not None and each.ready_at is not None and peer not in self.dialed
        }
        peers: Iterable[PeerId] = joined
        if isinstance(self.sources, PoolSources):
            peers = {**dict.fromkeys(self.sources.entries()), **joined}
        return _kaspad.compare(joined, {peer: self.sources.address_of(peer) for peer in peers}, facts)

    def status(self) -> dict[str, Any]:
        """Everything about the bridge as plain values: seconds, bytes, bytes per second."""
        found = super().status()
        comparison = self.compare()
        return {
            **found,
            "kaspad": self._kaspad_status(trio.current_time()),
            "notes": [{"note": note, "help": text} for note, text in self._notes(comparison)],
            "peers": {
                "joined": self._count_joined(),
                "handshaking": len(self.joiner.peers) - self._count_joined(),
                "kept": len(self.keeper),
            },
            "limits": {
                "max_joined": {"limit": self.settings.max_joined, "used": len(self.joiner.peers)},
                "max_pending": {"limit": self.settings.max_pending, "used": self.joiner.pending},
                **found["limits"],
            },
            "ends": dict(self.ends),
            "received": self.carried[0] + sum(each.from_peer.bytes for each in self.joiner.peers.values()),
            "sent": self.carried[1] + sum(each.from_kaspad.bytes for each in self.joiner.peers.values()),
            "upload_limit": self.settings.upload_rate,
        }

    def _kaspad_status(self, now: float) -> dict[str, Any]:
        state, rpc = self.watch.state, self.watch.rpc
        retry = self.watch.retry_at
        return {
            "condition": state.condition.value,
            "address": state.address,
            "network": state.network,
            "version": state.version,
            "agent": state.agent,
            "protocol_version": state.protocol_version,
            "node_id": state.node_id,
            "problem": state.problem,
            "help": state.help,
            "since_s": round(now - self.watch.since, 3),
            "retry_in_s": None if retry is None else round(max(0.0, retry - now), 3),
            "rpc": None
            if rpc is None
            else {
                "address": rpc.address,
                "problem": rpc.problem,
                "synced": rpc.synced,
                "peers": len(rpc.peers) if not rpc.problem else None,
            },
        }

    def _notes(self, comparison: Comparison) -> list[tuple[str, str]]:
        address = self.watch.address
        found = _kaspad.notes(
            comparison,
            host=address.host if address else "",
            one_source=isinstance(self.sources, FixedSource),
            sources_given=bool(self.settings.source),
            join_problem=self.joiner.kaspad_problem if self.watch.state.up else None,
        )
        problem = getattr(self.sources, "problem", None)
        if problem:
            found.append((problem, "nothing needs to be done; kaspad may have to learn the peers' new addresses"))
        return found

    def peers(self) -> list[dict[str, Any]]:
        """Every peer that is joined, shaking hands, connected or kept, as plain values."""
        now = trio.current_time()
        comparison = self.compare()
        joined = self.joiner.peers
        # The newest of a peer: an older one is about to end.
        sessions = {each.peer: each for each in self.node.status().sessions}
        rows = [
            self._joined_row(each, comparison, sessions.get(each.peer) if each.moves_itself else None, now)
            for each in joined.values()
        ]
        rows += [self._kept_row(kept, now) for kept in self.keeper.all() if kept.peer not in joined]
        return rows

    def _joined_row(
        self, joined: Joined, comparison: Comparison, session: SessionStatus | None, now: float
    ) -> dict[str, Any]:
        metadata = joined.stream.metadata
        ready = joined.ready_at
        theirs = joined.theirs
        return {
            "peer_id": joined.peer,
            "state": "joined" if ready is not None else "handshaking",
            "direction": str(metadata.direction),
            "path": str(metadata.path.kind),
            "relay_id": metadata.path.relay,
            "limits": reach.circuit_limits(metadata.limits),
            "session": reach.session(session, self.settings.session.patience),
            "address": metadata.remote_address,
            "dialect": joined.dialect.value,
            "rtt_ms": None if metadata.rtt is None else round(metadata.rtt * 1000, 2),
            "since_ms": round((now - (ready if ready is not None else joined.since)) * 1000),
            "source": joined.source,
            "listener": self.listening.get(joined.peer),
            "node": None
            if theirs is None
            else {
                "id": theirs.node_id,
                "version": theirs.version,
                "agent": theirs.user_agent,
                "network": theirs.network,
                "protocol_version": theirs.protocol_version,
            },
            "received": joined.from_peer.bytes,
            "sent": joined.from_kaspad.bytes,
            "messages_received": joined.from_peer.messages,
            "messages_sent": joined.from_kaspad.messages,
            "kept": self.keeper.get(joined.peer) is not None,
            "also_direct": comparison.direct.get(joined.peer),
            "retry_in_s": None,
            "problem": "",
        }

    def _kept_row(self, kept: Kept, now: float) -> dict[str, Any]:
        state = "listening" if kept.peer in self.listening else "waiting"
        if kept.state is KeptState.TRYING:
            state = "dialing"
        waits = kept.state is KeptState.WAITING and self.keeper.open
        problem = kept.problem
        if not self.keeper.open and kept.state is KeptState.WAITING:
            problem = "waits for our kaspad" + (f" (before that: {problem})" if problem else "")
        address = kept.addresses[0] if kept.addresses else ""
        relayed = bool(address) and is_relayed(address)
        return {
            "peer_id": kept.peer,
            "state": state,
            "direction": "outbound",
            "path": str(PathKind.RELAYED if relayed else PathKind.DIRECT),
            "relay_id": relay_of(address) if relayed else None,
            "limits": None,
            "session": None,
            "address": address,
            "dialect": "",
            "rtt_ms": None,
            "since_ms": None,
            "source": self.sources.address_of(kept.peer),
            "listener": self.listening.get(kept.peer),
            "node": None,
            "received": 0,
            "sent": 0,
            "messages_received": 0,
            "messages_sent": 0,
            "kept": True,
            "also_direct": None,
            "retry_in_s": round(max(0.0, kept.next_at - now), 1) if waits else None,
            "problem": problem,
        }

    def why(self, text: str) -> dict[str, Any]:
        """How a peer is connected, or why it is not.

        Raises:
            ActionError: no such peer.
        """
        peer = self.find_peer(text)
        row = next(each for each in self.peers() if each["peer_id"] == peer)
        info = self.node.peer_info(peer)
        ours = reach.values(self.node.status(), self.settings)
        return {
            "peer": row,
            "theirs": list(info.addresses) if info is not None else [],
            "kaspad": self._kaspad_status(trio.current_time()),
            "reachability": ours["reachability"],
            "port_mapping": ours["port_mapping"],
            "upgrade": next((each for each in ours["upgrades"] if each["peer_id"] == peer), None),
            "explained": self.node.why(peer)[1:],
        }
