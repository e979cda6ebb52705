from __future__ import annotations

import errno
import gc
import os
import resource
import socket
import struct
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import pytest
import trio
import trio.testing

from kas_libp2p import addresses
from kas_libp2p.config import DialConfig
from kas_libp2p.errors import AddressError, ListenError
from kas_libp2p.events import AcceptFailed, EventBus
from kas_libp2p.transport import tcp
from kas_libp2p.transport.raw import RawConnection
from kas_libp2p.transport.tcp import Dialer, Listener, Source, TcpRaw, listen, listen_all, send_buffer_by_limits
from tests.network import eventually

V4, V6 = "/ip4/127.0.0.1/tcp/0", "/ip6/::1/tcp/0"


@asynccontextmanager
async def pair(address: str = V4) -> AsyncIterator[tuple[TcpRaw, TcpRaw, Listener]]:
    """Dialer's end, acceptor's end, listener."""
    listener = await listen(address)
    dialed = await Dialer().dial(listener.address)
    accepted = await listener.accept()
    try:
        yield dialed, accepted, listener
    finally:
        for each in (dialed, accepted):
            each.abort()
        listener.close()


class Room:
    """Closes at the end of a test whatever was opened in it."""

    def __init__(self) -> None:
        self.opened: list[TcpRaw | Listener] = []

    async def listen(self, address: addresses.Address = V4, events: EventBus | None = None) -> Listener:
        listener = await listen(address, events=events)
        self.opened.append(listener)
        return listener

    async def accept(self, listener: Listener) -> TcpRaw:
        accepted = await listener.accept()
        self.opened.append(accepted)
        return accepted

    async def accept_from(self, listener: Listener, raw: TcpRaw) -> TcpRaw:
        """The accepted end of ``raw``."""
        while True:
            accepted = await self.accept(listener)
            if accepted.remote_address == raw.local_address:
                return accepted

    async def dial(
        self, address: addresses.Address, *own: Listener, source: Source = Source.PREFER_LISTEN_PORT
    ) -> TcpRaw:
        raw = await Dialer(own).dial(address, source=source)
        self.opened.append(raw)
        return raw

    def close(self) -> None:
        for each in self.opened:
            if isinstance(each, TcpRaw):
                each.abort()
            else:
                each.close()


@pytest.fixture
async def room() -> AsyncIterator[Room]:
    room = Room()
    yield room
    room.close()


async def receive(raw: TcpRaw, size: int = 65536) -> bytes:
    buffer = bytearray(size)
    return bytes(buffer[: await raw.receive_into(memoryview(buffer))])


def option(raw: TcpRaw, level: int, name: int) -> int:
    return raw.socket.getsockopt(level, name)


def fill(raw: TcpRaw) -> None:
    while raw.send_nowait(bytes(65536)):
        pass


def port_of(address: str) -> int:
    found = addresses.ip_port(address)
    assert found is not None
    return found[1]


