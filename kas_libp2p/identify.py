"""identify 1.0.0 and its push, on streams. What is said and believed is decided in `kas_libp2p._identify`."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence

import trio
from multiaddr import Multiaddr

from kas_libp2p._identify import (
    ID,
    PUSH,
    Allowance,
    Hearing,
    PeerInfo,
    PushPlan,
    for_remote,
    seal_record,
    statement,
)
from kas_libp2p.errors import ConnectionLost, KasError, RemoteProtocolError, StreamCode, StreamReset
from kas_libp2p.events import EventBus, IdentifyFailed, LimitHit, PeerIdentified, PeerMisbehaved
from kas_libp2p.identity import Identity
from kas_libp2p.metadata import PeerId
from kas_libp2p.transport.connection import Connection
from kas_libp2p.transport.yamux.stream import YamuxStream

__all__ = ["ID", "PUSH", "Identify", "PeerInfo"]

TIMEOUT = 10.0
"""Seconds for one exchange, in either direction: some kilobytes over a slow relay."""
MAX_PUSHES_AT_ONCE = 16
"""Peers that are told of a change at the same time."""
MAX_RECORDS = 64
"""Signed records that are kept: one per set of addresses, of which there are as many as classes of remote addresses."""


class Identify:
    """Tells about us and remembers what peers told.

    Args:
        identity: our key.
        events: where everything is told.
        listen: our addresses now, without our peer id.
        protocols: what we serve now.
        agent, protocol_version: what we call ourselves.
        wall_clock: seconds since the epoch, for the records' sequence numbers.

    Attributes:
        on_identified: called with what a peer told on a connection, merged with what it told before; must not raise.
        peers: what each connected peer told last.
        observed: by number of the connection, at which address its peer sees us.
    """

    def __init__(
        self,
        identity: Identity,
        events: EventBus,
        *,
        listen: Callable[[], Sequence[Multiaddr]],
        protocols: Callable[[], Sequence[str]],
        agent: str,
        protocol_version: str,
        wall_clock: Callable[[], float],
    ) -> None:
        self.on_identified: list[Callable[[Connection, PeerInfo], None]] = []
        self.peers: dict[PeerId, PeerInfo] = {}
        self.observed: dict[int, str] = {}
        self._identity = identity
        self._events = events
        self._listen = listen
        self._protocols = protocols
        self._agent = agent
        self._protocol_version = protocol_version
        self._wall_clock = wall_clock
        self._seq = 0
        self._records: OrderedDict[tuple[bytes, ...], bytes] = OrderedDict()
        self._asking: dict[int, trio.Event] = {}
        self._allowances: dict[int, Allowance] = {}
        self._plan = PushPlan()
        self._told: tuple[tuple[str, ...], tuple[str, ...]] | None = None
        self._wake = trio.Event()

    # Telling

    async def handle(self, stream: YamuxStream) -> None:
        """Serve ``/ipfs/id/1.0.0``."""
        with trio.move_on_after(TIMEOUT) as scope:
            await stream.send_all(self._statement(stream.connection))
            await stream.send_eof()
        if scope.cancelled_caught:
            stream.reset()

    def _statement(self, connection: Connection) -> bytes:
        listen = for_remote(self._listen(), connection.remote_address)
        return statement(
            self._identity,
            agent=self._agent,
            protocol_version=self._protocol_version,
            protocols=self._protocols(),
            listen=listen,
            seq=self._seq,
            observed=connection.remote_address,
            record=self._record(listen),
        )

    def _record(self, listen: list[Multiaddr]) -> bytes:
        key = tuple(address.to_bytes() for address in listen)
        record = self._records.get(key)
        if record is None:
            # Larger with each record, also over a restart: peers ignore what is not newer than what they have.
            self._seq = max(self._seq + 1, int(self._wall_clock() * 1e9))
            record = self._records[key] = seal_record(self._identity, listen, self._seq)
            if len(self._records) > MAX_RECORDS:
                self._records.popitem(last=False)
        return record

    # Hearing

    def expect(self, connection: Connection) -> None:
        """A connection has just come up, and its peer will be asked: `wait` waits for that from now on."""
        self._asking[connection.number] = trio.Event()

    async def ask(self, connection: Connection) -> None:
        """Have a peer tell about itself, on a connection that has just come up. Never raises for the peer's faults."""
        done = self._asking.setdefault(connection.number, trio.Event())
        try:
            with trio.fail_after(TIMEOUT):
                stream = await connection.open_stream(ID)
                try:
                    self._believe(connection, *await self._hear(stream))
                    await stream.aclose()
                except BaseException:
                    stream.reset()
                    raise
        except RemoteProtocolError as error:
            self._misbehaved(connection, str(error))
        except trio.TooSlowError:
            self._events.emit(IdentifyFailed(peer=connection.peer, reason=f"silent for {TIMEOUT:g} s"))
        except KasError as error:
            self._events.emit(IdentifyFailed(peer=connection.peer, reason=str(error)))
        finally:
            done.set()

    async def wait(self, connection: Connection) -> PeerInfo | None:
        """What a peer told, as soon as it did; ``None`` if it did not."""
        asking = self._asking.get(connection.number)
        if asking is not None:
            await asking.wait()
        return self.peers.get(connection.peer)

    async def handle_push(self, stream: YamuxStream) -> None:
        """Serve ``/ipfs/id/push/1.0.0``."""
        connection = stream.connection
        allowance = self._allowances.setdefault(connection.number, Allowance())
        if not allowance.take(trio.current_time()):
            self._events.emit(LimitHit(reason="identify_push", peer=connection.peer, address=connection.remote_address))
            stream.reset(StreamCode.RESOURCES)
            return
        try:
            with trio.fail_after(TIMEOUT):
                self._believe(connection, *await self._hear(stream))
        except RemoteProtocolError as error:
            self._misbehaved(connection, str(error))
            stream.reset()
        except trio.TooSlowError:
            self._misbehaved(connection, f"a push took longer than {TIMEOUT:g} s")
            stream.reset()

    async def _hear(self, stream: YamuxStream) -> tuple[PeerInfo, str | None]:
        connection = stream.connection
        hearing = Hearing(connection.peer, connection.public_key)
        while data := await stream.receive_some():
            hearing.receive(data)
        return hearing.finish()

    def _believe(self, connection: Connection, info: PeerInfo, fault: str | None) -> None:
        if connection.close_reason is not None:
            return
        if fault is not None:
            self._misbehaved(connection, fault)
        known = self.peers.get(info.peer)
        if known is not None:
            info = _merged(known, info)
        self.peers[info.peer] = info
        if info.observed is not None:
            self.observed[connection.number] = info.observed
        self._events.emit(
            PeerIdentified(
                peer=info.peer,
                agent=info.agent,
                protocol_version=info.protocol_version,
                protocols=info.protocols,
                addresses=info.addresses,
                observed=info.observed,
            )
        )
        for callback in self.on_identified:
            callback(connection, info)

    def _misbehaved(self, connection: Connection, reason: str) -> None:
        self._events.emit(
            PeerMisbehaved(peer=connection.peer, address=connection.remote_address, layer="identify", reason=reason)
        )

    def forget(self, connection: Connection, *, last: bool) -> None:
        """A connection ended.

        Args:
            last: whether it was the last one with its peer.
        """
        self.observed.pop(connection.number, None)
        self._allowances.pop(connection.number, None)
        self._asking.pop(connection.number, None)
        if last:
            self.peers.pop(connection.peer, None)

    # Pushing

    def changed(self) -> None:
        """Our addresses or protocols may have changed."""
        now = tuple(map(str, self._listen())), tuple(self._protocols())
        if now != self._told:
            self._told = now
            self._records.clear()
            self._plan.changed(trio.current_time())
            self._wake.set()

    async def push_changes(self, connections: Callable[[], Collection[Connection]]) -> None:
        """Tell connected peers of changes, for ever.

        Args:
            connections: the best connection with each peer.
        """
        while True:
            self._wake = trio.Event()
            with trio.move_on_at(self._plan.next_deadline(trio.current_time())):
                await self._wake.wait()
            if self._plan.on_timeout(trio.current_time()):
                await self._push([each for each in connections() if self._takes_pushes(each)])

    def _takes_pushes(self, connection: Connection) -> bool:
        info = self.peers.get(connection.peer)
        return info is not None and PUSH in info.protocols

    async def _push(self, connections: Collection[Connection]) -> None:
        turns = trio.CapacityLimiter(MAX_PUSHES_AT_ONCE)
        async with trio.open_nursery() as nursery:
            for connection in connections:
                nursery.start_soon(self._push_to, connection, turns)

    async def _push_to(self, connection: Connection, turns: trio.CapacityLimiter) -> None:
        async with turns:
            with trio.move_on_after(TIMEOUT):
                try:
                    stream = await connection.open_stream(PUSH)
                    try:
                        await stream.send_all(self._statement(connection))
                        await stream.aclose()
                    except BaseException:
                        stream.reset()
                        raise
                except (ConnectionLost, StreamReset, KasError) as error:
                    self._events.emit(IdentifyFailed(peer=connection.peer, reason=f"push: {error}"))


def _merged(known: PeerInfo, new: PeerInfo) -> PeerInfo:
    """A push holds what has changed; the rest stays. An older signed record changes no addresses."""
    older = known.signed and (not new.signed or new.seq < known.seq)
    source = known if older else new
    return PeerInfo(
        peer=new.peer,
        agent=new.agent or known.agent,
        protocol_version=new.protocol_version or known.protocol_version,
        protocols=new.protocols or known.protocols,
        addresses=source.addresses,
        observed=new.observed or known.observed,
        signed=source.signed,
        seq=source.seq,
    )
