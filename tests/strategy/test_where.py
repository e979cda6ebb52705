"""What a punch starts from, of what the parts of a node say."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

import pytest

from kas_libp2p import addresses as addr
from kas_libp2p.autonat._observed import Mapping, NatView
from kas_libp2p.autonat._roles import Filtering
from kas_libp2p.autonat.roles import Reachability
from kas_libp2p.dcutr._candidates import Known, Own
from kas_libp2p.metadata import DIRECT, Path, PathKind, PeerId
from kas_libp2p.strategy._nat import Ports
from kas_libp2p.strategy.where import Whereabouts
from kas_libp2p.transport.connection import Connection

PEER = PeerId("12D3KooWPjceQrSwdWXPyLLeABRXmuqt69Rg3sBYbU1Nft9HyQ6X")
RELAYED = Path(PathKind.RELAYED, PEER)
SEEN, MAPPED, HERE = "/ip4/11.1.0.1/tcp/40000", "/ip4/11.1.0.1/tcp/16117", "/ip4/192.168.1.2/tcp/16117"
THERE, DIALED = "/ip4/11.2.0.1/tcp/50000", "/ip4/11.2.0.1/tcp/16117"


class Sky:
    """What `Reachability` is asked here, of a NAT that has counted its ports up."""

    dials = 0
    ports: tuple[int, ...] = (40000, 40001, 40002)

    def candidates(self) -> list[str]:
        return [SEEN]

    def nat(self, family: int) -> tuple[NatView, Filtering]:
        return NatView(Mapping.DEPENDENT, False), Filtering.PORT

    def sightings(self, family: int) -> tuple[tuple[float, int], ...]:
        return tuple((9.0 - n, port) for n, port in enumerate(self.ports))

    def dials_since(self, family: int, age: float) -> int:
        assert age == 7.0
        return self.dials


def connection(path: Path, at: str, seen_at: str | None = None) -> Connection:
    circuit = SimpleNamespace(observed=None if seen_at is None else addr.parse(seen_at))
    made = SimpleNamespace(peer=PEER, path=path, remote_address=at, circuit=circuit if path is RELAYED else None)
    return cast(Connection, made)


def where(sky: Sky, *, agreed: bool = True) -> Whereabouts:
    others = [connection(RELAYED, f"/ip4/11.9.0.1/tcp/1/p2p/{PEER}/p2p-circuit"), connection(DIRECT, DIALED)]
    return Whereabouts(
        cast(Reachability, sky),
        interfaces=lambda: [HERE, "/ip6/fd00::1/tcp/16117"],
        listen=lambda: [addr.parse(HERE)],
        mapped=lambda: [MAPPED],
        connections_to=lambda peer: others,
        identified=lambda peer: [addr.parse(THERE)],
        shares_local=lambda peer: agreed,
    )


def test_where_a_peer_elsewhere_meets_us_and_we_it() -> None:
    circuit = connection(RELAYED, "", THERE)
    assert where(Sky()).ours(circuit) == Own(observed=[SEEN], mapped=[MAPPED], listen=[HERE], local=())
    assert where(Sky()).theirs(circuit) == Known(
        observed=[THERE, DIALED], identified=[THERE], own=[SEEN, MAPPED, HERE], local=[]
    )


@pytest.mark.parametrize("agreed", [True, False])
def test_one_behind_our_router_is_told_of_our_network_if_that_was_agreed_on(agreed: bool) -> None:
    here = where(Sky(), agreed=agreed)
    neighbour = connection(RELAYED, "", SEEN.replace("40000", "40009"))
    assert here.ours(neighbour).local == ([HERE] if agreed else ())
    assert here.theirs(neighbour).local == (["192.168.1.0/24"] if agreed else [])


def test_a_relay_that_does_not_say_where_it_sees_the_peer() -> None:
    assert where(Sky()).ours(connection(RELAYED, "")).local == ()
    assert where(Sky()).theirs(connection(RELAYED, "")).observed == [DIALED]


def test_our_own_dials_have_made_a_nat_count() -> None:
    sky = Sky()
    facts, at = where(sky).nats()
    assert (at, facts.v6) == ([SEEN], None)
    assert facts.v4 is not None
    assert facts.v4.ports is Ports.SEQUENTIAL
    assert [each.port for each in facts.v4.sightings] == [40000, 40001, 40002]
    sky.dials = 5
    facts, _ = where(sky).nats()
    assert facts.v4 is not None
    assert [(each.age, each.port) for each in facts.v4.sightings] == [(8.0, 40001), (7.0, 40002), (0.0, 40007)]


def test_our_own_dials_tell_nothing_of_ports_that_are_drawn() -> None:
    sky = Sky()
    sky.ports, sky.dials = (41100, 41002, 41471), 5  # five on it is another block
    facts, _ = where(sky).nats()
    assert facts.v4 is not None
    assert facts.v4.ports is Ports.BLOCK
    assert [each.port for each in facts.v4.sightings] == [41100, 41002, 41471]
