"""The bridge: keeps peers connected, joins whoever comes, and answers what the operator asks.

Everything that goes on with one peer happens in one task of its own, and ends with it: what one peer does is counted
and shown, and touches neither the others nor kaspad.
"""

from __future__ import annotations

import os
import random
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from importlib.metadata import version as distribution_version
from pathlib import Path
from typing import Any, Protocol

import trio
from trio import TaskStatus  # type: ignore[attr-defined,unused-ignore]  # libp2p brings stubs that lack it

from kas_bridge import _kaspad
from kas_bridge._control import ActionError
from kas_bridge._kaspad import Comparison, Condition, JoinedFacts, KaspadState
from kas_bridge._keeper import Full, Keeper, Kept, KeptState
from kas_bridge.bans import DEFAULT_SECONDS, Bans, BansError
from kas_bridge.config import Settings, parse_endpoint, parse_entry, parse_peer, parse_sources
from kas_bridge.events import (
    BanLifted,
    BridgeStarted,
    BridgeStopping,
    ListenerClosed,
    ListenerOpened,
    PeerFailed,
    PeerForgotten,
    PeerKept,
    Trouble,
)
from kas_bridge.kaspad import KaspadWatch, Look, OpenFacts, look, open_facts
from kas_bridge.listeners import PING, LocalAddresses, ping, stay
from kas_bridge.views import ended_words, short
from kas_libp2p.addresses import ip_port, without_peer
from kas_libp2p.errors import AddressError, ConfigError, ConnectionLost, DialError, KasError, Refused, Stage
from kas_libp2p.events import Banned, EventBus
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
from kas_libp2p.kaspa.messages import UploadCap
from kas_libp2p.kaspa.sources import FixedSource, PoolExhausted, PoolSources, Sources
from kas_libp2p.metadata import OverlayStream, PathKind, PeerId
from kas_libp2p.seams import OutboundConnector, Overlay, serve_with_incoming
from kas_libp2p.swarm import Candidate

VERSION = distribution_version("kas-bridge")

STOP_WITHIN = 1.0
"""Seconds for the peers to be told that we go; what is left of two seconds is the connections'."""

FIRST_LOOK = 1.0
"""Seconds that incoming peers wait for the first look at our kaspad, so as not to hear a no that is over at once."""

PEER_BACK_SOON = 5.0
"""Seconds before a peer is asked again at most, whose bridge answers but whose kaspad is away or busy: asking costs
one stream on a connection that is there."""

_KASPADS_DIAL: ContextVar[GrpcChannel | None] = ContextVar("kaspads_dial", default=None)
"""The channel on which our kaspad dialed the peer whose stream this task carries; ``None`` where we dial kaspad."""

_BLOCKING = frozenset(
    {Condition.SEARCHING, Condition.WRONG_NETWORK, Condition.TOO_OLD, Condition.SEVERAL, Condition.NOT_KASPAD}
)
"""Conditions in which no peer is joined even if kaspad's port answers."""

_QUIET = frozenset({End.SUPERSEDED, End.STOPPED, End.DISCONNECTED})
"""Our own doing: not a failure of the peer."""


class BridgeNode(Overlay, Protocol):
    """What the bridge needs of the node below; `kas_libp2p.node.Node` has it."""

    bus: EventBus

    @property
    def peer_id(self) -> PeerId: ...

    @property
    def addresses(self) -> tuple[str, ...]: ...

    def set_policy(self, policy: Callable[[Candidate], str | None] | None) -> None: ...

    def withdraw(self, protocol: str | Sequence[str] = ...) -> None: ...

    async def disconnect(self, peer: str, reason: str = "") -> int: ...

    def status(self) -> Any: ...


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


