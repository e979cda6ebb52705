"""Asking the router for our ports, and keeping them: PCP, else NAT-PMP, else UPnP; and to let strangers in at our IPv6
ports, by PCP.

A router that forgets its mappings tells by PCP and NAT-PMP, and is asked anew within a minute; by UPnP it says nothing,
and what it has is looked at every five minutes.

What is mapped is no promise: whether anybody gets in through it is seen by AutoNAT, and told to others only then.
"""

from __future__ import annotations

import hashlib
import math
import secrets
import socket
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import trio

from kas_libp2p import addresses as addr
from kas_libp2p.errors import AddressError
from kas_libp2p.events import EventBus, PortMapped, PortMappingFailed
from kas_libp2p.portmap._gateway import default_gateway, default_gateway6
from kas_libp2p.portmap._keeper import LIFETIME, NONCE_BYTES, Codec, Dice, Keeper, Mapped, is_useful
from kas_libp2p.portmap._natpmp import NatPmp
from kas_libp2p.portmap._pcp import MAX_MESSAGE, Pcp
from kas_libp2p.portmap.upnp import PORTS_TRIED, Igd, UpnpError

__all__ = ["Mapping", "PortMapper"]

T = TypeVar("T")

_ABANDON: dict[str, Any] = {"abandon_on_cancel": True}  # libp2p brings stubs of trio that lack it

PORT = 5351
"""UDP port of NAT-PMP and PCP at the router."""
ANYWHERE6 = "2000::1"
"""An address of the IPv6 internet, to see from where it would be reached."""
MAX_PORTS = 8
"""Ports that are asked for."""
FIRST_RETRY, RETRY = 5.0, 300.0
"""Seconds until a router that gives nothing is asked again, and the most after doubling: it may just be starting, or
somebody may change its settings."""
REMOVE_TIMEOUT = 1.0
"""Seconds for the removal of mappings at the end, by NAT-PMP and PCP."""
UPNP_REMOVE_TIMEOUT = 1.5
"""The same by UPnP, where each is a connection and a page of XML; the bridge ends within two seconds. What is left ends
with its lifetime."""
UPNP_CHECK = 300.0
"""Seconds between looks whether a UPnP mapping is still there: the router does not say when it has forgotten it."""


@dataclass(frozen=True, slots=True)
class Mapping:
    """A port of the router that leads to ours.

    Attributes:
        by: pcp, nat-pmp or upnp.
        local: where we listen, as ``/ip4/192.168.1.10/tcp/16117``.
        external: the same place, seen from outside.
        lifetime: seconds that it was granted for last; infinity: until it is removed.
    """

    by: str
    local: str
    external: str
    lifetime: float


@dataclass(frozen=True, slots=True)
class _Place:
    """What a round of asking depends on."""

    gateway: str
    local: str
    ports: tuple[int, ...]

    def address(self, port: int) -> str:
        return addr.ip_port_text(self.local, port)


