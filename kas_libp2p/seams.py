"""The two seams: all that a Kaspa core sees of the overlay is a stream, and where it came from.

Outbound, `OutboundConnector.connect` makes a stream of a target. Inbound, `serve_with_incoming` hands streams over.

Which Kaspa stream belongs on a connection
    kaspad's overlay decides by the *connection*: its initiator opens one stream and is the HTTP/2 client on it; a
    surplus stream is reset. Between our own nodes the message dialect is preferred, which either side may open. So:

    * The initiator proposes both dialects, messages first.
    * The responder proposes messages only, and only if the peer serves them (identify tells). For HTTP/2 it needs a
      connection of which it is the initiator, and dials one.
    * There is one Kaspa stream per connection. If both open one at the same time, the initiator's stays: it resets the
      other's, and the responder accepts the initiator's beside its own, which is about to be reset.
    * A session (`kas_libp2p.session`) counts as the Kaspa stream of the connection by which it goes. To open one beside
      another is refused; one that lives may move to any connection.
    * A stream that either side has closed is not the connection's Kaspa stream any more, though it may have to wait for
      the other side's end: the next one may be opened at once.

What may fall back to plain TCP
    An ``ip:port`` in mode ``bridge``, and every one in mode ``off``. A multiaddr or a peer id never does: who names a
    peer wants that peer proven.
"""

from __future__ import annotations

import errno
import socket
import struct
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import trio

from kas_libp2p import addresses as addr
from kas_libp2p.addresses import Target, TargetKind, parse_target
from kas_libp2p.config import Config, Mode
from kas_libp2p.errors import (
    AddressFailure,
    DialError,
    KasError,
    Refused,
    Stage,
    StreamCode,
)
from kas_libp2p.metadata import DIRECT, SESSION, Dialect, Direction, OverlayStream, PeerId, TransportMetadata

if TYPE_CHECKING:
    from kas_libp2p.transport.connection import Connection
    from kas_libp2p.transport.yamux.stream import YamuxStream

KASPA: tuple[str, ...] = (Dialect.MESSAGES, Dialect.HTTP2)
"""The protocols of Kaspa streams, the preferred one first."""
OVERLAY_TIMEOUT = 5.0
"""Seconds that mode ``bridge`` gives the overlay before plain TCP: kaspad's own dial waits no longer."""
TCP_TIMEOUT = 5.0
"""Seconds for a plain TCP connection, see `kas_libp2p.config.DialConfig.tcp_timeout`."""
MAX_COOLDOWNS = 1024
"""Addresses remembered as not on the overlay; the oldest are forgotten."""

Handler = Callable[[OverlayStream], Awaitable[None]]


def is_kaspa(protocols: Iterable[str]) -> bool:
    """Whether any of the protocols is a Kaspa dialect."""
    return any(protocol in KASPA for protocol in protocols)