class Bridge:
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

    def __init__(
        self,
        settings: Settings,
        node: BridgeNode,
        *,
        control: Path | None = None,
        bans: Bans | None = None,
        look: Look = look,
        open_facts: OpenFacts = open_facts,
        open_kaspad: Any = default_open_kaspad,
        wall_clock: Callable[[], float] = time.time,
        random: Callable[[], float] = random.random,
    ) -> None:
        self.settings = settings
        self.node = node
        self.control = control
        self.events = node.bus
        self.sources = make_sources(settings)
        self.bans = bans if bans is not None else Bans(settings.data_dir / "bans.json")
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
        self._wall = wall_clock
        self._kick = trio.Event()
        self._stop_reason: str | None = None
        self._stop = trio.Event()
        self.started_at = trio.current_time()
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
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._isolated, "kaspad", self.watch.run)
            nursery.start_soon(self._keep, nursery)
            with trio.move_on_after(FIRST_LOOK):
                await self.watch.wait_looked()
            await serve_with_incoming(self.node, self._inbound)
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
            nursery.cancel_scope.cancel()

    def stop(self, reason: str = "") -> None:
        """End the bridge. Returns at once; `run` returns when its peers are gone."""
        if self._stop_reason is None:
            self._stop_reason = reason
            self._stop.set()

    async def wait_stop(self) -> None:
        """Wait until `stop` is called."""
        await self._stop.wait()

    @property
    def stopping(self) -> bool:
        """Whether `stop` was called."""
        return self._stop.is_set()

    async def _isolated(self, where: str, part: Callable[[], Any]) -> None:
        """Run one part again when it fails: a fault in one must not end the rest."""
        while True:
            try:
                await part()
                return
            except Exception as error:  # noqa: BLE001 - the one place where the bridge's own parts are isolated
                self.trouble(where, error)
                await trio.sleep(1)

    def trouble(self, where: str, error: BaseException) -> None:
        """Tell of a fault of our own that was contained."""
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        self.events.emit(Trouble(where=where, reason=f"{type(error).__name__}: {error}"))

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
            await self._carry(stream)
        except Refused as error:
            # There is a stream with it already, or our own lists say no.
            self._over(peer, why(error), standing=error.limit != "one_kaspa_stream")
        except (KasError, PoolExhausted) as error:
            self._over(peer, why(error))
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
            self.events.emit(PeerFailed(peer=peer, problem=why(error), left=False, retry_in=0.0))
        except Exception as error:  # noqa: BLE001 - one dial of kaspad's is isolated from the peer's other ones
            self.trouble(f"peer {peer}", error)
        finally:
            self.dialed.discard(peer)
            await trio.aclose_forcefully(tcp)

    async def _inbound(self, stream: OverlayStream) -> None:
        await self._carry(stream)

    async def _carry(self, stream: OverlayStream) -> None:
        peer = stream.metadata.peer
        assert peer is not None
        seen: list[Joined] = []

        def on_ready(joined: Joined) -> None:
            seen.append(joined)
            self.keeper.is_here(peer)
            if joined.ours is not None:
                self.watch.met(joined.ours)

        ended = await self.joiner.carry(stream, on_ready=on_ready)
        self.ends[ended.reason] += 1
        if ended.reason is End.PATH_HUNG and peer not in self.joiner.peers:
            # A new stream on the same connection would hang as well.
            await self.node.disconnect(peer, "the path hung")
        if ended.by is Side.KASPAD:
            self.watch.suspect()
        joined_for = None
        if seen:
            joined = seen[0]
            self.carried[0] += joined.from_peer.bytes
            self.carried[1] += joined.from_kaspad.bytes
            if joined.ready_at is not None:
                joined_for = trio.current_time() - joined.ready_at
        self._over(
            peer,
            ended_words(ended.reason, ended.by, ended.text),
            joined_for=joined_for,
            standing=not ended.transient and ended.reason not in _QUIET and ended.reason is not End.PEER_BROKE,
            soon=ended.reason in (End.PEER_KASPAD, End.PEER_BUSY),
        )

    def _over(
        self, peer: PeerId, problem: str, *, joined_for: float | None = None, standing: bool = False, soon: bool = False
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
        )
        if delay is not None:
            left = joined_for is not None
            self.events.emit(PeerFailed(peer=peer, problem=problem, left=left, retry_in=delay))
            self._kick.set()

    def _count_joined(self) -> int:
        return sum(joined.ready_at is not None for joined in self.joiner.peers.values())

    def _policy(self, candidate: Candidate) -> str | None:
        ban = self.bans.find(candidate.peer or "", candidate.ip, self._wall())
        return None if ban is None else "banned here"

    def _keep_peer(self, address: str, origin: str, now: float) -> Kept:
        peer = PeerId(parse_peer(address))
        if peer == self.node.peer_id:
            raise ActionError(f"{short(peer)} is this bridge itself")
        return self.keeper.add(peer, address, origin, now)

    # -- What the operator asks ----------------------------------------------------------------------------------------

    def find_peer(self, text: str) -> PeerId:
        """The peer that a part of its id stands for.

        Raises:
            ActionError: none, or several.
        """
        known = self._known()
        if text in known:
            return PeerId(text)
        part = text.strip("…").removeprefix("12D3…")
        hits = [peer for peer in known if part in peer] if len(part) >= 3 else []
        if len(hits) == 1:
            return hits[0]
        if not hits:
            raise ActionError(f"no peer {text} is known here; kas-bridge peers lists them")
        raise ActionError(f"{text} stands for {len(hits)} peers: {', '.join(hits[:4])}; give more of it")

    def _known(self) -> list[PeerId]:
        known = dict.fromkeys(self.joiner.peers)
        known.update(dict.fromkeys(kept.peer for kept in self.keeper.all()))
        return list(known)

    def connect(self, address: str) -> dict[str, Any]:
        """Keep a peer connected from now on, until the bridge stops.

        Raises:
            ActionError: the address does not name a peer, the peer is banned, or too many are kept.
        """
        try:
            if "/" not in address:
                raise ActionError(f"{address} is no multiaddr; it looks like /ip4/192.0.2.1/tcp/16117/p2p/12D3KooW…")
            peer = PeerId(parse_peer(address))
            ban = self.bans.find(peer, None, self._wall())
            if ban is not None:
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

    async def ban(self, target: str, seconds: float | None = DEFAULT_SECONDS, reason: str = "") -> dict[str, Any]:
        """Keep a peer id, IP address or network out, and end what is there of it.

        Raises:
            ActionError: it is none of these, or the list can't be written.
        """
        try:
            if not _is_entry(target):
                target = self.find_peer(target)
            if target == self.node.peer_id:
                raise ActionError("that is this bridge itself")
            ban = self.bans.add(target, self._wall(), seconds=seconds, reason=reason)
        except (ConfigError, BansError) as error:
            raise ActionError(str(error)) from None
        self.events.emit(Banned(target=ban.target, seconds=seconds if seconds is not None else float("inf")))
        for kept in self.keeper.all():
            if kept.peer == ban.target and kept.state is KeptState.WAITING:
                self.keeper.ended(kept.peer, trio.current_time(), standing=True, problem="banned here")
        ended = []
        for peer, ip in self._connected():
            if self.bans.find(peer, ip, self._wall()) is ban:
                ended.append(peer)
                joined = self.joiner.peers.get(peer)
                if joined is not None:
                    joined.end(Ended(End.REFUSED, Side.US, "banned"))
                    with trio.move_on_after(STOP_WITHIN):
                        await joined.wait_ended()
                await self.node.disconnect(peer, "banned")
        return {"target": ban.target, "until": ban.until, "ended": ended}

    def _connected(self) -> list[tuple[PeerId, str | None]]:
        found: dict[tuple[PeerId, str | None], None] = {}
        for connection in self.node.status().connections:
            found[connection.peer, ip_of(connection.remote_address)] = None
        for peer, joined in self.joiner.peers.items():
            found[peer, ip_of(joined.stream.metadata.remote_address)] = None
        return list(found)

    def unban(self, target: str) -> dict[str, Any]:
        """Lift a ban.

        Raises:
            ActionError: there is none.
        """
        try:
            if not _is_entry(target):
                hits = [ban.target for ban in self.bans.current(self._wall()) if target in ban.target]
                target = hits[0] if len(hits) == 1 else target
            lifted = self.bans.remove(target, self._wall())
        except (ConfigError, BansError) as error:
            raise ActionError(str(error)) from None
        if not lifted:
            raise ActionError(f"{target} is not banned; kas-bridge status lists the bans")
        self.events.emit(BanLifted(target=target))
        kept = self.keeper.get(PeerId(target))
        if kept is not None and kept.state is KeptState.WAITING:
            kept.next_at = trio.current_time()
            self._kick.set()
        return {"target": target}

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
        now = trio.current_time()
        node = self.node.status()
        comparison = self.compare()
        return {
            "version": VERSION,
            "peer_id": self.node.peer_id,
            "pid": os.getpid(),
            "uptime_s": round(now - self.started_at, 3),
            "stopping": self.stopping,
            "addresses": list(self.node.addresses),
            "data_dir": str(self.settings.data_dir),
            "control": str(self.control or ""),
            "kaspad": self._kaspad_status(now),
            "notes": [{"note": note, "help": text} for note, text in self._notes(comparison)],
            "peers": {
                "joined": self._count_joined(),
                "handshaking": len(self.joiner.peers) - self._count_joined(),
                "kept": len(self.keeper),
                "connections": len(node.connections),
            },
            "limits": {
                "max_joined": {"limit": self.settings.max_joined, "used": len(self.joiner.peers)},
                "max_pending": {"limit": self.settings.max_pending, "used": self.joiner.pending},
                **{name: {"limit": getattr(node.limits, name), "used": used} for name, used in node.in_use.items()},
            },
            "limit_hits": dict(node.limit_hits),
            "ends": dict(self.ends),
            "bans": [
                {"target": ban.target, "since": ban.since, "until": ban.until, "reason": ban.reason}
                for ban in self.bans.current(self._wall())
            ],
            "received": self.carried[0] + sum(each.from_peer.bytes for each in self.joiner.peers.values()),
            "sent": self.carried[1] + sum(each.from_kaspad.bytes for each in self.joiner.peers.values()),
            "upload_limit": self.settings.upload_rate,
            "events": dict(node.events),
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
        rows = [self._joined_row(each, comparison, now) for each in joined.values()]
        rows += [self._kept_row(kept, now) for kept in self.keeper.all() if kept.peer not in joined]
        return rows

    def _joined_row(self, joined: Joined, comparison: Comparison, now: float) -> dict[str, Any]:
        metadata = joined.stream.metadata
        ready = joined.ready_at
        theirs = joined.theirs
        return {
            "peer_id": joined.peer,
            "state": "joined" if ready is not None else "handshaking",
            "direction": str(metadata.direction),
            "path": str(metadata.path.kind),
            "relay_id": metadata.path.relay,
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
        return {
            "peer_id": kept.peer,
            "state": state,
            "direction": "outbound",
            "path": str(PathKind.DIRECT),
            "relay_id": None,
            "address": kept.addresses[0] if kept.addresses else "",
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
        return {"peer": row, "kaspad": self._kaspad_status(trio.current_time())}


def _is_entry(text: str) -> bool:
    try:
        parse_entry(text)
    except ConfigError:
        return False
    return True


def ip_of(address: str) -> str | None:
    """The IP of a multiaddr, or ``None`` where it has none."""
    try:
        found = ip_port(address)
    except AddressError:
        return None
    return None if found is None else found[0]


def why(error: Exception) -> str:
    """An error in one line."""
    if isinstance(error, DialError):
        reasons = [error.hint] if error.hint else []
        reasons += [
            f"{without_peer(each.address)}: {_first_line(each.error)}"
            + ("" if each.stage is Stage.TCP else f" (at {each.stage})")
            for each in error.failures
        ]
        return "; ".join(reasons) or _first_line(error)
    return _first_line(error)


def _first_line(error: BaseException) -> str:
    lines = re.sub(r"^\[Errno -?\d+\] ", "", str(error)).splitlines()
    return lines[0] if lines else type(error).__name__
