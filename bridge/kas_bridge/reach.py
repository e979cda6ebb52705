"""How others reach us, and who helps: role, NAT, router, relays. First as plain values, then those in words."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from kas_libp2p import addresses as addr
from kas_libp2p.autonat._observed import Mapping as NatMapping
from kas_libp2p.autonat._roles import Filtering
from kas_libp2p.errors import AddressError
from kas_libp2p.relay._pool import Source
from kas_libp2p.units import milliseconds, plural, seconds, short, size

if TYPE_CHECKING:
    from kas_bridge.config import NodeSettings
    from kas_libp2p.metadata import CircuitLimits
    from kas_libp2p.session.status import SessionStatus
    from kas_libp2p.status import Status
    from kas_libp2p.strategy._upgrade import UpgradeStatus

Values = Mapping[str, Any]

MAX_SHOWN = 6
"""Relays, circuits or addresses that a listing shows; ``--json`` has all of them."""
SOON_SECONDS, SOON_BYTES = 600.0, 16_000_000
"""A circuit that ends within this is pointed out: ten minutes, or a batch of blocks."""

# -- Values ------------------------------------------------------------------------------------------------------------


def values(node: Status, settings: NodeSettings) -> dict[str, Any]:
    """What is known of how we are reached, as plain values: seconds, milliseconds where a name says so, bytes."""
    reachability = node.reachability
    circuits = [address for each in node.reservations for address in each.addresses]
    public = [str(addr.with_peer(each, node.peer_id)) for each in reachability.public_addresses]
    known = {each.peer: each for each in node.relays}
    announced = [each for each in node.addresses if settings.announce and not addr.is_relayed(each)]
    return {
        "reachability": {
            "role": reachability.role.value,
            "setting": settings.role.value,
            "reason": reachability.reason,
            "reachable": list(dict.fromkeys([*announced, *public, *circuits])),
            "nat": {
                "mapping": reachability.mapping.value,
                "keeps_port": reachability.keeps_port,
                "filtering": reachability.filtering.value,
            },
            "seen_at": dict(reachability.candidates),
            "servers": reachability.servers,
            "ipv6": any(_is_ipv6(each) for each in node.addresses),
        },
        "port_mapping": {
            "wanted": settings.port_mapping,
            "mappings": [
                {"by": each.by, "local": each.local, "external": each.external, "lifetime_s": each.lifetime}
                for each in node.mappings
            ],
            "problem": node.mapping_problem,
        },
        "reservations": [
            {
                "relay_id": each.relay,
                "address": each.address,
                "operator": known[each.relay].operator if each.relay in known else "",
                "score": round(known[each.relay].score, 3) if each.relay in known else None,
                "held": each.held,
                "reachable": list(each.addresses),
                "since_s": round(each.seconds, 1),
                "renew_in_s": round(each.seconds_left, 1) if each.held else None,
                "renewals": each.renewals,
                "max_bytes": each.max_bytes,
                "max_seconds": each.max_seconds,
                "circuits": each.circuits,
                "rtt_ms": _ms(each.rtt),
                "failures": each.failures,
                "problem": each.reason,
            }
            for each in node.reservations
        ],
        "relay_target": settings.relay_target,
        "relays": [
            {
                "relay_id": each.peer,
                "addresses": list(each.addresses),
                "operator": each.operator,
                "known": each.source.value,
                "told_by": each.teller,
                "place": each.place.value,
                "score": round(each.score, 3),
                "rtt_ms": _ms(each.rtt),
                "leaving": each.leaving,
                "problem": each.reason,
                "waits_s": round(each.wait, 1),
            }
            for each in node.relays
        ],
        "upgrades": upgrades(node.upgrades),
        "sessions": {
            "enabled": settings.session.enabled,
            "in_use": len(node.sessions),
            "limit": settings.session.max_sessions,
            "waiting": sum(each.waiting > 0 for each in node.sessions),
            "window": settings.session.window,
            "held": sum(each.in_flight + each.unread for each in node.sessions),
            "max_held": settings.session.max_memory,
            "patience_s": settings.session.patience,
        },
        "serve_relay": settings.serve_relay,
        "relay": None
        if node.relay is None
        else {
            "purpose": settings.relay_purpose.value,
            "operator": settings.relay_operator or "",
            "preset": settings.relay_limits.value,
            "changed": {name.replace("_", "-"): value for name, value in settings.relaying.given().items()},
            "places": [
                {"peer_id": each.peer, "address": each.address, "lasts_s": round(each.seconds, 1)}
                for each in node.relay.reservations
            ],
            "circuits": [
                {
                    "number": each.number,
                    "source": each.source,
                    "destination": each.destination,
                    "since_s": round(each.seconds, 1),
                    "forth": each.forth,
                    "back": each.back,
                }
                for each in node.relay.circuits
            ],
            "max_places": node.relay.limits.max_reservations,
            "max_circuits": node.relay.limits.max_circuits,
        },
    }


def upgrades(found: Iterable[UpgradeStatus]) -> list[dict[str, Any]]:
    """How it stands with each peer that was reached through a relay, as plain values."""
    return [
        {
            "peer_id": each.peer,
            "state": each.state.value,
            "since_s": round(each.seconds, 1),
            "wait_s": round(each.wait, 1) if math.isfinite(each.wait) else None,
            "chance": each.verdict.chance.value,
            "verdict": each.verdict.reason,
            "fixes": list(each.verdict.fixes),
            "cause": each.cause,
            "problem": each.text,
            "successes": each.successes,
        }
        for each in found
    ]


def session(found: SessionStatus | None, patience: float) -> dict[str, Any] | None:
    """A session as plain values.

    Args:
        patience: seconds for which it may be without any path.
    """
    if found is None:
        return None
    waiting = round(found.waiting, 1) if found.waiting else None
    return {
        "state": found.state.value,
        "moves": found.moves,
        "in_flight": found.in_flight,
        "unread": found.unread,
        "window": found.window,
        "gaps": found.gaps,
        "waiting_s": waiting,
        "ends_in_s": None if waiting is None else round(max(0.0, patience - found.waiting), 1),
        "reason": found.reason,
    }


def circuit_limits(limits: CircuitLimits | None) -> dict[str, Any] | None:
    """The limits of a circuit as plain values."""
    if limits is None:
        return None
    left = limits.seconds_left
    return {
        "max_bytes": limits.max_bytes,
        "max_s": limits.max_seconds,
        "bytes_left": limits.bytes_left,
        "left_s": None if left is None else round(left, 1),
    }


def _ms(value: float | None) -> float | None:
    return None if value is None else round(value * 1000, 2)


def _is_ipv6(address: str) -> bool:
    return not addr.is_relayed(address) and addr.family(address) == 6 and addr.is_public(address)


# -- Names -------------------------------------------------------------------------------------------------------------


def relay_name(peer: str) -> str:
    """A relay's id, short enough for a line, with its end, by which `path_name` calls it."""
    return f"{short(peer)}{peer[-4:]}" if len(peer) > 16 else peer


