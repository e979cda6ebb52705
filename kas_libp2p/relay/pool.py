"""Which relays we keep places on. What is chosen is decided in `kas_libp2p.relay._pool`; here it is fed and remembered.

Whoever makes reservations is told what to hold, as a whole, each time it changes, and tells what comes of it:
`RelayPool.made`, `failed` and `lost`. It tries as soon as it is told, tries again at once what was lost, and leaves all
further waiting to the pool: a relay that failed leaves the set, and is in it again when its time has come.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace

import trio
from trio import TaskStatus  # type: ignore[attr-defined,unused-ignore]  # libp2p brings stubs that lack it

from kas_libp2p import addresses as addr
from kas_libp2p.config import RelayConfig
from kas_libp2p.errors import (
    AddressError,
    ConfigError,
    KasError,
    NegotiationError,
    RelayRefused,
    RemoteProtocolError,
    SecurityError,
    in_words,
)
from kas_libp2p.events import EventBus, ReservationMade
from kas_libp2p.metadata import PeerId
from kas_libp2p.relay._pool import Appetite, Cause, Dice, Pool, RelayStatus, Source, Told
from kas_libp2p.statefile import StateFile

__all__ = ["Probe", "RelayPool", "RelayStatus"]

PROBE_TIMEOUT = 15.0
"""Seconds to reach a candidate and measure it: a dial, its identify and a few pings."""
GATHER = 0.02
"""Seconds from the first news to the choice: news come in bursts, and choosing looks at every candidate."""
SAVE_DELAY = 5.0
"""Seconds from a change of what is held until the file is written."""
SAVE_INTERVAL = 600.0
"""Seconds between two writings otherwise: what a crash may cost of the scores."""


@dataclass(frozen=True, slots=True)
class Probe:
    """What a visit to a candidate showed.

    Attributes:
        rtt: seconds of a round trip on the connection to it.
        address: its end of that connection.
        offers_hop: whether it says that it is a relay.
        dialed: whether it was dialed there.
    """

    rtt: float
    address: str
    offers_hop: bool
    dialed: bool = True


class RelayPool:
    """Chooses relays, for as long as `run` runs.

    Args:
        config: the operator's relays, the target, and the file.
        events: where a damaged file is told.
        hold: told which relays to hold places on, with their addresses (without peer id); those that we have first.
        probe: connects to a candidate at one of these addresses, unless there is a connection, and measures it. Raises
            a `KasError` if it can't be reached.
        in_use: the relays through which circuits of ours run, in either direction. None of these is given up.
        wall_clock: seconds since the epoch.
        dice: chance.
        quiet: seconds from now on for which nobody is dialed who was only heard of: who was dialed is no stranger any
            more, and a node that finds out whether it can be dialed needs some.
        allow_private: for laboratories: whether hearsay may lead to private addresses, and to any port.

    Attributes:
        on_appetite: called when `appetite` has changed.

    Raises:
        ConfigError: a relay of the configuration is no address with a peer id.
    """

    def __init__(
        self,
        config: RelayConfig,
        events: EventBus,
        *,
        hold: Callable[[Mapping[PeerId, tuple[str, ...]]], None],
        probe: Callable[[PeerId, tuple[str, ...]], Awaitable[Probe]],
        in_use: Callable[[], Collection[PeerId]],
        wall_clock: Callable[[], float],
        dice: Dice,
        quiet: float = 0.0,
        allow_private: bool = False,
    ) -> None:
        self.on_appetite: list[Callable[[], None]] = []
        self.appetite = Appetite.NONE
        self._allow_private = allow_private
        self._events = events
        self._hold = hold
        self._held: dict[PeerId, tuple[str, ...]] = {}
        self._probe = probe
        self._in_use = in_use
        self._wall_clock = wall_clock
        self._file = StateFile(config.state_file, events, "known relays") if config.state_file is not None else None
        self._save_at = float("inf")
        self._wake = trio.Event()
        self._pool = Pool(target=config.target, dice=dice, hearsay_from=trio.current_time() + quiet)
        if self._file is not None:
            self._file.load(lambda text: self._pool.load(text, trio.current_time(), wall_clock()))
        for peer, known in _configured(config.relays).items():
            self._pool.add(peer, known, Source.CONFIGURED, trio.current_time())

    # What is known

    def identified(self, peer: PeerId, *, offers_hop: bool, addresses: Iterable[str], remote: str) -> None:
        """A connected peer has told about itself.

        Args:
            offers_hop: whether it says that it is a relay.
            addresses: where it says it can be reached.
            remote: its end of the connection. Only addresses that lead to no place further inside count: of a peer on
                the internet the public ones, of one in our site its private ones, too, and no names.
        """
        now = trio.current_time()
        if offers_hop:
            self._pool.add(peer, _usable(addresses, remote), Source.MET, now, remote=remote)
        elif not self._pool.knows(peer):
            return
        else:
            self._pool.probe_failed(peer, Cause.NO_RELAY, "says that it is no relay", now)
        self._wake.set()

    def said(self, peer: PeerId, *, operator: str, free: int | None) -> None:
        """A connected peer, if it is a relay, has told who runs it and how many places it has left."""
        self._pool.said(peer, operator, free, trio.current_time())
        self._wake.set()

    def heard(self, relay: Told, *, teller: PeerId, origin: str) -> bool:
        """Another peer told of a relay. Only public addresses count, and ports from
        `kas_libp2p.addresses.LEAST_PORT` on: nobody may send us into our own network, nor to what commonly runs on
        others' machines.

        Args:
            teller: who told.
            origin: what the teller has in common with others that may be the same, as its network.

        Returns:
            whether it is a candidate.
        """
        known = [each for each in _usable(relay.addresses) if (addr.ip_port(each) or ("", 0))[1] >= addr.LEAST_PORT]
        if self._allow_private:
            known = _usable(relay.addresses, "/ip4/127.0.0.1")
        taken = self._pool.add(
            relay.peer,
            known,
            Source.HEARD,
            trio.current_time(),
            teller=teller,
            origin=origin,
            operator=relay.operator,
            capacity=relay.free,
            age=relay.age,
        )
        if taken:
            self._wake.set()
        return taken

    def tell(self) -> tuple[Told, ...]:
        """Relays that others may be told of, the best first: those that we have held a place on, at addresses where we
        reached them that mean something to everybody.
        """
        near = "/ip4/127.0.0.1" if self._allow_private else None
        found = self._pool.tell(trio.current_time())
        return tuple(replace(each, addresses=tuple(_usable(each.addresses, near))) for each in found)

    # What came of it

    def made(self, event: ReservationMade) -> None:
        """A place was made, or renewed."""
        now = trio.current_time()
        self._pool.reserved(event.relay, now, max_bytes=event.max_bytes, max_seconds=event.max_seconds)
        self._wake.set()

    def failed(self, relay: PeerId, error: BaseException) -> None:
        """An attempt to make or renew a place failed."""
        self._pool.failed(relay, _cause_of(error), _text_of(error), trio.current_time())
        self._wake.set()

    def lost(self, relay: PeerId, reason: str, broke: bool = False) -> None:
        """A place is gone that was not given up, and is being tried for again.

        Args:
            broke: whether the way to the relay broke, and neither side had ended the connection.
        """
        self._pool.lost(relay, reason, trio.current_time(), broke=broke)
        self._wake.set()

    # What is wanted

    @property
    def target(self) -> int:
        """Places to hold. 0 for a node that everybody can dial."""
        return self._pool.target

    @target.setter
    def target(self, count: int) -> None:
        if count != self._pool.target:
            self._pool.target = count
            self._wake.set()

    def network_changed(self) -> None:
        """Our own addresses have changed: what could not be reached is tried again, round trips are measured anew."""
        self._pool.network_changed(trio.current_time())
        self._wake.set()

    def offer_changed(self) -> None:
        """We serve other protocols than before: relays that denied us a place are asked again."""
        self._pool.offer_changed(trio.current_time())
        self._wake.set()

    def status(self) -> tuple[RelayStatus, ...]:
        """All relays that are known: those we hold or ask first, then by score."""
        return self._pool.status(trio.current_time())

    # Running

    async def run(self, *, task_status: TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Choose until cancelled. The first choice is made, and told to ``hold``, before this counts as started."""
        try:
            async with trio.open_nursery() as nursery:
                self._choose(nursery)
                task_status.started()
                while True:
                    self._wake = trio.Event()
                    with trio.move_on_at(min(self._pool.deadline, self._save_at)):
                        await self._wake.wait()
                        await trio.sleep(GATHER)
                    self._choose(nursery)
                    if trio.current_time() >= self._save_at:
                        self.save()
        finally:
            self.save()

    def _choose(self, nursery: trio.Nursery) -> None:
        now = trio.current_time()
        for peer in self._pool.update(now, self._in_use()):
            nursery.start_soon(self._visit, peer, self._pool.addresses_of(peer))
        held = {peer: self._pool.addresses_of(peer) for peer in self._pool.hold}
        if held != self._held:
            changed = held.keys() != self._held.keys()
            self._held = held
            self._save_at = min(self._save_at, now + (SAVE_DELAY if changed else SAVE_INTERVAL))
            self._hold(dict(held))
        appetite = self._pool.appetite(now)
        if appetite is not self.appetite:
            self.appetite = appetite
            for callback in self.on_appetite:
                callback()

    async def _visit(self, peer: PeerId, addresses: tuple[str, ...]) -> None:
        try:
            with trio.fail_after(PROBE_TIMEOUT):
                probe = await self._probe(peer, addresses)
        except trio.TooSlowError:
            reason = f"not reached within {PROBE_TIMEOUT:g} s"
            self._pool.probe_failed(peer, Cause.UNREACHABLE, reason, trio.current_time())
        except KasError as error:
            self._pool.probe_failed(peer, _cause_of(error), _text_of(error), trio.current_time())
        else:
            now = trio.current_time()
            if probe.offers_hop:
                where = str(addr.without_peer(probe.address))
                self._pool.probed(peer, probe.rtt, where, now, dialed=probe.dialed)
            else:
                self._pool.probe_failed(peer, Cause.NO_RELAY, "says that it is no relay", now)
        self._wake.set()

    # Remembering

    def save(self) -> None:
        """Write the file, as a whole or not at all. If that fails, an event says so."""
        now = trio.current_time()
        self._save_at = now + SAVE_INTERVAL
        if self._file is not None:
            self._file.save(self._pool.dump(now, self._wall_clock()))


