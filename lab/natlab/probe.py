"""What does this NAT do? A prober in the manner of RFC 5780, for UDP and TCP, and the server that it asks.

The server has two addresses and two ports. The prober learns

- the mapping, by asking several of the server's endpoints how they see one local port,
- the filtering, by having the server answer (TCP: connect) from elsewhere,
- what an unsolicited packet gets: nothing, a refusal, or a prohibition,
- whether the port is kept, whether the outside address works from the inside (hairpin),
- how long an idle mapping lives, if asked to wait for that.

UDP is plain STUN and RFC 5780, so any such server serves; what needs TCP asks a server of ours, see `_stun`.
"""

from __future__ import annotations

import contextlib
import errno
import select
import socket
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from ._stun import DEFAULT_PORT, HEAD, MAX_SIZE, Endpoint, Message, size_of
from .errors import LabError
from .nat import TYPES, Filtering, Mapping, Port, promise_of

PATIENCE = 0.5
"""Seconds after which silence counts as such, on top of four times the round trip."""
ANSWER_TIMEOUT = 3.0
"""Seconds for an answer that has to come."""
TRIES = 3
"""Times that a UDP request is sent."""
MAX_CONNECTIONS = 512
"""TCP connections that a server holds; more are refused."""
IDLE_TIMEOUT = 900.0
"""Seconds after which a server ends an idle connection: longer than the mappings whose lifetime is measured."""

LOOKS = 2
"""Local ports of which we ask how they are seen: of 512 ports three at random are not distinct once in 170 times."""
NEXT = 8
"""Ports by which two flows in a row may differ if each gets the next: others take some in between."""
BLOCK = 512
"""Ports in a carrier's block."""

MakeSocket = Callable[[int, int], socket.socket]


class _Server:
    """Answers as RFC 5780 says, from all pairs of its addresses and ports. Only ever contacts who asks."""

    def __init__(self, addresses: list[str], port: int, make: MakeSocket) -> None:
        self.addresses, self.ports, self.make = addresses[:2], (port, port + 1), make
        self.family = socket.AF_INET6 if ":" in addresses[0] else socket.AF_INET
        self.udp: dict[Endpoint, socket.socket] = {}
        self.listeners: dict[int, tuple[socket.socket, Endpoint]] = {}
        self.connections: dict[Endpoint, socket.socket] = {}
        self.room = threading.BoundedSemaphore(MAX_CONNECTIONS)
        for endpoint in ((address, each) for address in self.addresses for each in self.ports):
            sock = self.udp[endpoint] = self.bound(socket.SOCK_DGRAM, endpoint)
            sock.setblocking(False)
            listener = self.bound(socket.SOCK_STREAM, endpoint)
            listener.listen(128)
            self.listeners[listener.fileno()] = listener, endpoint

    def bound(self, kind: int, endpoint: Endpoint) -> socket.socket:
        sock = self.make(self.family, kind)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind(endpoint)
        except OSError as error:
            sock.close()
            raise LabError(f"the prober's server can't be at {endpoint[0]} port {endpoint[1]}: {error}") from None
        return sock

    def other(self, endpoint: Endpoint, address: bool = True, port: bool = True) -> Endpoint:
        host, number = endpoint
        if address and len(self.addresses) == 2:
            host = self.addresses[1 - self.addresses.index(host)]
        return host, sum(self.ports) - number if port else number

    def serve(self) -> None:
        endpoints = {sock.fileno(): (sock, endpoint) for endpoint, sock in self.udp.items()}
        poll = select.poll()
        for fd in (*endpoints, *self.listeners):
            poll.register(fd, select.POLLIN)
        while True:
            for fd, _ in poll.poll():
                if fd in endpoints:
                    self.datagram(*endpoints[fd])
                else:
                    listener, endpoint = self.listeners[fd]
                    with contextlib.suppress(OSError):  # whoever it was has gone
                        connection, client = listener.accept()
                        if self.room.acquire(blocking=False):
                            threading.Thread(
                                target=self.stream, args=(connection, endpoint, client[:2]), daemon=True
                            ).start()
                        else:
                            connection.close()

    def datagram(self, sock: socket.socket, here: Endpoint) -> None:
        try:
            data, client = sock.recvfrom(MAX_SIZE)
            request = Message.unpack(data)
        except (OSError, ValueError):
            return
        if not request.is_request or (request.change_address and len(self.addresses) == 1):
            return
        answer = Message(request.id, False, mapped=client[:2], other=self.other(here))
        origin = self.udp[self.other(here, request.change_address, request.change_port)]
        with contextlib.suppress(OSError):
            origin.sendto(answer.pack(), (client[0], request.response_port or client[1]))

    def stream(self, connection: socket.socket, here: Endpoint, client: Endpoint) -> None:
        self.connections[client] = connection
        try:
            connection.settimeout(IDLE_TIMEOUT)
            while True:
                request = _read(connection)
                if not request.is_request:
                    return
                outcome = None
                target = (client[0], request.response_port or client[1])
                if request.poke:
                    outcome = self.poke(request.id, target)
                elif request.change_address or request.change_port or request.response_port:
                    origin = self.other(here, request.change_address, request.change_port)
                    outcome = self.attempt(origin[0], target, request.udp)
                answer = Message(request.id, False, mapped=client, other=self.other(here), outcome=outcome)
                connection.sendall(answer.pack())
        except (OSError, ValueError, LabError):
            pass  # the client has gone, or is none
        finally:
            if self.connections.get(client) is connection:
                del self.connections[client]
            connection.close()
            self.room.release()

    def poke(self, id: bytes, target: Endpoint) -> str:
        with contextlib.suppress(KeyError, OSError):
            self.connections[target].sendall(Message(id, False, mapped=target).pack())
            return "sent"
        return "gone"

    def attempt(self, address: str, target: Endpoint, udp: bool) -> str:
        """Contact the client from one of our addresses and a port it never saw."""
        with self.make(self.family, socket.SOCK_DGRAM if udp else socket.SOCK_STREAM) as sock:
            sock.bind((address, 0))
            sock.settimeout(2 * PATIENCE)
            try:
                sock.connect(target)
                if not udp:
                    return "connected"
                sock.send(Message.request().pack())
                sock.recv(MAX_SIZE)
                return "connected"
            except TimeoutError:
                return "dropped"
            except OSError as error:
                return "refused" if error.errno == errno.ECONNREFUSED else "prohibited"


