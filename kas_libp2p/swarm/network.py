"""Where byte pipes come from: TCP, or something in memory in tests."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import trio
from multiaddr import Multiaddr

from kas_libp2p.config import DialConfig
from kas_libp2p.errors import AddressFailure
from kas_libp2p.events import EventBus
from kas_libp2p.transport import tcp
from kas_libp2p.transport.interfaces import InterfaceWatch
from kas_libp2p.transport.raw import RawConnection
from kas_libp2p.transport.resolve import resolve_all


class Listener(Protocol):
    """What the swarm needs of a listening socket."""

    @property
    def address(self) -> Multiaddr: ...

    def addresses(self) -> Sequence[Multiaddr]:
        """Where it can be reached now, a wildcard replaced by the addresses of the interfaces."""

    async def accept(self) -> RawConnection:
        """The next connection. Raises ``trio.ClosedResourceError`` once the listener is closed."""

    def close(self) -> None: ...


class Network(Protocol):
    """What the swarm needs from below."""

    async def listen(self, addresses: Sequence[Multiaddr]) -> Sequence[Listener]:
        """Listen on all of the addresses, or raise ``ListenError`` and on none."""

    on_contact: Callable[[str], None] | None
    """Called with the IP before each dial from a listen port: from then on a NAT may let it in there."""

    async def dial(self, address: Multiaddr) -> RawConnection:
        """Connect to one address. Raises ``OSError`` or ``AddressError``."""

    async def dial_fresh(self, address: Multiaddr) -> RawConnection:
        """As `dial`, from a port that nobody knows us by."""

    async def dial_punch(self, address: Multiaddr) -> RawConnection:
        """As `dial`, from the listen port and no other; crossed SYNs are a success. Raises ``OSError`` with what the
        network answered, EADDRNOTAVAIL if a listener has this very connection, or ``AddressError`` if nothing can be
        sent."""

    async def resolve(self, addresses: Iterable[Multiaddr]) -> tuple[list[Multiaddr], list[AddressFailure]]:
        """Names to addresses, and the failures."""

    async def watch(self, changed: Callable[[], None]) -> None:
        """Call a function whenever `Listener.addresses` may have changed, until cancelled."""


class TcpNetwork:
    """TCP on this machine. Dials from the listen port.

    Args:
        config: timeouts.
        events: where errors of listeners are told.

    """

    def __init__(self, config: DialConfig, events: EventBus) -> None:
        self._config = config
        self._events = events
        self._listeners: list[tcp.Listener] = []
        self._dialer = tcp.Dialer(self._listeners, config)

    @property
    def on_contact(self) -> Callable[[str], None] | None:
        """See `Network.on_contact`."""
        return self._dialer.on_contact

    @on_contact.setter
    def on_contact(self, tell: Callable[[str], None] | None) -> None:
        self._dialer.on_contact = tell

    async def listen(self, addresses: Sequence[Multiaddr]) -> Sequence[Listener]:
        """Listen on all of the addresses, or on none.

        Raises:
            ListenError: one can't be listened on; the text says who holds the port and what helps.
            AddressError: one is not for TCP.
        """
        listeners = await tcp.listen_all(addresses, events=self._events)
        self._listeners += listeners
        return listeners

    async def dial(self, address: Multiaddr) -> RawConnection:
        """Connect to one address.

        Raises:
            OSError: the system's reason.
            AddressError: it can't be dialed.
        """
        return await self._dialer.dial(address)

    async def dial_fresh(self, address: Multiaddr) -> RawConnection:
        """As `dial`, from a port that nobody knows us by."""
        return await self._dialer.dial(address, source=tcp.Source.ANY_PORT)

    async def dial_punch(self, address: Multiaddr) -> RawConnection:
        """See `Network.dial_punch`."""
        return await self._dialer.dial(address, source=tcp.Source.LISTEN_PORT)

    async def resolve(self, addresses: Iterable[Multiaddr]) -> tuple[list[Multiaddr], list[AddressFailure]]:
        """Names to addresses, and the failures."""
        return await resolve_all(addresses, timeout=self._config.resolve_timeout)

    async def watch(self, changed: Callable[[], None]) -> None:
        """Tell of changes of the interfaces, until cancelled."""
        watch = InterfaceWatch()
        async with trio.open_nursery() as nursery:
            await nursery.start(watch.run)
            known = watch.addresses
            while True:
                known = await watch.wait_change(known)
                changed()
