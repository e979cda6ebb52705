"""TCP: connections, listeners, and dialing from the port we listen on.

**Why from the listen port.** What others see of a node behind a NAT is the mapping of the port it dialed from. Only if
that is the port it listens on does the observed address lead back to it, which hole punching lives on. So a listener
and its outgoing connections share a port, by ``SO_REUSEADDR`` and ``SO_REUSEPORT``.

**What that costs.** A connection is told apart by its four numbers, so from one port there is one connection to a
remote ``ip:port`` at a time. A second one, or one while the first is in TIME_WAIT, is refused by the kernel
(EADDRNOTAVAIL) and gets another port. Two nodes that dial each other at the same moment get *one* connection if their
SYNs cross (RFC 9293 section 3.5, simultaneous open), and both would speak first on it; that is noticed, and both dial
once more from another port.

**How SO_REUSEPORT hides nothing.** With it on from the start, a second process of the same user would bind the same
port without an error and take half of the connections. So a listener binds and listens without it, which fails if
anybody else listens there, and switches it on only then. Two processes that try at once can't both pass, as the kernel
checks again in ``listen``.

Options set on the listening socket are inherited by what it accepts (Linux), so an accept costs no more system calls.
"""

from __future__ import annotations

import contextlib
import enum
import errno
import os
import socket
import struct
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path

import trio
from multiaddr import Multiaddr

from kas_libp2p import addresses as addr
from kas_libp2p.config import KIB, MIB, DialConfig
from kas_libp2p.errors import AddressError, ListenError
from kas_libp2p.events import AcceptFailed, EventBus
from kas_libp2p.transport.holders import who_holds
from kas_libp2p.transport.interfaces import read_addresses

BACKLOG = 1024
"""Connections that may wait for `Listener.accept`: what a burst brings while the process is busy for some 100 ms. The
kernel caps it (net.core.somaxconn, 4096)."""

NOTSENT_LOWAT = 128 * KIB
"""Unsent bytes in the kernel from which on it takes no more. Without it the send buffer grows to megabytes, and a small
message of one stream waits behind all that another has already put there. 128 KiB are two full Noise messages, which
keep the line busy while the next two are sealed.

Measured at 50 ms round trip and 55-62 MB/s: 95 % of the time at most 191 KiB (3.5 ms) wait unsent, without it 1273 KiB
(21.5 ms); at 64 KiB 2.4 ms. On loopback it costs the writer of 64 KiB pieces 0.2 s of CPU per GB, of 256 KiB pieces
nothing that shows."""

BYTES_ACKED = slice(120, 128)
"""Where ``tcpi_bytes_acked`` stands in Linux's ``struct tcp_info``, since 4.1."""
SEND_BUFFER = 32 * MIB
"""Bytes in flight that a connection may have, where the system allows it: the largest Yamux window in use, 160 MB/s at
200 ms of round trip. The kernel's own tuning ends at ``tcp_wmem`` (4 MiB by default, with its book-keeping): 15 MB/s
were measured over such a path, and 52 with this. `NOTSENT_LOWAT` bounds what is not in flight all the same, so nothing
waits longer."""

KEEPALIVE_IDLE = 60
"""Seconds of silence before TCP asks whether the other side is there. The muxer asks by itself, and sooner; this is for
connections that have no muxer yet or none at all, and keeps NAT mappings alive (some forget after 5 minutes)."""

SO_SNDBUFFORCE = 32
"""``asm-generic/socket.h``; the socket module lacks it."""

KEEPALIVE_INTERVAL = 15
KEEPALIVE_COUNT = 4
"""Unanswered probes after which the connection is dead: two minutes after its last sign of life."""

ACCEPT_PAUSE = 0.1
"""Seconds to wait when the system lacks what an accept needs (file descriptors, memory). The connection stays in the
kernel's queue meanwhile, so trying again at once would be a busy loop."""

READ_BEFORE_YIELD = 1024 * KIB
"""Bytes that `TcpRaw.receive_into` and `send_all` move before they let other tasks run: about a millisecond."""

_LACKING = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})