def serve(
    addresses: list[str],
    port: int = DEFAULT_PORT,
    make: MakeSocket = socket.socket,
    ready: Callable[[], None] | None = None,
) -> None:
    """Be a prober's server, for ever, at one or two addresses and at two ports from ``port`` on.

    With one address it can't tell endpoint-independent filtering from address-dependent filtering.

    Raises:
        LabError: it can't be there.
    """
    _check_port(port)
    server = _Server(addresses, port, make)
    if ready:
        ready()
    server.serve()


def _read(sock: socket.socket) -> Message:
    """One message from a stream."""
    data = b""
    wanted = HEAD
    while len(data) < wanted:
        part = sock.recv(wanted - len(data))
        if not part:
            raise LabError("the prober's server hung up")
        data += part
        if len(data) == HEAD:
            wanted = size_of(data)
    return Message.unpack(data)


@dataclass(frozen=True, slots=True)
class Behaviour:
    """What was found for one protocol. None: it can't be told with this server.

    Attributes:
        local, mapped: a local endpoint, and how the server sees it.
        port: how outside ports are chosen, as far as that shows.
        unsolicited: "dropped", "refused", "prohibited", or "connected" where nothing filters.
        lifetime: whole seconds after which an idle mapping still let the server in; only if it was measured.
    """

    local: Endpoint
    mapped: Endpoint
    mapping: Mapping
    filtering: Filtering
    port: Port
    hairpin: bool
    unsolicited: str | None
    lifetime: int | None = None


