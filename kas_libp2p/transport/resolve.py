"""From names to IP addresses: ``/dns``, ``/dns4``, ``/dns6`` and ``/dnsaddr`` at the start of a multiaddr.

- ``/dns``, ``/dns4`` and ``/dns6`` are asked of the system (getaddrinfo), so /etc/hosts and the operator's resolver
  count. What follows the name stays.
- ``/dnsaddr/NAME`` stands for the multiaddrs in the TXT records ``dnsaddr=…`` of ``_dnsaddr.NAME``. What follows the
  name is a suffix that the records must have: ``/dnsaddr/NAME/p2p/ID`` selects those of one peer. A record may be a
  ``/dnsaddr`` or ``/dns`` again, hence bounds on depth, on questions and on results: a name's owner decides what we ask
  next, and must not be able to keep us busy.

Sources: multiformats/multiaddr ``protocols/DNSADDR.md``; libp2p/specs ``addressing``.
"""

from __future__ import annotations

import socket
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal, Protocol

import dns.asyncbackend
import dns.asyncresolver
import dns.exception
import dns.resolver
import trio
from multiaddr import Multiaddr

from kas_libp2p import addresses as addr
from kas_libp2p.errors import AddressError, AddressFailure, ResolveError, Stage

MAX_DEPTH = 4
"""``/dnsaddr`` records that may lead to each other. The public bootstrap names use two."""

MAX_QUESTIONS = 32
"""Names asked for one address in all. The public bootstrap name asks 5."""

MAX_ADDRESSES = 64
"""Results of one address. The public bootstrap name gives about 30, over all transports."""

MAX_NAMES = 16
"""Addresses with a name that are resolved for one peer, as many as are dialed by default. Others may hold thousands for
it, each of which would be a question to somebody else's name server."""

MAX_RECORDS = 256
"""TXT records looked at per name; the largest DNS message (64 KiB) holds some hundred of a circuit address's length."""

PREFIX = "dnsaddr="

_LIFETIME = 60.0
"""Seconds after which a TXT question ends by itself; the caller's timeout is what should end it."""

Family = Literal[4, 6] | None


class Names(Protocol):
    """Where names are looked up. Errors are `ResolveError`; a name without what was asked for is one too."""

    async def hosts(self, name: str, family: Family) -> list[str]:
        """The IP addresses of a name, of one family or (``None``) of both, in the system's order of preference."""

    async def texts(self, name: str) -> list[str]:
        """The TXT records of a name, each joined to one text."""


class SystemNames:
    """The system's resolver for hosts, and the name servers it is configured with for TXT records.

    Args:
        nameservers: IP addresses to ask for TXT records instead of those in /etc/resolv.conf.
        port: their port.
    """

    def __init__(self, nameservers: Iterable[str] = (), port: int = 53) -> None:
        self._nameservers = list(nameservers)
        self._port = port

    async def hosts(self, name: str, family: Family) -> list[str]:
        wanted = {4: socket.AF_INET, 6: socket.AF_INET6, None: socket.AF_UNSPEC}[family]
        try:
            found = await trio.socket.getaddrinfo(name, None, family=wanted, type=socket.SOCK_STREAM)
        except UnicodeError:
            raise ResolveError(f"{name}: no name that DNS can carry") from None
        except OSError as error:
            raise ResolveError(f"{name}: {error.strerror or error}") from error
        return list(dict.fromkeys(_ip(info[4]) for info in found))

    async def texts(self, name: str) -> list[str]:
        try:
            resolver = dns.asyncresolver.Resolver(configure=not self._nameservers)
        except dns.resolver.NoResolverConfiguration:
            raise ResolveError(f"{name}: no name server is configured in /etc/resolv.conf") from None
        if self._nameservers:
            resolver.nameservers = self._nameservers
            resolver.port = self._port
        try:
            answer = await resolver.resolve(
                name.rstrip(".") + ".",  # absolute: no search list may turn it into another question
                "TXT",
                lifetime=_LIFETIME,
                raise_on_no_answer=False,
                backend=dns.asyncbackend.get_backend("trio"),
            )
        except dns.resolver.NXDOMAIN:
            raise ResolveError(f"{name}: there is no such name") from None
        except dns.exception.DNSException as error:
            raise ResolveError(f"{name}: {error}") from error
        except OSError as error:
            raise ResolveError(f"{name}: {error.strerror or error}") from error
        if answer.rrset is None:
            return []
        return [b"".join(record.strings).decode("utf-8", "replace") for record in list(answer.rrset)[:MAX_RECORDS]]


def _ip(sockaddr: tuple[str | int, ...]) -> str:
    ip = str(sockaddr[0])
    scope = int(sockaddr[3]) if len(sockaddr) == 4 else 0
    return f"{ip}%{scope}" if scope and "%" not in ip else ip


SYSTEM_NAMES = SystemNames()