class PortMapper:
    """Keeps our TCP ports mapped, and open in an IPv6 firewall, for as long as `run` runs.

    Args:
        events: where mappings and failures are told.
        listen: the addresses that we listen on now; wildcards count for every interface.
        dice: chance.
        secret: what nobody else knows and we know again after a crash: a PCP router gives a port that we had to nobody
            else, and knows us by what is derived from this. ``None``: new each time.
        read_routes, read_routes6: the text of the routing tables, as in ``/proc/net/route`` and ``ipv6_route``.

    Attributes:
        on_changed: called when `mappings` has changed.
    """

    def __init__(
        self,
        events: EventBus,
        *,
        listen: Callable[[], Sequence[str]],
        dice: Dice,
        secret: bytes | None = None,
        read_routes: Callable[[], str] | None = None,
        read_routes6: Callable[[], str] | None = None,
    ) -> None:
        self.on_changed: list[Callable[[], None]] = []
        secret = secret or secrets.token_bytes(32)
        read, read6 = read_routes or partial(_read, "route"), read_routes6 or partial(_read, "ipv6_route")
        self._four = _Mapper(events, listen, dice, secret, read, self._tell)
        self._six = _Opener(events, listen, dice, secret, read6, self._tell)

    @property
    def mappings(self) -> tuple[Mapping, ...]:
        """What we have."""
        return self._four.mappings + self._six.mappings

    @property
    def problem(self) -> str:
        """Why we have nothing, in a sentence; empty if we do, need nothing, or don't know yet."""
        return "" if self.mappings else self._four.problem

    def network_changed(self) -> None:
        """Our addresses or listeners may have changed: look whether that concerns the router, and ask anew if so."""
        self._four.network_changed()
        self._six.network_changed()

    async def run(self) -> None:
        """Keep ports mapped until cancelled; then they are removed, within `UPNP_REMOVE_TIMEOUT`."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._four.run)
            nursery.start_soon(self._six.run)

    def _tell(self) -> None:
        for callback in self.on_changed:
            callback()


class _Mapper:
    """Of IPv4: ports of the router that lead to ours."""

    def __init__(
        self,
        events: EventBus,
        listen: Callable[[], Sequence[str]],
        dice: Dice,
        secret: bytes,
        read_routes: Callable[[], str],
        on_changed: Callable[[], None],
    ) -> None:
        self.mappings: tuple[Mapping, ...] = ()
        self.problem = ""
        self._events = events
        self._listen = listen
        self._dice = dice
        self._read_routes = read_routes
        self._secret = secret
        self._on_changed = on_changed
        self._renewals: dict[int, int] = {}
        self._refused: dict[int, str] = {}  # what was told of ports that were refused beside others that were not
        self._changed = trio.Event()
        self._place: _Place | None = None
        self._had_any = False  # whether there was a mapping in this round

    def network_changed(self) -> None:
        self._changed.set()

    async def run(self) -> None:
        pause = FIRST_RETRY
        while True:
            self._changed = trio.Event()
            before, self._place = self._place, await self._find_place()
            self._had_any = False
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._watch, nursery.cancel_scope)
                await self._keep()
                if self._had_any or self._place != before:
                    pause = FIRST_RETRY
                await trio.sleep(pause)
                pause = min(2 * pause, RETRY)
                nursery.cancel_scope.cancel()

    async def _watch(self, scope: trio.CancelScope) -> None:
        """End the round when it rests on something that is not so any more."""
        while True:
            await self._changed.wait()
            self._changed = trio.Event()
            if await self._find_place() != self._place:
                scope.cancel()
                return

    async def _find_place(self) -> _Place | None:
        gateway = default_gateway(self._read_routes())
        if gateway is None:
            return None
        try:
            with trio.socket.socket(trio.socket.AF_INET, trio.socket.SOCK_DGRAM) as sock:
                await sock.connect((gateway, PORT))
                local = str(sock.getsockname()[0])
        except OSError:
            return None
        ports = dict.fromkeys(port for ip, port in map(_ip_port, self._listen()) if ip in (local, "0.0.0.0"))  # noqa: S104
        return _Place(gateway, local, tuple(ports)[:MAX_PORTS])

    # A round

    _family = trio.socket.AF_INET

    def _check(self, addresses: Iterable[str]) -> None:
        for each in addresses:
            if not is_useful(each):
                raise _BehindAnother(each)

    async def _keep(self) -> None:
        """Ask in order, and keep what is given. Returns when nothing is to be had, or was lost."""
        place = self._place
        if place is None:
            self._fail([""], "there is no IPv4 default gateway to ask for a port")
            return
        if not place.ports or is_useful(place.local):
            self.problem = ""
            return  # nothing to map, or no NAT between us and the internet
        reasons = []
        help_ = "switch one of them on in its settings, or forward the port there by hand and set announce"
        for keep in (self._keep_by_pcp, self._keep_by_natpmp, self._keep_by_upnp):
            try:
                reasons.append(await keep(place))
            except _BehindAnother as error:
                reasons = [f"is behind another NAT itself: its outside address is {error}"]
                help_ = "no port of it leads anywhere; IPv6, or a public address from the provider, would help"
                break
            finally:
                self._set(())
        reason = "; it ".join(filter(None, reasons)) or "answers neither PCP, NAT-PMP nor UPnP"
        self._fail(map(place.address, place.ports), f"the router {place.gateway} {reason}: {help_}")

    async def _keep_by_pcp(self, place: _Place) -> str:
        return await self._keep_by_datagrams(place, Pcp(place.local))

    async def _keep_by_natpmp(self, place: _Place) -> str:
        return await self._keep_by_datagrams(place, NatPmp())

    async def _keep_by_datagrams(self, place: _Place, codec: Codec) -> str:
        keeper = Keeper(codec, place.ports, self._nonce, self._dice, trio.current_time())
        try:
            sock = trio.socket.socket(self._family, trio.socket.SOCK_DGRAM)
        except OSError as error:
            return f"can't be asked ({error.strerror})"
        with sock:
            try:
                await sock.bind((place.local, 0))  # PCP is about the address that a request comes from
                await sock.connect(_endpoint(place.gateway))
                while keeper.failed is None:
                    await _exchange(keeper, sock)
                    mapped = keeper.mappings(trio.current_time())
                    self._check(each.address for each in mapped)
                    self._take(place, codec.name, mapped)
                    if mapped:
                        self._tell_refused(place, keeper.refusals())
            except OSError as error:
                return f"can't be asked ({error.strerror})"
            finally:
                keeper.stop(trio.current_time())
                with _last_words(REMOVE_TIMEOUT):
                    while not keeper.done:
                        await _exchange(keeper, sock)
        return keeper.failed

    def _nonce(self, port: int) -> bytes:
        return hashlib.blake2b(str(port).encode(), key=self._secret[:64], digest_size=NONCE_BYTES).digest()

    async def _keep_by_upnp(self, place: _Place) -> str:
        held: dict[int, Mapped] = {}
        try:
            igd = await _in_thread(Igd, place.gateway, place.local)
            try:
                while True:
                    address = await _in_thread(igd.address)
                    self._check([address])
                    for port in place.ports:
                        held[port] = await self._map_by_upnp(igd, port, address, held.get(port))
                    self._take(place, "upnp", held.values())
                    await self._rest_with_upnp(igd, held.values())
            finally:
                with _last_words(UPNP_REMOVE_TIMEOUT):
                    for port in place.ports:
                        external = held[port].external if port in held else port
                        # A call that we were cancelled in may have made a mapping that nobody told us of.
                        if port in held or await _in_thread(igd.holds, port, external):
                            await _in_thread(igd.unmap, external)
        except UpnpError as error:
            return str(error)

    async def _map_by_upnp(self, igd: Igd, port: int, address: str, old: Mapped | None) -> Mapped:
        others = [int(self._dice.uniform(addr.LEAST_PORT, 65535)) for _ in range(PORTS_TRIED)]
        wanted = port if old is None else old.external
        external, lifetime = await _in_thread(igd.map, port, wanted, others, LIFETIME)
        return Mapped(port, address, external, lifetime, 0 if old is None else old.renewals + 1)

    async def _rest_with_upnp(self, igd: Igd, held: Iterable[Mapped]) -> None:
        """Until half of the shortest lifetime is over, or something is gone."""
        end = trio.current_time() + min(each.lifetime or math.inf for each in held) / 2
        while (left := end - trio.current_time()) > 0:
            await trio.sleep(min(left, UPNP_CHECK))
            address = await _in_thread(igd.address)
            for each in held:
                if each.address != address or not await _in_thread(igd.holds, each.port, each.external):
                    return

    # Telling

    def _take(self, place: _Place, by: str, mapped: Iterable[Mapped]) -> None:
        found = []
        for each in mapped:
            local, external = place.address(each.port), addr.ip_port_text(each.address, each.external)
            found.append(Mapping(by, local, external, each.lifetime or math.inf))
            if self._renewals.get(each.port) != each.renewals:
                self._renewals[each.port] = each.renewals
                self._events.emit(PortMapped(by=by, local=local, external=external, lifetime=each.lifetime))
        self._set(tuple(found))
        if found:
            self.problem = ""
            self._had_any = True

    def _set(self, mappings: tuple[Mapping, ...]) -> None:
        if not mappings:
            self._renewals.clear()
            self._refused.clear()
        changed = {(each.local, each.external) for each in mappings} != {
            (each.local, each.external) for each in self.mappings
        }
        self.mappings = mappings
        if changed:
            self._on_changed()

    def _tell_refused(self, place: _Place, refused: dict[int, str]) -> None:
        for port, reason in refused.items():
            if self._refused.get(port) != reason:
                text = f"the router {place.gateway} {reason}, but has mapped others"
                self._events.emit(PortMappingFailed(local=place.address(port), reason=text))
        self._refused = refused

    def _fail(self, local: Iterable[str], reason: str) -> None:
        if reason != self.problem:
            self.problem = reason
            for each in local:
                self._events.emit(PortMappingFailed(local=each, reason=reason))


class _Opener(_Mapper):
    """Of IPv6: our ports in the router's firewall. A router that does not answer may have none, and is no problem."""

    _family = trio.socket.AF_INET6

    async def _find_place(self) -> _Place | None:
        gateway, local = default_gateway6(self._read_routes()), await _source6()
        if gateway is None or local is None:
            return None
        ports = dict.fromkeys(port for ip, port in map(_ip_port, self._listen()) if ip in (local, "::"))
        return _Place("%".join(gateway), local, tuple(ports)[:MAX_PORTS])

    def _check(self, addresses: Iterable[str]) -> None:
        pass

    async def _keep(self) -> None:
        place = self._place
        if place is None or not place.ports:
            return
        try:
            reason = await self._keep_by_pcp(place)
        finally:
            self._set(())
        if reason:
            help_ = "allow the ports in its firewall by hand, if others are to dial us over IPv6"
            self._fail(map(place.address, place.ports), f"the router {place.gateway} {reason}: {help_}")