_OURS = frozenset({errno.EBADF, errno.EINVAL, errno.ENOTSOCK, errno.EFAULT, errno.EOPNOTSUPP})
"""What `accept` answers to a mistake of ours. Everything else in there is a network error of the new connection, which
Linux passes on (accept(2)), and the listener is fine."""

_TAKEN = frozenset({errno.EADDRINUSE, errno.EADDRNOTAVAIL, errno.ECONNRESET})
"""What a dial from the listen port meets when another port would do: the port, or all four numbers, are taken; or the
other side noticed crossed SYNs before we did."""

DIALS_FROM_LISTEN_PORT = 2
"""Dials from the listen port, if it can't be told whether the first one's SYNs crossed or were answered twice. Dialed
from another port, a relay would see us where nobody else does, and none of its peers could meet us by a punch."""

_DISCARD_AT_CLOSE = 256 * KIB
"""Bytes of unread input to throw away before closing."""

_LINGER_NONE = struct.pack("ii", 1, 0)
_ESTABLISHED = 1
_INFO_SEGMENTS = struct.Struct("=I8xI")  # tcpi_segs_in, tcpi_data_segs_in of struct tcp_info (linux/tcp.h)
_INFO_SEGMENTS_AT = 140
_INFO_RETRANSMITTED = struct.Struct("=I")  # tcpi_total_retrans
_INFO_RETRANSMITTED_AT = 100


