"""A network as a value: sites around a public core, each with its routers, hosts and link. Pure; checked when made.

::

    alice ── 192.168.1.0/24 ── router ── 11.1.0.0/24 ═╗
                                                      ╠═ core ═ 11.3.0.0/24 ── relay
    bob ── 192.168.1.0/24 ── router ── carrier ───────╝
                             100.64.0.0/24  11.2.0.0/24

A site's link to the core is where delay, jitter, loss and rate happen: half of what two sites see between them.
11.0.0.0/8 and 2d00::/8 stand for the public internet, because the usual libraries take them for public.
"""

from __future__ import annotations

import math
import re
import tomllib
from collections.abc import Mapping as MappingABC
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from . import nat as nats
from .errors import TopologyError

MAX_SITES = 1000
"""More would need other addresses than these, and no machine holds them."""
MAX_HOSTS = 200
"""Hosts of one site: they share a /24."""
RESERVED = ("core", "wires")
"""Names of the lab's own namespaces."""
SERVICES = ("upnp", "natpmp", "pcp")
"""Port-mapping services that a home router can offer: UPnP IGD, NAT-PMP (RFC 6886), PCP (RFC 6887)."""

_NAME = re.compile(r"[a-z][a-z0-9-]{0,30}")
_AMOUNT = re.compile(r"([0-9.]+)\s*([a-zA-Z%]*)")
_SECONDS = {"": 1.0, "s": 1.0, "ms": 1e-3, "us": 1e-6, "min": 60.0}
_SHARES = {"": 1.0, "%": 0.01}
_BITS = {"": 1.0, "bit": 1.0, "kbit": 1e3, "Mbit": 1e6, "Gbit": 1e9}


def _amount(value: Any, units: MappingABC[str, float], what: str) -> float:
    if isinstance(value, int | float) and math.isfinite(value):
        return float(value)
    match = _AMOUNT.fullmatch(value.strip()) if isinstance(value, str) else None
    try:
        if match:
            return float(match[1]) * units[match[2]]
    except (KeyError, ValueError):
        pass
    raise TopologyError(f"{value!r} is no {what}: write a number and one of {', '.join(filter(None, units))}")


def seconds(text: float | str) -> float:
    """``0.025`` or ``"25ms"``, ``"2s"``, ``"300us"``, ``"2min"``."""
    return _amount(text, _SECONDS, "time")


def share(text: float | str) -> float:
    """``0.01`` or ``"1%"``."""
    return _amount(text, _SHARES, "share")


def bits(text: float | str) -> float:
    """Bits per second: ``1e6`` or ``"1Mbit"``, ``"64kbit"``."""
    return _amount(text, _BITS, "rate")


_READ = {"delay": seconds, "jitter": seconds, "loss": share, "rate": bits}


@dataclass(frozen=True, slots=True)
class Link:
    """What a link does to each packet, in each direction.

    Attributes:
        delay: seconds one way.
        jitter: seconds by which the delay varies, evenly to both sides. Packets keep their order.
        loss: share of the packets that vanish, 0 to 1.
        rate: bits per second; 0: as fast as the machine.
    """

    delay: float = 0.0
    jitter: float = 0.0
    loss: float = 0.0
    rate: float = 0.0

    def __post_init__(self) -> None:
        if self.delay < 0 or self.jitter < 0 or self.rate < 0:
            raise TopologyError("a link's delay, jitter and rate can't be negative")
        if self.jitter > self.delay:
            raise TopologyError(
                f"jitter of {self.jitter * 1e3:g} ms needs a delay of at least as much, not {self.delay * 1e3:g} ms"
            )
        if not 0 <= self.loss <= 1:
            raise TopologyError(f"a loss of {self.loss:g} is not between 0 and 1")

    @classmethod
    def of(
        cls, delay: float | str = 0.0, jitter: float | str = 0.0, loss: float | str = 0.0, rate: float | str = 0.0
    ) -> Link:
        """The same with units: ``Link.of(delay="25ms", loss="1%", rate="10Mbit")``."""
        return cls().changed({"delay": delay, "jitter": jitter, "loss": loss, "rate": rate})

    def changed(self, values: MappingABC[str, float | str | None]) -> Link:
        """The same with other values, as in `of`; those that are None stay."""
        return replace(self, **{key: _READ[key](value) for key, value in values.items() if value is not None})

    @property
    def is_plain(self) -> bool:
        """Whether it does nothing: then the kernel forwards, at full speed."""
        return self == Link()

    def __str__(self) -> str:
        parts = [f"{self.delay * 1e3:g} ms"] if self.delay else []
        parts += [f"±{self.jitter * 1e3:g} ms"] if self.jitter else []
        parts += [f"{self.loss * 100:g} % loss"] if self.loss else []
        parts += [f"{self.rate / 1e6:g} Mbit/s"] if self.rate else []
        return ", ".join(parts)


