"""Hole punching with plain sockets, TCP and UDP: what two hosts can do that know each other's outside endpoints.

Both bind a local port, ask the prober's server how it is seen from outside, and at a moment that was agreed on contact
what the other is seen as. TCP as it should be done: the listener on the same port stays open, and a connection that was
dialed here may have been accepted there. A trial has succeeded when each side has read what the other wrote.

Which pairs can is known (``expected``): measured once, and a law of these rules since.
"""

from __future__ import annotations

import contextlib
import errno
import random
import select
import socket
import threading
import time
from dataclasses import dataclass
from enum import IntEnum

from ._stun import MAX_SIZE, Endpoint, Message
from .nat import Filtering, Mapping, Refusal, chain_of, nat_named
from .probe import _read
from .running import Host

WINDOW = 1.6
"""Seconds after which a trial has failed: a SYN that was dropped is sent again after 1 s, plus two long round trips."""
REFUSED_AGAIN = (0.01, 0.1)
"""Seconds, at random, after which a refused side tries again, if it does: a fixed time would keep both in step."""
RESEND = 0.05
"""Seconds between two packets over UDP."""
PREPARE = 0.05
"""Seconds from when both are ready to when the first contacts the other."""


class Group(IntEnum):
    """NAT types that behave alike when TCP is punched."""

    G1 = 1
    """Lets in whom it has not written to, at least at another port."""
    G2 = 2
    """Lets in only whom it has written to, and drops all else."""
    G3 = 3
    """As G2, but refuses all else, which ends the other's attempt."""
    G4 = 4
    """As G2, and nobody knows the port from which it will write."""


def group_of(type: str) -> Group:
    """The group of a NAT type; of two routers the stricter one counts."""
    nats = [nat_named(each) for each in chain_of(type)]
    if any(nat.mapping in (Mapping.ADM, Mapping.APDM) for nat in nats):
        return Group.G4
    if all(nat.filtering is not Filtering.APDF for nat in nats):
        return Group.G1
    return Group.G2 if nats[0].refusal is Refusal.DROP else Group.G3


def expected(a: str, b: str, protocol: str = "tcp", skew: float = 0.0, delay: float = 0.04) -> bool:
    """Whether a punch between two types succeeds.

    Args:
        skew: seconds by which b begins after a.
        delay: seconds one way between the two.
    """
    groups = (group_of(a), group_of(b))
    if groups[1] is Group.G3 and skew >= delay:
        return _survives(a, b, protocol)
    if groups[0] is Group.G3 and -skew >= delay:
        return _survives(b, a, protocol)
    return Group.G1 in groups or Group.G4 not in groups


def _survives(first: str, other: str, protocol: str) -> bool:
    """Whether it still works out when the first is refused by the other's router, before the other begins.

    Over UDP it sends again, so a refusal does no harm, unless the router took the packet for its own: then it remembers
    that as a connection, and gives the other a port that nobody expects.

    Over TCP, a reset ends the first's connection in its own router, too, which then has to let in the other's SYN as a
    stranger's. An ICMP error does not: the other's SYN is taken for an answer to the first's, passes, and is answered
    by the listener with a sequence number that a translating router takes for nonsense, while one that only filters
    lets it out.
    """
    refuser = nat_named(chain_of(other)[0])
    if protocol == "udp" and refuser.guarded:
        return group_of(first) is not Group.G4
    if protocol == "tcp" and refuser.refusal is Refusal.ICMP:
        return not any(nat_named(each).translates for each in chain_of(first))
    return group_of(first) is Group.G1


@dataclass(frozen=True, slots=True)
class Trial:
    """What came of one punch.

    Attributes:
        seconds: from the first contact until both sides had read the other; None: they never did.
        skew: seconds by which b really began after a.
        foreseen: whether each heard the other from where it was expected: not so behind a NAT that maps by destination,
            unless it happens to take the same port again.
    """

    seconds: float | None
    skew: float
    foreseen: bool

    @property
    def succeeded(self) -> bool:
        return self.seconds is not None


class _Side:
    """One of the two hosts in one trial, run by a thread of its own."""

    def __init__(self, host: Host, port: int, server: Endpoint, token: bytes) -> None:
        self.host, self.port, self.server, self.token = host, port, server, token
        self.mapped: Endpoint | None = None
        self.heard: Endpoint | None = None
        self.began = 0.0
        self.done: float | None = None

    def bound(self, kind: int) -> socket.socket:
        sock = self.host.socket(socket.AF_INET, kind)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.bind(("0.0.0.0", self.port))
        return sock

    def wait_until(self, moment: float) -> None:
        time.sleep(max(0.0, moment - time.monotonic()))
        self.began = time.monotonic()