class KaspaStreams:
    """Keeps to one Kaspa stream per connection. See the module for the rules.

    Args:
        talks: whether a stream belongs to a session on which both sides still talk.
    """

    def __init__(self, talks: Callable[[YamuxStream], bool] = lambda _: False) -> None:
        self._talks = talks
        self._opened: dict[int, YamuxStream | None] = {}

    def busy(self, connection: Connection) -> bool:
        """Whether the connection has a Kaspa stream, or one is being opened from here."""
        return self._ours(connection) or any(map(self._counts, connection.streams))

    def _ours(self, connection: Connection) -> bool:
        if connection.number not in self._opened:
            return False
        stream = self._opened[connection.number]
        return stream is None or self._counts(stream)

    def _counts(self, stream: YamuxStream) -> bool:
        """Whether it is a Kaspa stream on which both sides still talk."""
        return self._talks(stream) if stream.protocol == SESSION else stream.protocol in KASPA and not stream.over

    def is_surplus(self, stream: YamuxStream) -> bool:
        """Whether a Kaspa stream that the peer opened has to be reset."""
        connection = stream.connection
        if stream.protocol == Dialect.HTTP2 and connection.initiator:
            return True
        if connection.initiator and self._ours(connection):
            return True
        return any(
            other is not stream and other.direction is Direction.INBOUND and self._counts(other)
            for other in connection.streams
        )

    async def open(self, connection: Connection, protocols: Sequence[str]) -> YamuxStream:
        """Open a Kaspa stream on a connection that is not `busy`.

        Raises:
            NegotiationError, UpgradeTimeout, Refused, ConnectionLost: see `Connection.open_stream`.
        """
        last = self._opened.get(connection.number)
        if last is not None and last.closed and last.unsent:
            last.reset()  # its end would come behind the new one's beginning, which would be taken for surplus
        self._opened[connection.number] = None
        try:
            stream = await connection.open_stream(*protocols)
        except BaseException:
            self.forget(connection)  # which may have been told already
            raise
        self._opened[connection.number] = stream
        return stream

    def forget(self, connection: Connection) -> None:
        """A connection ended."""
        self._opened.pop(connection.number, None)

    def guard(
        self, handler: Handler, refused: Callable[[YamuxStream], None]
    ) -> Callable[[YamuxStream], Awaitable[None]]:
        """A handler that resets surplus streams.

        Args:
            handler: gets the others.
            refused: told of each surplus stream.
        """

        async def serve(stream: YamuxStream) -> None:
            if self.is_surplus(stream):
                stream.reset(StreamCode.RESOURCES)
                refused(stream)
            else:
                await handler(stream)

        return serve