@dataclass(frozen=True, slots=True)
class Router:
    """A router of a site.

    Attributes:
        nat: its type, one of `natlab.nat.NATS`.
        hairpin: whether insiders reach each other by the outside address.
        udp_lifetime, tcp_lifetime: seconds after which an idle mapping is forgotten; None: as the kernel has it, and
            120 s for what full-cone and address-restricted routers let in.
        services: port-mapping services that it offers to its insiders, of `SERVICES`.
    """

    nat: str = "pr"
    hairpin: bool = False
    udp_lifetime: float | None = None
    tcp_lifetime: float | None = None
    services: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        kind = nats.nat_named(self.nat)
        for name in ("udp_lifetime", "tcp_lifetime"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise TopologyError(f"a {name} of {value:g} s is below the kernel's finest, 1 s")
        for service in self.services:
            if service not in SERVICES:
                raise TopologyError(f"there is no router service {service!r}; there are: {', '.join(SERVICES)}")
        if not kind.translates and (self.hairpin or self.services):
            raise TopologyError(f"a router of type {self.nat} maps no ports, so hairpin and services make no sense")


@dataclass(frozen=True, slots=True)
class Site:
    """One line to the core, and what is behind it.

    Attributes:
        name: unique among sites and hosts (a site may be called as one of its own hosts).
        hosts: names of the hosts, unique in the lab.
        routers: the outermost first: none for a host with a public address, one at home, two behind a carrier's NAT.
        link: what the line does; None: as the lab's `Lab.wan`.
        ipv6: "none", "open", or "fw": a firewall that lets in only what was asked for. Without a router: not "fw".
        addresses: public addresses of a host without routers.
    """

    name: str
    hosts: tuple[str, ...] = ()
    routers: tuple[Router, ...] = ()
    link: Link | None = None
    ipv6: str = "none"
    addresses: int = 1

    def __post_init__(self) -> None:
        for name in (self.name, *self.hosts):
            if not _NAME.fullmatch(name):
                raise TopologyError(f"{name!r} can't be a name: use a to z, 0 to 9 and -, at most 31, a letter first")
            if name in RESERVED:
                raise TopologyError(f"{name!r} is a name of the lab's own: take another")
        if self.ipv6 not in ("none", "open", "fw"):
            raise TopologyError(f"ipv6 of {self.name} is {self.ipv6!r}: it can be none, open or fw")
        if len(self.routers) > 2:
            raise TopologyError(f"{self.name} has {len(self.routers)} routers in a row: two is the most")
        if len(self.hosts) > MAX_HOSTS:
            raise TopologyError(f"{self.name} has {len(self.hosts)} hosts: {MAX_HOSTS} is the most")
        if not self.routers:
            if len(self.hosts) != 1:
                raise TopologyError(f"{self.name} has no router, so it must have exactly one host")
            if self.ipv6 == "fw":
                raise TopologyError(f"{self.name} has no router, so nothing there can be an IPv6 firewall")
        elif self.addresses != 1:
            raise TopologyError(f"{self.name} has a router: only a host without one can have several addresses")
        if not 1 <= self.addresses <= MAX_HOSTS:
            raise TopologyError(f"{self.name} can have 1 to {MAX_HOSTS} addresses, not {self.addresses}")
        if len(self.routers) == 2 and not all(nats.nat_named(router.nat).translates for router in self.routers):
            raise TopologyError(f"{self.name}: both routers of a carrier's customer must translate addresses")

    @property
    def type(self) -> str:
        """The NAT type as `natlab.nat.TYPES` names it, or "public"."""
        if not self.routers:
            return "public"
        return nats.CARRIER_PREFIX + self.routers[0].nat if len(self.routers) == 2 else self.routers[0].nat

    @property
    def translates(self) -> bool:
        """Whether its hosts have private IPv4 addresses, and the outside sees another."""
        return any(nats.nat_named(router.nat).translates for router in self.routers)

    def router_name(self, index: int) -> str:
        """The namespace of a router: ``alice/router``, and ``alice/carrier`` if it is the outer one of two."""
        return f"{self.name}/{'carrier' if len(self.routers) == 2 and index == 0 else 'router'}"


@dataclass(frozen=True, slots=True)
class Lab:
    """A whole network.

    Attributes:
        sites: everything around the core.
        wan: the link of every site that has none of its own.
        seed: of all that happens at random on links; the same seed gives the same fate to the same packet.
    """

    sites: tuple[Site, ...] = ()
    wan: Link = field(default_factory=Link)
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "sites", tuple(self.sites))  # a list is as good
        if len(self.sites) > MAX_SITES:
            raise TopologyError(f"{len(self.sites)} sites are more than a lab can have ({MAX_SITES})")
        owner: dict[str, str] = {}
        for site in self.sites:
            for name in dict.fromkeys((site.name, *site.hosts)):
                if name in owner:
                    raise TopologyError(f"two things are called {name!r}: one at {owner[name]}, one at {site.name}")
                owner[name] = site.name
            if len(set(site.hosts)) != len(site.hosts):
                raise TopologyError(f"{site.name} has two hosts of one name: {', '.join(site.hosts)}")

    def with_site(self, site: Site) -> Lab:
        """The same with one more site, which gets the next addresses."""
        return replace(self, sites=(*self.sites, site))

    def link_of(self, site: Site) -> Link:
        return self.wan if site.link is None else site.link


