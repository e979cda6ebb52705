"""AutoNAT v2 with go-libp2p and js-libp2p, on public addresses of natlab's, as they dial no others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kas_libp2p import Config, open_node
from kas_libp2p.autonat._messages import DIAL_REQUEST, V1
from kas_libp2p.autonat._roles import Kind
from kas_libp2p.events import DialBackServed
from natlab import Host, Process, RunningLab

PORT = 16117
STARTED = r'"event":"started","peer":"(\w+)"'
CONFIG = Config(listen=(f"/ip4/0.0.0.0/tcp/{PORT}",))


async def ask(server: str, other: str = "", kind: Kind = Kind.V2) -> tuple[str, str, str]:
    """Have a server test the address where it sees us, or another one.

    Returns:
        verdict, reason, and where the dial-back came from.
    """
    async with open_node(CONFIG) as node:
        info = await node.identify(server)
        assert info is not None
        assert {Kind.V1: V1, Kind.V2: DIAL_REQUEST}[kind] in info.protocols
        connection = node.swarm.connection_to(info.peer)
        assert connection is not None
        [seen] = node.reachability.candidates()
        outcome = await node.reachability._client.test(connection.connection, other or seen, kind)
        return str(outcome.verdict), outcome.reason, outcome.proof.remote_address if outcome.proof is not None else ""


async def serve() -> None:
    """A server of ours that prints what it was asked for."""
    async with open_node(CONFIG) as node:
        events = node.events()
        print(*node.addresses, sep="\n", flush=True)
        async for event in events:
            if isinstance(event, DialBackServed):
                print(f"served: {event.address} {event.status} {event.reason}", flush=True)


def start(host: Host, program: Path) -> str:
    """Start a peer of another implementation; returns its address, which js does not tell before it is confirmed."""
    return f"/ip4/{host.address}/tcp/4001/p2p/{spawn(host, program).expect(STARTED)[1]}"


def spawn(host: Host, program: Path) -> Process:
    return host.spawn([str(program), "listen", "--autonat", f"/ip4/{host.address}/tcp/4001"], stdin=True)


@pytest.mark.parametrize(("nat", "verdict"), [("open", "reachable"), ("fcx", "reachable"), ("pr", "unreachable")])
def test_they_test_us(lab: RunningLab, other: Path, nat: str, verdict: str) -> None:
    server = lab.public("server")
    address = start(server, other)
    found, reason, origin = lab.home("alice", nat=nat, delay="5ms").python(ask, address)
    assert found == verdict, reason
    assert origin.startswith(f"/ip4/{server.address}/tcp/") == (verdict == "reachable")
    assert not origin.endswith("/4001")


def test_they_have_us_pay_for_another_address(lab: RunningLab, other: Path) -> None:
    address = start(lab.public("server"), other)
    nobody = lab.public("nobody").address
    found, reason, _ = lab.public("alice").python(ask, address, f"/ip4/{nobody}/tcp/9")
    assert (found, reason) == ("unreachable", "E_DIAL_ERROR")


def test_we_test_them(lab: RunningLab, other: Path) -> None:
    ours = [lab.public(name).spawn_python(serve) for name in ("ashburn", "frankfurt", "singapore")]
    addresses = [each.expect(r"^/ip4/11\S+$")[0] for each in ours]
    host = lab.public("them")
    peer = spawn(host, other)
    peer.expect(STARTED)
    for number, address in enumerate(addresses):
        order = {"id": number, "do": "connect", "address": address}
        peer.stdin.write(json.dumps(order).encode() + b"\n")
    assert ours[0].expect(r"^served: .*$")[0] == f"served: /ip4/{host.address}/tcp/4001 OK "
