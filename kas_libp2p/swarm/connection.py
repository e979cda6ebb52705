"""A connection and its streams as py-libp2p knows them, over the transport's own."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache

import trio
from libp2p.abc import IListener, IMuxedConn, IMuxedStream, INetConn, INetStream
from libp2p.connection_types import ConnectionType
from libp2p.custom_types import TProtocol
from libp2p.network.exceptions import SwarmException
from libp2p.network.stream import exceptions as stream_errors
from libp2p.peer.id import ID
from multiaddr import Multiaddr

from kas_libp2p import addresses
from kas_libp2p.errors import ConnectionLost, NegotiationError, Refused
from kas_libp2p.metadata import Path, PathKind, PeerId
from kas_libp2p.swarm._admission import Ticket
from kas_libp2p.swarm.network import Listener
from kas_libp2p.transport.connection import Connection
from kas_libp2p.transport.yamux.stream import YamuxStream

Notify = Callable[[str, "SwarmStream"], None]
"""Tells py-libp2p's notifees of a stream: the method's name, and the stream."""


@lru_cache(maxsize=4096)
def id_of(peer: PeerId) -> ID:
    """py-libp2p's form of a peer id."""
    return ID.from_base58(peer)


def peer_of(peer: ID | str) -> PeerId:
    """Our form of a peer id."""
    return PeerId(peer if isinstance(peer, str) else peer.to_base58())


@contextmanager
def _their_errors() -> Iterator[None]:
    """What a stream raises, in the form that py-libp2p's services handle."""
    try:
        yield
    except (trio.BrokenResourceError, NegotiationError) as error:
        raise stream_errors.StreamReset(str(error)) from error
    except trio.ClosedResourceError as error:
        raise stream_errors.StreamClosed(str(error)) from error


class SwarmStream(INetStream, IMuxedStream):
    """A stream as py-libp2p's services know one."""

    metric_send_channel = None

    def __init__(self, connection: SwarmConnection, stream: YamuxStream) -> None:
        self.muxed_conn = connection
        self.muxed_stream = self
        self.swarm_conn = connection
        self.stream = stream
        self._protocol = TProtocol(stream.protocol) if stream.protocol else None

    def get_protocol(self) -> TProtocol | None:
        return self._protocol

    def set_protocol(self, protocol_id: TProtocol) -> None:
        self._protocol = protocol_id

    async def read(self, n: int | None = None) -> bytes:
        """Read up to ``n`` bytes, or what is there.

        Raises:
            StreamEOF, StreamReset, StreamClosed: py-libp2p's.
        """
        if n == 0:
            return b""
        with _their_errors():
            data = await self.stream.receive_some(n if n is not None and n > 0 else None)
        if not data:
            raise stream_errors.StreamEOF
        return data

    async def write(self, data: bytes) -> None:
        """Write.

        Raises:
            StreamReset, StreamClosed: py-libp2p's.
        """
        with _their_errors():
            await self.stream.send_all(data)

    async def close_write(self) -> None:
        """End our direction. Raises as `write`."""
        with _their_errors():
            await self.stream.send_eof()

    async def close(self) -> None:
        await self.stream.aclose()
        self.swarm_conn.forget_stream(self)

    async def reset(self) -> None:
        self.stream.reset()
        self.swarm_conn.forget_stream(self)

    def set_deadline(self, ttl: int) -> None:
        """Not supported; use trio's cancel scopes."""
        raise NotImplementedError("use trio.fail_after")

    def get_remote_address(self) -> tuple[str, int] | None:
        return self.swarm_conn.get_remote_address()

    async def __aenter__(self) -> SwarmStream:
        return self


def _started() -> trio.Event:
    event = trio.Event()
    event.set()
    return event