@dataclass(frozen=True, slots=True)
class Findings:
    """What was found; a protocol that got no answer is None."""

    udp: Behaviour | None
    tcp: Behaviour | None

    @property
    def types(self) -> tuple[str, ...]:
        """The lab's types that would look like this, routers in a row left out."""
        return tuple(name for name in TYPES if not name.startswith("cgn-") and not self.differences(name))

    def differences(self, name: str) -> list[str]:
        """In what this is not as a type promises, in words."""
        promise = promise_of(name)
        wrong = []
        for protocol, found in (("UDP", self.udp), ("TCP", self.tcp)):
            if found is None:
                wrong.append(f"{protocol} gets no answer")
                continue
            unsolicited = promise.unsolicited_udp if protocol == "UDP" else promise.unsolicited_tcp
            for what, wanted, is_ in (
                ("mapping", promise.mapping, found.mapping),
                ("filtering", promise.filtering, found.filtering),
                ("port", promise.port, found.port),
                ("unsolicited", unsolicited, found.unsolicited or unsolicited),
            ):
                if wanted != is_:
                    wrong.append(f"{protocol} {what}: {is_}, not {wanted}")
        return wrong


def probe(
    server: Endpoint,
    make: MakeSocket = socket.socket,
    *,
    udp: bool = True,
    tcp: bool = True,
    lifetime: int = 0,
) -> Findings:
    """Find out what is between us and a server. Takes 2 to 5 seconds, and ``lifetime`` on top.

    Args:
        make: makes our sockets, such as `Host.socket` for those of a host.
        lifetime: seconds up to which to look how long an idle mapping lives.

    Raises:
        LabError: the server does not answer at all.
    """
    _check_port(server[1])
    kinds = ([_Udp] if udp else []) + ([_Tcp] if tcp else [])

    def measure(kind: type[_Udp | _Tcp]) -> Behaviour | Exception:
        try:
            return kind(server, make).measure(lifetime)
        except (OSError, LabError, ValueError) as error:
            return error

    with ThreadPoolExecutor(len(kinds)) as pool:
        found = dict(zip(kinds, pool.map(measure, kinds), strict=True))
    errors = [each for each in found.values() if isinstance(each, Exception)]
    if len(errors) == len(found):
        raise LabError(f"the prober's server {server[0]} port {server[1]} does not answer: {errors[0]}")
    udp_found, tcp_found = (None if isinstance(each := found.get(kind), Exception) else each for kind in (_Udp, _Tcp))
    return Findings(udp_found, tcp_found)


def _check_port(port: int) -> None:
    if not 0 < port < 65535:
        raise LabError(f"the prober's server can't have port {port}: it has this one and the next, of 1 to 65535")


@dataclass(frozen=True, slots=True)
class _Look:
    """How one local port is seen by the server's first endpoint, and by two of another address."""

    hearer: socket.socket
    local: Endpoint
    seen: list[Endpoint]


class _Prober(ABC):
    """What both protocols have in common."""

    kind: int

    def __init__(self, server: Endpoint, make: MakeSocket) -> None:
        self.server, self.make = server, make
        self.family = socket.AF_INET6 if ":" in server[0] else socket.AF_INET
        self.wait = PATIENCE

    def measure(self, lifetime: int) -> Behaviour:
        with contextlib.ExitStack() as stack:
            looks = [self.look(stack) for _ in range(LOOKS)]
            first, mapping = looks[0], _mapping(looks)
            found = Behaviour(
                first.local,
                first.seen[0],
                mapping,
                self.filtering(),
                _port(looks, mapping),
                self.hairpin(first.hearer, first.seen[0]),
                self.unsolicited(),
            )
        return replace(found, lifetime=self.lifetime(lifetime)) if lifetime else found

    def look(self, stack: contextlib.ExitStack) -> _Look:
        hearer = stack.enter_context(self.hearer())
        self.wait = ANSWER_TIMEOUT
        start = time.monotonic()
        answer = self.see(stack, hearer, self.server)
        self.wait = PATIENCE + 4 * (time.monotonic() - start)
        other = answer.other
        if answer.mapped is None or other is None:
            raise LabError("its answers lack what RFC 5780 asks for")
        seen = [answer.mapped]
        for target in ((other[0], self.server[1]), other):
            seen.append(self.see(stack, hearer, target).mapped or answer.mapped)
        return _Look(hearer, (self.address_towards_server(), hearer.getsockname()[1]), seen)

    @abstractmethod
    def hearer(self) -> contextlib.AbstractContextManager[socket.socket]:
        """A local port at which others are heard."""

    @abstractmethod
    def see(self, stack: contextlib.ExitStack, hearer: socket.socket, target: Endpoint) -> Message:
        """Ask one of the server's endpoints from the hearer's port; what that needs stays until the stack ends."""

    @abstractmethod
    def filtering(self) -> Filtering:
        """Who is let in to a port that has been used."""

    @abstractmethod
    def hairpin(self, hearer: socket.socket, mapped: Endpoint) -> bool:
        """Whether what is sent to our outside endpoint comes in; meaningless, and true, without a NAT."""

    @abstractmethod
    def unsolicited(self) -> str | None:
        """What a stranger gets for writing to a port that was never used."""

    @abstractmethod
    def lifetime(self, most: int) -> int:
        """Look at one mapping after a second, at another after two, and so on; returns the last that was alive."""

    @contextlib.contextmanager
    def local(self, port: int = 0) -> Iterator[socket.socket]:
        """A socket at a local port, which several may share."""
        with self.make(self.family, self.kind) as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            sock.bind(("::" if self.family == socket.AF_INET6 else "0.0.0.0", port))
            sock.settimeout(ANSWER_TIMEOUT)
            yield sock

    def unused_port(self) -> int:
        with self.local() as sock:
            return int(sock.getsockname()[1])

    def address_towards_server(self) -> str:
        with self.make(self.family, socket.SOCK_DGRAM) as sock:
            sock.connect(self.server)
            return str(sock.getsockname()[0])


