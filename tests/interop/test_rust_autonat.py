"""AutoNAT v1 and v2 with rust-libp2p, both ways, on public addresses of natlab's.

v1 is what the overlay inside kaspad speaks; the peer grants what that grants, one request a minute.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import trio

from kas_libp2p import Config, identify, open_node
from kas_libp2p.autonat._client import Verdict
from kas_libp2p.autonat._messages import MAX_PIECE
from kas_libp2p.autonat._roles import Ask, Kind
from kas_libp2p.autonat._server import MAX_DATA, MIN_DATA
from kas_libp2p.config import AutoNatConfig
from kas_libp2p.events import ReachabilityTested
from natlab import Host, Process, RunningLab
from tests.interop.test_autonat import CONFIG, PORT, STARTED, ask, serve

NO_CONNECTION = "server failed to establish a connection"
"""What rust makes of E_DIAL_ERROR."""


def spawn(host: Host, program: Path, *options: str) -> Process:
    return host.spawn([str(program), "listen", f"/ip4/{host.address}/tcp/4001", *options], stdin=True)


def start(host: Host, program: Path, *options: str) -> str:
    """Start a rust peer; returns its address."""
    return f"/ip4/{host.address}/tcp/4001/p2p/{spawn(host, program, *options).expect(STARTED)[1]}"


def connect(peer: Process, *addresses: str) -> None:
    for number, address in enumerate(addresses):
        order = {"id": number, "do": "connect", "addr": address}
        peer.stdin.write(json.dumps(order).encode() + b"\n")


def told(peer: Process, event: str, fields: str = "") -> dict[str, Any]:
    """Wait for an event of a rust peer's in which there are these fields, which are sorted."""
    found: dict[str, Any] = json.loads(peer.expect(rf'^.*{fields}.*"event":"{event}".*$')[0])
    return found


def ours(host: Host) -> str:
    return host.spawn_python(serve).expect(rf"^/ip4/{host.address}\S+$")[0]


def outcome(peer: Process, ip: str) -> tuple[int, str | None]:
    """What a rust peer's v2 client paid for a test of its port at an IP, and what was wrong."""
    event = told(peer, "autonat-asked", f'"address":"/ip4/{ip}/tcp/4001"')
    return event["bytes"], event["error"]


@pytest.mark.parametrize("kind", [Kind.V1, Kind.V2])
def test_it_tests_us(lab: RunningLab, rust_binary: Path, kind: Kind) -> None:
    server = lab.public("server")
    address = start(server, rust_binary, "--autonat-v1", "--autonat-v2-server")
    asking = {
        nat: lab.home(nat, nat=nat, delay="5ms").spawn_python(ask, address, kind=kind) for nat in ("open", "pr-rst")
    }
    verdict, reason, origin = asking["open"].result()
    assert verdict == Verdict.REACHABLE, reason
    assert origin.startswith(f"/ip4/{server.address}/tcp/")
    assert not origin.endswith("/4001")
    assert asking["pr-rst"].result()[0] == Verdict.UNREACHABLE


def test_where_packets_are_swallowed(lab: RunningLab, rust_binary: Path) -> None:
    """Its v2 server says nothing then, as it gives the whole request no longer than the dial. Ours tells its client."""
    theirs = start(lab.public("theirs"), rust_binary, "--autonat-v1", "--autonat-v2-server")
    asking = [lab.home(kind, nat="pr", delay="5ms").spawn_python(ask, theirs, kind=kind) for kind in (Kind.V1, Kind.V2)]
    home = lab.home("home", nat="pr", delay="5ms")
    peer = spawn(home, rust_binary, "--autonat-v2-client")
    connect(peer, ours(lab.public("ours")))
    assert outcome(peer, home.public_address) == (0, NO_CONNECTION)
    assert [each.result()[0] for each in asking] == [Verdict.UNREACHABLE, Verdict.REFUSED]


