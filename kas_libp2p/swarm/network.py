"""Where byte pipes come from: TCP, or something in memory in tests."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Protocol

from multiaddr import Multiaddr

from kas_libp2p.transport.raw import RawConnection


class Listener(Protocol):
    """What the swarm needs of a listening socket."""

    @property
    def address(self) -> Multiaddr: ...

    def addresses(self) -> Sequence[Multiaddr]: ...

    async def accept(self) -> RawConnection: ...

    def close(self) -> None: ...


class Network(Protocol):
    """What the swarm needs from below: byte pipes. TCP, or something in memory in tests."""

    async def listen(self, address: Multiaddr) -> Listener: ...

    async def dial(self, address: Multiaddr) -> RawConnection: ...

    async def resolve(self, address: Multiaddr) -> Sequence[Multiaddr]: ...

    def address_changes(self) -> AsyncIterator[object]: ...