def host_of(address: str) -> str:
    """The host in an address, or the address itself."""
    try:
        first = next(each for each in addr.components(address) if each[0] != "ip6zone")
    except AddressError:
        return address
    return first[1] or address


def nat_name(nat: Values) -> str:
    """``port-restricted NAT, keeps the port``; empty while nothing is known."""
    filtering = {
        Filtering.OPEN: "open",
        Filtering.ADDRESS: "address-restricted",
        Filtering.PORT: "port-restricted",
    }.get(nat["filtering"])
    match nat["mapping"]:
        case NatMapping.NONE if filtering is None:
            return "no NAT"
        case NatMapping.NONE:
            return "no NAT, no firewall" if filtering == "open" else "no NAT, but a firewall"
        case NatMapping.DEPENDENT:
            return "symmetric NAT"
        case NatMapping.INDEPENDENT:
            name = "full-cone NAT" if filtering == "open" else f"{filtering} NAT" if filtering else "NAT"
            keeps = {True: ", keeps the port", False: ", changes the port"}.get(nat["keeps_port"], "")
            return name + keeps
    return f"{filtering} NAT or firewall" if filtering in ("address-restricted", "port-restricted") else ""


def nat_words(nat: Values) -> str:
    """What our NAT does, in one sentence without an end."""
    mapping = {
        NatMapping.NONE: "there is none: others see the address that we have",
        NatMapping.INDEPENDENT: "every destination sees us at one port",
        NatMapping.DEPENDENT: "every destination sees us at another port",
    }.get(nat["mapping"])
    if mapping is not None and nat["mapping"] == NatMapping.INDEPENDENT and nat["keeps_port"] is not None:
        mapping += ", the one that we use" if nat["keeps_port"] else ", not the one that we use"
    filtering = {
        Filtering.OPEN: "everybody gets in",
        Filtering.ADDRESS: "only hosts that we dialed get in",
        Filtering.PORT: "only what we dialed gets in",
    }.get(nat["filtering"])
    return "; ".join(filter(None, (mapping, filtering)))


# -- Lines -------------------------------------------------------------------------------------------------------------


