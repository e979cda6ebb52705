"""Finds our kaspad, keeps an eye on it, and says in one sentence what is wrong when something is.

A look is a handshake that is given up after kaspad's Version: it tells network, version and node id without any flag or
RPC. It is done until a kaspad was found, and after one was lost. While peers are joined they are the sign of life; else
a TCP connection now and then is, which kaspad does not even note. RPC, where it answers, is read beside that, and
nothing depends on it.
"""

from __future__ import annotations

import ipaddress
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import trio

from kas_bridge import _kaspad
from kas_bridge._kaspad import QUICK, Condition, KaspadState, RpcFacts, RpcPeer
from kas_bridge.config import Network, Settings, format_endpoint, parse_endpoint
from kas_bridge.events import KaspadChanged
from kas_libp2p.errors import KasError
from kas_libp2p.events import EventBus
from kas_libp2p.kaspa.join import Ended, Joiner, JoinFailed, KaspadAddress, VersionInfo, dial_kaspad
from kas_libp2p.kaspa.rpc import connect_rpc
from kas_libp2p.kaspa.sources import Sources

__all__ = ["Condition", "KaspadState", "KaspadWatch", "RpcFacts", "look", "open_facts"]

FIRST_RETRY = 0.25
"""Seconds before a missing kaspad is looked for again, doubling."""

QUICK_RETRY = 2.0
"""Seconds between looks at most while nothing listens: a refused connection costs nobody anything, and a kaspad that is
back is used at once."""

SLOW_RETRY = 15.0
"""The same while something answers that we can't use: each look costs it a handshake."""

CHECK_EVERY = 10.0
"""Seconds between two looks at a kaspad that is up: RPC where it answers, else whether the port is still open."""

RPC_TIMEOUT = 3.0
"""Seconds for one round of RPC calls. kaspad's reads go on while its writes are blocked, and take milliseconds."""

RPC_RETRY = 30.0
"""Seconds before RPC is tried again: nothing depends on it."""

Look = Callable[[KaspadAddress, Sources], Awaitable[VersionInfo]]
OpenFacts = Callable[[str, int], AbstractAsyncContextManager[Callable[[], Awaitable[RpcFacts]]]]


async def look(address: KaspadAddress, sources: Sources) -> VersionInfo:
    """Ask what listens at an address who it is.

    Raises:
        JoinFailed: it is no kaspad that can be joined; ``ended`` says why.
    """
    return await Joiner(address, sources).look()


@asynccontextmanager
async def open_facts(host: str, port: int) -> AsyncIterator[Callable[[], Awaitable[RpcFacts]]]:
    """Connect to kaspad's RPC for the length of a block, and give the function that asks it: only reads, which it
    answers in its default safe mode.

    Raises:
        OSError, KasError, trio.TooSlowError: it can't be asked, or no longer.
    """
    async with connect_rpc(host, port) as rpc:

        async def ask() -> RpcFacts:
            with trio.fail_after(RPC_TIMEOUT):
                info = await rpc.get_info()
                server = await rpc.get_server_info()
                synced = await rpc.get_sync_status()
                peers = await rpc.get_connected_peer_info()
            return RpcFacts(
                format_endpoint(host, port),
                version=info.serverVersion,
                network=f"kaspa-{server.networkId.removeprefix('kaspa-')}",
                node_id=info.p2pId,
                synced=synced,
                peers=tuple(RpcPeer(each.id, _ip(each.address), each.isOutbound) for each in peers),
                at=trio.current_time(),
            )

        yield ask


def _ip(address: str) -> str:
    host = address.rpartition(":")[0].strip("[]")
    try:
        ip = ipaddress.ip_address(host)
    except ValueError:
        return host
    mapped = ip.ipv4_mapped if isinstance(ip, ipaddress.IPv6Address) else None
    return str(mapped or ip)


