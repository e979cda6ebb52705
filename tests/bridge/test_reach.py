"""Role, NAT, router and relays in words, from the values that programs get."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest
from rich.console import Console

from kas_bridge import reach, views
from kas_bridge._control import encode, event_values
from kas_libp2p.autonat.roles import Filtering, Mapping
from kas_libp2p.events import (
    CircuitClosed,
    CircuitOpened,
    Event,
    FileDamaged,
    PortMapped,
    PortMappingFailed,
    RelayRequestServed,
    ReservationFailed,
    ReservationLost,
    ReservationMade,
    RoleChanged,
)
from kas_libp2p.metadata import PeerId
from kas_libp2p.strategy._upgrade import State
from kas_libp2p.transport.splice import End

from .test_views import ALICE, BOB, NAT, NO_MAPPING, REACHABILITY, joined, status, table

RELAY = "12D3KooWGWGqxNdqn4nYqAUg5rE7L846uMmw9SXYPMeMDjA88yWh"
CIRCUIT = f"/ip4/203.0.113.5/tcp/16117/p2p/{RELAY}/p2p-circuit/p2p/{ALICE}"


def place(**changes: Any) -> dict[str, Any]:
    return {
        "relay_id": RELAY,
        "address": f"/ip4/203.0.113.5/tcp/16117/p2p/{RELAY}",
        "operator": "",
        "score": 0.83,
        "held": True,
        "reachable": [CIRCUIT],
        "since_s": 960.0,
        "renew_in_s": 2640.0,
        "renewals": 0,
        "max_bytes": None,
        "max_seconds": 7200.0,
        "circuits": 2,
        "rtt_ms": 18.2,
        "failures": 0,
        "problem": "",
    } | changes


def known(**changes: Any) -> dict[str, Any]:
    return {
        "relay_id": RELAY,
        "addresses": ["/ip4/203.0.113.5/tcp/16117"],
        "operator": "",
        "known": "met",
        "told_by": None,
        "place": "none",
        "score": 0.417,
        "rtt_ms": 96.0,
        "leaving": False,
        "problem": "",
        "waits_s": 0.0,
    } | changes


def ours(**changes: Any) -> dict[str, Any]:
    return REACHABILITY | changes


@pytest.mark.parametrize("mapping", list(Mapping))
@pytest.mark.parametrize("filtering", list(Filtering))
@pytest.mark.parametrize("keeps", [True, False, None])
def test_every_nat_has_a_name_and_words_or_neither(mapping: Mapping, filtering: Filtering, keeps: bool | None) -> None:
    nat = {"mapping": mapping.value, "keeps_port": keeps, "filtering": filtering.value}
    if (mapping, filtering) == (Mapping.UNKNOWN, Filtering.UNKNOWN):
        assert reach.nat_name(nat) == reach.nat_words(nat) == ""
    else:
        assert reach.nat_words(nat)
        assert "None" not in reach.nat_name(nat)


@pytest.mark.parametrize(
    ("nat", "name"),
    [
        (("none", None, "open"), "no NAT, no firewall"),
        (("none", None, "port-restricted"), "no NAT, but a firewall"),
        (("endpoint-independent", True, "open"), "full-cone NAT, keeps the port"),
        (("endpoint-independent", False, "address-restricted"), "address-restricted NAT, changes the port"),
        (("endpoint-independent", True, "port-restricted"), "port-restricted NAT, keeps the port"),
        (("endpoint-dependent", False, "port-restricted"), "symmetric NAT"),
    ],
)
def test_names(nat: tuple[str, bool | None, str], name: str) -> None:
    assert reach.nat_name(dict(zip(("mapping", "keeps_port", "filtering"), nat, strict=True))) == name


def test_what_run_says_of_a_private_bridge() -> None:
    places = [place(), place(relay_id=BOB, rtt_ms=96.0, renew_in_s=3000.0)]
    text = "\n".join(
        views.startup(status(reservations=places, reachability=ours(reachable=[CIRCUIT]), addresses=[CIRCUIT]))
    )
    assert (
        "  role      private: 0 of 3 servers reached 198.51.100.20:16117 (port-restricted NAT, keeps the port)\n"
        "  router    the router 192.168.1.1 gives none: switch UPnP on\n"
        "  relays    12D3KooWGWGq…8yWh 18 ms · 12D3KooWPqT5…P7yG 96 ms (2 of 3 reserved, good for 44 min)\n"
        f"  reachable {CIRCUIT}\n"
    ) in text
    assert "listens" not in text


def test_what_run_says_of_a_public_one() -> None:
    mapped = {"by": "upnp", "local": "/ip4/192.168.1.9/tcp/16117", "external": "/ip4/198.51.100.20/tcp/16117"}
    mapping = {"wanted": True, "mappings": [mapped | {"lifetime_s": 3600.0}], "problem": ""}
    reachable = f"/ip4/198.51.100.20/tcp/16117/p2p/{ALICE}"
    values = status(
        reachability=ours(role="public", reason="strangers come", reachable=[reachable], nat=NAT | {"mapping": "none"}),
        port_mapping=mapping,
        addresses=[reachable, f"/ip4/192.168.1.9/tcp/16117/p2p/{ALICE}"],
        serve_relay=True,
    )
    text = "\n".join(views.startup(values))
    assert "role      public: strangers come (no NAT, but a firewall)" in text
    assert "router    198.51.100.20:16117 by UPnP for 60 min" in text
    assert "relays" not in text
    assert text.index("reachable /ip4/198") < text.index("listens   /ip4/192")
    assert "NAT" in "\n".join(views.status(values))


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({}, "none known yet: name one with --relay MULTIADDR, or connect to a peer that is one"),
        ({"relay_target": 0}, "none wanted (--relay-target 0)"),
        ({"reservations": [place(held=False)]}, "asking 12D3KooWGWGq…8yWh"),
        (
            {"relays": [known(problem="full", waits_s=600.0)]},
            "none: 12D3KooWGWGq…8yWh full; asked again in 10 min",
        ),
        ({"reservations": [place()] * 3}, "(reserved, good for 44 min)"),
        ({"reachability": ours(role="public")}, "none needed: others can dial us"),
    ],
)
def test_relays_in_one_line(changes: dict[str, Any], line: str) -> None:
    assert line in reach.relays_line(status(**changes))[0]


def test_what_status_says_of_relays() -> None:
    text = "\n".join(
        views.status(
            status(
                reservations=[
                    place(),
                    place(relay_id=BOB, held=False, problem="it is full"),
                    place(max_bytes=131072, max_seconds=120.0),
                    place(max_seconds=None, operator="relays.example", score=None),
                ],
                relays=[
                    known(place="reserved"),
                    known(known="heard of", told_by=BOB, operator="Relays Ltd", rtt_ms=None),
                    *[known(problem="refused", waits_s=60.0)] * 7,
                ],
                port_mapping=NO_MAPPING | {"wanted": False},
            )
        )
    )
    for each in (
        "NAT       every destination sees us at one port, the one that we use; only what we dialed gets in",
        "others see us at /ip4/198.51.100.20/tcp/16117",
        "router    off; --port-mapping asks the router for a port",
        "relays    12D3KooWGWGq…8yWh at 203.0.113.5, score 0.83, 18 ms, good for 44 min, circuits of at most 2 h, 2",
        "12D3KooWPqT5…P7yG not yet: it is full",
        "circuits of at most 2 min and 131 kB",
        "at 203.0.113.5, run by relays.example, 18 ms, good for 44 min, circuits without limit",
        "at 203.0.113.5, heard of from 12D3KooWPqT5…, run by Relays Ltd, score 0.42",
        "12D3KooWGWGq…8yWh at 203.0.113.5, met, score 0.42, 96 ms, left alone for 60 s: refused",
        "and 2 more (kas-bridge status --json)",
    ):
        assert each in text


def upgrade(state: str, peer: str = BOB) -> dict[str, Any]:
    return {"peer_id": peer, "state": state, "since_s": 0.3}


def test_who_is_becoming_direct() -> None:
    upgrades = [upgrade(each) for each in ("punching", "proving", "stable", "stable", "relayed", "cooling")]
    assert reach.upgrades_line(upgrades) == "2 under way, 2 direct, 1 relayed, 1 left alone for now"
    under_way = [
        "12D3KooWPqT5… is being punched: both sides dial each other (0.3 s)",
        "12D3KooWPqT5… has a direct way, which proves itself (0.3 s)",
    ]
    assert reach.upgrade_lines(upgrades) == under_way
    text = "\n".join(views.status(status(upgrades=upgrades)))
    assert f"punches   2 under way, 2 direct, 1 relayed, 1 left alone for now\n            {under_way[0]}\n" in text
    assert "punches" not in "\n".join(views.status(status()))
    out = Console(file=io.StringIO(), width=80)
    out.print(views.peers([joined(path="relayed", relay_id=RELAY)], upgrades, out))
    assert isinstance(out.file, io.StringIO)
    assert out.file.getvalue().splitlines()[-2:] == under_way


@pytest.mark.parametrize("state", State)
def test_every_state_of_an_upgrade_counts_once(state: State) -> None:
    assert reach.upgrades_line([upgrade(state)]).partition(" ")[0] == "1"


def test_a_relay_says_what_it_carries() -> None:
    circuit = {"number": 1, "source": ALICE, "destination": BOB, "since_s": 61.0, "forth": 1200, "back": 3_000_000}
    carried = {
        "purpose": "any",
        "operator": "Relays Ltd",
        "preset": "open",
        "changed": {"max-circuits": 512, "max-circuit-seconds": 0.5},
        "places": [{"peer_id": ALICE, "address": "/ip4/1.2.3.4/tcp/1", "lasts_s": 9.0}],
        "circuits": [circuit] * 8,
        "max_places": 256,
        "max_circuits": 512,
    }
    bridge = status()
    values = {name: each for name, each in bridge.items() if name not in ("kaspad", "notes", "peers", "ends")}
    values |= {"mode": "relay", "relay": carried, "reachability": ours(role="public", setting="public")}
    values |= {"limits": {"max_connections": {"limit": 1024, "used": 2}}, "port_mapping": NO_MAPPING | {"problem": ""}}
    text = "\n".join(views.status(values))
    assert text.startswith("kas-bridge relay 0.1.0 · ")
    for each in (
        "carries   1 place of 256, 8 circuits of 512, for anybody (open limits, max-circuits 512,",
        "max-circuit-seconds 0.5), run by Relays Ltd\n",
    ):
        assert each in text
    assert "12D3KooWKWQM… → 12D3KooWPqT5… for 61 s, 1.2 kB there and 3.0 MB back" in text
    assert "and 2 more" in text
    assert "1 connection of at most 1024" in text
    assert "router" not in text
    assert "kas-bridge relay 0.1.0" in views.startup(values)[0]
    idle = values | {"relay": None, "serve_relay": True}
    assert "carries   nothing: only who is public can be a relay" in "\n".join(views.startup(idle))


def test_who_is_connected_to_a_relay() -> None:
    row = {
        "peer_id": ALICE,
        "state": "connected",
        "direction": "inbound",
        "path": "direct",
        "relay_id": None,
        "address": "/ip6/2001:db8::7/tcp/50001",
        "agent": "kas-libp2p/0.1.0",
        "rtt_ms": 12.0,
        "since_ms": 60_000,
        "place": True,
        "circuits": 3,
        "received": 1,
        "sent": 1,
    }
    rows = [
        row,
        row | {"place": False, "agent": "x" * 99, "rtt_ms": None, "address": "/ip6/2001:db8:1:2:3:4:5:6/tcp/1"},
    ]
    first = ["12D3KooWKWQM…", "2001:db8::7", "12", "ms", "60", "s", "yes", "3"]
    assert table(rows, 120, relay=True).splitlines()[1].split() == [*first, "kas-libp2p/0.1.0"]
    assert "nobody is connected" in table([], relay=True)
    assert table(rows, 80, relay=True).splitlines()[1].split() == first


# -- Circuits of ours --------------------------------------------------------------------------------------------------


def relayed(left_s: float | None = 7000.0, bytes_left: int | None = None) -> dict[str, Any]:
    limits = {"max_bytes": bytes_left, "max_s": 7200.0, "bytes_left": bytes_left, "left_s": left_s}
    return joined(path="relayed", relay_id=RELAY, limits=limits, address=f"/p2p/{RELAY}/p2p-circuit")


@pytest.mark.parametrize(
    ("row", "note"),
    [
        (relayed(), ""),
        (relayed(240.0), "its relay ends the circuit in 4 min; then anew"),
        (relayed(None, 120_000), "its relay ends the circuit after 120 kB; then anew"),
        (relayed(60.0, 120_000), "in 60 s, or after 120 kB"),
        (relayed(None, None), ""),
    ],
)
def test_a_circuit_that_ends_soon(row: dict[str, Any], note: str) -> None:
    lines = table([row]).splitlines()
    assert ("ends the circuit" in lines[-1]) == bool(note)
    assert note in lines[-1]
    assert all(len(line) <= 80 for line in lines)


# -- Events ------------------------------------------------------------------------------------------------------------

US, THEM, BOX = PeerId(ALICE), PeerId(BOB), PeerId(RELAY)
MADE = {"relay": BOX, "addresses": (CIRCUIT,), "lifetime": 3600.0, "seconds": 0.041}


@pytest.mark.parametrize(
    ("event", "expected"),
    [
        (RoleChanged(role="public", reason="3 of 3 reached us"), "role  public: 3 of 3 reached us"),
        (
            ReservationMade(**MADE, max_bytes=None, max_seconds=7200.0, renewed=False),  # type: ignore[arg-type]
            "relay 12D3KooWGWGq…8yWh  keeps a place for us, good for 60 min, circuits of at most 2 h (asked in 41 ms)",
        ),
        (ReservationMade(**MADE, max_bytes=None, max_seconds=None, renewed=True), None),  # type: ignore[arg-type]
        (ReservationFailed(relay=BOX, reason="full", seconds=1.0), "…8yWh  has no place for us: full"),
        (ReservationLost(relay=BOX, reason="it is gone"), "…8yWh  our place there is gone: it is gone"),
        (
            PortMapped(by="nat-pmp", local="/ip4/1", external="/ip4/2", lifetime=3600.0),
            "router  gave us /ip4/2 by NAT-PMP for 60 min",
        ),
        (
            PortMapped(by="upnp", local="/ip4/1", external="/ip4/2", lifetime=float("inf")),
            "router  gave us /ip4/2 by UPnP",
        ),
        (PortMappingFailed(local="/ip4/1", reason="it is off"), "router  gave us no port: it is off"),
        (RelayRequestServed(peer=US, request="reserve", status="OK", reason=""), "12D3KooWKWQM…  has a place here"),
        (RelayRequestServed(peer=US, request="connect", status="OK", reason=""), None),
        (RelayRequestServed(peer=US, request="reserve", status="PERMISSION_DENIED", reason="purpose"), None),
        (CircuitOpened(circuit=7, source=US, destination=THEM), "circuit 7  12D3KooWKWQM… → 12D3KooWPqT5…"),
        (FileDamaged(path="/d/relays.json", reason="can't be read"), "/d/relays.json  can't be read"),
    ],
)
def test_events(event: Event, expected: str | None) -> None:
    values = json.loads(encode(event_values(event)))
    line = views.event_line(values)
    if expected is None:
        assert line is None
        assert views.event_line(values, verbose=True) is not None
    else:
        assert line is not None
        assert line[10:].endswith(expected)


@pytest.mark.parametrize("reason", list(End))
def test_every_end_of_a_circuit_has_words(reason: End) -> None:
    event = CircuitClosed(
        circuit=7, source=US, destination=THEM, reason=str(reason), seconds=61.0, forth=1200, back=3_000_000
    )
    line = views.event_line(json.loads(encode(event_values(event))))
    assert line is not None
    assert line.endswith("(1.2 kB there, 3.0 MB back)")
