from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from kas_libp2p.transport import interfaces
from kas_libp2p.transport.interfaces import InterfaceWatch, read_addresses

HOME = ("127.0.0.1", "192.168.1.5")
AWAY = ("127.0.0.1", "10.0.0.7")


class Machine:
    """Addresses that a test changes, and a socket that tells of changes as netlink does."""

    def __init__(self) -> None:
        self.addresses = HOME
        self.readings = 0
        self._ours, self._theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        for each in (self._ours, self._theirs):
            each.setblocking(False)

    def read(self) -> tuple[str, ...]:
        self.readings += 1
        return self.addresses

    def open_notifier(self) -> socket.socket:
        return self._theirs

    def tell(self, count: int = 1) -> None:
        for _ in range(count):
            self._ours.send(b"something changed")

    def close(self) -> None:
        self._ours.close()
        self._theirs.close()


@pytest.fixture
def machine() -> Iterator[Machine]:
    machine = Machine()
    yield machine
    machine.close()


async def test_a_change_is_told(machine: Machine, autojump_clock: MockClock, nursery: trio.Nursery) -> None:
    watch = InterfaceWatch(machine.read, machine.open_notifier)
    await nursery.start(watch.run)
    assert watch.addresses == HOME
    changes = watch.changes()
    machine.addresses = AWAY
    machine.tell()
    assert await anext(changes) == AWAY == watch.addresses
    assert trio.current_time() == pytest.approx(interfaces.DEBOUNCE)


async def test_a_burst_is_read_once(machine: Machine, autojump_clock: MockClock, nursery: trio.Nursery) -> None:
    watch = InterfaceWatch(machine.read, machine.open_notifier)
    await nursery.start(watch.run)
    before = machine.readings
    machine.addresses = AWAY
    machine.tell(100)
    await watch.wait_change(HOME)
    await trio.sleep(10 * interfaces.DEBOUNCE)
    assert machine.readings == before + 1


async def test_a_message_without_a_change_wakes_nobody(
    machine: Machine, autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    watch = InterfaceWatch(machine.read, machine.open_notifier)
    await nursery.start(watch.run)
    machine.tell()
    with trio.move_on_after(1) as scope:
        await watch.wait_change(HOME)
    assert scope.cancelled_caught


async def test_a_lost_message_is_made_up_for(machine: Machine, mock_clock: MockClock, nursery: trio.Nursery) -> None:
    watch = InterfaceWatch(machine.read, machine.open_notifier)
    await nursery.start(watch.run)
    await wait_all_tasks_blocked()
    machine.addresses = AWAY
    mock_clock.jump(interfaces.POLL)
    assert await watch.wait_change(HOME) == AWAY


async def test_without_netlink_it_polls(machine: Machine, autojump_clock: MockClock, nursery: trio.Nursery) -> None:
    watch = InterfaceWatch(machine.read, lambda: None)
    await nursery.start(watch.run)
    machine.addresses = AWAY
    assert await watch.wait_change(HOME) == AWAY
    assert trio.current_time() == pytest.approx(interfaces.POLL_WITHOUT_NETLINK)


async def test_a_slow_reader_gets_the_last_state(
    machine: Machine, autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    watch = InterfaceWatch(machine.read, machine.open_notifier)
    await nursery.start(watch.run)
    changes = watch.changes()
    for state in ((), AWAY, ("11.0.0.1",)):
        machine.addresses = state
        machine.tell()
        await trio.sleep(1)
    assert await anext(changes) == ("11.0.0.1",)


async def test_what_changed_before_the_start_is_seen(machine: Machine, nursery: trio.Nursery) -> None:
    watch = InterfaceWatch(machine.read, machine.open_notifier)
    machine.addresses = AWAY
    await nursery.start(watch.run)
    assert watch.addresses == AWAY


async def test_the_machines_own_addresses() -> None:
    found = read_addresses()
    assert "127.0.0.1" in found
    assert not [ip for ip in found if ip.startswith("fe80") or "%" in ip]
    assert len(set(found)) == len(found)


async def test_netlink_opens_and_is_silent_while_nothing_changes() -> None:
    netlink = interfaces.open_netlink()
    if netlink is None:
        pytest.skip("this system gives us no netlink socket")
    with netlink, pytest.raises(BlockingIOError):
        netlink.recv(1)
