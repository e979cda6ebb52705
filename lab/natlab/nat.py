"""Every NAT type: what it promises, and the nftables ruleset that keeps the promise. Pure.

The words are those of RFC 4787 and RFC 5382. Mapping says when two flows of one inside port share an outside port;
filtering says whose packets may come in on it; refusal says what everybody else gets.

========  =======================  =========  ==========
name      mapping                  filtering  unsolicited
========  =======================  =========  ==========
open      none                     none       RST
fw        none                     APDF       dropped
fc        EIM, keeps the port      EIF        dropped
fcx       EIM, changes the port    EIF        dropped
ar        EIM, keeps the port      ADF        dropped
pr        EIM, keeps the port      APDF       dropped     Linux' default
pr-rst    as pr                    APDF       RST
pr-icmp   as pr                    APDF       ICMP
naive     as pr                    APDF       RST         masquerade without an input chain
eimx      EIM, changes the port    APDF       dropped
adm       ADM                      APDF       dropped
sym       APDM, random             APDF       dropped
symseq    APDM, plus one           APDF       dropped
symblk    APDM in 512 ports        APDF       dropped
cgn-X     X at the carrier, and a home router (pr) behind it
========  =======================  =========  ==========
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from .errors import TopologyError


class Mapping(StrEnum):
    """When two flows from one inside endpoint share an outside port."""

    NONE = "none"
    """No translation at all."""
    EIM = "EIM"
    """Always: endpoint-independent."""
    ADM = "ADM"
    """If they go to one address: address-dependent."""
    APDM = "APDM"
    """Never: address- and port-dependent, "symmetric"."""


class Filtering(StrEnum):
    """Whose packets come in on a mapping."""

    NONE = "none"
    """Everybody's, even without a mapping."""
    EIF = "EIF"
    """Everybody's: endpoint-independent, "full cone"."""
    ADF = "ADF"
    """Those of addresses that were written to."""
    APDF = "APDF"
    """Those of endpoints that were written to."""


class Refusal(StrEnum):
    """What an unwanted packet is answered."""

    DROP = "drop"
    RST = "rst"
    """A TCP reset; for UDP, ICMP port unreachable."""
    ICMP = "icmp"
    """ICMP administratively prohibited."""


class Port(StrEnum):
    """How an outside port is chosen."""

    KEEP = "keep"
    """The inside port, if it is free."""
    CHANGE = "change"
    """From 61000 to 65535."""
    RANDOM = "random"
    PLUS_ONE = "plus one"
    """Each new flow gets the next, from 40000 on."""
    BLOCK = "block"
    """At random within a carrier's block of 512, from 40960 on."""
    HASH = "hash"
    """By a hash of the inside endpoint and the outside address, from 40000 on."""


@dataclass(frozen=True, slots=True)
class Nat:
    """What a router does to what passes."""

    name: str
    mapping: Mapping
    filtering: Filtering
    refusal: Refusal
    port: Port = Port.KEEP
    guarded: bool = True
    """Whether the router's own ports are behind the firewall, too."""

    @property
    def translates(self) -> bool:
        return self.mapping is not Mapping.NONE


NATS: dict[str, Nat] = {
    nat.name: nat
    for nat in (
        Nat("open", Mapping.NONE, Filtering.NONE, Refusal.RST, guarded=False),
        Nat("fw", Mapping.NONE, Filtering.APDF, Refusal.DROP),
        Nat("fc", Mapping.EIM, Filtering.EIF, Refusal.DROP),
        Nat("fcx", Mapping.EIM, Filtering.EIF, Refusal.DROP, Port.CHANGE),
        Nat("ar", Mapping.EIM, Filtering.ADF, Refusal.DROP),
        Nat("pr", Mapping.EIM, Filtering.APDF, Refusal.DROP),
        Nat("pr-rst", Mapping.EIM, Filtering.APDF, Refusal.RST),
        Nat("pr-icmp", Mapping.EIM, Filtering.APDF, Refusal.ICMP),
        Nat("naive", Mapping.EIM, Filtering.APDF, Refusal.RST, guarded=False),
        Nat("eimx", Mapping.EIM, Filtering.APDF, Refusal.DROP, Port.CHANGE),
        Nat("adm", Mapping.ADM, Filtering.APDF, Refusal.DROP, Port.HASH),
        Nat("sym", Mapping.APDM, Filtering.APDF, Refusal.DROP, Port.RANDOM),
        Nat("symseq", Mapping.APDM, Filtering.APDF, Refusal.DROP, Port.PLUS_ONE),
        Nat("symblk", Mapping.APDM, Filtering.APDF, Refusal.DROP, Port.BLOCK),
    )
}
"""What one router can be."""

