"""Whole bridges with everything that may go wrong around them, on the mock clock."""

from __future__ import annotations

import random
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from kas_bridge import _keeper
from kas_bridge._control import ActionError
from kas_bridge._kaspad import RpcFacts, RpcPeer
from kas_bridge.app import STOP_WITHIN
from kas_bridge.config import Network
from kas_libp2p.config import Config, Limits, SessionConfig
from kas_libp2p.errors import KasError
from kas_libp2p.identity import Identity
from kas_libp2p.kaspa import p2p_pb2 as pb
from kas_libp2p.kaspa.peer import LightPeer
from kas_libp2p.metadata import Dialect
from kas_libp2p.node import open_node

from .world import KASPAD, NETWORK, Machine, World, until, world


async def joined(w: World, **settings: Any) -> tuple[Machine, Machine]:
    """Two machines, of which the first keeps the second connected."""
    b = await w.machine()
    a = await w.machine(peer=(b.address,), **settings)
    await until(lambda: a.kaspad.light.peers and b.kaspad.light.peers)
    return a, b


def is_joined(a: Machine, b: Machine) -> bool:
    return any(each["peer_id"] == b.peer and each["state"] == "joined" for each in a.bridge.peers())


# -- Joining -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dialer", ["a", "b"])
async def test_two_kaspads_are_joined(dialer: str, tmp_path: Path, autojump_clock: MockClock) -> None:
    async with world(tmp_path) as w:
        a, b = await w.machine(), await w.machine()
        ours, other = (a, b) if dialer == "a" else (b, a)
        answer = ours.bridge.connect(other.address)
        assert (answer["state"], answer["new"], answer["kaspad"]) == ("trying", True, "up")
        await until(lambda: a.kaspad.light.peers and b.kaspad.light.peers)
        assert await a.kaspad.light.peers[0].ping() < 0.1
        await trio.sleep(1)

        row = a.row(b)
        assert (row["state"], row["path"], row["dialect"]) == ("joined", "direct", Dialect.MESSAGES)
        assert row["direction"] == ("outbound" if dialer == "a" else "inbound")
        assert row["source"] == "127.1.0.1"
        assert row["node"]["id"] == b.kaspad.node_id
        assert row["node"]["version"] == "2.1.0"
        assert row["sent"] == b.row(a)["received"] > 0
        kept = int(dialer == "a")
        assert a.bridge.status()["peers"] == {"joined": 1, "handshaking": 0, "kept": kept}
        assert a.bridge.status()["connections"] == 1
        assert ours.bridge.connect(other.address)["state"] == "joined"


@pytest.mark.parametrize("who_dials", ["bridge", "peer"])
async def test_a_node_that_speaks_http2_itself(who_dials: str, tmp_path: Path, autojump_clock: MockClock) -> None:
    async with world(tmp_path) as w:
        a = await w.machine()
        identity = Identity.from_seed(b"f" * 32)
        config = Config(listen=("/ip4/10.0.9.9/tcp/16117",))
        async with (
            open_node(config, identity=identity, network=w.internet.host("10.0.9.9")) as node,
            LightPeer(NETWORK, user_agent="/rusty:1.1.0/") as foreign,
        ):
            if who_dials == "bridge":
                await node.serve(foreign.handle, Dialect.HTTP2)
                a.bridge.connect(node.addresses[0])
                await until(lambda: foreign.peers)
                peer = foreign.peers[0]
            else:
                peer = await foreign.handshake(await node.connect(a.address, (Dialect.HTTP2, Dialect.MESSAGES)))
            await peer.ping()
            (row,) = a.bridge.peers()
            assert (row["state"], row["dialect"], row["node"]["version"]) == ("joined", Dialect.HTTP2, "1.1.0")