class KaspadWatch:
    """Knows how it stands with our kaspad, all the time.

    Args:
        settings: where to look, and which network is wanted.
        sources: the addresses that kaspad is dialed from.
        events: where `KaspadChanged` goes.
        joined: how many peers are joined now; while some are, no TCP check is made.
        look, open_facts: how kaspad is asked; other ones in tests.

    Attributes:
        state: how it stands now.
        rpc: what RPC told last, or ``None`` before it was asked or if it is off.
        address: the kaspad that was found last, or ``None``.
        version: what it said of itself.
        since: since when the condition holds, on trio's clock.
        retry_at: when it is looked for next, on trio's clock; ``None`` while it is up.
        on_change: called after each change of ``state``.
    """

    def __init__(
        self,
        settings: Settings,
        sources: Sources,
        events: EventBus,
        *,
        joined: Callable[[], int] = lambda: 0,
        look: Look = look,
        open_facts: OpenFacts = open_facts,
    ) -> None:
        self._given = parse_endpoint(settings.kaspad) if settings.kaspad else None
        self._network: Network | None = settings.network
        self._rpc_off = settings.rpc == "off"
        self._rpc_given = parse_endpoint(settings.rpc) if settings.rpc and not self._rpc_off else None
        self._sources = sources
        self._events = events
        self._joined = joined
        self._look = look
        self._open_facts = open_facts
        self._suspected = trio.Event()
        self._looked = trio.Event()
        self._renewed = False
        self._other_node = ""
        self.state = KaspadState()
        self.rpc: RpcFacts | None = None
        self.address: KaspadAddress | None = None
        self.version: VersionInfo | None = None
        self.retry_at: float | None = None
        self.since = trio.current_time()
        self.on_change: Callable[[KaspadState], None] = lambda state: None

    def suspect(self) -> None:
        """Something went wrong with kaspad: look at it now."""
        self._suspected.set()

    def met(self, version: VersionInfo) -> None:
        """A peer was joined, and kaspad said Version: it may be another kaspad than before."""
        if self.address is not None:
            self.version = version
            self._set(_kaspad.of_version(self.address, version, self._network))

    async def wait_looked(self) -> None:
        """Wait until the first look is over."""
        await self._looked.wait()

    async def run(self) -> None:
        """Watch until cancelled."""
        delay = FIRST_RETRY
        while True:
            await self._find()
            self._looked.set()
            if self.state.up:
                delay = FIRST_RETRY
                self.retry_at = None
                await self._stay()
                self._suspected = trio.Event()
                continue
            longest = QUICK_RETRY if self.state.condition in QUICK else SLOW_RETRY
            delay = min(delay * 2, longest)
            self.retry_at = trio.current_time() + delay
            await trio.sleep(delay)

    async def _find(self) -> None:
        outcomes: dict[int, tuple[KaspadAddress, VersionInfo | Ended]] = {}

        async def ask(index: int, address: KaspadAddress) -> None:
            try:
                outcomes[index] = address, await self._look(address, self._sources)
            except JoinFailed as failure:
                outcomes[index] = address, failure.ended

        tried = _kaspad.candidates(self._given, self._network)
        async with trio.open_nursery() as nursery:
            for index, address in enumerate(tried):
                nursery.start_soon(ask, index, address)
        answers = [outcomes[index] for index in sorted(outcomes)]
        found, state = _kaspad.judge(answers, self._network, given=self._given is not None)
        if found is not None:
            self.address = found
            self.version = next(
                answer for address, answer in answers if address is found and not isinstance(answer, Ended)
            )
        self._set(state)

    async def _stay(self) -> None:
        """Return when kaspad is no longer there, or is another one."""
        async with trio.open_nursery() as nursery:
            if not self._rpc_off:
                nursery.start_soon(self._ask_rpc)
            while self.state.up:
                with trio.move_on_after(CHECK_EVERY):
                    await self._suspected.wait()
                suspected, self._suspected = self._suspected.is_set(), trio.Event()
                if self._renewed:
                    self._renewed = False
                    break
                if (suspected or (not self._joined() and not self._rpc_answers())) and not await self._is_open():
                    break
            nursery.cancel_scope.cancel()

    def _rpc_answers(self) -> bool:
        return self.rpc is not None and not self.rpc.problem

    async def _is_open(self) -> bool:
        assert self.address is not None
        try:
            stream = await dial_kaspad(self.address, None)
        except JoinFailed:
            return False
        await trio.aclose_forcefully(stream)
        return True

    async def _ask_rpc(self) -> None:
        assert self.address is not None
        host, port = _kaspad.rpc_address(self._rpc_given, self.address, self.state.network)
        while True:
            try:
                async with self._open_facts(host, port) as ask:
                    while True:
                        self.rpc = self._of_our_kaspad(await ask())
                        await trio.sleep(CHECK_EVERY)
            except trio.TooSlowError:
                problem = "no answer in time"
            except OSError as error:
                problem = "nothing listens there" if _refused(error) else error.strerror or str(error)
            except KasError as error:
                problem = str(error)
            self.rpc = RpcFacts(format_endpoint(host, port), problem)
            await trio.sleep(RPC_RETRY)

    def _of_our_kaspad(self, facts: RpcFacts) -> RpcFacts:
        """Facts of another node than the one whose peers we are would mislead.

        Either kaspad was started again, with a new id, and is looked at again; or it is another kaspad's RPC.
        """
        if facts.problem or facts.node_id == self.state.node_id:
            return facts
        if facts.node_id != self._other_node:
            self._other_node = facts.node_id
            self._renewed = True
            self.suspect()
        return RpcFacts(facts.address, f"another kaspad answers there, on {facts.network}; say which with --rpc")

    def _set(self, state: KaspadState) -> None:
        old, self.state = self.state, state
        if old == state:
            return
        if old.condition != state.condition:
            self.since = trio.current_time()
        if not state.up:
            self.rpc = None
        if (old.condition, old.problem, old.node_id) != (state.condition, state.problem, state.node_id):
            self._events.emit(
                KaspadChanged(
                    condition=state.condition,
                    address=state.address,
                    network=state.network,
                    version=state.version,
                    node_id=state.node_id,
                    problem=state.problem,
                    help=state.help,
                )
            )
        self.on_change(state)


def _refused(error: OSError | ExceptionGroup[OSError]) -> bool:
    """trio keeps the errors of all addresses of a name in one group."""
    cause = error.__cause__
    errors = cause.exceptions if isinstance(cause, ExceptionGroup) else (error,)
    return all(isinstance(each, ConnectionRefusedError) for each in errors)
