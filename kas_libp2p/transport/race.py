"""Several addresses of one peer, tried as RFC 8305 (Happy Eyeballs v2) says. The first that works wins.

- Addresses are tried one after the other, but the next does not wait for the failure of the one before: it starts
  ``delay`` seconds after it (section 5), or at once when any attempt fails.
- IPv6 and IPv4 alternate, IPv6 first (section 4), so that a broken family costs one delay rather than many. Within a
  family the order given is kept: it is the caller's preference.
- An attempt is the *whole* way to a usable connection, TCP and upgrade. A middlebox that completes every TCP handshake
  would else win each race with a connection that leads nowhere.
- What is known is tried while names are still being looked up (section 3): a name server that does not answer holds up
  nothing but its own names.
- Circuits may be dialed beside the direct addresses, in a lane of their own with a head start for the others: a peer
  that nobody can reach would else cost a delay for each of its addresses.
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
    RelayRefused,
    ResolveError,
    Stage,
    UpgradeError,
)
from kas_libp2p.events import AddressFailed, EventBus
from kas_libp2p.metadata import PeerId

T = TypeVar("T")

Found = tuple[Iterable[addr.Address], Iterable[AddressFailure]]
"""Addresses, and why others are none."""

CONSIDERED = 16
"""Addresses that are looked at for each one that may be tried. A peer can list ten thousand, and reading them all would
take seconds; this many leave room for duplicates and for both families."""
CIRCUITS = 4
"""Circuits that are tried beside direct addresses however many of those there are: as many as a peer has relays."""


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
    later: Callable[[], Awaitable[Found]] | None = None,
    circuits_after: float | None = None,
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
        failures: of addresses that did not get this far. They are part of the error.
        later: finds more addresses meanwhile, as by resolving names, and failures of the same kind.
        circuits_after: seconds after which the first circuit is dialed, or at once when no direct address is left;
            ``None``: after all direct addresses, as one of them.
        peer, events: where and under which name each failure is told (`AddressFailed`).

    Raises:
        DialError: no attempt succeeded; one reason per address, in the order of their starts.
    """
    this = _Race(attempt, discard, max_addresses, later, circuits_after, peer, events)
    this.add(addresses, failures)
    return await this.run(delay, target)


class _Lane:
    """Addresses of which one is tried after the other."""

    __slots__ = ("failed", "failures", "started", "waiting")

    def __init__(self) -> None:
        self.waiting: deque[Multiaddr] = deque()
        self.started = 0
        self.failures = 0
        self.failed = trio.Event()


class _Race(Generic[T]):
    def __init__(
        self,
        attempt: Callable[[Multiaddr], Awaitable[T]],
        discard: Callable[[T], object],
        max_addresses: int,
        later: Callable[[], Awaitable[Found]] | None,
        circuits_after: float | None,
        peer: PeerId | None,
        events: EventBus | None,
    ) -> None:
        self._attempt = attempt
        self._discard = discard
        self._max_addresses = max_addresses
        self._later = later
        self._peer = peer
        self._events = events
        self._circuits_after = circuits_after
        self._direct = _Lane()
        self._circuits = self._direct if circuits_after is None else _Lane()
        self._direct_over = trio.Event()
        self._started: set[Multiaddr] = set()
        self._unusable: list[AddressFailure] = []
        self._complete = trio.Event()
        self._winners: list[T] = []  # one at most
        self._failures: dict[int, AddressFailure] = {}

    def add(self, addresses: Iterable[addr.Address], failures: Iterable[AddressFailure]) -> None:
        self._unusable += failures
        usable = [*dict.fromkeys((*self._direct.waiting, *self._circuits.waiting))]
        for address in itertools.islice(addresses, CONSIDERED * self._max_addresses):
            try:
                if addr.without_peer(address) not in self._started:
                    usable.append(addr.parse(address))
            except AddressError as error:
                self._unusable.append(AddressFailure(str(address), Stage.RESOLVE, error, 0.0))
        room = self._max_addresses - len(self._started)
        if self._circuits_after is None:
            self._direct.waiting = deque(in_order(usable, room))
            return
        direct = in_order(itertools.filterfalse(addr.is_relayed, usable), room)
        circuits = in_order(filter(addr.is_relayed, usable), max(room - len(direct), min(room, CIRCUITS)))
        self._circuits.waiting = deque(circuits)
        self._direct.waiting = deque(direct[: room - len(circuits)])

    async def run(self, delay: float, target: str) -> T:
        try:
            async with trio.open_nursery() as nursery:
                if self._later is not None:
                    nursery.start_soon(self._look_further, self._later)
                else:
                    self._complete.set()
                if self._circuits_after is not None:
                    nursery.start_soon(self._start_circuits, nursery, delay, self._circuits_after)
                await self._start_all(self._direct, nursery, delay)
        except BaseException:
            while self._winners:  # a mistake surfaced, or the caller was cancelled, in the winner's instant
                self._discard(self._winners.pop())
            raise
        if self._winners:
            return self._winners.pop()
        failures = (*self._unusable, *(self._failures[index] for index in sorted(self._failures)))
        hint = "" if failures else "no address is known"
        error = DialError(target, failures, hint)
        causes = [failure.error for failure in failures if isinstance(failure.error, Exception)]
        if causes:
            raise error from ExceptionGroup("every address failed", causes)
        raise error

    async def _look_further(self, later: Callable[[], Awaitable[Found]]) -> None:
        self.add(*await later())
        self._complete.set()
        self._look_at_direct()

    async def _start_circuits(self, nursery: trio.Nursery, delay: float, after: float) -> None:
        self._look_at_direct()
        with trio.move_on_after(after):
            await self._direct_over.wait()
        await self._start_all(self._circuits, nursery, delay)

    def _look_at_direct(self) -> None:
        lane = self._direct
        if self._complete.is_set() and not lane.waiting and lane.failures == lane.started:
            self._direct_over.set()

    async def _start_all(self, lane: _Lane, nursery: trio.Nursery, delay: float) -> None:
        answered = 0  # failures that have been answered by the start of another attempt
        while lane.waiting or not self._complete.is_set():
            if not lane.waiting:
                await self._complete.wait()
                continue
            address = lane.waiting.popleft()
            nursery.start_soon(self._one, lane, len(self._started), address, nursery.cancel_scope)
            self._started.add(addr.without_peer(address))
            lane.started += 1
            if not lane.waiting and self._complete.is_set():
                return
            with trio.move_on_after(delay):
                while lane.failures == answered:
                    lane.failed = trio.Event()
                    await lane.failed.wait()
                answered += 1

    async def _one(self, lane: _Lane, index: int, address: Multiaddr, everything: trio.CancelScope) -> None:
        started = trio.current_time()
        try:
            result = await self._attempt(address)
        except (OSError, KasError, trio.BrokenResourceError, trio.ClosedResourceError) as error:
            failure = AddressFailure(str(address), stage_of(error), error, trio.current_time() - started)
            self._failures[index] = failure
            lane.failures += 1
            lane.failed.set()
            self._look_at_direct()
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
        case RelayRefused():
            return Stage.RELAY
        case AddressError() | ResolveError():
            return Stage.RESOLVE
    return Stage.TCP