CARRIER_PREFIX = "cgn-"
HOME_BEHIND_CARRIER = "pr"
"""The home router behind a carrier's: Linux' default, so that the carrier's NAT decides."""
TYPES: tuple[str, ...] = (*NATS, *(CARRIER_PREFIX + name for name, nat in NATS.items() if nat.translates))
"""Every type that a home can have."""

DEFAULT_LIFETIME = 120.0
"""Seconds that a full-cone or address-restricted router lets others in after the last packet out (Linux' own UDP
streams: 120 s)."""
TABLE_SIZE = 2048
"""Ports in a table of ports. Twice as many flows of one router at a time would meet."""


def nat_named(name: str) -> Nat:
    """The NAT of one router.

    Raises:
        TopologyError: no such type.
    """
    try:
        return NATS[name]
    except KeyError:
        raise TopologyError(f"there is no NAT type {name!r}; there are: {', '.join(TYPES)}") from None


def chain_of(name: str) -> tuple[str, ...]:
    """The routers that a home of this type has, the outermost first: one, or two for ``cgn-X``.

    Raises:
        TopologyError: no such type.
    """
    if name not in TYPES:
        raise TopologyError(f"there is no NAT type {name!r}; there are: {', '.join(TYPES)}")
    outer = name.removeprefix(CARRIER_PREFIX)
    return (outer,) if outer == name else (outer, HOME_BEHIND_CARRIER)


@dataclass(frozen=True, slots=True)
class Promise:
    """What a prober must find behind a type, for TCP as for UDP, except where it says so."""

    mapping: Mapping
    filtering: Filtering
    port: Port
    unsolicited_tcp: str
    unsolicited_udp: str


def promise_of(name: str) -> Promise:
    """What the type promises to a prober.

    Of two routers the outer one decides, except that the home router behind it also filters. Where nothing filters, a
    port that nobody listens on is refused by the host itself. A hash can't be told from any other change of the port.
    """
    chain = chain_of(name)
    nat = nat_named(chain[0])
    strictest = max((nat_named(each).filtering for each in chain), key=list(Filtering).index)
    port = Port.CHANGE if nat.port is Port.HASH else nat.port
    tcp, udp = {
        Refusal.DROP: ("dropped", "dropped"),
        Refusal.RST: ("refused", "refused"),
        Refusal.ICMP: ("prohibited", "prohibited"),
    }[nat.refusal]
    return Promise(nat.mapping, strictest, port, tcp, udp)


def ruleset(
    nat: Nat,
    wan: str,
    *,
    hairpin: bool = False,
    udp_lifetime: float = DEFAULT_LIFETIME,
    tcp_lifetime: float = DEFAULT_LIFETIME,
    ipv6: str = "open",
    portmap: bool = False,
) -> str:
    """The nftables script of one router whose outside interface is ``wan`` and whose inside ones are ``lan*``.

    It starts from nothing, so loading it again is a reboot (with the connections forgotten, too).

    Args:
        wan: the router's outside IPv4 address.
        hairpin: whether insiders reach each other by the outside address.
        udp_lifetime, tcp_lifetime: seconds that outsiders may use a mapping after the last packet out.
        ipv6: "open", or "fw" to let in over IPv6 only what was asked for.
        portmap: whether the router has a port-mapping service, which writes into ``map portmap``, and of an IPv6
            firewall into ``set pinholes``.
    """
    return (
        "flush ruleset\n"
        + _firewall(nat, ipv6, portmap or hairpin, portmap)
        + _translation(nat, wan, hairpin, {"udp": udp_lifetime, "tcp": tcp_lifetime}, portmap)
    )


def _reject(refusal: Refusal) -> list[str]:
    match refusal:
        case Refusal.DROP:
            return []
        case Refusal.RST:
            return ["meta l4proto tcp reject with tcp reset", "meta l4proto udp reject with icmpx port-unreachable"]
        case Refusal.ICMP:
            return ["reject with icmpx admin-prohibited"]