async def _source6() -> str | None:
    """The address from which the system reaches the IPv6 internet; ``None`` if it has none. Nothing is sent."""
    try:
        with trio.socket.socket(trio.socket.AF_INET6, trio.socket.SOCK_DGRAM) as sock:
            await sock.connect((ANYWHERE6, PORT))
            local = str(sock.getsockname()[0])
    except OSError:
        return None
    return local if addr.is_public(local) else None


def _endpoint(gateway: str) -> tuple[Any, ...]:
    ip, _, interface = gateway.partition("%")
    return (ip, PORT, 0, socket.if_nametoindex(interface)) if interface else (ip, PORT)


async def _exchange(keeper: Keeper, sock: trio.socket.SocketType) -> None:
    """Send what is due, and take one datagram or wait until something is due."""
    try:
        for each in keeper.datagrams(trio.current_time()):
            await sock.send(each)
        with trio.move_on_at(keeper.next_deadline(trio.current_time())):
            keeper.receive(await sock.recv(MAX_MESSAGE), trio.current_time())
    except ConnectionRefusedError:
        keeper.unreachable(trio.current_time(), "")
    except OSError as error:
        keeper.unreachable(trio.current_time(), f"can't be reached ({error.strerror})")


class _BehindAnother(Exception):
    """The router's outside address is none on the internet; the text is that address."""


def _last_words(seconds: float) -> trio.CancelScope:
    """Room for what has to be done although we were cancelled."""
    return trio.CancelScope(deadline=trio.current_time() + seconds, shield=True)


async def _in_thread(function: Callable[..., T], *arguments: object) -> T:
    """Call something that blocks. If we are cancelled, it is left to end by itself."""
    return await trio.to_thread.run_sync(partial(function, *arguments), **_ABANDON)


def _ip_port(address: str) -> tuple[str, int]:
    try:
        return addr.ip_port(address) or ("", 0)
    except AddressError:
        return "", 0


def _read(table: str) -> str:
    try:
        return Path("/proc/net", table).read_text(encoding="ascii")
    except OSError:  # not Linux
        return ""