class TestConnection:
    @pytest.mark.parametrize("address", [V4, V6])
    async def test_bytes_cross_in_both_directions(self, address: str) -> None:
        async with pair(address) as (dialed, accepted, listener):
            await dialed.send_all(b"there")
            assert await receive(accepted) == b"there"
            await accepted.send_all(memoryview(b"and back"))
            assert await receive(dialed) == b"and back"
            assert dialed.remote_address == accepted.local_address == str(listener.address)
            assert dialed.local_address == accepted.remote_address
            assert isinstance(dialed, RawConnection)

    async def test_nowait_says_when_it_would_wait(self) -> None:
        async with pair() as (dialed, accepted, _):
            buffer = memoryview(bytearray(10))
            assert accepted.receive_nowait(buffer) is None
            assert dialed.send_nowait(b"abc") == 3
            await accepted.wait_readable()
            assert accepted.receive_nowait(buffer) == 3
            fill(dialed)
            assert dialed.send_nowait(b"x") == 0

    async def test_a_large_write_waits_for_the_reader(self) -> None:
        data = os.urandom(4 * 1024 * 1024)
        async with pair() as (dialed, accepted, _), trio.open_nursery() as nursery:
            nursery.start_soon(dialed.send_all, data)
            received = bytearray()
            while len(received) < len(data):
                received += await receive(accepted)
            assert received == data

    async def test_what_has_arrived_is_counted_and_no_more(self) -> None:
        async with pair() as (one, other, _):
            before = one.delivered()
            await one.send_all(b"x" * 5000)
            await receive(other)
            assert one.delivered() - before >= 5000
            sent = 0
            while count := one.send_nowait(bytes(1 << 20)):
                sent += count
            assert one.delivered() < sent, "what nobody reads stays here"
        assert one.delivered() == 0

    async def test_end_of_stream_in_one_direction(self) -> None:
        async with pair() as (dialed, accepted, _):
            dialed.send_eof()
            assert await receive(accepted) == b""
            await accepted.send_all(b"still here")
            assert await receive(dialed) == b"still here"

    async def test_close_delivers_what_was_sent_even_with_unread_input(self) -> None:
        async with pair() as (dialed, accepted, _):
            await accepted.send_all(b"never read")
            await dialed.wait_readable()
            await dialed.send_all(b"last words")
            await dialed.aclose()
            await dialed.aclose()
            assert await receive(accepted) == b"last words"
            assert await receive(accepted) == b""

    async def test_abort_resets(self) -> None:
        async with pair() as (dialed, accepted, _):
            dialed.abort()
            dialed.abort()
            with pytest.raises(trio.BrokenResourceError, match="reset"):
                await receive(accepted)
            with pytest.raises(trio.BrokenResourceError):
                await accepted.send_all(b"x")

    async def test_what_is_closed_says_so(self) -> None:
        async with pair() as (dialed, _, _):
            await dialed.aclose()
            buffer = memoryview(bytearray(1))
            for call in (lambda: dialed.send_nowait(b"x"), lambda: dialed.receive_nowait(buffer)):
                with pytest.raises(trio.ClosedResourceError):
                    call()
            for wait in (dialed.wait_readable, dialed.wait_writable):
                with pytest.raises(trio.ClosedResourceError):
                    await wait()
            with pytest.raises(trio.ClosedResourceError):
                await dialed.send_all(b"")
            dialed.send_eof()
            assert "closed" in repr(dialed)

    @pytest.mark.parametrize("end", ["aclose", "abort"])
    async def test_closing_wakes_who_waits(self, end: str) -> None:
        async with pair() as (dialed, _, _):

            async def wait() -> None:
                with pytest.raises(trio.ClosedResourceError):
                    await receive(dialed)

            async with trio.open_nursery() as nursery:
                nursery.start_soon(wait)
                await trio.testing.wait_all_tasks_blocked()
                if end == "aclose":
                    await dialed.aclose()
                else:
                    dialed.abort()

    async def test_cancelling_a_read_loses_nothing(self) -> None:
        async with pair() as (dialed, accepted, _):
            with trio.CancelScope() as scope:
                scope.cancel()
                await receive(accepted)
            assert scope.cancelled_caught
            await dialed.send_all(b"kept")
            assert await receive(accepted) == b"kept"

    async def test_a_reader_with_endless_input_lets_others_run(self) -> None:
        async with pair() as (dialed, accepted, _):
            turns = 0

            async def other() -> None:
                nonlocal turns
                while True:
                    await trio.lowlevel.checkpoint()
                    turns += 1

            async with trio.open_nursery() as nursery:
                nursery.start_soon(other)
                buffer = memoryview(bytearray(65536))
                moved = 0
                while moved < 8 * tcp.READ_BEFORE_YIELD:
                    fill(dialed)
                    moved += await accepted.receive_into(buffer)
                nursery.cancel_scope.cancel()
            assert turns >= 4  # without yielding there are none

    async def test_options_on_both_ends(self) -> None:
        async with pair() as (dialed, accepted, _):
            for raw in (dialed, accepted):
                assert option(raw, socket.IPPROTO_TCP, socket.TCP_NODELAY)
                assert option(raw, socket.SOL_SOCKET, socket.SO_KEEPALIVE)
                assert option(raw, socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == tcp.KEEPALIVE_IDLE
                assert option(raw, socket.IPPROTO_TCP, socket.TCP_KEEPINTVL) == tcp.KEEPALIVE_INTERVAL
                assert option(raw, socket.IPPROTO_TCP, socket.TCP_KEEPCNT) == tcp.KEEPALIVE_COUNT
                assert option(raw, socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT) == tcp.NOTSENT_LOWAT
                assert not raw.socket.get_inheritable()


class TestListener:
    async def test_wildcards_become_interface_addresses(self) -> None:
        v4, v6 = await listen_all(["/ip4/0.0.0.0/tcp/0", "/ip6/::/tcp/0"])
        try:
            interfaces = ["127.0.0.1", "11.0.0.5", "::1", "2d00::5"]
            assert [str(each) for each in v4.addresses(interfaces)] == [
                f"/ip4/127.0.0.1/tcp/{v4.port}",
                f"/ip4/11.0.0.5/tcp/{v4.port}",
            ]
            assert [str(each) for each in v6.addresses(interfaces)] == [
                f"/ip6/::1/tcp/{v6.port}",
                f"/ip6/2d00::5/tcp/{v6.port}",
            ]
            assert addresses.from_ip_port("127.0.0.1", v4.port) in v4.addresses()
            assert v4.port == v6.port
        finally:
            v4.close()
            v6.close()

    async def test_a_bound_address_stays(self) -> None:
        listener = await listen(V4)
        assert listener.addresses(["11.0.0.5"]) == [listener.address]
        listener.close()

    async def test_the_families_are_separate(self) -> None:
        v6 = await listen("/ip6/::/tcp/0")
        with pytest.raises(ConnectionRefusedError):
            await Dialer().dial(f"/ip4/127.0.0.1/tcp/{v6.port}")
        v6.close()

    async def test_all_or_none(self) -> None:
        free = await listen(V4)
        free.close()
        taken = await listen(V4)
        with pytest.raises(ListenError):
            await listen_all([str(free.address), str(taken.address)])
        (await listen(str(free.address))).close()
        taken.close()

    async def test_closing_wakes_who_accepts(self) -> None:
        listener = await listen(V4)

        async def accept() -> None:
            with pytest.raises(trio.ClosedResourceError):
                await listener.accept()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(accept)
            await trio.testing.wait_all_tasks_blocked()
            listener.close()
            listener.close()
        with pytest.raises(trio.ClosedResourceError):
            await listener.accept()
        with pytest.raises(ConnectionRefusedError):
            await Dialer().dial(listener.address)

    async def test_a_port_is_free_again_while_its_connections_live(self) -> None:
        async with pair() as (dialed, accepted, listener):
            listener.close()
            again = await listen(listener.address)
            other = await Dialer().dial(again.address)
            await dialed.send_all(b"old")
            assert await receive(accepted) == b"old"
            other.abort()
            again.close()

    @pytest.mark.parametrize("address", ["/dns4/localhost/tcp/1", "/ip4/127.0.0.1/tcp/1/ws", "/ip4/127.0.0.1"])
    async def test_what_is_no_ip_and_port(self, address: str) -> None:
        with pytest.raises(AddressError):
            await listen(address)

    async def test_an_address_of_another_machine(self) -> None:
        with pytest.raises(ListenError, match=r"11\.1\.2\.3 is no address of this machine, which has .*127\.0\.0\.1"):
            await listen("/ip4/11.1.2.3/tcp/0")


class TestPortTaken:
    @pytest.mark.parametrize(
        ("theirs", "ours"),
        [
            ("127.0.0.1", "/ip4/127.0.0.1"),
            ("0.0.0.0", "/ip4/127.0.0.1"),
            ("127.0.0.1", "/ip4/0.0.0.0"),
            ("::", "/ip6/::1"),
        ],
    )
    @pytest.mark.parametrize("hiding", [True, False])
    async def test_by_another_process(self, room: Room, theirs: str, ours: str, hiding: bool) -> None:
        """The other process uses SO_REUSEPORT too, and would share its port silently with one that just binds."""
        with holder(theirs, reuse_port=hiding) as (process, port):
            with pytest.raises(ListenError) as caught:
                await room.listen(f"{ours}/tcp/{port}")
            name = name_of(process)
            assert f"port {port} is held by {name} (pid {process.pid}); stop that" in str(caught.value)
            assert "\n" not in str(caught.value)

    async def test_by_ourselves(self, room: Room) -> None:
        listener = await room.listen()
        with pytest.raises(ListenError, match="held by this very process"):
            await room.listen(listener.address)
        listener.close()

    async def test_two_that_start_at_once_do_not_both_pass(self, room: Room) -> None:
        # Both have bound before either listens: the kernel must check again in listen().
        def bound(port: int) -> socket.socket:
            sock = socket.socket()
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(("127.0.0.1", port))
            return sock

        with bound(0) as first, bound(first.getsockname()[1]) as second:
            first.listen()
            first.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            with pytest.raises(OSError) as caught:
                second.listen()
            assert caught.value.errno == errno.EADDRINUSE

    async def test_a_listener_that_came_later_is_refused_too(self, room: Room) -> None:
        listener = await room.listen()
        dialed = await room.dial((await room.listen()).address, listener)
        with pytest.raises(ListenError):  # although our own dialed connection shares the port
            await room.listen(listener.address)
        dialed.abort()
        listener.close()


@contextmanager
def holder(ip: str, *, reuse_port: bool) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """Another process that listens on a free port."""
    code = f"""
import socket, sys
sock = socket.socket(socket.AF_INET6 if ":" in {ip!r} else socket.AF_INET)
sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
if {reuse_port}:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
sock.bind(({ip!r}, 0))
sock.listen()
print(sock.getsockname()[1], flush=True)
sys.stdin.read()
"""
    with subprocess.Popen(
        [sys.executable, "-S", "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        yield process, int(process.stdout.readline())
        assert process.stdin is not None
        process.stdin.close()
        process.wait()


def name_of(process: subprocess.Popen[str]) -> str:
    return Path(f"/proc/{process.pid}/comm").read_text().strip()


class TestDial:
    @pytest.mark.parametrize(
        ("ours", "theirs"), [(V4, V4), (V6, V6), ("/ip4/0.0.0.0/tcp/0", V4), ("/ip6/::/tcp/0", V6)]
    )
    async def test_from_the_listen_port(self, room: Room, ours: str, theirs: str) -> None:
        own, target = await room.listen(ours), await room.listen(theirs)
        raw = await room.dial(target.address, own)
        assert port_of(raw.local_address) == own.port
        accepted = await room.accept(target)
        assert accepted.remote_address == raw.local_address
        await talks(raw, accepted)
        # and the listener still listens
        inbound = await room.dial(own.addresses(["127.0.0.1", "::1"])[0])
        await talks(inbound, await room.accept(own))

    async def test_a_second_connection_gets_another_port(self, room: Room) -> None:
        own, target = await room.listen(), await room.listen()
        first = await room.dial(target.address, own)
        second = await room.dial(target.address, own)
        assert port_of(first.local_address) == own.port != port_of(second.local_address)
        await talks(second, await room.accept_from(target, second))
        with pytest.raises(OSError) as caught:
            await room.dial(target.address, own, source=Source.LISTEN_PORT)
        assert caught.value.errno == errno.EADDRNOTAVAIL

    async def test_a_connection_in_time_wait_gets_another_port(self, room: Room) -> None:
        own, target = await room.listen(), await room.listen()
        first = await room.dial(target.address, own)
        accepted = await room.accept(target)
        await first.aclose()
        assert await receive(accepted) == b""
        await accepted.aclose()
        second = await room.dial(target.address, own)
        await talks(second, await room.accept(target))

    async def test_any_port_when_asked(self, room: Room) -> None:
        own, target = await room.listen(), await room.listen()
        for _ in range(50):  # the listener's port is one that the system gives out itself
            raw = await room.dial(target.address, own, source=Source.ANY_PORT)
            assert port_of(raw.local_address) != own.port

    async def test_whom_a_dial_from_the_listen_port_goes_to_is_told_before(self, room: Room) -> None:
        own, gone = await room.listen(), await room.listen()
        gone.close()
        told: list[str] = []
        dialer = Dialer([own])
        dialer.on_contact = told.append
        for source in Source:
            with pytest.raises(ConnectionRefusedError):
                await dialer.dial(gone.address, source=source)
        assert told == ["127.0.0.1"] * 2  # but not the one from a fresh port

    async def test_a_listener_of_the_other_family_or_closed_is_no_help(self, room: Room) -> None:
        v6, gone, target = await room.listen(V6), await room.listen(), await room.listen()
        gone.close()
        raw = await room.dial(target.address, v6, gone)
        assert port_of(raw.local_address) not in (v6.port, gone.port)
        with pytest.raises(AddressError, match="no listener"):
            await room.dial(target.address, v6, gone, source=Source.LISTEN_PORT)

    async def test_the_loopback_listener_beats_the_wildcard_for_loopback(self, room: Room) -> None:
        wildcard, loopback, target = await room.listen("/ip4/0.0.0.0/tcp/0"), await room.listen(), await room.listen()
        raw = await room.dial(target.address, wildcard, loopback)
        assert port_of(raw.local_address) == loopback.port

    async def test_a_loopback_listener_is_not_used_for_the_rest_of_the_world(self, room: Room) -> None:
        """The target is an address from which no answer comes; only the choice of the port is looked at."""
        own = await room.listen()
        assert Dialer([own])._local_for("11.0.0.1", ("11.0.0.1", 1)) is None
        wildcard = await room.listen("/ip4/0.0.0.0/tcp/0")
        assert Dialer([own, wildcard])._local_for("11.0.0.1", ("11.0.0.1", 1)) == ("0.0.0.0", wildcard.port)

    async def test_listeners_that_open_later_count(self, room: Room) -> None:
        listeners: list[Listener] = []
        dialer = Dialer(listeners)
        target = await room.listen()
        first = await dialer.dial(target.address)
        listeners.append(await room.listen())
        second = await dialer.dial(target.address)
        room.opened += [first, second]
        assert port_of(first.local_address) != listeners[0].port == port_of(second.local_address)

    async def test_refused(self, room: Room) -> None:
        listener = await room.listen()
        listener.close()
        with pytest.raises(ConnectionRefusedError, match="refused"):
            await room.dial(listener.address)
        own = await room.listen()
        with pytest.raises(ConnectionRefusedError, match="refused"):
            await room.dial(listener.address, own)
        own.close()

    async def test_no_answer(self, room: Room, autojump_clock: trio.testing.MockClock) -> None:
        # A full queue of a listener that accepts nothing: the kernel drops further SYNs.
        with socket.socket() as deaf:
            deaf.bind(("127.0.0.1", 0))
            deaf.listen(0)
            target = addresses.from_ip_port(*deaf.getsockname())
            with socket.create_connection(deaf.getsockname()):
                started = trio.current_time()
                with pytest.raises(TimeoutError, match=r"no answer within 5 s"):
                    await Dialer(config=DialConfig(tcp_timeout=5)).dial(target)
                assert trio.current_time() - started == 5

    async def test_cancelling_leaves_no_socket(self, room: Room) -> None:
        with socket.socket() as deaf:
            deaf.bind(("127.0.0.1", 0))
            deaf.listen(0)
            with socket.create_connection(deaf.getsockname()):
                before = open_files()
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(Dialer().dial, addresses.from_ip_port(*deaf.getsockname()))
                    await trio.testing.wait_all_tasks_blocked()
                    assert open_files() == before + 1
                    nursery.cancel_scope.cancel()
                assert open_files() == before

    @pytest.mark.parametrize(
        "address",
        [
            "/ip4/127.0.0.1/tcp/0",
            "/ip4/0.0.0.0/tcp/80",
            "/ip6/::/tcp/80",
            "/ip4/224.0.0.1/tcp/80",
            "/ip6/ff02::1/tcp/80",
            "/dns4/localhost/tcp/80",
            "/ip4/127.0.0.1/udp/80/quic-v1",
            "/ip4/127.0.0.1/tcp/80/ws",
        ],
    )
    async def test_what_can_not_be_dialed(self, room: Room, address: str) -> None:
        with pytest.raises(AddressError):
            await room.dial(address)

    async def test_our_own_address(self, room: Room) -> None:
        bound, wildcard = await room.listen(), await room.listen("/ip4/0.0.0.0/tcp/0")
        for address in (bound.address, f"/ip4/127.9.9.9/tcp/{wildcard.port}"):
            with pytest.raises(AddressError, match="own listen address"):
                await room.dial(address, bound, wildcard)
        with pytest.raises(ConnectionRefusedError):
            await room.dial(f"/ip4/127.9.9.9/tcp/{bound.port}", bound, wildcard)

    async def test_an_unknown_zone(self, room: Room) -> None:
        with pytest.raises(OSError):
            await room.dial("/ip6zone/nosuch0/ip6/fe80::1/tcp/1")

    async def test_the_peer_id_is_not_tcps_affair(self, room: Room) -> None:
        target = await room.listen()
        peer = "12D3KooWHHzSeKaY8xuZVzkLbKFfvNgPPeKhFBGrMbNzbm5akpqu"
        raw = await room.dial(addresses.with_peer(target.address, peer))
        assert raw.remote_address == str(target.address)


class TestSimultaneousOpen:
    async def test_both_dial_each_other_at_once(self, room: Room) -> None:
        """On loopback the first SYN reaches the other's listener before the other can dial: one falls back."""
        a, b = await room.listen(), await room.listen()
        dialed: dict[str, TcpRaw] = {}

        async def dial(name: str, own: Listener, target: Listener) -> None:
            dialed[name] = await room.dial(target.address, own)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(dial, "a", a, b)
            nursery.start_soon(dial, "b", b, a)
        at_b, at_a = await room.accept(b), await room.accept(a)
        await talks(dialed["a"], at_b)
        await talks(dialed["b"], at_a)
        assert [port_of(dialed[name].local_address) == own.port for name, own in (("a", a), ("b", b))].count(True) == 1

    async def test_crossed_syns_are_recognised(self, room: Room) -> None:
        # A socket that connects to itself is the smallest simultaneous open there is.
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            sock.connect(sock.getsockname())
            assert tcp._crossed(sock)

    async def test_ordinary_connections_are_not_taken_for_crossed(self, room: Room) -> None:
        async with pair() as (dialed, accepted, _):
            assert not tcp._crossed(dialed.socket)
            await accepted.send_all(b"data before anybody looked")
            await dialed.wait_readable()
            assert not tcp._crossed(dialed.socket)
            await accepted.aclose()
            await dialed.wait_readable()
            assert not tcp._crossed(dialed.socket)


class TestAcceptErrors:
    async def test_no_file_descriptors_left(self, room: Room) -> None:
        bus = EventBus(lambda: 0.0)
        listener = await room.listen(events=bus)
        with socket.socket() as client:
            client.setblocking(False)
            client.connect_ex(("127.0.0.1", listener.port))
            began = trio.current_time()
            with no_more_files():
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(room.accept, listener)
                    await eventually(lambda: bus.counts["accept-failed", "EMFILE"] >= 3)
                    nursery.cancel_scope.cancel()
            assert trio.current_time() - began >= 2 * tcp.ACCEPT_PAUSE  # a busy loop would have them at once
            (await room.accept(listener)).abort()
        listener.close()

    async def test_errors_of_the_new_connection_do_not_stop_the_listener(self, room: Room) -> None:
        bus = EventBus(lambda: 0.0)
        errors = [errno.ECONNABORTED, errno.EPROTO, errno.ENETDOWN, errno.EPERM]
        listener = Listener(Faulty(*errors), bus)
        room.opened.append(listener)
        with bus.subscribe() as events:
            client = await room.dial(listener.address)
            accepted = await room.accept(listener)
            await talks(client, accepted)
            seen = [await anext(events) for _ in errors]
        assert [event.reason for event in seen if isinstance(event, AcceptFailed)] == [
            "ECONNABORTED",
            "EPROTO",
            "ENETDOWN",
            "EPERM",
        ]

    async def test_a_connection_that_was_reset_while_it_waited(self, room: Room) -> None:
        listener = await room.listen()
        with socket.create_connection(("127.0.0.1", listener.port)) as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        accepted = await room.accept(listener)
        with pytest.raises(trio.BrokenResourceError):
            await receive(accepted)

    async def test_our_own_mistake_is_raised(self, room: Room) -> None:
        listener = Listener(Faulty(errno.EINVAL))
        room.opened.append(listener)
        with pytest.raises(OSError, match="Invalid"):
            await room.accept(listener)
        listener.close()


class Faulty(socket.socket):
    """A listening socket whose ``accept`` fails with these errors first."""

    def __init__(self, *errors: int) -> None:
        super().__init__()
        self.bind(("127.0.0.1", 0))
        self.listen()
        self.setblocking(False)
        self.errors = list(errors)

    def accept(self) -> tuple[socket.socket, object]:
        if self.errors:
            code = self.errors.pop(0)
            raise OSError(code, os.strerror(code))
        return super().accept()


@contextmanager
def no_more_files() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest_free = os.dup(0)
    os.close(lowest_free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def test_a_thousand_connections_leave_nothing_open(room: Room) -> None:
    own, target = await room.listen(), await room.listen()
    dialer = Dialer([own])
    gc.collect()
    before = open_files()
    for index in range(1000):
        raw = await dialer.dial(target.address)
        accepted = await target.accept()
        if index % 2:
            raw.abort()
            await accepted.aclose()
        else:
            await accepted.aclose()
            raw.abort()
    assert open_files() == before


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


async def talks(one: TcpRaw, other: TcpRaw) -> None:
    for sender, receiver in ((one, other), (other, one)):
        await sender.send_all(b"hello")
        assert await receive(receiver) == b"hello"


@pytest.mark.parametrize(
    ("wmem_max", "tcp_wmem", "size"),
    [
        pytest.param("212992", "4096\t16384\t4194304", None, id="as Linux has it: its own tuning reaches further"),
        pytest.param("4194304", "4096\t16384\t4194304", 4194304, id="more is allowed than tuning reaches"),
        pytest.param("2097152", "4096\t16384\t4194304", None, id="as much"),
        pytest.param("67108864", "4096\t16384\t4194304", tcp.SEND_BUFFER, id="more than we want"),
        pytest.param("67108864", "4096\t16384\t67108864", None, id="tuned for long paths"),
        pytest.param("", "4096\t16384\t4194304", None, id="not readable"),
        pytest.param("4194304", "", None, id="nor this"),
    ],
)
def test_the_send_buffer_never_becomes_smaller_than_the_kernel_makes_it(
    wmem_max: str, tcp_wmem: str, size: int | None
) -> None:
    assert send_buffer_by_limits(wmem_max, tcp_wmem) == size
