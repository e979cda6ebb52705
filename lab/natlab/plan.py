"""From a topology to what must be done in the kernel, as values. Pure: no step is taken here.

Each namespace is one node. A site's link is cut in the namespace ``wires``, where what arrives at ``3a`` leaves at
``3b`` and the other way round: by the kernel as long as the link is plain, by a process that delays and drops
otherwise.

::

    core:s3 ── wires:3a │ wires:3b ── alice/router:wan   lan0 (a bridge: p0, p1 …) ── alice:eth0
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from . import nat as nats
from .topology import Lab, Link, Router, Site

CORE, WIRES = "core", "wires"


@dataclass(frozen=True, slots=True)
class Veth:
    """A cable between two namespaces."""

    a: str
    a_name: str
    b: str
    b_name: str


@dataclass(frozen=True, slots=True)
class Bridge:
    """A switch in a namespace, with the interfaces that are its ports."""

    at: str
    name: str
    ports: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Up:
    """Switch an interface on, without an IPv6 address of its own making.

    Until the kernel has made sure that nobody else has that one, a second later, a router can't ask for its neighbours.
    """

    at: str
    name: str


@dataclass(frozen=True, slots=True)
class Address:
    """Give an interface an address with its prefix length, or take it away."""

    at: str
    name: str
    address: str
    remove: bool = False


@dataclass(frozen=True, slots=True)
class Route:
    """Send a prefix, or "default", by a neighbour."""

    at: str
    prefix: str
    via: str


@dataclass(frozen=True, slots=True)
class Sysctl:
    """Write to a file under ``/proc/sys/net``; ``optional``: where the kernel has it."""

    at: str
    key: str
    value: str
    optional: bool = False


@dataclass(frozen=True, slots=True)
class Nft:
    """Load a script of nftables."""

    at: str
    script: str


@dataclass(frozen=True, slots=True)
class Forget:
    """Drop every connection that a router remembers."""

    at: str


@dataclass(frozen=True, slots=True)
class Wire:
    """What a site's link does to what goes up (from the site to the core) and down; None: cut."""

    number: int
    up: Link | None
    down: Link | None
    up_seed: str
    down_seed: str


Step = Veth | Bridge | Up | Address | Route | Sysctl | Nft | Forget | Wire


@dataclass(frozen=True, slots=True)
class Plan:
    """Namespaces to make, then steps in order. The scripts of `Nft` may be loaded side by side, after all else."""

    namespaces: tuple[str, ...]
    steps: tuple[Step, ...]

    def as_json(self) -> dict[str, Any]:
        return {
            "namespaces": list(self.namespaces),
            "steps": [{"step": type(step).__name__, **asdict(step)} for step in self.steps],
        }


def core_address(number: int, version: int = 4) -> str:
    """The core's end of a site's link."""
    return _outside(number, 1, version)


def site_address(number: int, version: int = 4, index: int = 0) -> str:
    """A site's public address: of its outermost router, or of its host."""
    return _outside(number, 2 + index, version)


def _outside(number: int, last: int, version: int) -> str:
    # Every site in a /16, and a /48, of its own, as sites are on the internet: programs judge diversity by that.
    return f"2d00:0:{number:x}::{last:x}" if version == 6 else f"11.{number % 128}.{number // 128}.{last}"


def _lan(site: Site, number: int, last: int) -> str:
    """An IPv4 address in the LAN: private behind a NAT, else public like those of the core's links."""
    if site.translates:
        return f"192.168.1.{last}"
    return f"11.{128 + number % 128}.{number // 128}.{last}"


def _lan6(number: int, depth: int, last: int) -> str:
    return f"2d00:{0x100 + number:x}:{depth}::{last:x}"


def host_address(lab: Lab, name: str, version: int = 4) -> str | None:
    """The address of a host's interface, None if it has none of that version."""
    for number, site in enumerate(lab.sites, 1):
        if name in site.hosts:
            if version == 6 and site.ipv6 == "none":
                return None
            if not site.routers:
                return site_address(number, version)
            last = 10 + site.hosts.index(name)
            return _lan(site, number, last) if version == 4 else _lan6(number, len(site.routers), last)
    raise KeyError(name)


