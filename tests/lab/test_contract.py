"""The hole-punch test of the libp2p project with our peer in both roles, on the networks that it is run on.

Two things let a peer pass there that has punched nothing: the network that Redis is in joins both peers, and the relay
has routes to both. So what counts is where the direct connection leads.
"""

from __future__ import annotations

import re
import shutil

import pytest

from kas_libp2p import Config, open_node, redis
from kas_libp2p.config import Purpose, RelayConfig, RelayLimits, Role
from natlab import Host, RunningLab, plan
from natlab.processes import Process
from tests.command import COMMAND
from tests.redis import run as run_redis

pytestmark = pytest.mark.lab

KEY = "a1b2c3d4"
RESULT = r"latency:\n  handshake_plus_one_rtt: (\d+\.\d\d)\n  ping_rtt: (\d+\.\d\d)\n  unit: ms\n"


def start_redis(host: Host) -> Process:
    """A Redis server, the real one if it is installed."""
    program = shutil.which("redis-server")
    if program is None:
        server: Process = host.spawn_python(run_redis, host.address, redis.PORT)
        server.expect("^ready")
    else:
        server = host.spawn([program, "--bind", host.address, "--save", "", "--protected-mode", "no"])
        server.expect("Ready to accept connections")
    return server


async def relay(host: str, store: str) -> None:
    """The test's relay: rust's, with its limits. It tells its address by Redis."""
    settings = RelayConfig(serve=True, purpose=Purpose.ANY, limits=RelayLimits.reference())
    async with open_node(Config(listen=(f"/ip4/{host}/tcp/4001",), role=Role.PUBLIC, relay=settings)) as node:
        async with await redis.connect(store) as server:
            await server.set(f"{KEY}_relay_multiaddr", node.addresses[0])
        async for event in node.events():
            print(event, flush=True)


def start_peer(host: Host, store: Host, **more: str) -> Process:
    """Our peer, as the test starts it."""
    (gateway,) = re.findall(r"^default via (\S+)", host.run("ip route").stdout, re.MULTILINE)
    told = {
        "REDIS_ADDR": f"{store.address}:{redis.PORT}",
        "TEST_KEY": KEY,
        "TRANSPORT": "tcp",
        "SECURE_CHANNEL": "noise",
        "MUXER": "yamux",
        "WAN_SUBNET": f"{store.address.partition('.')[0]}.0.0.0/8",
        "WAN_ROUTER_IP": gateway,
    }
    return host.spawn([*COMMAND, "holepunch-test"], env=told | more)


@pytest.fixture
def private_wan(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test's WAN is a network of Docker's."""
    address = plan._outside
    monkeypatch.setattr(plan, "_outside", lambda *where: address(*where).replace("11.", "10.", 1))


@pytest.mark.usefixtures("private_wan")
def test_ours_with_ours_on_private_networks(lab: RunningLab) -> None:
    check_ours_with_ours(lab, "pr")
    assert lab["relay"].address.startswith("10.")


@pytest.mark.parametrize("nat", ["pr", "naive"])
def test_ours_with_ours(lab: RunningLab, nat: str) -> None:
    check_ours_with_ours(lab, nat)


def check_ours_with_ours(lab: RunningLab, nat: str) -> None:
    host, store = lab.public("relay"), lab.public("redis")
    start_redis(store)
    alice, bob = lab.home("alice", nat=nat, delay="20ms"), lab.home("bob", nat=nat, delay="20ms")
    dialer = start_peer(alice, store, IS_DIALER="true", DIALER_IP=alice.address)
    listener = start_peer(bob, store, IS_DIALER="false", LISTENER_IP=bob.address, DEBUG="true")
    host.spawn_python(relay, host.address, store.address)  # the last to be there, as it may be
    assert dialer.wait() == 0, dialer.stderr
    result = re.fullmatch(RESULT, dialer.stdout)
    assert result, dialer.stdout
    assert float(result[1]) > float(result[2]) > 80  # the round trip of the direct path
    assert f"direct connection with /ip4/{bob.public_address}/tcp/" in dialer.stderr
    assert ".0.0.0/8 via" in alice.run("ip route").stdout
    assert re.search(rf'"kind": "punched".*"address": "/ip4/{alice.public_address}/tcp/\d+"', listener.stderr)
    assert listener.stdout == ""
    assert listener.status is None
