"""With go-libp2p on public addresses, as its AutoRelay takes no others, and its relay tells no others."""

from __future__ import annotations

import json

from kas_libp2p import Config, open_node
from kas_libp2p.config import Purpose, RelayConfig, Role
from kas_libp2p.events import ReservationMade
from natlab import RunningLab
from tests.interop.ends import Programs
from tests.interop.protocols import ECHO, round_trip, serve

PORT = 16117


async def relay(host: str) -> None:
    """A relay of ours that prints its address."""
    config = Config(
        listen=(f"/ip4/{host}/tcp/{PORT}",), role=Role.PUBLIC, relay=RelayConfig(serve=True, purpose=Purpose.ANY)
    )
    async with open_node(config) as node:
        print(node.addresses[0], flush=True)
        events = node.events()
        async for event in events:
            print(event, flush=True)


async def hold(address: str) -> None:
    """A peer of ours with a place on a relay."""
    async with open_node(Config(listen=(), role=Role.PRIVATE, relay=RelayConfig(relays=(address,)))) as node:
        await serve(node)
        events = node.events()
        async for event in events:
            if isinstance(event, ReservationMade):
                print(*event.addresses, sep="\n", flush=True)


async def call(address: str) -> tuple[str, list[str]]:
    """Use a circuit: how it goes, and what its other end says of where it can be reached."""
    async with open_node(Config(listen=())) as node:
        stream = await node.connect(address, ECHO)
        await round_trip(stream)
        info = await node.identify(stream.metadata.peer or "")
        assert info is not None
        return str(stream.metadata.path.kind), list(info.addresses)


def test_go_behind_a_nat_on_our_relay(lab: RunningLab, programs: Programs) -> None:
    host = lab.public("relay")
    ours = host.spawn_python(relay, host.address)
    address = ours.expect(r"^/ip4/11\S+$")[0]
    bob = lab.home("bob", nat="pr", delay="5ms")
    peer = bob.spawn([str(programs["go"]), "listen", "--auto-relay", address, "/ip4/0.0.0.0/tcp/4001"], stdin=True)
    bob_id = peer.expect(r'"peer":"([^"]+)"')[1]
    ours.expect(r"RelayRequestServed.*reserve.*OK")
    kind, told = lab.home("alice", nat="pr", delay="5ms").python(call, f"{address}/p2p-circuit/p2p/{bob_id}")
    assert kind == "relayed"
    assert f"{address}/p2p-circuit" in told


def test_ours_and_rust_s_behind_a_nat_on_go_s_relay(lab: RunningLab, programs: Programs) -> None:
    """What rust can't do on loopback."""
    host = lab.public("relay")
    go = host.spawn([str(programs["go"]), "listen", "--relay", f"/ip4/{host.address}/tcp/4001"], stdin=True)
    address = go.expect(r'"(/ip4/11[^"]+/p2p/[^"]+)"')[1]
    bob = lab.home("bob", nat="pr", delay="5ms").spawn_python(hold, address)
    at_bob = bob.expect(r"^/ip4/11\S+$")[0]
    assert at_bob.startswith(f"{address}/p2p-circuit/p2p/")
    rust = lab.home("carol", nat="pr", delay="5ms").spawn([str(programs["rust"]), "dial", address], stdin=True)
    carol_id = rust.expect(r'"peer":"([^"]+)"')[1]
    rust.expect('"event":"connected"')
    assert rust.stdin is not None
    rust.stdin.write(json.dumps({"id": 1, "do": "listen", "addr": f"{address}/p2p-circuit"}).encode() + b"\n")
    rust.expect('"event":"reserved"')
    alice = lab.home("alice", nat="pr", delay="5ms")
    for each in (at_bob, f"{address}/p2p-circuit/p2p/{carol_id}"):
        kind, told = alice.python(call, each)
        assert kind == "relayed"
        assert any(one.startswith(f"{address}/p2p-circuit") for one in told)