def _firewall(nat: Nat, ipv6: str, lets_dnat_in: bool, pinholes: bool) -> str:
    guard4 = nat.filtering is not Filtering.NONE
    guard6 = ipv6 == "fw"
    if not guard4 and not guard6:
        return ""
    common = ['iifname != "wan" accept', "ct state established,related accept"]
    if not guard6:
        common.append("meta nfproto ipv6 accept")
    if not guard4:
        common.append("meta nfproto ipv4 accept")
    neighbours = "icmpv6 type { nd-neighbor-solicit, nd-neighbor-advert, nd-router-advert, nd-router-solicit } accept"
    forward = [*common]
    if nat.filtering in (Filtering.EIF, Filtering.ADF) or lets_dnat_in:
        forward.append("ct status dnat accept")
    holes = []
    if guard6 and pinholes:
        holes.append("set pinholes { type inet_proto . ipv6_addr . inet_service; flags timeout; size 1024; }")
        forward.append("meta l4proto . ip6 daddr . th dport @pinholes accept")
    chains = {"forward": forward + _reject(nat.refusal)}
    if nat.guarded or not guard4:
        chains["input"] = [*common, neighbours, *_reject(nat.refusal)]
    return _table(
        "inet fw",
        holes
        + [
            _chain(name, f"type filter hook {name} priority filter; policy drop;", lines)
            for name, lines in chains.items()
        ],
    )


def _translation(nat: Nat, wan: str, hairpin: bool, lifetimes: dict[str, float], portmap: bool) -> str:
    if not nat.translates:
        return ""
    learns = hairpin or nat.filtering in (Filtering.EIF, Filtering.ADF)
    flow = "meta l4proto { tcp, udp }"
    parts: list[str] = []
    pre: list[str] = []
    post = [f'iifname "lan*" oifname "lan*" ct status dnat snat to {wan}'] if hairpin else []
    sets = "flags dynamic,timeout; timeout 120s; size 65535;"
    if portmap:
        parts.append(
            "map portmap { type inet_proto . inet_service : ipv4_addr . inet_service; flags timeout; size 1024; }"
        )
        comes_in = f"ip daddr {wan}" if hairpin else 'iifname "wan"'
        pre.append(f"{comes_in} dnat to meta l4proto . th dport map @portmap")
    if learns:
        parts.append(f"map rev {{ type inet_proto . inet_service : ipv4_addr . inet_service; {sets} }}")
    match nat.filtering:
        case Filtering.EIF:
            pre.append('iifname "wan" dnat to meta l4proto . th dport map @rev')
        case Filtering.ADF:
            parts.append(f"set allow {{ type inet_proto . inet_service . ipv4_addr; {sets} }}")
            pre.append(
                'iifname "wan" meta l4proto . th dport . ip saddr @allow dnat to meta l4proto . th dport map @rev'
            )
        case _:
            pass
    if hairpin:
        pre.append(f'iifname "lan*" ip daddr {wan} dnat to meta l4proto . th dport map @rev')
    match nat.port:
        case Port.KEEP:
            pass
        case Port.CHANGE:
            post.append(f'oifname "wan" {flow} snat to {wan}:61000-65535')
        case Port.RANDOM:
            post.append('oifname "wan" masquerade random,fully-random')
        case Port.BLOCK:
            post.append(f'oifname "wan" {flow} snat to {wan}:40960-41471 random,fully-random')
        case Port.PLUS_ONE | Port.HASH:
            pick = (
                f"numgen inc mod {TABLE_SIZE}"
                if nat.port is Port.PLUS_ONE
                else f"jhash ip saddr . ip daddr . th sport mod {TABLE_SIZE}"
            )
            ports = ", ".join(f"{index}: {40000 + index}" for index in range(TABLE_SIZE))
            post.append(f'oifname "wan" {flow} snat to {wan} : {pick} map {{ {ports} }}')
    post.append('oifname "wan" masquerade')
    if pre:
        parts.append(_chain("pre", "type nat hook prerouting priority dstnat;", pre))
    parts.append(_chain("post", "type nat hook postrouting priority srcnat;", post))
    if learns:
        learn = []
        for protocol, lifetime in lifetimes.items():
            out = f'oifname "wan" ct direction original meta l4proto {protocol}'
            expires = f"timeout {max(1, round(lifetime * 1000))}ms"
            inside = "ct original ip saddr . ct original proto-src"
            # An element that lives would keep who had this port before.
            learn.append(f"{out} ct state new delete @rev {{ meta l4proto . th sport : {inside} }}")
            learn.append(f"{out} update @rev {{ meta l4proto . th sport {expires} : {inside} }}")
            if nat.filtering is Filtering.ADF:
                learn.append(f"{out} update @allow {{ meta l4proto . th sport . ip daddr {expires} }}")
        parts.append(_chain("learn", "type filter hook postrouting priority srcnat + 10;", learn))
    return _table("ip nat", parts)


def _table(name: str, parts: list[str]) -> str:
    return f"table {name} {{\n" + "".join(part if part.endswith("\n") else f" {part}\n" for part in parts) + "}\n"


def _chain(name: str, hook: str, lines: list[str]) -> str:
    return f" chain {name} {{\n  {hook}\n" + "".join(f"  {line}\n" for line in lines) + " }\n"
