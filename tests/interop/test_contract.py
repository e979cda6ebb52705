"""Our peer for the hole-punch test of the libp2p project, with rust-libp2p at the other end in either role."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from kas_libp2p import redis
from natlab import RunningLab
from tests.interop import punching
from tests.interop.ends import Programs
from tests.interop.punching import ip_of
from tests.lab.test_contract import KEY, RESULT, relay, start_peer, start_redis

DELAY = "20ms"


@pytest.fixture(scope="session", params=["kas-interop-punch", "kas-interop-punch-056"])
def rust(request: pytest.FixtureRequest, programs: Programs) -> Path:
    """The programs of both versions."""
    return programs["rust"].parent / str(request.param)


async def tell(store: str, key: str, value: str) -> None:
    async with await redis.connect(store) as server:
        await server.set(f"{KEY}_{key}", value)


async def told(store: str, key: str) -> str | None:
    async with await redis.connect(store) as server:
        return await server.get(f"{KEY}_{key}")


def test_we_dial(lab: RunningLab, rust: Path) -> None:
    host, store = lab.public("relay"), lab.public("redis")
    start_redis(store)
    host.spawn_python(relay, host.address, store.address)
    alice, bob = lab.home("alice", nat="pr", delay=DELAY), lab.home("bob", nat="pr", delay=DELAY)
    dialer = start_peer(alice, store, IS_DIALER="true", DIALER_IP=alice.address)
    listener, circuit = punching.reserve(rust, bob, dialer.expect(r"^relay (\S+)$")[1])
    store.python(tell, store.address, "listener_peer_id", circuit.rpartition("/")[2])
    assert dialer.wait() == 0, dialer.stderr
    assert re.fullmatch(RESULT, dialer.stdout)
    assert f"direct connection with /ip4/{bob.public_address}/tcp/4001" in dialer.stderr
    assert listener.wait("dcutr")["error"] is None  # else rust's listener there would have left with an error


def test_we_listen(lab: RunningLab, rust: Path) -> None:
    host, store = lab.public("relay"), lab.public("redis")
    start_redis(store)
    host.spawn_python(relay, host.address, store.address)
    alice, bob = lab.home("alice", nat="pr", delay=DELAY), lab.home("bob", nat="pr", delay=DELAY)
    listener = start_peer(bob, store, IS_DIALER="false", LISTENER_IP=bob.address)
    listener.expect("told its peer id")
    at, peer = (store.python(told, store.address, key) for key in ("relay_multiaddr", "listener_peer_id"))
    dialer = punching.dial(rust, alice, f"{at}/p2p-circuit/p2p/{peer}")
    assert ip_of(dialer.wait("direct")["remote"]) == bob.public_address
    assert dialer.wait("dcutr")["error"] is None
    assert listener.status is None
    assert listener.stdout == ""
