"""Two nodes behind one router, which leads nobody from inside to its outer address."""

from __future__ import annotations

import pytest
import trio

from kas_libp2p import Config, open_node
from kas_libp2p.config import Purpose, RelayConfig, Role
from kas_libp2p.events import ConnectionOpened, ReservationMade
from kas_libp2p.metadata import PathKind, PeerId
from kas_libp2p.node import Node
from natlab import RunningLab
from tests.lab.test_dcutr import LISTEN, relay

pytestmark = pytest.mark.lab

PATIENCE = 30.0
"""Seconds for three attempts on a busy machine."""


def config(at: str) -> Config:
    return Config(listen=LISTEN, role=Role.PRIVATE, relay=RelayConfig(relays=(at,), target=1, purpose=Purpose.ANY))


async def placed(node: Node) -> str:
    with node.bus.subscribe() as events:
        async for event in events:
            if isinstance(event, ReservationMade):
                break
    return str(event.addresses[0])


async def stay(at: str) -> None:
    async with open_node(config(at)) as node:
        print("place", await placed(node), flush=True)
        await trio.sleep_forever()


async def call(at: str, neighbour: str) -> str:
    """Where the neighbour is met in the end."""
    peer = PeerId(neighbour.rpartition("/")[2])
    async with open_node(config(at)) as node:
        await placed(node)
        with node.bus.subscribe() as events, trio.fail_after(PATIENCE):
            await node.ping(neighbour)
            async for event in events:
                if isinstance(event, ConnectionOpened) and event.peer == peer and event.path.kind != PathKind.RELAYED:
                    return event.address
    raise AssertionError


def test_two_behind_one_router_meet_at_their_local_addresses(lab: RunningLab) -> None:
    at = lab.public("relay").spawn_python(relay).expect(r"^/ip4/\S+$")[0]
    lab.home("home", "pr", hosts=("alice", "bob"))
    bob = lab["bob"].spawn_python(stay, at).expect(r"^place (\S+)$")[1]
    met = lab["alice"].python(call, at, bob)
    assert f"/ip4/{lab['bob'].address}/tcp/" in met
