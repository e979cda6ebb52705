"""Several addresses of one peer, tried as RFC 8305 (Happy Eyeballs v2) says. The first that works wins.

- Addresses are tried one after the other, but the next does not wait for the failure of the one before: it starts
  ``delay`` seconds after it (section 5), or at once when any attempt fails.
- IPv6 and IPv4 alternate, IPv6 first (section 4), so that a broken family costs one delay rather than many. Within a
  family the order given is kept: it is the caller's preference.
- An attempt is the *whole* way to a usable connection, TCP and upgrade. A middlebox that completes every TCP handshake
  would else win each race with a connection that leads nowhere.
- The winner ends all other attempts. One that completes in the same instant is discarded, not leaked.
- Every failed address keeps its reason.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Generic, TypeVar

import trio
from multiaddr import Multiaddr

from kas_libp2p import addresses as addr
from kas_libp2p.errors import (
    AddressError,
    AddressFailure,
    DialError,
    KasError,
    Refused,
    ResolveError,
    Stage,
    UpgradeError,
)
from kas_libp2p.events import AddressFailed, EventBus
from kas_libp2p.metadata import PeerId

T = TypeVar("T")

CONSIDERED = 16
"""Addresses that are looked at for each one that may be tried. A peer can list ten thousand, and reading them all would
take seconds; this many leave room for duplicates and for both families."""


def in_order(addresses: Iterable[addr.Address], limit: int) -> list[Multiaddr]:
    """The addresses in the order in which they are tried: without duplicates, families alternating, at most ``limit``.

    Two addresses that differ in a ``/p2p`` at the end only are one. Relayed addresses come after all direct ones.

    Raises:
        AddressError: one of them is no multiaddr.
    """
    unique: dict[Multiaddr, Multiaddr] = {}
    for address in addresses:
        parsed = addr.parse(address)
        unique.setdefault(addr.without_peer(parsed), parsed)
    direct = [each for each in unique.values() if not addr.is_relayed(each)]
    relayed = [each for each in unique.values() if addr.is_relayed(each)]
    return [*_interleave(direct), *_interleave(relayed)][:limit]


def _interleave(addresses: Sequence[Multiaddr]) -> list[Multiaddr]:
    v6 = deque(each for each in addresses if addr.family(each) == 6)
    others = deque(each for each in addresses if addr.family(each) != 6)
    ordered: list[Multiaddr] = []
    while v6 or others:
        ordered += [queue.popleft() for queue in (v6, others) if queue]
    return ordered


async def race(
    addresses: Iterable[addr.Address],
    attempt: Callable[[Multiaddr], Awaitable[T]],
    delay: float,
    *,
    discard: Callable[[T], object],
    target: str,
    max_addresses: int,
    failures: Iterable[AddressFailure] = (),
    peer: PeerId | None = None,
    events: EventBus | None = None,
) -> T:
    """Try addresses until one attempt succeeds.

    If the caller is cancelled and an attempt succeeds all the same, it is returned rather than lost.

    Args:
        addresses: of one peer, resolved, the preferred first; see `in_order`.
        attempt: makes one complete connection. What it has opened it closes if it fails or is cancelled. It may fail
            with ``OSError``, `KasError`, ``trio.BrokenResourceError`` and ``trio.ClosedResourceError``; anything else
            is a mistake, ends the race and is raised in an ``ExceptionGroup``.
        delay: seconds between two starts.
        discard: closes, without waiting, a connection that succeeded but did not win.
        target: whom this is about, for the error's text.
        max_addresses: how many are tried at most; of more than 16 times as many the rest is not even read.
        failures: of addresses that did not get this far, as names that did not resolve. They are part of the error.
        peer, events: where and under which name each failure is told (`AddressFailed`).

    Raises:
        DialError: no attempt succeeded; one reason per address, in the order of their starts.
    """
    usable: list[Multiaddr] = []
    earlier = list(failures)
    for address in itertools.islice(addresses, CONSIDERED * max_addresses):
        try:
            addr.without_peer(address)
            usable.append(addr.parse(address))
        except AddressError as error:
            earlier.append(AddressFailure(str(address), Stage.RESOLVE, error, 0.0))
    this = _Race(attempt, discard, peer, events)
    return await this.run(in_order(usable, max_addresses), delay, target, tuple(earlier))


class _Race(Generic[T]):
    def __init__(
        self,
        attempt: Callable[[Multiaddr], Awaitable[T]],
        discard: Callable[[T], object],
        peer: PeerId | None,
        events: EventBus | None,
    ) -> None:
        self._attempt = attempt
        self._discard = discard
        self._peer = peer
        self._events = events
        self._winners: list[T] = []  # one at most
        self._failures: dict[int, AddressFailure] = {}
        self._failed = trio.Event()

    async def run(
        self, addresses: Sequence[Multiaddr], delay: float, target: str, earlier: tuple[AddressFailure, ...]
    ) -> T:
        try:
            async with trio.open_nursery() as nursery:
                await self._start_all(nursery, addresses, delay)
        except BaseException:
            while self._winners:  # a mistake surfaced, or the caller was cancelled, in the winner's instant
                self._discard(self._winners.pop())
            raise
        if self._winners:
            return self._winners.pop()
        failures = (*earlier, *(self._failures[index] for index in sorted(self._failures)))
        hint = "" if failures else "no address is known"
        error = DialError(target, failures, hint)
        causes = [failure.error for failure in failures if isinstance(failure.error, Exception)]
        if causes:
            raise error from ExceptionGroup("every address failed", causes)
        raise error

    async def _start_all(self, nursery: trio.Nursery, addresses: Sequence[Multiaddr], delay: float) -> None:
        answered = 0  # failures that have been answered by the start of another attempt
        for index, address in enumerate(addresses):
            nursery.start_soon(self._one, index, address, nursery.cancel_scope)
            if index + 1 == len(addresses):
                return
            with trio.move_on_after(delay):
                while len(self._failures) == answered:
                    self._failed = trio.Event()
                    await self._failed.wait()
                answered += 1

    async def _one(self, index: int, address: Multiaddr, everything: trio.CancelScope) -> None:
        started = trio.current_time()
        try:
            result = await self._attempt(address)
        except (OSError, KasError, trio.BrokenResourceError, trio.ClosedResourceError) as error:
            failure = AddressFailure(str(address), stage_of(error), error, trio.current_time() - started)
            self._failures[index] = failure
            self._failed.set()
            self._tell(failure)
            return
        if self._winners:
            self._discard(result)
            return
        self._winners.append(result)
        everything.cancel()

    def _tell(self, failure: AddressFailure) -> None:
        if self._events is not None:
            self._events.emit(
                AddressFailed(
                    peer=self._peer,
                    address=failure.address,
                    stage=failure.stage,
                    reason=str(failure.error) or type(failure.error).__name__,
                    seconds=failure.seconds,
                )
            )


def stage_of(error: BaseException) -> Stage:
    """How far an attempt had come that failed with ``error``."""
    match error:
        case UpgradeError():
            return error.stage
        case Refused():
            return Stage.GATE
        case AddressError() | ResolveError():
            return Stage.RESOLVE
    return Stage.TCP