class TcpRaw:
    """One TCP connection: `RawConnection` over a non-blocking socket.

    Every method tries its system call first and waits only if it has to.

    Args:
        sock: connected and non-blocking. Belongs to this object from now on.
        remote: its peer's address as the socket gave it.
    """

    __slots__ = ("_closed", "_moved", "_sent", "_sock", "local_address", "remote_address")

    def __init__(self, sock: socket.socket, remote: tuple[str | int, ...]) -> None:
        self._sock = sock
        self._closed = False
        self._moved = 0
        self._sent = 0
        self.local_address: str = _text(sock.getsockname())
        """This end, as multiaddr text."""
        self.remote_address: str = _text(remote)
        """The other end, as multiaddr text."""

    def __repr__(self) -> str:
        return f"<TcpRaw {self.local_address} to {self.remote_address}{', closed' if self._closed else ''}>"

    @property
    def socket(self) -> socket.socket:
        """The socket underneath, for its options and statistics; not to be read, written or closed."""
        return self._sock

    def receive_nowait(self, buffer: memoryview) -> int | None:
        """Read what is there; see `RawConnection`."""
        try:
            return self._sock.recv_into(buffer)
        except BlockingIOError:
            return None
        except OSError as error:
            raise self._broken(error) from error

    async def wait_readable(self) -> None:
        """Wait until there is something to read; see `RawConnection`."""
        self._check_open()
        await trio.lowlevel.wait_readable(self._sock.fileno())

    async def receive_into(self, buffer: memoryview) -> int:
        """Read at least one byte; see `RawConnection`."""
        await self._take_turn()
        while True:
            count = self.receive_nowait(buffer)
            if count is not None:
                self._moved += count
                return count
            self._moved = 0
            await self.wait_readable()

    def delivered(self) -> int:
        """Bytes that the other host has acknowledged; see `RawConnection`."""
        try:
            info = self._sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, BYTES_ACKED.stop)
        except OSError:  # closed
            return 0
        return int.from_bytes(info[BYTES_ACKED], sys.byteorder)

    def send_nowait(self, data: bytes | bytearray | memoryview) -> int:
        """Send what there is room for; see `RawConnection`."""
        try:
            count = self._sock.send(data)
        except BlockingIOError:
            return 0
        except OSError as error:
            raise self._broken(error) from error
        self._sent += count
        return count

    def undelivered(self) -> int:
        """Bytes that the other host has not acknowledged; see `RawConnection`."""
        return max(0, self._sent - self.delivered()) if not self._closed else 0

    async def wait_writable(self) -> None:
        """Wait until there is room; see `RawConnection`."""
        self._check_open()
        await trio.lowlevel.wait_writable(self._sock.fileno())

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Send all of ``data``; see `RawConnection`."""
        await self._take_turn()
        self._check_open()
        with memoryview(data).cast("B") as view:
            sent = 0
            while sent < len(view):
                with view[sent:] as rest:
                    count = self.send_nowait(rest)
                sent += count
                self._moved += count
                if sent < len(view):
                    self._moved = 0
                    await self.wait_writable()

    def send_eof(self) -> None:
        """Say that nothing more follows; see `RawConnection`."""
        try:
            self._sock.shutdown(socket.SHUT_WR)
        except OSError:
            return  # broken or closed: there is nobody to tell

    async def aclose(self) -> None:
        """Close in order; see `RawConnection`."""
        if not self._closed:
            self.send_eof()
            self._discard_input()
            self._close()
        await trio.lowlevel.checkpoint()

    def abort(self) -> None:
        """Close with a TCP reset; see `RawConnection`."""
        if self._closed:
            return
        try:
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_NONE)
        except OSError:
            pass  # already reset by the other side
        finally:
            self._close()

    def _close(self) -> None:
        self._closed = True
        trio.lowlevel.notify_closing(self._sock.fileno())
        self._sock.close()

    def _discard_input(self) -> None:
        # Closing with unread input makes Linux reset the connection and drop what we sent and has not left yet.
        scratch = bytearray(64 * KIB)
        try:
            for _ in range(_DISCARD_AT_CLOSE // len(scratch)):
                if not self._sock.recv_into(scratch):
                    return
        except OSError:
            return

    async def _take_turn(self) -> None:
        if self._moved >= READ_BEFORE_YIELD:
            self._moved = 0
            await trio.lowlevel.checkpoint()
        else:
            await trio.lowlevel.checkpoint_if_cancelled()

    def _check_open(self) -> None:
        if self._closed:
            raise trio.ClosedResourceError(f"the connection to {self.remote_address} was closed on this side")

    def _broken(self, error: OSError) -> Exception:
        if self._closed:
            return trio.ClosedResourceError(f"the connection to {self.remote_address} was closed on this side")
        return trio.BrokenResourceError(f"TCP to {self.remote_address}: {error.strerror or error}")


class Listener:
    """One listening socket. Made by `listen`.

    Attributes:
        address: the bound address; the port is the real one, the IP may be a wildcard.
        ip, port: the same in parts.
    """

    def __init__(self, sock: socket.socket, events: EventBus | None = None) -> None:
        self._sock = sock
        self._events = events
        self._closed = False
        name = sock.getsockname()
        self.address: Multiaddr = addr.parse(_text(name))
        self.ip: str = name[0]
        self.port: int = name[1]
        self.family: socket.AddressFamily = sock.family

    def __repr__(self) -> str:
        return f"<Listener {self.address}{', closed' if self._closed else ''}>"

    @property
    def is_wildcard(self) -> bool:
        """Whether it listens on all addresses of its family."""
        return addr.is_wildcard(self.ip)

    def addresses(self, interfaces: Iterable[str] | None = None) -> list[Multiaddr]:
        """Where it can be reached: the bound address, or each interface address if it is a wildcard.

        Args:
            interfaces: the IP addresses of the machine's interfaces; read from the system if left out.
        """
        if not self.is_wildcard:
            return [self.address]
        found = read_addresses() if interfaces is None else interfaces
        return [addr.from_ip_port(ip, self.port) for ip in found if _family(ip) == self.family]

    async def accept(self) -> TcpRaw:
        """Wait for the next connection.

        Survives every error of the system and of single connections; each is an `AcceptFailed` event.

        Raises:
            trio.ClosedResourceError: the listener was closed.
        """
        await trio.lowlevel.checkpoint()  # before, not after: what has been accepted must reach the caller
        while True:
            try:
                sock, remote = self._sock.accept()
            except BlockingIOError:
                await trio.lowlevel.wait_readable(self._sock.fileno())
                continue
            except OSError as error:
                if self._closed:
                    raise trio.ClosedResourceError(f"the listener on {self.address} was closed") from None
                if error.errno in _OURS:
                    raise
                await self._pause(error)
                continue
            try:
                sock.setblocking(False)
                return TcpRaw(sock, remote)
            except BaseException:
                sock.close()
                raise

    async def _pause(self, error: OSError) -> None:
        seconds = ACCEPT_PAUSE if error.errno in _LACKING else 0.0
        if self._events is not None:
            reason = errno.errorcode.get(error.errno or 0, str(error))
            self._events.emit(AcceptFailed(address=str(self.address), reason=reason, pause=seconds))
        await trio.sleep(seconds)

    def close(self) -> None:
        """Stop listening. Connections that wait in the kernel's queue are reset; accepted ones are not touched."""
        if not self._closed:
            self._closed = True
            trio.lowlevel.notify_closing(self._sock.fileno())
            self._sock.close()