class TcpStream(OverlayStream):
    """A plain TCP connection as a stream like any other: no peer is proven, no protocol agreed on."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self._stream = stream
        self._opened_at = trio.current_time()
        self._local = _address_text(stream.socket.getsockname())
        self._remote = _address_text(stream.socket.getpeername())

    @property
    def metadata(self) -> TransportMetadata:
        """Who is at the other end: nobody knows; by which way: direct."""
        return TransportMetadata(
            peer=None,
            path=DIRECT,
            direction=Direction.OUTBOUND,
            initiator=True,
            protocol="",
            local_address=self._local,
            remote_address=self._remote,
            connection_opened_at=self._opened_at,
            stream_opened_at=self._opened_at,
        )

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await self._stream.send_all(data if isinstance(data, bytes | memoryview) else memoryview(data))

    async def wait_send_all_might_not_block(self) -> None:
        await self._stream.wait_send_all_might_not_block()

    async def send_eof(self) -> None:
        await self._stream.send_eof()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        return bytes(await self._stream.receive_some(max_bytes))

    async def aclose(self) -> None:
        await self._stream.aclose()

    def reset(self, code: int = 0) -> None:
        """Abort with a TCP reset. TCP has no codes."""
        try:
            self._stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        except OSError as error:
            if error.errno != errno.EBADF:  # it was closed before
                raise
        self._stream.socket.close()


def _address_text(where: tuple[Any, ...]) -> str:
    return addr.ip_port_text(where[0], where[1])


class Overlay(Protocol):
    """What the seams need of a node."""

    @property
    def config(self) -> Config: ...

    async def connect(
        self, target: str, protocol: str | Sequence[str] = ..., *, addresses: Iterable[str] = ()
    ) -> OverlayStream: ...

    async def serve(self, handler: Handler, protocol: str | Sequence[str] = ...) -> None: ...

    def known_peer_at(self, ip: str, port: int) -> PeerId | None: ...


class OutboundConnector:
    """Makes a stream of a target: peer id, multiaddr, or ``ip:port``.

    Args:
        node: the overlay.
        mode: see `kas_libp2p.config.Mode`; the node's if left out.
        cooldown: seconds for which mode ``bridge`` leaves the overlay alone for an ``ip:port`` where it failed; the
            node's if left out.
    """

    def __init__(self, node: Overlay, *, mode: Mode | None = None, cooldown: float | None = None) -> None:
        self._node = node
        self.mode = mode if mode is not None else node.config.mode
        self._cooldown = cooldown if cooldown is not None else node.config.tcp_cooldown
        self._left_alone: OrderedDict[str, float] = OrderedDict()

    async def connect(self, target: str, *, addresses: Iterable[str] = ()) -> OverlayStream:
        """Connect to a Kaspa node.

        Args:
            target: a peer id (its addresses known, or given), a multiaddr, ``ip:port`` or ``host:port``.
            addresses: addresses of the peer beside those that are known.

        Returns:
            The stream. ``stream.metadata.dialect`` tells how it speaks; ``None`` is plain TCP, on which the caller is
            the HTTP/2 client.

        Raises:
            AddressError: the target is none of these.
            Refused: the mode or a list forbids it.
            DialError: nothing answered; the reason of each address is in it.
            KasError: the peer was reached, but has no Kaspa stream for us.
        """
        parsed = parse_target(target)
        if parsed.kind is not TargetKind.HOST:
            if self.mode is Mode.OFF:
                raise Refused("mode", f"{target} is an overlay address, and mode is off: use bridge or full")
            return await self._node.connect(target, KASPA, addresses=addresses)
        match self.mode:
            case Mode.OFF:
                return await self._plain(parsed)
            case Mode.FULL:
                peer = self._known(parsed)
                if peer is None:
                    raise Refused(
                        "mode",
                        f"no known overlay peer is at {parsed}, and mode is full, which allows no plain TCP: "
                        "name its multiaddr, or use mode bridge",
                    )
                return await self._node.connect(peer, KASPA)
            case Mode.BRIDGE:
                return await self._overlay_first(parsed, addresses)

    async def _overlay_first(self, target: Target, addresses: Iterable[str]) -> OverlayStream:
        if self.cooling(target.text) > 0:
            return await self._plain(target)
        peer = self._known(target)
        try:
            with trio.fail_after(OVERLAY_TIMEOUT):
                stream = await self._node.connect(peer or str(target.address), KASPA, addresses=addresses)
            self._left_alone.pop(target.text, None)
            return stream
        except Refused:
            raise  # a ban, a list or a limit is no reason to try another way
        except (KasError, trio.TooSlowError) as error:
            self._left_alone[target.text] = trio.current_time() + self._cooldown
            self._left_alone.move_to_end(target.text)
            if len(self._left_alone) > MAX_COOLDOWNS:
                self._left_alone.popitem(last=False)
            try:
                return await self._plain(target)
            except DialError as plain:
                reason = error if isinstance(error, KasError) else f"not within {OVERLAY_TIMEOUT:g} s"
                raise DialError(
                    target.text, plain.failures, f"not by the overlay ({reason}), nor by plain TCP"
                ) from error

    def cooling(self, target: str) -> float:
        """Seconds for which plain TCP alone is used for an ``ip:port``."""
        return max(0.0, self._left_alone.get(target, 0.0) - trio.current_time())

    def _known(self, target: Target) -> PeerId | None:
        assert target.address is not None
        where = addr.ip_port(target.address)
        return self._node.known_peer_at(*where) if where is not None else None

    async def _plain(self, target: Target) -> TcpStream:
        host, _, port = target.text.rpartition(":")
        host = host.strip("[]")
        started = trio.current_time()
        reasons: Sequence[BaseException]
        try:
            with trio.fail_after(TCP_TIMEOUT):
                stream = await trio.open_tcp_stream(host, int(port))
            return TcpStream(stream)
        except trio.TooSlowError:
            reasons = [TimeoutError(f"no answer within {TCP_TIMEOUT:g} s")]
        except OSError as problem:
            # Trio says that all attempts failed, and keeps why behind that.
            why = problem.__cause__ or problem
            reasons = why.exceptions if isinstance(why, BaseExceptionGroup) else [why]
        seconds = trio.current_time() - started
        failures = tuple(AddressFailure(target.text, Stage.TCP, each, seconds) for each in reasons)
        raise DialError(target.text, failures) from BaseExceptionGroup("every address failed", reasons)


async def serve_with_incoming(node: Overlay, handler: Handler) -> None:
    """Hand incoming Kaspa streams over, each at once and in a task of its own.

    Returns as soon as they are served. A handler that waits for a silent peer holds up nobody; one that raises loses
    its stream. The stream is closed when its handler returns.

    Args:
        node: the overlay.
        handler: gets each stream; ``stream.metadata`` tells from whom and in which dialect.
    """
    await node.serve(handler, KASPA)