def _configured(relays: Iterable[str]) -> dict[PeerId, list[str]]:
    found: dict[PeerId, list[str]] = {}
    for each in relays:
        try:
            address = addr.parse(each)
            peer = addr.peer_of(address)
            if peer is None or addr.is_relayed(address):
                raise AddressError("a relay is written as /ip4/192.0.2.1/tcp/16117/p2p/12D3KooW…")
            found.setdefault(peer, []).append(str(addr.without_peer(address)))
        except AddressError as error:
            raise ConfigError(f"relay.relays: {each!r} leads to no relay: {error}") from None
    return found


def _usable(addresses: Iterable[str], remote: str | None = None) -> list[str]:
    """Of what a peer says where a relay is, what leads to no place further inside than the peer itself is.

    A name is never among them: it leads wherever its owner likes, our own network included. Nor is a zone, which means
    something to that peer alone.

    Args:
        remote: the relay's end of a connection; ``None`` if it is not connected.
    """
    found = []
    for each in addresses:
        try:
            address = addr.parse(each)
            where = addr.ip_port(address)
            near = remote is not None and (
                addr.is_loopback(remote) or (addr.is_private(remote) and addr.is_private(address))
            )
            usable = where is not None and where[1] and "%" not in where[0]
            if usable and (near or addr.is_public(address)):
                found.append(str(addr.without_peer(address)))
        except AddressError:
            continue
    return found


def _cause_of(error: BaseException) -> Cause:
    match error:
        case RelayRefused(status="PERMISSION_DENIED"):
            return Cause.DENIED
        case RelayRefused(status="RESERVATION_REFUSED" | "RESOURCE_LIMIT_EXCEEDED"):
            return Cause.FULL
        case RelayRefused() | RemoteProtocolError() | SecurityError():
            return Cause.BROKEN
        case NegotiationError():
            return Cause.NO_RELAY
    return Cause.UNREACHABLE


def _text_of(error: BaseException) -> str:
    return in_words(error)[:256]