def _mapping(looks: list[_Look]) -> Mapping:
    """The strictest that was seen: by chance a port may come again, and a NAT look more lenient than it is."""
    found = []
    for look in looks:
        first, second, third = look.seen
        if first == second == third:
            found.append(Mapping.NONE if first == look.local else Mapping.EIM)
        else:
            found.append(Mapping.ADM if second == third else Mapping.APDM)
    return max(found, key=list(Mapping).index)


def _port(looks: list[_Look], mapping: Mapping) -> Port:
    ports = [[port for _, port in look.seen] for look in looks]
    if all(set(each) == {look.local[1]} for each, look in zip(ports, looks, strict=True)):
        return Port.KEEP
    if mapping is not Mapping.APDM:
        return Port.CHANGE
    if all(0 < after - before <= NEXT for each in ports for before, after in pairwise(each)):
        return Port.PLUS_ONE
    every = [port for each in ports for port in each]
    return Port.BLOCK if max(every) - min(every) < BLOCK else Port.RANDOM


class _Udp(_Prober):
    kind = socket.SOCK_DGRAM

    def ask(
        self, sock: socket.socket, target: Endpoint, request: Message, hearer: socket.socket | None = None
    ) -> Message:
        """Send a request until its answer comes.

        Raises:
            TimeoutError: none comes.
        """
        hearer = hearer or sock
        for _ in range(TRIES):
            sock.sendto(request.pack(), target)
            deadline = time.monotonic() + self.wait / TRIES
            while (left := deadline - time.monotonic()) > 0:
                hearer.settimeout(left)
                with contextlib.suppress(TimeoutError, ValueError):
                    answer = Message.unpack(hearer.recv(MAX_SIZE))
                    if answer.id == request.id:
                        return answer
        raise TimeoutError("no answer")

    def answers(self, *arguments: Any) -> bool:
        try:
            self.ask(*arguments)
        except (TimeoutError, ConnectionError):
            return False
        return True

    def hearer(self) -> contextlib.AbstractContextManager[socket.socket]:
        return self.local()

    def see(self, stack: contextlib.ExitStack, hearer: socket.socket, target: Endpoint) -> Message:
        return self.ask(hearer, target, Message.request())

    def filtering(self) -> Filtering:
        with self.local() as asker, self.local() as hearer:
            request = Message.request(change_address=True, change_port=True, response_port=hearer.getsockname()[1])
            if self.answers(asker, self.server, request, hearer):
                return Filtering.NONE  # nothing ever went out from there
        with self.local() as sock:
            self.ask(sock, self.server, Message.request())
            if self.answers(sock, self.server, Message.request(change_address=True, change_port=True)):
                return Filtering.EIF
            if self.answers(sock, self.server, Message.request(change_port=True)):
                return Filtering.ADF
        return Filtering.APDF

    def hairpin(self, hearer: socket.socket, mapped: Endpoint) -> bool:
        with self.local() as inside:
            return self.answers(inside, mapped, Message.request(), hearer)

    def unsolicited(self) -> str | None:
        with contextlib.suppress(OSError, LabError), _Tcp(self.server, self.make).connected() as control:
            request = Message.request(change_address=True, change_port=True, response_port=self.unused_port(), udp=True)
            return _Tcp.exchange(control, request).outcome
        return None

    def lifetime(self, most: int) -> int:
        with contextlib.ExitStack() as stack:
            socks = [stack.enter_context(self.local()) for _ in range(most)]
            asker = stack.enter_context(self.local())
            mapped = [self.ask(sock, self.server, Message.request()).mapped for sock in socks]
            start, alive = time.monotonic(), 0
            for seconds, (sock, outside) in enumerate(zip(socks, mapped, strict=True), 1):
                time.sleep(max(0.0, start + seconds - time.monotonic()))
                request = Message.request(response_port=outside[1] if outside else 0)
                if not self.answers(asker, self.server, request, sock):
                    break
                alive = seconds
            return alive