def lan_gateway(site: Site, number: int) -> str:
    """The inside address of a site's innermost router."""
    return _lan(site, number, 1)


def lan_gateway6(site: Site, number: int) -> str:
    """The same of its IPv6 firewall; empty if there is none."""
    return _lan6(number, len(site.routers), 1) if site.ipv6 == "fw" else ""


def plan_core() -> Plan:
    """The middle of every lab."""
    return Plan(
        (CORE, WIRES),
        (Up(CORE, "lo"), *_forwarding(CORE)),
    )


def plan_site(lab: Lab, number: int) -> Plan:
    """One site of a lab, numbered from 1, and its link to the core."""
    site = lab.sites[number - 1]
    nodes = [*(site.router_name(index) for index in range(len(site.routers))), *site.hosts]
    link = lab.link_of(site)
    steps: list[Step] = [Up(node, "lo") for node in nodes]
    edge, port = (nodes[0], "wan") if site.routers else (site.hosts[0], "eth0")
    steps += [
        Veth(CORE, f"s{number}", WIRES, f"{number}a"),
        Veth(WIRES, f"{number}b", edge, port),
        *(Up(WIRES, f"{number}{end}") for end in "ab"),
        Up(CORE, f"s{number}"),
        Address(CORE, f"s{number}", core_address(number) + "/24"),
        Up(edge, port),
    ]
    for index in range(site.addresses):
        steps.append(Address(edge, port, site_address(number, 4, index) + "/24"))
        if site.ipv6 != "none":
            steps.append(Address(edge, port, site_address(number, 6, index) + "/64"))
    steps.append(Route(edge, "default", core_address(number)))
    if site.ipv6 != "none":
        steps.append(Address(CORE, f"s{number}", core_address(number, 6) + "/64"))
        steps += [Address(CORE, f"s{number}", "fe80::1/64"), Address(edge, port, "fe80::2/64")]
        steps.append(Route(edge, "default", core_address(number, 6)))
    for depth in range(len(site.routers)):
        steps += _router(site, number, depth)
    steps.append(wire_step(lab, number, link, link))
    return Plan(tuple(nodes), tuple(steps))


def _router(site: Site, number: int, depth: int) -> list[Step]:
    """The router at this depth (0: outermost) with what hangs on its LAN."""
    router, name = site.routers[depth], site.router_name(depth)
    innermost = depth == len(site.routers) - 1
    if innermost:
        below = [(host, "eth0", 10 + index) for index, host in enumerate(site.hosts)]
        lan4 = [_lan(site, number, last) for last in (1, *(last for _, _, last in below))]
    else:
        below = [(site.router_name(depth + 1), "wan", 2)]
        lan4 = ["100.64.0.1", "100.64.0.2"]
    lan6 = [_lan6(number, depth + 1, last) for last in (1, *(last for _, _, last in below))]
    steps: list[Step] = [*_forwarding(name), *_lifetimes(router, name)]
    steps += [Veth(name, f"p{index}", node, port) for index, (node, port, _) in enumerate(below)]
    ports = tuple(f"p{index}" for index in range(len(below)))
    steps.append(Bridge(name, "lan0", ports))
    # In this order each interface has a carrier when it goes up, or is told at once; a bridge would be told up to a
    # second later, and IPv6 waits for that.
    steps += [*(Up(node, port) for node, port, _ in below), *(Up(name, each) for each in ports)]
    steps += [Up(name, "lan0"), Address(name, "lan0", lan4[0] + "/24")]
    # A bridge must not hand its frames to the firewall, or hairpinned packets are translated twice.
    steps.append(Sysctl(name, "bridge/bridge-nf-call-iptables", "0", optional=True))
    for index, (node, port, _) in enumerate(below, 1):
        steps += [Address(node, port, lan4[index] + "/24"), Route(node, "default", lan4[0])]
    if not site.translates:
        steps.append(Route(CORE, lan4[0][: -len("1")] + "0/24", site_address(number)))
    if site.ipv6 != "none":
        steps += [Address(name, "lan0", lan6[0] + "/64"), Address(name, "lan0", "fe80::1/64")]
        for index, (node, port, last) in enumerate(below, 1):
            steps += [Address(node, port, lan6[index] + "/64"), Address(node, port, f"fe80::{last:x}/64")]
            steps.append(Route(node, "default", lan6[0]))
        if depth == 0:
            steps.append(Route(CORE, f"2d00:{0x100 + number:x}::/32", site_address(number, 6)))
        if not innermost:
            steps.append(Route(name, f"2d00:{0x100 + number:x}:{depth + 2}::/64", lan6[1]))
    steps.append(_rules(site, depth, router_address(number, depth)))
    return steps