async def listen(address: addr.Address, *, events: EventBus | None = None, backlog: int = BACKLOG) -> Listener:
    """Listen on one IP address and TCP port.

    Args:
        address: ``/ip4/…/tcp/…`` or ``/ip6/…/tcp/…``; port 0 takes a free one.
        events: where errors of `Listener.accept` are told.
        backlog: connections that may wait to be accepted.

    Raises:
        ListenError: it is not possible; one sentence says why, who holds the port, and what helps.
        AddressError: no IP address with a TCP port.
    """
    await trio.lowlevel.checkpoint()
    ip, port = _where(address)
    try:
        return Listener(_open_listener(ip, port, backlog), events)
    except OSError as error:
        raise ListenError(await _explain(str(address), ip, port, error)) from error


async def listen_all(addresses: Sequence[addr.Address], *, events: EventBus | None = None) -> list[Listener]:
    """Listen on several addresses, or on none of them if one fails.

    Port 0 on both wildcards (0.0.0.0 and ::) takes the same free port for both if it can: one port to open in a
    firewall. A machine without IPv6 is no reason to fail at ``/ip6/::`` as long as another listener is open.

    Raises:
        ListenError, AddressError: as `listen`, for the first address that failed.
    """
    listeners: list[Listener] = []
    try:
        for address in addresses:
            ip, port = _where(address)
            if not port and addr.is_wildcard(ip):
                shared = [each.port for each in listeners if each.is_wildcard and each.family != _family(ip)]
                if shared:
                    try:
                        listeners.append(await listen(addr.from_ip_port(ip, shared[0]), events=events))
                        continue
                    except ListenError:
                        pass  # taken in this family: any other port, below
            try:
                listeners.append(await listen(address, events=events))
            except ListenError:
                if not (listeners and ip == "::" and not has_ipv6()):
                    raise
    except BaseException:
        for listener in listeners:
            listener.close()
        raise
    return listeners


def has_ipv6() -> bool:
    """Whether this machine has any IPv6 address, loopback included."""
    return any(":" in ip for ip in read_addresses())


def _open_listener(ip: str, port: int, backlog: int) -> socket.socket:
    sock = socket.socket(_family(ip), socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        _set_options(sock)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if sock.family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind(_sockaddr(ip, port))
        sock.listen(backlog)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)  # not before: see the module's text
    except BaseException:
        sock.close()
        raise
    return sock


async def _explain(address: str, ip: str, port: int, error: OSError) -> str:
    match error.errno:
        case errno.EADDRINUSE:
            holder = await trio.to_thread.run_sync(who_holds, ip, port)
            by = f"held by {holder}" if holder else "in use"
            return f"can't listen on {address}: port {port} is {by}; stop that, or choose another port"
        case errno.EACCES:
            return f"can't listen on {address}: this user may not use port {port}; choose one from 1024 on"
        case errno.EADDRNOTAVAIL:
            own = ", ".join(each for each in read_addresses() if _family(each) == _family(ip)) or "none of that family"
            return f"can't listen on {address}: {ip} is no address of this machine, which has {own}"
        case errno.EAFNOSUPPORT:
            return f"can't listen on {address}: this machine has no IPv{6 if ':' in ip else 4}"
    return f"can't listen on {address}: {error.strerror or error}"


class Source(enum.Enum):
    """Which local port a dial uses."""

    PREFER_LISTEN_PORT = "prefer"
    """The port we listen on where a listener fits, else, or if it is taken, any."""
    LISTEN_PORT = "only"
    """The port we listen on and no other, as hole punching needs it. EADDRNOTAVAIL then means that this very connection
    may just have been accepted by our listener, and crossed SYNs are a success."""
    ANY_PORT = "any"
    """A fresh port, never one that we listen on: the system gives out no port that is bound."""