_LINK_KEYS = frozenset(each.name for each in fields(Link))


def _link(options: MappingABC[str, Any]) -> tuple[Link | None, dict[str, Any]]:
    rest = {key: value for key, value in options.items() if key not in _LINK_KEYS}
    mine = {key: value for key, value in options.items() if key in _LINK_KEYS and value is not None}
    return (Link.of(**mine) if mine else None), rest


def home(
    name: str,
    nat: str = "pr",
    *,
    hosts: tuple[str, ...] = (),
    hairpin: bool = False,
    udp_lifetime: float | str | None = None,
    tcp_lifetime: float | str | None = None,
    services: tuple[str, ...] = (),
    ipv6: str = "none",
    delay: float | str | None = None,
    jitter: float | str | None = None,
    loss: float | str | None = None,
    rate: float | str | None = None,
) -> Site:
    """A site behind NAT, with one host of the same name if none are named.

    ``hairpin`` and the lifetimes are those of the router that decides: the outer one of two. ``services`` are those of
    the router at home.

    Raises:
        TopologyError: no such type, or the options contradict each other.
    """
    link, _ = _link({"delay": delay, "jitter": jitter, "loss": loss, "rate": rate})
    routers = [Router(each) for each in nats.chain_of(nat)]
    routers[0] = replace(
        routers[0],
        hairpin=hairpin,
        udp_lifetime=None if udp_lifetime is None else seconds(udp_lifetime),
        tcp_lifetime=None if tcp_lifetime is None else seconds(tcp_lifetime),
    )
    routers[-1] = replace(routers[-1], services=tuple(services))
    return Site(name, tuple(hosts) or (name,), tuple(routers), link, ipv6)


def public(
    name: str,
    *,
    addresses: int = 1,
    ipv6: str = "open",
    delay: float | str | None = None,
    jitter: float | str | None = None,
    loss: float | str | None = None,
    rate: float | str | None = None,
) -> Site:
    """A host with public addresses, no router before it."""
    link, _ = _link({"delay": delay, "jitter": jitter, "loss": loss, "rate": rate})
    return Site(name, (name,), (), link, ipv6, addresses)


def site_from_text(text: str) -> Site:
    """One site in a word: ``alice=pr``, ``bob=cgn-sym,delay=25ms,loss=1%,hosts=bob+eve``, ``relay=public``.

    Raises:
        TopologyError: it can't be read.
    """
    name, equals, rest = text.partition("=")
    if not equals:
        raise TopologyError(f"{text!r} is no site: write NAME=TYPE, such as alice=pr or relay=public")
    kind, *pairs = rest.split(",")
    options: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if key in options:
            raise TopologyError(f"{text!r} says {key} twice")
        if not equals and key != "hairpin":
            raise TopologyError(f"{pair!r} in {text!r} is no option: write KEY=VALUE")
        options[key] = value if equals else True
    return _site(name, kind, options)