class SwarmConnection(INetConn, IMuxedConn):
    """A connection in the swarm's table.

    Attributes:
        connection: the transport's connection.
        ticket: the places that it holds.
        last_used: when a stream was last opened, or known to be open; trio's clock.

    Args:
        notify: told of each stream that py-libp2p's services open and close.
    """

    event_started = _started()  # nobody sees a connection that has not started

    def __init__(self, connection: Connection, ticket: Ticket, notify: Notify) -> None:
        self.connection = connection
        self.ticket = ticket
        self.peer_id = id_of(connection.peer)
        self.last_used = connection.opened_at
        self._notify = notify
        self._net_streams: set[SwarmStream] | None = None

    def __repr__(self) -> str:
        return repr(self.connection)

    # Ours

    @property
    def peer(self) -> PeerId:
        """Who is at the other end."""
        return self.connection.peer

    @property
    def path(self) -> Path:
        """The way it takes."""
        return self.connection.path

    @property
    def lasts(self) -> float:
        """Seconds that the circuit under it will last, see `CircuitLimits.lasts`; infinity if there is none."""
        circuit = self.connection.circuit
        return circuit.limits.lasts if circuit is not None else math.inf

    async def open_stream(self, *protocols: str) -> YamuxStream:  # type: ignore[override]
        """Open a stream; see `kas_libp2p.transport.connection.Connection.open_stream`."""
        self.last_used = trio.current_time()
        return await self.connection.open_stream(*protocols)

    async def close(self, reason: str = "") -> None:
        """End it in order, see `Connection.aclose`."""
        await self.connection.aclose(reason)

    # INetConn and IMuxedConn

    @property
    def muxed_conn(self) -> IMuxedConn:  # type: ignore[override]
        return self

    @property
    def is_initiator(self) -> bool:
        return self.connection.initiator

    @property
    def is_closed(self) -> bool:
        return self.connection.closing

    @property
    def is_established(self) -> bool:
        return not self.connection.closing

    @property
    def direction(self) -> str:
        """``inbound`` or ``outbound``, as py-libp2p's metrics compare it."""
        return str(self.connection.direction)

    async def start(self) -> None:
        """Nothing to do: the swarm runs its connections."""

    async def accept_stream(self) -> IMuxedStream:
        """Not offered: the swarm hands each stream to its handler at once."""
        raise NotImplementedError("inbound streams go to the handlers of the swarm")

    async def new_stream(self) -> SwarmStream:
        """A bare stream: its user negotiates.

        Raises:
            SwarmException: the connection ended, or a limit is reached.
        """
        try:
            return self.net_stream(await self.open_stream())
        except (ConnectionLost, Refused) as error:
            raise SwarmException(str(error)) from error

    def net_stream(self, stream: YamuxStream) -> SwarmStream:
        """Wrap a stream for py-libp2p, and remember it for `get_streams`."""
        wrapped = SwarmStream(self, stream)
        if self._net_streams is None:
            self._net_streams = set()
        self._net_streams.add(wrapped)
        self._notify("opened_stream", wrapped)
        return wrapped

    def forget_stream(self, stream: SwarmStream) -> None:
        """A wrapped stream ended. May be called again."""
        if self._net_streams and stream in self._net_streams:
            self._net_streams.discard(stream)
            self._notify("closed_stream", stream)

    def get_streams(self) -> tuple[INetStream, ...]:
        """The open streams. Those of our own services are wrapped for the occasion."""
        wrapped = {each.stream: each for each in self._net_streams or ()}
        return tuple(wrapped.get(stream) or SwarmStream(self, stream) for stream in self.connection.streams)

    def get_transport_addresses(self) -> list[Multiaddr]:
        return [addresses.parse(self.connection.remote_address)]

    def get_connection_type(self) -> ConnectionType:
        relayed = self.connection.path.kind is PathKind.RELAYED
        return ConnectionType.RELAYED if relayed else ConnectionType.DIRECT

    def get_remote_address(self) -> tuple[str, int] | None:
        return addresses.ip_port(self.connection.remote_address)

    def remove_stream(self, stream: SwarmStream) -> None:
        self.forget_stream(stream)


class ListenerDoor(IListener):
    """A listener as py-libp2p knows one."""

    def __init__(self, listener: Listener) -> None:
        self.listener = listener

    async def listen(self, maddr: Multiaddr) -> None:
        raise NotImplementedError("it listens already")

    def get_addrs(self) -> tuple[Multiaddr, ...]:
        return tuple(self.listener.addresses())

    async def close(self) -> None:
        self.listener.close()