class _Tcp(_Prober):
    kind = socket.SOCK_STREAM

    @contextlib.contextmanager
    def connected(self, port: int = 0, target: Endpoint | None = None) -> Iterator[socket.socket]:
        with self.local(port) as sock:
            sock.connect(target or self.server)
            yield sock

    @contextlib.contextmanager
    def listening(self) -> Iterator[socket.socket]:
        with self.local() as listener:
            listener.listen()
            yield listener

    @staticmethod
    def exchange(sock: socket.socket, request: Message) -> Message:
        sock.sendall(request.pack())
        while True:
            answer = _read(sock)
            if answer.id == request.id:
                return answer

    def hearer(self) -> contextlib.AbstractContextManager[socket.socket]:
        return self.listening()

    def see(self, stack: contextlib.ExitStack, hearer: socket.socket, target: Endpoint) -> Message:
        sock = stack.enter_context(self.connected(hearer.getsockname()[1], target))
        return self.exchange(sock, Message.request())

    def comes_in(self, control: socket.socket, listener: socket.socket, request: Message) -> bool:
        """Whether the server says that it got through, and a connection is there."""
        if self.exchange(control, request).outcome != "connected":
            return False
        listener.settimeout(self.wait)
        with contextlib.suppress(TimeoutError):
            listener.accept()[0].close()
            return True
        return False

    def filtering(self) -> Filtering:
        with self.listening() as untouched, self.connected() as control:
            elsewhere = Message.request(change_address=True, change_port=True, response_port=untouched.getsockname()[1])
            if self.comes_in(control, untouched, elsewhere):
                return Filtering.NONE
        with self.listening() as listener, self.connected(listener.getsockname()[1]) as control:
            if self.comes_in(control, listener, Message.request(change_address=True, change_port=True)):
                return Filtering.EIF
            if self.comes_in(control, listener, Message.request(change_port=True)):
                return Filtering.ADF
        return Filtering.APDF

    def hairpin(self, hearer: socket.socket, mapped: Endpoint) -> bool:
        with self.local() as inside:
            inside.settimeout(self.wait)
            hearer.settimeout(self.wait)
            with contextlib.suppress(OSError):
                inside.connect(mapped)
                hearer.accept()[0].close()
                return True
        return False

    def unsolicited(self) -> str | None:
        with self.connected() as control:
            request = Message.request(change_address=True, change_port=True, response_port=self.unused_port())
            return self.exchange(control, request).outcome

    def lifetime(self, most: int) -> int:
        with contextlib.ExitStack() as stack:
            socks = [stack.enter_context(self.connected()) for _ in range(most)]
            control = stack.enter_context(self.connected())
            mapped = [self.exchange(sock, Message.request()).mapped for sock in socks]
            start, alive = time.monotonic(), 0
            for seconds, (sock, outside) in enumerate(zip(socks, mapped, strict=True), 1):
                time.sleep(max(0.0, start + seconds - time.monotonic()))
                # Its own keep-alive: a connection that the router forgot can be revived by our next packet.
                self.exchange(control, Message.request(poke=True, response_port=outside[1] if outside else 0))
                sock.settimeout(self.wait)
                try:
                    _read(sock)
                except TimeoutError:
                    break
                alive = seconds
            return alive