async def test_peers_keep_their_source_addresses_over_restarts(tmp_path: Path, autojump_clock: MockClock) -> None:
    folder = tmp_path / "a"
    async with world(tmp_path) as w:
        b, c = await w.machine(), await w.machine()
        a = await w.machine(peer=(b.address, c.address), data_dir=folder)
        await until(lambda: len(a.kaspad.light.peers) == 2)
        first = {peer: a.row(peer)["source"] for peer in (b, c)}
        assert sorted(first.values()) == ["127.1.0.1", "127.1.0.2"]
        assert sorted(a.kaspad.sources[-2:]) == sorted(first.values())

        again = await w.machine(peer=(c.address, b.address), data_dir=folder)
        await until(lambda: len(again.kaspad.light.peers) == 2)
        assert {peer: again.row(peer)["source"] for peer in (b, c)} == first


async def test_the_same_node_by_another_way_is_told_by_its_id(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with world(tmp_path) as w:
        b = await w.machine()
        twin = await w.machine(b.kaspad)
        a = await w.machine(peer=(b.address,))
        await until(lambda: is_joined(a, b))
        a.bridge.connect(twin.address)
        await until(lambda: a.row(twin)["problem"])
        assert a.row(twin)["problem"] == "this node is joined already, by another way"
        assert is_joined(a, b)
        assert a.bridge.status()["ends"] == {"duplicate": 1}


async def test_a_bridge_in_front_of_our_own_kaspad(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with world(tmp_path) as w:
        b = await w.machine()
        a = await w.machine(b.kaspad, peer=(b.address,))
        await until(lambda: a.row(b)["problem"])
        assert a.row(b)["problem"].startswith("its node is our own")
        assert a.row(b)["retry_in_s"] > 500


# -- Our kaspad --------------------------------------------------------------------------------------------------------


async def test_a_kaspad_that_comes_later(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with world(tmp_path) as w:
        b = await w.machine()
        kaspad = await w.kaspad()
        kaspad.stop()
        a = await w.machine(kaspad, peer=(b.address,))
        status = a.bridge.status()["kaspad"]
        assert status["condition"] == "not running"
        assert status["problem"] == f"no kaspad listens on {KASPAD}"
        assert "start kaspad" in status["help"]
        assert status["retry_in_s"] <= 2
        assert a.row(b)["problem"] == "waits for our kaspad"
        assert len(b.kaspad.sources) == 1, "a peer was asked although our kaspad is away"
        # Who comes by itself hears why it can't be joined.
        b.bridge.connect(a.address)
        await until(lambda: b.row(a)["problem"])
        assert b.row(a)["problem"].startswith("its kaspad is not running or can't be joined")

        await trio.sleep(60)
        await kaspad.start()
        assert await until(lambda: is_joined(a, b)) < 5
        assert [event.condition for event in a.of("kaspad-changed")] == ["not running", "up"]  # type: ignore[attr-defined]


async def test_a_kaspad_that_restarts(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with world(tmp_path) as w:
        a, b = await joined(w)
        await trio.sleep(100)
        old = a.kaspad.node_id
        a.kaspad.stop()
        await until(lambda: not a.bridge.watch.state.up, 1)
        await until(lambda: not is_joined(a, b) and not is_joined(b, a), 1)
        await trio.sleep(5)
        await a.kaspad.start()
        assert await until(lambda: is_joined(a, b)) < 5
        status = a.bridge.status()["kaspad"]
        assert old != status["node_id"] == a.kaspad.node_id
        assert b.row(a)["node"]["id"] == a.kaspad.node_id


async def test_the_peers_kaspad_restarts(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with world(tmp_path) as w:
        a, b = await joined(w)
        await trio.sleep(100)
        b.kaspad.stop()
        await until(lambda: not is_joined(a, b), 1)
        await trio.sleep(60)
        assert a.row(b)["problem"].startswith("its kaspad is not running or can't be joined")
        assert a.bridge.watch.state.up
        await b.kaspad.start()
        # Asking costs one stream on a connection that is there, so it is done often.
        assert await until(lambda: is_joined(a, b)) < 10


@pytest.mark.parametrize(
    ("made", "settings", "condition", "problem", "helps"),
    [
        (
            {"network": "kaspa-testnet-10"},
            {"network": Network.SIMNET},
            "wrong network",
            f"kaspad at {KASPAD} is on kaspa-testnet-10, but the bridge was told kaspa-simnet",
            "--network testnet-10",
        ),
        (
            {"agent": "/kaspad:1.0.0/", "protocol": 7},
            {},
            "too old",
            f"kaspad 1.0.0 at {KASPAD} speaks P2P protocol 7, too old to join",
            "update it to kaspad 2.x",
        ),
    ],
)
async def test_a_kaspad_that_can_not_be_used(
    made: dict[str, Any],
    settings: dict[str, Any],
    condition: str,
    problem: str,
    helps: str,
    tmp_path: Path,
    autojump_clock: MockClock,
) -> None:
    async with world(tmp_path) as w:
        kaspad = await w.kaspad(**made)
        b = await w.machine()
        a = await w.machine(kaspad, **settings)
        status = a.bridge.status()["kaspad"]
        assert (status["condition"], status["problem"]) == (condition, problem)
        assert helps in status["help"]
        b.bridge.connect(a.address)
        await until(lambda: b.row(a)["problem"])
        assert not is_joined(b, a)
        # Looked for again, but not often: each look costs it a handshake.
        await trio.sleep(60)
        looks = len(kaspad.sources)
        await trio.sleep(150)
        assert 9 <= len(kaspad.sources) - looks <= 11


async def test_rpc_tells_who_is_connected_directly_as_well(tmp_path: Path, autojump_clock: MockClock) -> None:
    facts: list[Any] = []

    @asynccontextmanager
    async def open_facts(host: str, port: int) -> Any:
        async def ask() -> RpcFacts:
            node_id, peers = facts[0]
            return RpcFacts(
                f"{host}:{port}", "", "2.1.0", NETWORK, node_id, synced=True, peers=peers, at=trio.current_time()
            )

        yield ask

    async with world(tmp_path) as w:
        kaspad = await w.kaspad()
        facts[:] = [(kaspad.node_id, ())]
        b = await w.machine()
        a = await w.machine(kaspad, rpc=None, open_facts=open_facts, peer=(b.address,))
        await until(lambda: is_joined(a, b))
        node = b.kaspad.node_id
        facts[:] = [(kaspad.node_id, (RpcPeer(node, a.row(b)["source"], False), RpcPeer(node, "203.0.113.5", True)))]
        await until(lambda: a.row(b)["also_direct"])
        assert a.row(b)["also_direct"] == "203.0.113.5"
        assert a.bridge.status()["kaspad"]["rpc"] == {
            "address": "127.0.0.1:16510",
            "problem": "",
            "synced": True,
            "peers": 2,
        }

        # Something stands between: kaspad sees other addresses than ours.
        facts[:] = [(kaspad.node_id, (RpcPeer(node, "172.17.0.1", False),))]
        await until(lambda: a.bridge.status()["notes"])
        assert "kaspad sees our peers as 172.17.0.1" in a.bridge.status()["notes"][0]["note"]

        # Facts of another node would mislead: they are not shown.
        facts[:] = [("00000000-0000-0000-0000-000000000000", (RpcPeer(node, "203.0.113.5", True),))]
        await trio.sleep(60)
        rpc = a.bridge.status()["kaspad"]["rpc"]
        assert rpc["problem"] == "another kaspad answers there, on kaspa-simnet; say which with --rpc"
        assert rpc["synced"] is None
        assert a.row(b)["also_direct"] is None
        assert is_joined(a, b)


# -- Reasons -----------------------------------------------------------------------------------------------------------

REJECTS = [
    ("DUPLICATE_CONNECTION", "duplicate"),
    ("LOOPBACK_CONNECTION", "loopback"),
    ("peer is banned", "banned"),
    ("P2P protocol version mismatch - local: 11, remote: 9", "protocol version"),
    ("Network mismatch: kaspa-mainnet and kaspa-simnet", "network"),
    ("peer user agent rejected", "user agent"),
    ("something new", "rejected"),
]


@pytest.mark.parametrize(("text", "reason"), REJECTS)
@pytest.mark.parametrize("whose", ["ours", "theirs"])
async def test_a_kaspads_no_is_shown_by_name(
    text: str, reason: str, whose: str, tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with world(tmp_path) as w:
        a, b = await w.machine(), await w.machine()
        (a if whose == "ours" else b).kaspad.reject = text
        a.bridge.connect(b.address)
        await until(lambda: a.row(b)["problem"] and b.bridge.ends)
        assert reason in a.bridge.ends
        assert reason in b.bridge.ends
        problem = a.row(b)["problem"]
        if reason in ("loopback", "duplicate", "banned"):
            assert text in problem
        else:
            assert f"{'our' if whose == 'ours' else 'its'} kaspad said no: {reason}" in problem
        standing = reason != "duplicate"
        assert (a.row(b)["retry_in_s"] > 100) == standing


async def test_other_networks_never_reach_the_kaspads(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with world(tmp_path) as w:
        b = await w.machine(await w.kaspad(network="kaspa-testnet-10"))
        looks = len(b.kaspad.sources)
        a = await w.machine(peer=(b.address,))
        await until(lambda: a.row(b)["problem"])
        assert "we are on kaspa-testnet-10, the peer is on kaspa-simnet" in a.row(b)["problem"]
        assert len(b.kaspad.sources) == looks


async def test_a_peer_that_is_not_there(tmp_path: Path, autojump_clock: MockClock) -> None:
    ghost = Identity.from_seed(b"g" * 32).peer_id
    async with world(tmp_path) as w:
        a = await w.machine(peer=(f"/ip4/10.9.9.9/tcp/1/p2p/{ghost}",))
        await trio.sleep(600)
        (row,) = a.bridge.peers()
        assert row["problem"] == "/ip4/10.9.9.9/tcp/1: Connection refused"
        assert row["retry_in_s"] <= _keeper.LONGEST_DELAY
        tries = [event.retry_in for event in a.of("peer-failed")]  # type: ignore[attr-defined]
        assert tries[:7] == [1, 2, 4, 8, 16, 32, 60]
        assert set(tries[7:]) == {60}
        text = a.bridge.why(str(ghost)[8:14])
        assert text["peer"]["peer_id"] == ghost


async def test_another_peer_than_the_address_says(tmp_path: Path, autojump_clock: MockClock) -> None:
    ghost = Identity.from_seed(b"g" * 32).peer_id
    async with world(tmp_path) as w:
        b = await w.machine()
        address, _, _ = b.address.partition("/p2p/")
        a = await w.machine(peer=(f"{address}/p2p/{ghost}",))
        await until(lambda: a.bridge.peers()[0]["problem"])
        assert str(b.peer) in a.bridge.peers()[0]["problem"]


# -- Limits ------------------------------------------------------------------------------------------------------------


async def test_no_more_peers_than_allowed(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with world(tmp_path) as w:
        a = await w.machine(max_joined=1)
        b, c = await w.machine(peer=(a.address,)), await w.machine()
        await until(lambda: is_joined(b, a))
        c.bridge.connect(a.address)
        await until(lambda: c.row(a)["problem"])
        assert "its bridge is busy" in c.row(a)["problem"]
        assert a.bridge.status()["limits"]["max_joined"] == {"limit": 1, "used": 1}
        assert a.bridge.status()["limit_hits"]["max_joined"] >= 1
        assert is_joined(b, a)
        await b.bridge.disconnect(a.peer)
        assert await until(lambda: is_joined(c, a)) < 15


async def test_no_more_handshakes_pending_than_allowed(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with world(tmp_path) as w:
        a = await w.machine(max_pending=1)
        a.kaspad.stuck = True
        b = await w.machine(peer=(a.address,))
        await until(lambda: a.bridge.joiner.pending == 1)
        c = await w.machine(peer=(a.address,))
        await until(lambda: c.row(a)["problem"])
        assert "its bridge is busy" in c.row(a)["problem"]
        assert a.bridge.status()["limit_hits"]["max_pending"] >= 1
        assert a.row(b)["state"] == "handshaking"
        a.kaspad.stuck = False
        await b.bridge.disconnect(a.peer)
        assert await until(lambda: is_joined(c, a)) < 15


async def test_limits_reach_the_joiner(tmp_path: Path, autojump_clock: MockClock) -> None:
    given = {"max_joined": 5, "max_pending": 7, "max_pending_per_source": 1, "max_pending_per_host": 3}
    async with world(tmp_path) as w:
        a = await w.machine(**given)
        assert {name: getattr(a.bridge.joiner.settings, name) for name in given} == given


async def test_a_kaspad_that_says_nothing(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with world(tmp_path) as w:
        a, b = await w.machine(), await w.machine()
        a.kaspad.silent = True
        a.bridge.connect(b.address)
        await until(lambda: a.row(b)["problem"])
        assert "did not say Version in time" in a.row(b)["problem"]
        assert not b.kaspad.light.peers
        a.kaspad.silent = False
        assert await until(lambda: is_joined(a, b)) < 20


async def test_a_path_that_hangs_is_left_within_seconds(tmp_path: Path, autojump_clock: MockClock) -> None:
    """Without a session, which does that by itself."""
    async with world(tmp_path) as w:
        a, b = await joined(w, session=SessionConfig(enabled=False))
        await trio.sleep(100)
        (peer,) = a.kaspad.light.peers
        w.hang()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_ping_in_vain, peer)
            found = await until(lambda: not is_joined(a, b))
            assert found < 6
            again = await until(lambda: is_joined(a, b) and is_joined(b, a))
            assert again < 5
            nursery.cancel_scope.cancel()
        assert a.bridge.ends["path hung"] == 1
        how = {end.closed for end in w.internet.pipes[0]}
        assert "aborted" in how, "else the system would hold its addresses and ports for minutes"


async def test_a_path_to_a_foreign_node_that_hangs(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with world(tmp_path) as w:
        a = await w.machine()
        host = w.internet.host("10.0.9.9")
        async with (
            open_node(Config(listen=()), identity=Identity.from_seed(b"f" * 32), network=host) as node,
            LightPeer(NETWORK) as foreign,
        ):
            await foreign.handshake(await node.connect(a.address, (Dialect.HTTP2, Dialect.MESSAGES)))
            await until(lambda: a.kaspad.light.peers)
            await trio.sleep(100)
            w.hang()
            assert await until(lambda: not a.bridge.peers()) < 7
            assert a.bridge.ends["path hung"] == 1
            assert not a.kaspad.light.peers


async def _ping_in_vain(peer: Any) -> None:
    with pytest.raises(KasError):
        await peer.ping()


async def test_an_upload_limit_holds_for_all_peers_together(tmp_path: Path, autojump_clock: MockClock) -> None:
    payload = random.Random(1).randbytes(300_000)  # does not compress
    block = pb.KaspadMessage(block=pb.Block(transactions=[pb.Transaction(payload=payload)])).SerializeToString()
    async with world(tmp_path) as w:
        b, c = await w.machine(), await w.machine()
        a = await w.machine(peer=(b.address, c.address), upload_limit="100kB")
        await until(lambda: len(a.kaspad.light.peers) == 2 and b.kaspad.light.peers and c.kaspad.light.peers)
        for peer in a.kaspad.light.peers:
            await peer.channel.send(block)
        took = await until(lambda: b.row(a)["received"] > 3e5 and c.row(a)["received"] > 3e5)
        assert 4 < took < 7
        assert a.bridge.status()["upload_limit"] == 1e5
        begun = trio.current_time()
        await b.kaspad.light.peers[0].channel.send(block)
        await until(lambda: a.row(b)["received"] > 3e5)
        assert trio.current_time() - begun < 1, "what comes in is not limited"


# -- What the operator does --------------------------------------------------------------------------------------------


async def test_disconnect(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with world(tmp_path) as w:
        a, b = await joined(w)
        answer = await a.bridge.disconnect(str(b.peer)[12:18])
        assert answer == {"peer_id": b.peer, "was_joined": True, "was_kept": True, "connections": 1}
        await trio.sleep(300)
        assert not a.bridge.peers()
        assert not b.bridge.peers()
        assert b.bridge.ends == {"closed by the peer": 1}
        with pytest.raises(ActionError, match="no peer"):
            await a.bridge.disconnect(b.peer)


async def test_disconnect_while_it_is_being_dialed(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with world(tmp_path) as w:
        a, b = await w.machine(), await w.machine()
        a.bridge.connect(b.address)
        await trio.sleep(0.03)
        assert a.row(b)["state"] == "dialing"
        await a.bridge.disconnect(b.peer)
        await trio.sleep(30)
        assert not a.bridge.peers()
        assert not a.of("kaspa-peer-joined")


async def test_who_was_disconnected_may_come_back(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with world(tmp_path) as w:
        a, b = await joined(w)
        await b.bridge.disconnect(a.peer)
        assert not is_joined(b, a)
        assert await until(lambda: is_joined(b, a)) < 5


async def test_connect_refuses_what_it_can_not_do(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with world(tmp_path) as w:
        a, b = await w.machine(), await w.machine()
        for address, problem in (
            ("example.org", "no multiaddr; it looks like /ip4/192.0.2.1"),
            ("/ip4/10.0.0.1/tcp/1", "does not end in /p2p/<peer id>"),
            ("/ip4/10.0.0.1/tcp/1/p2p/nonsense", "nonsense"),
            (a.address, "is this bridge itself"),
        ):
            with pytest.raises(ActionError, match=problem):
                a.bridge.connect(address)
        await a.bridge.ban(b.peer)
        with pytest.raises(ActionError, match="kas-bridge unban"):
            a.bridge.connect(b.address)
        a.bridge.unban(b.peer)
        for number in range(_keeper.MAX_KEPT):
            peer = Identity.from_seed(number.to_bytes(2, "big") * 16).peer_id
            a.bridge.connect(f"/ip4/10.9.9.9/tcp/1/p2p/{peer}")
        with pytest.raises(ActionError, match="256 peers are kept already"):
            a.bridge.connect(b.address)


async def test_a_part_of_a_peer_id(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with world(tmp_path) as w:
        a, b = await joined(w)
        c = await w.machine(peer=(a.address,))
        await until(lambda: is_joined(a, c))
        assert a.bridge.find_peer(str(b.peer)[-6:]) == b.peer
        with pytest.raises(ActionError, match="stands for 2 peers"):
            a.bridge.find_peer("12D3KooW")
        with pytest.raises(ActionError, match="no peer"):
            a.bridge.find_peer("zz")


@pytest.mark.parametrize("target", ["peer", "ip", "network"])
async def test_a_ban_ends_and_keeps_out(target: str, tmp_path: Path, autojump_clock: MockClock) -> None:
    async with world(tmp_path) as w:
        a, b = await joined(w)
        await trio.sleep(100)
        entry = {"peer": str(a.peer), "ip": "10.0.0.2", "network": "10.0.0.0/30"}[target]
        answer = await b.bridge.ban(entry, seconds=1000, reason="rude")
        assert answer["ended"] == [a.peer]
        assert not is_joined(b, a)
        await trio.sleep(700)
        assert not is_joined(b, a)
        assert not is_joined(a, b)
        assert b.bridge.status()["bans"][0]["reason"] == "rude"
        assert b.bridge.status()["limit_hits"]["policy"] >= 1
        # It ends by itself, and the peer is asked again by itself.
        assert await until(lambda: is_joined(b, a), 500, step=2) > 200


async def test_a_ban_also_ends_our_own_attempts(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with world(tmp_path) as w:
        a, b = await joined(w)
        await a.bridge.ban(b.peer)
        await trio.sleep(100)
        assert a.row(b)["problem"] == "refused by our lists (banned)"
        assert not is_joined(a, b)
        a.bridge.unban(b.peer)
        assert await until(lambda: is_joined(a, b)) < 5
        with pytest.raises(ActionError, match="is not banned"):
            a.bridge.unban(b.peer)
        with pytest.raises(ActionError, match="this bridge itself"):
            await a.bridge.ban(a.peer)
        with pytest.raises(ActionError, match="no peer nobody is known"):
            await a.bridge.ban("nobody")


async def test_a_ban_of_an_address_that_is_lifted(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with world(tmp_path) as w:
        a, b = await joined(w)
        await a.bridge.ban("10.0.0.0/8")
        await trio.sleep(100)
        assert a.row(b)["retry_in_s"] > 300
        a.bridge.unban("10.0.0.0/8")
        assert await until(lambda: is_joined(a, b)) < 5


async def test_a_ban_of_many_on_paths_that_hang_is_quick(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with world(tmp_path) as w:
        a = await w.machine()
        others = [await w.machine(peer=(a.address,)) for _ in range(4)]
        await until(lambda: all(is_joined(a, each) for each in others))
        w.hang()
        begun = trio.current_time()
        answer = await a.bridge.ban("10.0.0.0/8")
        assert set(answer["ended"]) == {each.peer for each in others}
        assert trio.current_time() - begun < 0.5
        assert not a.bridge.peers()


@pytest.mark.parametrize(
    ("settings", "in_"),
    [
        ({"deny": ("10.0.0.2",)}, False),
        ({"deny": ("10.0.0.3",)}, True),
        ({"allow": ("10.0.0.2/32",)}, True),
        ({"allow": ("10.0.0.3",)}, False),
        ({"allow": (Identity.from_seed(b"\2" * 32).peer_id,)}, True),
        ({"deny": (Identity.from_seed(b"\2" * 32).peer_id,)}, False),
    ],
)
async def test_lists(settings: dict[str, Any], in_: bool, tmp_path: Path, autojump_clock: MockClock) -> None:
    async with world(tmp_path) as w:
        b = await w.machine(**settings)
        a = await w.machine(peer=(b.address,))
        await until(lambda: is_joined(a, b) or a.row(b)["problem"])
        assert is_joined(a, b) == in_


async def test_stop_tells_the_peers_and_is_quick(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with world(tmp_path) as w:
        a, b = await joined(w)
        c = await w.machine(peer=(a.address,))
        await until(lambda: is_joined(c, a))
        begun = trio.current_time()
        a.bridge.stop("for the test")
        await until(lambda: not a.bridge.joiner.peers)
        assert trio.current_time() - begun < STOP_WITHIN
        assert [event.reason for event in a.of("bridge-stopping")] == ["for the test"]  # type: ignore[attr-defined]
        await until(lambda: not is_joined(c, a) and not is_joined(b, a))
        assert b.bridge.ends == {"peer stopped": 1}
        assert not a.kaspad.light.peers


async def test_stop_with_a_path_that_hangs(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with world(tmp_path) as w:
        a, _ = await joined(w)
        w.hang()
        a.bridge.stop()
        assert await until(lambda: not a.bridge.joiner.peers) <= STOP_WITHIN + 0.1


async def test_an_unknown_fault_in_one_attempt_is_told_and_touches_nobody(
    tmp_path: Path, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with world(tmp_path) as w:
        a, b = await joined(w)
        c = await w.machine()
        connect = a.bridge.connector.connect

        async def broken(target: str, **options: Any) -> Any:
            if target == c.peer:
                raise ZeroDivisionError("a bug")
            return await connect(target, **options)

        monkeypatch.setattr(a.bridge.connector, "connect", broken)
        a.bridge.connect(c.address)
        await until(lambda: a.row(c)["problem"])
        assert a.row(c)["problem"] == "ZeroDivisionError: a bug"
        assert a.of("trouble")
        assert is_joined(a, b)


async def test_too_many_strangers_hurt_nobody(tmp_path: Path, autojump_clock: MockClock) -> None:
    """Streams that bring no Version are cut before our kaspad is touched."""
    async with world(tmp_path) as w:
        a, b = await joined(w, limits=Limits(max_per_ip=4))
        dialed = len(a.kaspad.sources)
        config = Config(listen=())
        async with trio.open_nursery() as nursery:
            for number in range(8):
                nursery.start_soon(_silent_stranger, w, a, config, number)
            await trio.sleep(5)
            assert is_joined(a, b)
            assert await a.kaspad.light.peers[0].ping() < 0.1
            nursery.cancel_scope.cancel()
        assert len(a.kaspad.sources) == dialed
        assert a.bridge.ends["peer silent"] == 4
        assert a.bridge.status()["limit_hits"]["max_per_ip"] >= 4


async def _silent_stranger(w: World, a: Machine, config: Config, number: int) -> None:
    identity = Identity.from_seed(bytes([100 + number]) * 32)
    async with open_node(config, identity=identity, network=w.internet.host("10.0.7.7")) as node:
        try:
            await node.connect(a.address)
        except KasError:
            return
        await trio.sleep_forever()