def test_it_has_us_pay_for_another_address(lab: RunningLab, rust_binary: Path) -> None:
    host = lab.public("server")
    server = spawn(host, rust_binary, "--autonat-v2-server")
    address = f"/ip4/{host.address}/tcp/4001/p2p/{server.expect(STARTED)[1]}"
    other = f"/ip4/{lab.public('nobody').address}/tcp/9"
    verdict, reason, _ = lab.public("alice").python(ask, address, other)
    assert (verdict, reason) == (Verdict.UNREACHABLE, "E_DIAL_ERROR")
    served = told(server, "autonat-served")
    assert (served["address"], served["error"]) == (other, None)
    assert MIN_DATA <= served["bytes"] < MAX_DATA + MAX_PIECE


async def ask_twice(servers: list[str]) -> tuple[str, list[tuple[str, str]], str]:
    """What a node makes of its v1 servers, what they said, one of them twice, and what it makes of that."""
    async with open_node(CONFIG) as node:
        events = node.events()
        said: list[tuple[str, str]] = []
        for server in servers:
            await node.identify(server)
        async for event in events:
            if isinstance(event, ReachabilityTested):
                said.append((event.verdict, event.reason))
                if len(said) == len(servers):
                    before = node.status().reachability.reason
                    server = node.reachability._servers()[0]
                    await node.reachability._ask_one(Ask(event.address, server, Kind.V1, trio.current_time()))
                elif len(said) > len(servers):
                    break
        return before, said, node.status().reachability.reason


def test_its_refusals_are_no_failures(lab: RunningLab, rust_binary: Path) -> None:
    servers = [start(lab.public(name), rust_binary, "--autonat-v1") for name in ("ashburn", "frankfurt")]
    alice = lab.public("alice")
    before, said, after = alice.python(ask_twice, servers)
    assert [verdict for verdict, _ in said] == [Verdict.REACHABLE, Verdict.REACHABLE, Verdict.REFUSED]
    assert said[2][1] == "too many dials for peer"
    assert before == after == f"2 of 2 servers reached {alice.address}:{PORT}, no stranger has tried yet"


def test_we_test_it_by_v1(lab: RunningLab, rust_binary: Path) -> None:
    """It is tested until our server has enough of it, which makes it no less sure."""
    server = ours(lab.public("server"))
    public, home = lab.public("open"), lab.home("home", nat="pr-rst", delay="5ms")
    heard = {
        public: ("public", rf'"address":"/ip4/{public.address}/tcp/4001\S*"'),
        home: ("private", r'"error":"Response\(DialError\)"'),
    }
    peers = {host: spawn(host, rust_binary, "--autonat-v1", "--autonat-interval", "0.1") for host in heard}
    for host, (status, verdict) in heard.items():
        connect(peers[host], server)
        told(peers[host], "autonat-asked", verdict)
        told(peers[host], "autonat-asked", r'"confidence":3,"error":"Response\(DialRefused\)"')
        [change] = [line for line in peers[host].stdout.splitlines() if '"autonat-status"' in line]
        assert json.loads(change)["status"] == status


async def lie(where: str) -> None:
    """A peer that tells everybody to be somewhere else than it sees them, and serves no AutoNAT."""
    true = identify.statement
    with patch.object(identify, "statement", lambda *args, **fields: true(*args, **fields | {"observed": where})):
        async with open_node(Config(listen=CONFIG.listen, autonat=AutoNatConfig(serve=False))) as node:
            print(*node.addresses, sep="\n", flush=True)
            await trio.sleep_forever()


def test_we_test_it_by_v2(lab: RunningLab, rust_binary: Path) -> None:
    """An address of another IP costs it something."""
    server, nobody, host = ours(lab.public("server")), lab.public("nobody"), lab.public("liar")
    liar = host.spawn_python(lie, f"/ip4/{nobody.address}/tcp/4001").expect(rf"^/ip4/{host.address}\S+$")[0]
    public = lab.public("open")
    peer = spawn(public, rust_binary, "--autonat-v2-client")
    connect(peer, server, liar)
    assert outcome(peer, public.address) == (0, None)
    paid, error = outcome(peer, nobody.address)
    assert MIN_DATA <= paid <= MAX_DATA
    assert error == NO_CONNECTION