def role_line(values: Values) -> str:
    """``private: 0 of 3 servers reached 203.0.113.7:16117 (port-restricted NAT, keeps the port)``."""
    reachability = values["reachability"]
    name = nat_name(reachability["nat"])
    return f"{reachability['role']}: {reachability['reason']}" + (f" ({name})" if name else "")


def mapping_line(values: Values) -> str:
    """How it stands with the router."""
    mapping = values["port_mapping"]
    if not mapping["wanted"]:
        return "off; --port-mapping asks the router for a port"
    if mapping["mappings"]:
        return " · ".join(
            f"{endpoint(each['external'])} by {protocol_name(each['by'])}"
            + (f" for {seconds(each['lifetime_s'])}" if each["lifetime_s"] not in (None, float("inf")) else "")
            for each in mapping["mappings"]
        )
    return mapping["problem"] or "nothing asked of the router, or no answer yet"


def protocol_name(by: str) -> str:
    """A mapping protocol as people write it."""
    return {"pcp": "PCP", "nat-pmp": "NAT-PMP", "upnp": "UPnP"}.get(by, by)


def endpoint(address: str) -> str:
    """``203.0.113.7:16117`` of a multiaddr, or the address itself."""
    where = addr.ip_port(address)
    if where is None:
        return address
    return f"[{where[0]}]:{where[1]}" if ":" in where[0] else f"{where[0]}:{where[1]}"


def held(values: Values) -> list[Values]:
    """The places that we have."""
    return [each for each in values["reservations"] if each["held"]]


def relays_line(values: Values) -> list[str]:
    """Which relays keep a place for us, in one line, and what is missing in another."""
    if values["reachability"]["role"] == "public":
        return ["none needed: others can dial us"]
    target = max(values["relay_target"], len(values["reservations"]))
    if not target:
        return ["none wanted (--relay-target 0)"]
    places = held(values)
    if not places:
        asked = values["reservations"]
        if asked:
            return [f"asking {' · '.join(relay_name(each['relay_id']) for each in asked[:MAX_SHOWN])}"]
        waiting = [each for each in values["relays"] if each["problem"]]
        if waiting:
            first = waiting[0]
            return [
                f"none: {relay_name(first['relay_id'])} {first['problem']}"
                + (f"; asked again in {seconds(first['waits_s'])}" if first["waits_s"] else "")
            ]
        return ["none known yet: name one with --relay MULTIADDR, or connect to a peer that is one"]
    names = " · ".join(
        relay_name(each["relay_id"]) + (f" {milliseconds(each['rtt_ms'])}" if each["rtt_ms"] is not None else "")
        for each in places
    )
    soonest = min(each["renew_in_s"] for each in places)
    count = "" if len(places) >= target else f"{len(places)} of {target} "
    return [f"{names} ({count}reserved, good for {seconds(soonest)})"]


def serving_line(relay: Values) -> str:
    """What is carried for others."""
    for_whom = "peers with a Kaspa stream" if relay["purpose"] == "overlay" else "anybody"
    changed = "".join(f", {name} {value:g}" for name, value in relay["changed"].items())
    return (
        f"{plural(len(relay['places']), 'place')} of {relay['max_places']},"
        f" {plural(len(relay['circuits']), 'circuit')} of {relay['max_circuits']}, for {for_whom}"
        f" ({relay['preset']} limits{changed})" + (f", run by {relay['operator']}" if relay["operator"] else "")
    )


def reservation_lines(values: Values) -> list[str]:
    """Each relay on which a place is wanted."""
    lines = []
    for each in values["reservations"]:
        name = relay_name(each["relay_id"])
        if not each["held"]:
            lines.append(f"{name} not yet: {each['problem'] or 'being asked'}")
            continue
        facts = [f"run by {each['operator']}"] if each["operator"] else []
        facts += [f"score {each['score']:.2f}"] if each["score"] is not None else []
        facts += [milliseconds(each["rtt_ms"])] if each["rtt_ms"] is not None else []
        facts.append(f"good for {seconds(each['renew_in_s'])}")
        facts.append(allowance(each["max_bytes"], each["max_seconds"]) + f", {each['circuits']} came in")
        lines.append(f"{name} at {host_of(each['address'])}, {', '.join(facts)}")
    return lines


def allowance(max_bytes: int | None, max_seconds: float | None) -> str:
    """What a relay allows each circuit."""
    limits = [seconds(max_seconds)] if max_seconds is not None else []
    limits += [size(max_bytes)] if max_bytes is not None else []
    return f"circuits of at most {' and '.join(limits)}" if limits else "circuits without limit"


