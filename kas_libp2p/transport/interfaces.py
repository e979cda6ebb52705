"""The machine's IP addresses, and when they change.

A node on a wildcard address is reachable at whatever addresses its interfaces have at the moment: a laptop changes
networks, a router hands out another IPv6 prefix, a tunnel comes up. Linux tells at once through a netlink socket
(rtnetlink(7)); the messages say only *that* something changed, and the addresses are then read anew. Where there is no
netlink, and in case a message was missed, the addresses are read at intervals as well.
"""

from __future__ import annotations

import contextlib
import ipaddress
import socket
from collections.abc import AsyncIterator, Callable

import ifaddr
import trio
from trio import TaskStatus  # type: ignore[attr-defined,unused-ignore]  # libp2p brings stubs that lack it

DEBOUNCE = 0.2
"""Seconds from the first sign of a change until the addresses are read: one change brings a burst of messages (address,
route, duplicate detection), and a burst must cost one reading. Also the shortest time between two readings."""

POLL = 60.0
"""Seconds between readings where netlink works, in case a message was lost."""

POLL_WITHOUT_NETLINK = 5.0
"""Seconds between readings where nothing tells of a change: a reading takes a quarter of a millisecond."""

_RTMGRP_LINK = 0x1
_RTMGRP_IPV4_IFADDR = 0x10
_RTMGRP_IPV6_IFADDR = 0x100


def read_addresses() -> tuple[str, ...]:
    """The IP addresses of all interfaces, loopback too, sorted; IPv4 before IPv6. Those of one link only are left out.

    Link-local IPv6 addresses (fe80::/10) mean nothing without the name of the interface, which means nothing to others.
    """
    found: set[ipaddress.IPv4Address | ipaddress.IPv6Address] = set()
    for adapter in ifaddr.get_adapters():
        for each in adapter.ips:
            text = each.ip if isinstance(each.ip, str) else each.ip[0]
            with contextlib.suppress(ValueError):
                address = ipaddress.ip_address(text.partition("%")[0])
                if not (address.version == 6 and address.is_link_local):
                    found.add(address)
    return tuple(str(address) for address in sorted(found, key=lambda ip: (ip.version, int(ip))))


def open_netlink() -> socket.socket | None:
    """A socket that becomes readable when an address or a link changes; ``None`` where the system has none for us."""
    try:
        netlink = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE)
    except (AttributeError, OSError):  # not Linux, or forbidden (a sandbox)
        return None
    try:
        netlink.setblocking(False)
        netlink.bind((0, _RTMGRP_LINK | _RTMGRP_IPV4_IFADDR | _RTMGRP_IPV6_IFADDR))
    except OSError:
        netlink.close()
        return None
    return netlink


class InterfaceWatch:
    """Knows the current interface addresses, and wakes those who wait for a change.

    ``run`` does the watching and must be started in a nursery. Any number of tasks may iterate over `changes`.

    Args:
        read: returns the current addresses.
        open_notifier: returns a socket that is readable when something may have changed, or ``None``.
    """

    def __init__(
        self,
        read: Callable[[], tuple[str, ...]] = read_addresses,
        open_notifier: Callable[[], socket.socket | None] = open_netlink,
    ) -> None:
        self._read = read
        self._open_notifier = open_notifier
        self._changed = trio.lowlevel.ParkingLot()
        self.addresses: tuple[str, ...] = read()
        """The current addresses, as `read_addresses` gives them."""

    async def wait_change(self, known: tuple[str, ...]) -> tuple[str, ...]:
        """Return the current addresses as soon as they differ from ``known``."""
        await trio.lowlevel.checkpoint()
        while self.addresses == known:
            await self._changed.park()
        return self.addresses

    def changes(self) -> Changes:
        """The addresses after each change from now on. A slow reader misses states in between, never the last one."""
        return Changes(self)

    async def run(self, *, task_status: TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Watch until cancelled."""
        notifier = self._open_notifier()
        try:
            self._update()  # what changed between our making and the notifier's
            task_status.started()
            while True:
                await self._wait_for_sign(notifier)
                self._update()
        finally:
            if notifier is not None:
                notifier.close()

    async def _wait_for_sign(self, notifier: socket.socket | None) -> None:
        if notifier is None:
            await trio.sleep(POLL_WITHOUT_NETLINK)
            return
        with trio.move_on_after(POLL):
            await trio.lowlevel.wait_readable(notifier.fileno())
            await trio.sleep(DEBOUNCE)
            _drain(notifier)

    def _update(self) -> None:
        addresses = self._read()
        if addresses != self.addresses:
            self.addresses = addresses
            self._changed.unpark_all()


class Changes:
    """Async iterator over the states of an `InterfaceWatch`. Needs no closing."""

    def __init__(self, watch: InterfaceWatch) -> None:
        self._watch = watch
        self._known = watch.addresses

    def __aiter__(self) -> AsyncIterator[tuple[str, ...]]:
        return self

    async def __anext__(self) -> tuple[str, ...]:
        self._known = await self._watch.wait_change(self._known)
        return self._known


def _drain(notifier: socket.socket) -> None:
    for _ in range(1024):  # bounds one turn; what is left makes the socket readable again
        try:
            notifier.recv(65536)
        except BlockingIOError:
            return
        except OSError:  # ENOBUFS: messages were lost, which is as good a sign as their arrival
            continue