def _site(name: str, kind: str, options: dict[str, Any]) -> Site:
    for key in {"hosts", "services"} & set(options):
        several = options[key].split("+") if isinstance(options[key], str) else options[key]
        if not isinstance(several, list) or not all(isinstance(each, str) for each in several):
            raise TopologyError(f"{key} of {name} are {several!r}: write names, with + between them")
        options[key] = tuple(several)
    if "hairpin" in options:
        if options["hairpin"] not in (True, "yes", False, "no"):
            raise TopologyError(f"hairpin of {name} is {options['hairpin']!r}: it can be yes or no")
        options["hairpin"] = options["hairpin"] in (True, "yes")
    known = (
        {*_LINK_KEYS, "ipv6", "addresses"}
        if kind == "public"
        else {*_LINK_KEYS, "ipv6", "hosts", "hairpin", "udp_lifetime", "tcp_lifetime", "services"}
    )
    if unknown := sorted(set(options) - known):
        raise TopologyError(f"{name} has no option {unknown[0]!r}; there are: {', '.join(sorted(known))}")
    if kind != "public":
        return home(name, kind, **options)
    if "addresses" in options:
        options["addresses"] = _number(options["addresses"], f"addresses of {name}")
    return public(name, **options)


def _number(value: Any, what: str) -> int:
    if (isinstance(value, str) and value.isdecimal()) or isinstance(value, int):
        return int(value)
    raise TopologyError(f"{what} is {value!r}: write a whole number")


def lab_from_text(words: list[str]) -> Lab:
    """A lab in words, one per site, or the name of one TOML file.

    ``seed=7`` sets the seed, ``wan=25ms`` the delay of every line that has none of its own. The file has the same in
    tables: ``seed = 7``, ``[wan]`` with the attributes of `Link`, and ``[sites.alice]`` with ``type`` and the options.

    Raises:
        TopologyError: it can't be read.
    """
    if len(words) == 1 and words[0].endswith(".toml"):
        return _lab_from_file(Path(words[0]))
    wan, seed, sites = Link(), 0, []
    for word in words:
        if word.startswith("seed="):
            seed = _number(word[5:], "seed")
        elif word.startswith("wan="):
            wan = Link.of(delay=word[4:])
        else:
            sites.append(site_from_text(word))
    return Lab(tuple(sites), wan, seed)


def _lab_from_file(path: Path) -> Lab:
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise TopologyError(f"{path} can't be read: {error}") from None
    if unknown := sorted(set(content) - {"sites", "wan", "seed"}):
        raise TopologyError(f"{path} has no use for {unknown[0]!r}: it can hold sites, wan and seed")
    for name in ("sites", "wan"):
        if not isinstance(content.setdefault(name, {}), dict):
            raise TopologyError(f"{path}: {name} is {content[name]!r}: write a table")
    sites = []
    for name, options in content["sites"].items():
        if not isinstance(options, dict) or not isinstance(options.get("type"), str):
            raise TopologyError(f'{path}: write [sites.{name}] and type = "pr" or another type')
        rest = {key: value for key, value in options.items() if key != "type"}
        sites.append(_site(name, options["type"], rest))
    link, rest = _link(content["wan"])
    if rest:
        raise TopologyError(f"{path}: [wan] has no {sorted(rest)[0]!r}; there are: {', '.join(sorted(_LINK_KEYS))}")
    return Lab(tuple(sites), link or Link(), _number(content.get("seed", 0), f"seed in {path}"))


def lab_as_json(lab: Lab) -> dict[str, Any]:
    """A lab for a program to read; `lab_from_json` makes it again."""
    return asdict(lab)


def lab_from_json(data: MappingABC[str, Any]) -> Lab:
    """The lab that `lab_as_json` described."""
    sites = []
    for site in data["sites"]:
        routers = tuple(Router(**{**each, "services": tuple(each["services"])}) for each in site["routers"])
        link = None if site["link"] is None else Link(**site["link"])
        sites.append(Site(**{**site, "hosts": tuple(site["hosts"]), "routers": routers, "link": link}))
    return Lab(tuple(sites), Link(**data["wan"]), data["seed"])