def known_lines(values: Values) -> list[str]:
    """The relays that are known beside those that have a place for us."""
    lines = []
    others = [each for each in values["relays"] if each["place"] != "reserved"]
    for each in others[:MAX_SHOWN]:
        where = host_of(each["addresses"][0]) if each["addresses"] else "nowhere"
        facts = [each["known"] + (f" from {short(each['told_by'])}" if each["known"] == Source.HEARD else "")]
        facts += [f"run by {each['operator']}"] if each["operator"] else []
        facts.append(f"score {each['score']:.2f}")
        facts += [milliseconds(each["rtt_ms"])] if each["rtt_ms"] is not None else []
        facts += ["being asked"] if each["place"] == "asked" else []
        facts += [f"left alone for {seconds(each['waits_s'])}"] if each["waits_s"] else []
        problem = f": {each['problem']}" if each["problem"] else ""
        lines.append(f"{relay_name(each['relay_id'])} at {where}, {', '.join(facts)}{problem}")
    if len(others) > MAX_SHOWN:
        lines.append(f"and {len(others) - MAX_SHOWN} more (kas-bridge status --json)")
    return lines


def circuit_lines(relay: Values) -> list[str]:
    """The circuits that we carry for others."""
    circuits = relay["circuits"]
    lines = [
        f"{short(each['source'])} → {short(each['destination'])} for {seconds(each['since_s'])},"
        f" {size(each['forth'])} there and {size(each['back'])} back"
        for each in circuits[:MAX_SHOWN]
    ]
    if len(circuits) > MAX_SHOWN:
        lines.append(f"and {len(circuits) - MAX_SHOWN} more (kas-bridge status --json)")
    return lines


_UNDER_WAY = {
    "queued": "waits for its turn to become direct",
    "punching": "is being punched: both sides dial each other",
    "answering": "is being punched: both sides dial each other",
    "proving": "has a direct way, which proves itself",
}
"""Of `kas_libp2p.strategy._upgrade.State`, which would be long to import, and so below."""


def upgrades_line(upgrades: Sequence[Values]) -> str:
    """How many that were met through relays have become direct: ``1 under way, 3 direct, 2 stay relayed for now``."""
    states = [each["state"] for each in upgrades]
    counts = {
        "under way": sum(each in _UNDER_WAY for each in states),
        "direct": states.count("stable"),
        "relayed": states.count("relayed"),
        "left alone for now": states.count("cooling"),
    }
    return ", ".join(f"{count} {what}" for what, count in counts.items() if count)


def upgrade_lines(upgrades: Sequence[Values]) -> list[str]:
    """Those under way: ``12D3KooWPqT5… is being punched: both sides dial each other (0.3 s)``."""
    return [
        f"{short(each['peer_id'])} {_UNDER_WAY[each['state']]} ({seconds(each['since_s'])})"
        for each in upgrades
        if each["state"] in _UNDER_WAY
    ]


# -- Sessions ----------------------------------------------------------------------------------------------------------


def sessions_line(sessions: Values) -> str:
    """``2 of at most 256; up to 8.4 MB each way in each, 1.2 MB of at most 268 MB now``."""
    if not sessions["enabled"]:
        return "off; --session.enabled carries peers on when their path changes"
    line = f"{sessions['in_use']} of at most {sessions['limit']}"
    if sessions["waiting"]:
        line += f", {sessions['waiting']} without a path now"
    held = f"{size(sessions['held'])} of at most {size(sessions['max_held'])} now"
    return f"{line}; up to {size(sessions['window'])} each way in each, {held}"


def waits(session: Values | None) -> str:
    """``no path for 3.0 s``; empty if it has one, or needs none."""
    if session is None or session["waiting_s"] is None:
        return ""
    return f"no path for {seconds(session['waiting_s'])}"


# -- A circuit of ours -------------------------------------------------------------------------------------------------


def ends(limits: Values | None) -> str:
    """When the relay ends a circuit: ``in 4 min, or after 120 kB``; empty if never."""
    if limits is None:
        return ""
    parts = [f"in {seconds(limits['left_s'])}"] if limits["left_s"] is not None else []
    parts += [f"after {size(limits['bytes_left'])}"] if limits["bytes_left"] is not None else []
    return ", or ".join(parts)


def ends_soon(limits: Values | None) -> bool:
    """Whether that is worth a line of its own."""
    if limits is None:
        return False
    soon = limits["left_s"] is not None and limits["left_s"] < SOON_SECONDS
    return soon or (limits["bytes_left"] is not None and limits["bytes_left"] < SOON_BYTES)