async def resolve(address: addr.Address, *, names: Names = SYSTEM_NAMES, timeout: float = 5.0) -> list[Multiaddr]:
    """The addresses that a multiaddr with a name stands for; the address itself if it has none.

    Args:
        names: where to look up.
        timeout: seconds for all of it (``dial.resolve_timeout``).

    Raises:
        ResolveError: nothing was found, or not in time; the text names what failed.
        AddressError: no multiaddr.
    """
    parsed = addr.parse(address)
    name = addr.name_of(parsed)
    if name is None:
        return [parsed]
    search = _Search(names)
    with trio.move_on_after(timeout) as scope:
        await search.follow(parsed)
    if search.found:
        return search.results()
    if scope.cancelled_caught:
        raise ResolveError(f"{name[1]}: no answer within {timeout:g} s")
    raise search.reason(parsed)


async def resolve_all(
    addresses: Iterable[addr.Address], *, names: Names = SYSTEM_NAMES, timeout: float = 5.0
) -> tuple[list[Multiaddr], list[AddressFailure]]:
    """Resolve several addresses of one peer at once, at most `MAX_NAMES` of them with a name.

    Returns:
        all results in the order of the addresses, and one failure per address that led to none.
    """
    wanted = list(addresses)
    names_left = MAX_NAMES
    results: list[list[Multiaddr]] = [[] for _ in wanted]
    failures: list[AddressFailure | None] = [None] * len(wanted)

    async def one(index: int, address: addr.Address) -> None:
        started = trio.current_time()
        try:
            results[index] = await resolve(address, names=names, timeout=timeout)
        except ResolveError as error:
            failures[index] = AddressFailure(str(address), Stage.RESOLVE, error, trio.current_time() - started)

    async with trio.open_nursery() as nursery:
        for index, address in enumerate(wanted):
            try:
                if addr.name_of(address) is None:
                    results[index] = [addr.parse(address)]
                    continue
                names_left -= 1
                if names_left < 0:
                    raise ResolveError(f"more than {MAX_NAMES} names for one peer")
            except (ResolveError, AddressError) as error:
                failures[index] = AddressFailure(str(address), Stage.RESOLVE, error, 0.0)
            else:
                nursery.start_soon(one, index, address)
    return [each for result in results for each in result], [each for each in failures if each is not None]


@dataclass(slots=True)
class _Search:
    """One address being resolved: what was found and where, what was asked, what failed."""

    names: Names
    found: dict[Multiaddr, tuple[int, ...]] = field(default_factory=dict)
    """Each result with its place: the numbers of the records that led to it."""
    asked: set[Multiaddr] = field(default_factory=set)
    errors: list[ResolveError] = field(default_factory=list)

    async def follow(self, address: Multiaddr, place: tuple[int, ...] = ()) -> None:
        name = addr.name_of(address)
        if name is None:
            self._add(address, place)
            return
        if address in self.asked or len(self.found) >= MAX_ADDRESSES:
            return
        if len(place) >= MAX_DEPTH or len(self.asked) >= MAX_QUESTIONS:
            self.errors.append(ResolveError(f"{name[1]}: too many names lead to each other"))
            return
        self.asked.add(address)
        try:
            await self._ask(address, *name, place)
        except ResolveError as error:
            self.errors.append(error)

    async def _ask(self, address: Multiaddr, kind: str, host: str | None, place: tuple[int, ...]) -> None:
        assert host is not None  # every kind of name has its value
        rest = addr.components(address)[1:]
        if kind != "dnsaddr":
            for index, ip in enumerate(await self.names.hosts(host, addr.family(address))):
                self._add(addr.join((*addr.ip_components(ip), *rest)), (*place, index))
            return
        records = [text for text in await self.names.texts(f"_dnsaddr.{host}") if text.startswith(PREFIX)]
        fitting = [each for each in map(_read_record, records) if each is not None and _ends_with(each, rest)]
        if not records:
            raise ResolveError(f"{host}: has no dnsaddr records")
        if not fitting:
            what = "".join(f"/{name}/{value}" for name, value in rest) or "anything usable"
            raise ResolveError(f"{host}: none of its {len(records)} dnsaddr records has {what}")
        async with trio.open_nursery() as nursery:
            for index, each in enumerate(fitting):
                nursery.start_soon(self.follow, each, (*place, index))

    def _add(self, address: Multiaddr, place: tuple[int, ...]) -> None:
        if len(self.found) < MAX_ADDRESSES:
            self.found.setdefault(address, place)

    def results(self) -> list[Multiaddr]:
        """What was found, in the order of the records."""
        return sorted(self.found, key=self.found.__getitem__)

    def reason(self, address: Multiaddr) -> ResolveError:
        texts = list(dict.fromkeys(str(error) for error in self.errors))
        return ResolveError("; ".join(texts[:3]) or f"{address} leads to no address")


def _read_record(text: str) -> Multiaddr | None:
    try:
        return addr.parse(text.removeprefix(PREFIX).strip())
    except AddressError:
        return None  # of a transport newer than we are, most likely


def _ends_with(address: Multiaddr, suffix: tuple[addr.Component, ...]) -> bool:
    return not suffix or addr.components(address)[-len(suffix) :] == suffix
