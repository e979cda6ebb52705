"""A node of ours behind a real NAT. Its functions run in hosts of natlab, so they are in reach of each other only."""

from __future__ import annotations

import pytest
import trio

from kas_libp2p import Config, DialError, OverlayStream, open_node
from natlab import RunningLab

pytestmark = pytest.mark.lab

WHO = "/test/who-am-i/1.0.0"


async def tell(stream: OverlayStream) -> None:
    await stream.send_all(stream.metadata.remote_address.encode())


async def serve() -> None:
    async with open_node(Config(listen=("/ip4/0.0.0.0/tcp/16117", "/ip6/::/tcp/16117"))) as node:
        await node.serve(tell, WHO)
        print(*node.addresses, sep="\n", flush=True)
        await trio.sleep_forever()


async def ask(address: str) -> tuple[str, str]:
    """Our own address, and how we are seen."""
    async with open_node(Config(listen=())) as node:
        stream = await node.connect(address, WHO)
        async with stream:
            seen = b"".join([data async for data in stream])
        return stream.metadata.local_address, seen.decode()


@pytest.mark.nat_types("pr", "eimx", "cgn-sym")
def test_a_node_behind_a_nat_reaches_a_public_one(lab: RunningLab, nat_type: str) -> None:
    relay, alice = lab.public("relay"), lab.home("alice", nat=nat_type, ipv6="fw", delay="5ms")
    node = relay.spawn_python(serve)

    local, seen = alice.python(ask, node.expect(rf"^/ip4/{relay.address}/\S+$")[0])
    assert local.startswith(f"/ip4/{alice.address}/tcp/")
    assert seen.startswith(f"/ip4/{alice.public_address}/tcp/")
    assert (local.rpartition("/")[2] == seen.rpartition("/")[2]) == (nat_type == "pr")  # only this one keeps the port

    local, seen = alice.python(ask, node.expect(rf"^/ip6/{relay.address6}/\S+$")[0])
    assert local == seen


@pytest.mark.natlab("alice=pr", "bob=pr-rst", wan="5ms")
def test_a_node_behind_a_nat_is_out_of_reach(lab: RunningLab) -> None:
    node = lab["bob"].spawn_python(serve)
    inside = node.expect(rf"^/ip4/{lab['bob'].address}/\S+$")[0]
    with pytest.raises(DialError, match="refused"):
        lab["alice"].python(ask, inside.replace(lab["bob"].address, lab["bob"].public_address))