class Dialer:
    """Opens TCP connections, from the listen port where that is possible.

    Args:
        listeners: our listeners. The object is kept, so later changes count.
        config: ``tcp_timeout`` is used.

    Attributes:
        on_contact: called with the IP before each dial from a listen port: from then on a NAT may let it in there.
    """

    def __init__(self, listeners: Sequence[Listener] = (), config: DialConfig | None = None) -> None:
        self.on_contact: Callable[[str], None] | None = None
        self._listeners = listeners
        self._config = config or DialConfig()

    async def dial(self, address: addr.Address, *, source: Source = Source.PREFER_LISTEN_PORT) -> TcpRaw:
        """Connect to one IP address and port. A ``/p2p`` at the end is left to whoever verifies it.

        Raises:
            AddressError: not an address for plain TCP, or none that can be dialed (ours, port 0, wildcard, multicast);
                from the listen port alone: no listener fits, or there is no route.
            OSError: the system's reason; ``TimeoutError`` after ``tcp_timeout`` seconds.
        """
        ip, port = _where(address)
        self._check(address, ip, port)
        target = _sockaddr(ip, port)
        timeout = self._config.tcp_timeout
        with trio.move_on_after(timeout):
            if source is not Source.ANY_PORT:
                raw = await self._dial_from_listen_port(ip, target, source)
                if raw is not None:
                    return raw
            return await _connect(target, None)
        raise TimeoutError(errno.ETIMEDOUT, f"no answer within {timeout:g} s")

    async def _dial_from_listen_port(self, ip: str, target: tuple[str | int, ...], source: Source) -> TcpRaw | None:
        only = source is Source.LISTEN_PORT
        local = self._local_for(ip, target)
        if local is None:
            if only:
                raise AddressError(f"no listener has an address from which {ip} can be reached")
            return None
        if only and _source_towards(target) is None:
            raise AddressError(f"this machine has no route to {ip}")
        if self.on_contact is not None:
            self.on_contact(ip.partition("%")[0])
        again = False
        for _ in range(DIALS_FROM_LISTEN_PORT):
            try:
                raw = await _connect(target, local)
            except OSError as error:
                if only or not (again or error.errno in _TAKEN):
                    raise
                return None
            if only or not _crossed(raw.socket):
                return raw
            again = _sent_again(raw.socket)
            raw.abort()
            if not again:
                break
        return None

    def _local_for(self, ip: str, target: tuple[str | int, ...]) -> tuple[str | int, ...] | None:
        """The address to bind to: of a listener at the address that the system would send from, or of a wildcard."""
        fitting = [each for each in self._listeners if each.family == _family(ip) and not each._closed]
        if not fitting:
            return None
        exact = [each for each in fitting if not each.is_wildcard]
        if exact:
            ours = _source_towards(target)
            for listener in exact:
                if listener.ip == ours or (addr.is_loopback(listener.ip) and addr.is_loopback(ip)):
                    return _sockaddr(listener.ip, listener.port)
        return next((_sockaddr(each.ip, each.port) for each in fitting if each.is_wildcard), None)

    def _check(self, address: addr.Address, ip: str, port: int) -> None:
        if not port:
            raise AddressError(f"{address} can't be dialed: port 0")
        if addr.is_wildcard(ip) or addr.is_multicast(ip):
            raise AddressError(f"{address} can't be dialed: {ip} is no single host")
        for listener in self._listeners:
            if listener.port == port and listener.family == _family(ip) and not listener._closed:
                own = listener.ip == ip or (listener.is_wildcard and (addr.is_loopback(ip) or ip in read_addresses()))
                if own:  # TCP would connect the port to itself
                    raise AddressError(f"{address} is this node's own listen address")


async def _connect(target: tuple[str | int, ...], local: tuple[str | int, ...] | None) -> TcpRaw:
    sock = socket.socket(_family(str(target[0])), socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        _set_options(sock)
        if local is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            sock.bind(local)
        await trio.lowlevel.checkpoint_if_cancelled()
        code = sock.connect_ex(target)
        if code == errno.EINPROGRESS:
            await trio.lowlevel.wait_writable(sock.fileno())
            code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code:
            raise OSError(code, os.strerror(code))
        return TcpRaw(sock, target)
    except BaseException:
        trio.lowlevel.notify_closing(sock.fileno())
        sock.close()
        raise


def _set_options(sock: socket.socket) -> None:
    _widen(sock)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, NOTSENT_LOWAT)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_IDLE)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, KEEPALIVE_INTERVAL)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, KEEPALIVE_COUNT)