def router_address(number: int, depth: int) -> str:
    """The outside address that a router has at first."""
    return site_address(number) if depth == 0 else "100.64.0.2"


def _rules(site: Site, depth: int, wan: str) -> Nft:
    router = site.routers[depth]
    innermost = depth == len(site.routers) - 1
    script = nats.ruleset(
        nats.nat_named(router.nat),
        wan,
        hairpin=router.hairpin,
        udp_lifetime=router.udp_lifetime or nats.DEFAULT_LIFETIME,
        tcp_lifetime=router.tcp_lifetime or nats.DEFAULT_LIFETIME,
        ipv6="fw" if innermost and site.ipv6 == "fw" else "open",
        portmap=bool(router.services),
    )
    return Nft(site.router_name(depth), script)


def _forwarding(at: str) -> list[Step]:
    return [
        Sysctl(at, "ipv4/ip_forward", "1"),
        Sysctl(at, "ipv6/conf/all/forwarding", "1", optional=True),
        Sysctl(at, "ipv4/conf/all/rp_filter", "0"),
    ]


def _lifetimes(router: Router, at: str) -> list[Step]:
    keys: list[tuple[str, float | None]] = [
        ("udp_timeout", router.udp_lifetime),
        ("udp_timeout_stream", router.udp_lifetime),
        ("tcp_timeout_established", router.tcp_lifetime),
    ]
    return [Sysctl(at, f"netfilter/nf_conntrack_{key}", str(round(value))) for key, value in keys if value is not None]


def plan_reboot(lab: Lab, number: int, depth: int, wan: str) -> Plan:
    """A router, whose public address may have changed since, forgets its mappings and connections."""
    name = lab.sites[number - 1].router_name(depth)
    return Plan((), (_rules(lab.sites[number - 1], depth, wan), Forget(name)))


def plan_new_address(lab: Lab, number: int, old: str, new: str) -> Plan:
    """A site's router gets another public IPv4 address, and with it forgets all connections."""
    site = lab.sites[number - 1]
    name = site.router_name(0)
    steps: list[Step] = [
        Address(name, "wan", old + "/24", remove=True),
        Address(name, "wan", new + "/24"),
        Route(name, "default", core_address(number)),
    ]
    if not site.translates:
        steps.append(Route(CORE, _lan(site, number, 0) + "/24", new))
    steps += [_rules(site, 0, new), Forget(name)]
    return Plan((), tuple(steps))


def plan_between(number: int, other: int, *, cut: bool) -> Plan:
    """Let nothing pass between two sites, or everything again; what both have with others stays as it is."""
    table, ends = f"inet between_{min(number, other)}_{max(number, other)}", (f"s{number}", f"s{other}")
    script = f"add table {table}\ndelete table {table}\n"
    if cut:
        drops = " ".join(f'iifname "{one}" oifname "{two}" drop;' for one, two in (ends, ends[::-1]))
        script += f"table {table} {{\nchain forward {{ type filter hook forward priority filter; {drops} }}\n}}\n"
    return Plan((), (Nft(CORE, script),))


def wire_step(lab: Lab, number: int, up: Link | None, down: Link | None) -> Wire:
    """What a site's link does from now on, with the random numbers of the lab's seed."""
    seed = f"{lab.seed}/{lab.sites[number - 1].name}"
    return Wire(number, up, down, seed + "/up", seed + "/down")