class _TcpSide(_Side):
    def prepare(self, stack: contextlib.ExitStack) -> None:
        self.stack = stack
        self.listener = stack.enter_context(self.bound(socket.SOCK_STREAM))
        self.listener.listen()
        self.listener.setblocking(False)
        control = stack.enter_context(self.bound(socket.SOCK_STREAM))
        control.settimeout(5)
        control.connect(self.server)
        control.sendall(Message.request().pack())
        self.mapped = _read(control).mapped

    def dial(self, target: Endpoint) -> socket.socket | None:
        """Begin to connect; None: the other's connection is there already."""
        sock = self.stack.enter_context(self.bound(socket.SOCK_STREAM))
        sock.setblocking(False)
        try:
            sock.connect(target)
        except BlockingIOError:
            pass
        except OSError as error:
            if error.errno != errno.EADDRNOTAVAIL:
                raise
            return None
        return sock

    def run(self, moment: float, target: Endpoint, token: bytes, again: random.Random | None) -> None:
        self.wait_until(moment)
        connections: list[socket.socket] = []
        dialing: socket.socket | None = self.dial(target)
        self.began = time.monotonic()
        retry: float | None = None
        deadline = self.began + WINDOW
        while (now := time.monotonic()) < deadline:
            if retry is not None and now >= retry:
                retry, dialing = None, self.dial(target)
            until = deadline if retry is None else retry
            readable, writable, _ = select.select(
                [self.listener, *connections], [dialing] if dialing else [], [], max(0.0, until - now)
            )
            if dialing and writable:
                code = dialing.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                if not code:
                    connections.append(self.greeted(dialing))
                elif again and code in (errno.ECONNREFUSED, errno.EHOSTUNREACH):
                    retry = time.monotonic() + again.uniform(*REFUSED_AGAIN)
                dialing = None
            for sock in readable:
                if sock is self.listener:
                    connections.append(self.greeted(self.stack.enter_context(sock.accept()[0])))
                    continue
                with contextlib.suppress(OSError):
                    if sock.recv(len(token)) == token:
                        self.done = time.monotonic()
                        self.heard = sock.getpeername()
                        return
                connections.remove(sock)

    def greeted(self, sock: socket.socket) -> socket.socket:
        with contextlib.suppress(OSError):
            sock.send(self.token)
        return sock


class _UdpSide(_Side):
    def prepare(self, stack: contextlib.ExitStack) -> None:
        self.sock = stack.enter_context(self.bound(socket.SOCK_DGRAM))
        self.sock.settimeout(1)
        for _ in range(3):
            self.sock.sendto(Message.request().pack(), self.server)
            with contextlib.suppress(TimeoutError):
                self.mapped = Message.unpack(self.sock.recv(MAX_SIZE)).mapped
                return
        raise TimeoutError(f"the prober's server does not answer {self.host}")

    def run(self, moment: float, target: Endpoint, token: bytes, again: random.Random | None) -> None:
        self.wait_until(moment)
        deadline = self.began + WINDOW
        while (now := time.monotonic()) < deadline:
            # What comes says from where it really comes: behind a symmetric NAT, not from where it was expected.
            self.sock.sendto(self.token + (b"!" if self.heard else b"?"), self.heard or target)
            next_time = now + RESEND
            while (left := next_time - time.monotonic()) > 0:
                self.sock.settimeout(left)
                try:
                    data, origin = self.sock.recvfrom(MAX_SIZE)
                except (TimeoutError, ConnectionError):
                    continue
                if data[:-1] != token:
                    continue
                self.heard = origin
                if data.endswith(b"!"):  # the other has read us
                    self.sock.sendto(self.token + b"!", origin)
                    self.done = time.monotonic()
                    return


def punch(
    a: Host,
    b: Host,
    server: Endpoint,
    *,
    protocol: str = "tcp",
    skew: float = 0.0,
    port: int = 20000,
    retry: random.Random | None = None,
) -> Trial:
    """One trial between two hosts.

    Args:
        server: of the prober, where both learn how they are seen.
        protocol: "tcp" or "udp".
        skew: seconds by which b begins after a.
        port: local port of both; take another for each trial, or the routers remember the last one.
        retry: where the time comes from after which a refused side tries again; None: it does not.
    """
    kind = _UdpSide if protocol == "udp" else _TcpSide
    one, two = kind(a, port, server, b"from a"), kind(b, port, server, b"from b")
    with contextlib.ExitStack() as stack:
        one.prepare(stack)
        two.prepare(stack)
        assert one.mapped is not None
        assert two.mapped is not None
        start = time.monotonic() + PREPARE + max(0.0, -skew)
        other = threading.Thread(target=two.run, args=(start + skew, one.mapped, one.token, retry))
        other.start()
        try:
            one.run(start, two.mapped, two.token, retry)
        finally:
            other.join()
    first = min(one.began, two.began)
    both = None if one.done is None or two.done is None else max(one.done, two.done) - first
    return Trial(both, two.began - one.began, (one.heard, two.heard) == (two.mapped, one.mapped))