def _widen(sock: socket.socket) -> None:
    """Let the send buffer grow to `SEND_BUFFER`, unless asking for it would end the kernel's tuning below that."""
    # The kernel takes the size twice, for its book-keeping. With the right to it (CAP_NET_ADMIN) it knows no limit.
    with contextlib.suppress(PermissionError):
        sock.setsockopt(socket.SOL_SOCKET, SO_SNDBUFFORCE, SEND_BUFFER)
        return
    size = send_buffer_by_limits(_read("/proc/sys/net/core/wmem_max"), _read("/proc/sys/net/ipv4/tcp_wmem"))
    if size is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, size)


def send_buffer_by_limits(wmem_max: str, tcp_wmem: str) -> int | None:
    """The send buffer to ask for without privilege.

    Args:
        wmem_max, tcp_wmem: the contents of the files of these names under ``/proc/sys/net``; empty if not readable.

    Returns:
        bytes, or ``None`` where the kernel's own tuning reaches as far.
    """
    if not wmem_max or not tcp_wmem:
        return None
    size = min(SEND_BUFFER, int(wmem_max))
    return size if 2 * size > int(tcp_wmem.split()[2]) else None


@cache
def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="ascii")
    except OSError:
        return ""


def _crossed(sock: socket.socket) -> bool:
    """Whether a connection just made came from crossed SYNs.

    An ordinary one has seen one segment without data, the SYN-ACK; one from crossed SYNs a SYN and a SYN-ACK. A
    repeated SYN-ACK looks the same and costs a needless dial: from the listen port where our SYN was sent again
    (`_sent_again`), else from any.
    """
    info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _INFO_SEGMENTS_AT + _INFO_SEGMENTS.size)
    if len(info) < _INFO_SEGMENTS_AT + _INFO_SEGMENTS.size or info[0] != _ESTABLISHED:
        return False
    received, with_data = _INFO_SEGMENTS.unpack_from(info, _INFO_SEGMENTS_AT)
    return bool(received - with_data > 1)


def _sent_again(sock: socket.socket) -> bool:
    """Whether our SYN was sent more than once, and so may have been answered more than once."""
    info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _INFO_RETRANSMITTED_AT + _INFO_RETRANSMITTED.size)
    return len(info) == _INFO_RETRANSMITTED_AT + _INFO_RETRANSMITTED.size and bool(
        _INFO_RETRANSMITTED.unpack_from(info, _INFO_RETRANSMITTED_AT)[0]
    )


def _source_towards(target: tuple[str | int, ...]) -> str | None:
    """The address from which the system would reach ``target``. Connecting a UDP socket asks without sending."""
    with socket.socket(_family(str(target[0])), socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(target)
        except OSError:
            return None
        return str(probe.getsockname()[0])


def _where(address: addr.Address) -> tuple[str, int]:
    where = addr.ip_port(address)
    if where is None:
        raise AddressError(f"{address} is no address for plain TCP: /ip4/… or /ip6/… with /tcp/… is")
    return where


def _family(ip: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in ip else socket.AF_INET


def _sockaddr(ip: str, port: int) -> tuple[str | int, ...]:
    plain, _, zone = ip.partition("%")
    if ":" not in plain:
        return plain, port
    return plain, port, 0, _zone_index(zone) if zone else 0


def _zone_index(zone: str) -> int:
    return int(zone) if zone.isascii() and zone.isdigit() else socket.if_nametoindex(zone)


def _text(sockaddr: tuple[str | int, ...]) -> str:
    ip, port, *rest = sockaddr
    scope = int(rest[1]) if len(rest) == 2 else 0
    if scope and "%" not in str(ip):
        try:
            ip = f"{ip}%{socket.if_indextoname(scope)}"
        except OSError:  # the interface is gone
            ip = f"{ip}%{scope}"
    return addr.ip_port_text(str(ip), int(port))
