"""Two namespaces and a wire: real round trips, whole packets, nothing left behind."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kas_bridge.simnet.wire import Wire, WireError, _is_neighbour

DELAY = 0.025


@pytest.fixture
def wire() -> Iterator[Wire]:
    with Wire(DELAY) as wire:
        yield wire


def ask(wire: Wire, family: int = socket.AF_INET) -> float:
    """Seconds that a datagram takes from a to b."""
    host = wire.b.address if family == socket.AF_INET else wire.b.address6
    with wire.b.socket(family, socket.SOCK_DGRAM) as there, wire.a.socket(family, socket.SOCK_DGRAM) as here:
        there.bind((host, 5000))
        there.settimeout(5)
        begun = time.monotonic()
        here.sendto(b"ping", (host, 5000))
        assert there.recv(10) == b"ping"
        return time.monotonic() - begun


@pytest.mark.parametrize(
    ("frame", "neighbour"),
    [
        pytest.param(b"\0" * 12 + b"\x08\x06" + b"\0" * 28, True, id="arp"),
        pytest.param(b"\0" * 12 + b"\x08\x00" + b"\0" * 60, False, id="ipv4"),
        pytest.param(b"\0" * 12 + b"\x86\xdd" + b"\0" * 6 + b"\x3a" + b"\0" * 33 + b"\x87" + b"\0" * 8, True, id="nd"),
        pytest.param(
            b"\0" * 12 + b"\x86\xdd" + b"\0" * 6 + b"\x3a" + b"\0" * 33 + b"\x80" + b"\0" * 8, False, id="echo"
        ),
        pytest.param(
            b"\0" * 12 + b"\x86\xdd" + b"\0" * 6 + b"\x06" + b"\0" * 33 + b"\x87" + b"\0" * 8, False, id="tcp6"
        ),
        pytest.param(b"\0" * 12 + b"\x86\xdd", False, id="cut"),
    ],
)
def test_only_neighbour_discovery_is_never_delayed(frame: bytes, neighbour: bool) -> None:
    assert _is_neighbour(memoryview(frame)) is neighbour


@pytest.mark.lab
@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
def test_a_packet_is_held_for_the_delay(wire: Wire, family: int) -> None:
    # The first packet includes neighbour discovery, which must cost no round trip.
    first = ask(wire, family)
    assert first >= DELAY
    assert wire.stats().dropped == 0
    wire.delay = 0.0
    assert wire.delay == 0.0
    assert min(ask(wire, family) for _ in range(20)) < DELAY


@pytest.mark.lab
def test_tcp_is_carried_whole_and_sees_the_round_trip(wire: Wire) -> None:
    content = os.urandom(3_000_000)
    with wire.b.socket() as listener, wire.a.socket() as client:
        listener.bind((wire.b.address, 6000))
        listener.listen()
        begun = time.monotonic()
        client.connect((wire.b.address, 6000))
        assert time.monotonic() - begun >= 2 * DELAY
        accepted, address = listener.accept()
        assert address[0] == wire.a.address
        thread = threading.Thread(target=client.sendall, args=(content,))
        thread.start()
        received = bytearray()
        with accepted:
            while len(received) < len(content):
                received += accepted.recv(1 << 20)
        thread.join()
    assert received == content
    carried = wire.stats()
    assert carried.bytes[0] > len(content) > carried.bytes[1]


@pytest.mark.lab
def test_a_command_runs_inside_and_ends_as_itself(wire: Wire) -> None:
    process = wire.b.popen(["sh", "-c", "cat /proc/net/fib_trie; exit 7"], stdout=subprocess.PIPE)
    output = process.communicate()[0].decode()
    assert process.returncode == 7
    assert wire.b.address in output
    assert wire.a.address not in output


@pytest.mark.lab
def test_settings_hold_at_both_ends() -> None:
    name = "ipv4/tcp_keepalive_time"
    with Wire(settings={name: "1234"}) as wire:
        for end in (wire.a, wire.b):
            process = end.popen(["cat", f"/proc/sys/net/{name}"], stdout=subprocess.PIPE)
            assert process.communicate()[0] == b"1234\n"
    assert Path(f"/proc/sys/net/{name}").read_text() != "1234\n"
    with pytest.raises(WireError, match="No such file"):
        Wire(settings={"ipv4/no_such_setting": "1"})


@pytest.mark.lab
def test_two_wires_do_not_see_one_another(wire: Wire) -> None:
    with Wire() as other:
        assert min(ask(other) for _ in range(20)) < DELAY <= ask(wire)
        with other.b.socket(kind=socket.SOCK_DGRAM) as there, wire.a.socket(kind=socket.SOCK_DGRAM) as here:
            there.bind((other.b.address, 5000))
            there.settimeout(2 * DELAY)
            here.sendto(b"stray", (wire.b.address, 5000))
            with pytest.raises(TimeoutError):
                there.recv(10)


@pytest.mark.lab
def test_nothing_is_left_when_its_maker_is_killed() -> None:
    code = "import time; from kas_bridge.simnet.wire import Wire; w = Wire(); print(w.pid, flush=True); time.sleep(60)"
    maker = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert maker.stdout is not None
    helper = Path(f"/proc/{int(maker.stdout.readline())}")
    assert helper.exists()
    pidfd = os.pidfd_open(int(helper.name))
    maker.send_signal(signal.SIGKILL)
    maker.wait()
    maker.stdout.close()
    ended = select.select([pidfd], [], [], 10)[0]
    os.close(pidfd)
    assert ended


@pytest.mark.lab
def test_a_closed_wire_says_so() -> None:
    with Wire() as wire:
        pass
    with pytest.raises(WireError, match="closed"):
        wire.a.socket()
    wire.close()
