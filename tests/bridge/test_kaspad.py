"""What is known of our kaspad: the judgement is pure; the watch runs on the mock clock."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from kas_bridge import kaspad as kaspad_module
from kas_bridge._kaspad import (
    Comparison,
    Condition,
    JoinedFacts,
    RpcFacts,
    RpcPeer,
    candidates,
    compare,
    judge,
    notes,
    of_version,
    rpc_address,
)
from kas_bridge.config import Network, Settings
from kas_bridge.kaspad import CHECK_EVERY, QUICK_RETRY, SLOW_RETRY, KaspadWatch
from kas_libp2p.events import EventBus
from kas_libp2p.kaspa.join import End, Ended, JoinFailed, KaspadAddress, Side, VersionInfo
from kas_libp2p.kaspa.sources import PoolSources, Sources
from kas_libp2p.metadata import PeerId

HERE = KaspadAddress("127.0.0.1", 16511)
ALICE, BOB = PeerId("12D3KooWAlice"), PeerId("12D3KooWBob")


def node(network: str = "kaspa-simnet", protocol: int = 11, node_id: str = "1") -> VersionInfo:
    return VersionInfo(node_id=node_id, network=network, user_agent="/kaspad:2.1.0/", protocol_version=protocol)


def ended(reason: End, text: str = "") -> Ended:
    return Ended(reason, Side.KASPAD, text)


# -- Where it may be ---------------------------------------------------------------------------------------------------


def test_where_is_looked() -> None:
    assert candidates(("10.0.0.1", 5), None) == [KaspadAddress("10.0.0.1", 5)]
    assert candidates(None, Network.TESTNET_10) == [KaspadAddress("127.0.0.1", 16211)]
    assert [each.port for each in candidates(None, None)] == [16111, 16211, 16511, 16611]


def test_where_its_rpc_may_be() -> None:
    assert rpc_address(("h", 1), HERE, "kaspa-mainnet") == ("h", 1)
    assert rpc_address(None, KaspadAddress("10.0.0.1", 5), "kaspa-testnet-10") == ("10.0.0.1", 16210)
    assert rpc_address(None, HERE, "") == ("127.0.0.1", 16510)
    assert rpc_address(None, KaspadAddress("10.0.0.1", 5), "") == ("10.0.0.1", 16110)


# -- What the answers come to ------------------------------------------------------------------------------------------


def test_one_kaspad_is_found_among_the_networks() -> None:
    answers = [(each, ended(End.NOT_RUNNING)) for each in candidates(None, None)]
    found, state = judge([*answers[:2], (HERE, node()), answers[3]], None, given=False)
    assert found is HERE
    assert (state.condition, state.version, state.network) == (Condition.UP, "2.1.0", "kaspa-simnet")
    assert (state.problem, state.help) == ("", "")


def test_several_kaspads() -> None:
    other = KaspadAddress("127.0.0.1", 16111)
    found, state = judge([(other, node("kaspa-mainnet")), (HERE, node())], None, given=False)
    assert found is None
    assert state.condition is Condition.SEVERAL
    assert state.problem == "2 kaspads run here: mainnet at 127.0.0.1:16111 and simnet at 127.0.0.1:16511"
    assert "--network" in state.help


def test_no_kaspad_anywhere() -> None:
    _, state = judge([(each, ended(End.NOT_RUNNING)) for each in candidates(None, None)], None, given=False)
    assert state.condition is Condition.NOT_RUNNING
    assert "tried mainnet 16111, testnet-10 16211, simnet 16511, devnet 16611" in state.problem
    assert "--connect or --maxinpeers=0" in state.help
    assert "--kaspad HOST:PORT" in state.help


@pytest.mark.parametrize(
    ("address", "what", "condition", "problem", "helps"),
    [
        (HERE, ended(End.NOT_RUNNING), Condition.NOT_RUNNING, "no kaspad listens on 127.0.0.1:16511", "start kaspad"),
        (HERE, ended(End.NOT_KASPAD, "an echo"), Condition.NOT_KASPAD, "is no kaspad (an echo)", "ss -ltnp"),
        (
            KaspadAddress("127.0.0.1", 16110),
            ended(End.NOT_KASPAD, "status 12"),
            Condition.NOT_KASPAD,
            "16110 is its RPC port",
            "--kaspad 127.0.0.1:16111",
        ),
        (HERE, ended(End.KASPAD_SILENT), Condition.SILENT, "takes connections and says nothing", "another program"),
        (HERE, ended(End.KASPAD_BUSY), Condition.BUSY, "too many handshakes pending", "passes within seconds"),
        (HERE, ended(End.BANNED), Condition.BANNED, "has banned the address", "Unban"),
        (HERE, ended(End.NO_SOURCE, "10.9.9.1 can't be used"), Condition.UNREACHABLE, "10.9.9.1", "--source"),
        (
            KaspadAddress("172.17.0.2", 16111),
            ended(End.UNREACHABLE, "no answer"),
            Condition.UNREACHABLE,
            "no answer",
            "--listen=0.0.0.0:16111",
        ),
    ],
)
def test_what_is_wrong_and_what_helps(
    address: KaspadAddress, what: Ended, condition: Condition, problem: str, helps: str
) -> None:
    found, state = judge([(address, what)], Network.SIMNET, given=True)
    assert found is None
    assert state.condition is condition
    assert problem in state.problem
    assert helps in state.help
    assert not state.up


def test_another_network_than_wanted() -> None:
    _, state = judge([(HERE, node())], Network.MAINNET, given=True)
    assert state.condition is Condition.WRONG_NETWORK
    assert "--network simnet" in state.help


@pytest.mark.parametrize(
    ("protocol", "condition", "problem"),
    [(8, Condition.TOO_OLD, "too old"), (9, Condition.UP, "of its own age"), (10, Condition.UP, "")],
)
def test_old_ones(protocol: int, condition: Condition, problem: str) -> None:
    state = of_version(HERE, node(protocol=protocol), None)
    assert state.condition is condition
    assert problem in state.problem
    assert bool(state.help) == bool(problem)


# -- What RPC adds -----------------------------------------------------------------------------------------------------


def test_a_peer_that_is_connected_directly_too() -> None:
    joined = {ALICE: JoinedFacts("a", "127.1.0.1", 5.0), BOB: JoinedFacts("b", "127.1.0.2", 5.0)}
    sources: dict[PeerId, str | None] = {ALICE: "127.1.0.1", BOB: "127.1.0.2"}
    peers = (RpcPeer("a", "127.1.0.1", False), RpcPeer("a", "203.0.113.5", True), RpcPeer("b", "127.1.0.2", False))
    facts = RpcFacts("r", peers=peers, at=10.0)
    assert compare(joined, sources, facts) == Comparison({ALICE: "203.0.113.5"}, ())
    # Joined after RPC was asked: nothing is known yet.
    assert compare({ALICE: JoinedFacts("a", "127.1.0.1", 10.0)}, sources, facts) == Comparison()


def test_something_stands_between() -> None:
    joined = {ALICE: JoinedFacts("a", "127.1.0.1", 5.0)}
    facts = RpcFacts("r", peers=(RpcPeer("a", "172.17.0.1", False),), at=10.0)
    comparison = compare(joined, {ALICE: "127.1.0.1"}, facts)
    assert comparison == Comparison({}, ("172.17.0.1",))
    ((note, helps),) = notes(comparison, host="127.0.0.1", one_source=False, sources_given=False, join_problem=None)
    assert "172.17.0.1" in note
    assert "--network host" in helps


def test_one_source_for_all() -> None:
    joined = {ALICE: JoinedFacts("a", None, 5.0)}
    facts = RpcFacts("r", peers=(RpcPeer("a", "10.0.0.1", False), RpcPeer("a", "203.0.113.5", True)), at=10.0)
    assert compare(joined, {ALICE: None}, facts) == Comparison({ALICE: "203.0.113.5"}, ())


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"host": "127.0.0.1", "one_source": False}, ""),
        ({"host": "", "one_source": True}, ""),
        ({"host": "172.17.0.2", "one_source": True}, "on another host or in a container"),
        ({"host": "172.17.0.2", "one_source": True, "sources_given": True}, ""),
        ({"host": "::1", "one_source": True}, "IPv6 has one loopback address"),
        (
            {"host": "127.0.0.1", "one_source": False, "join_problem": ended(End.NO_SOURCE, "10.9.9.1 can't be used")},
            "no peer can be joined: 10.9.9.1 can't be used",
        ),
        ({"host": "127.0.0.1", "one_source": False, "join_problem": ended(End.KASPAD_BUSY)}, ""),
    ],
)
def test_notes(given: dict[str, Any], expected: str) -> None:
    found = notes(Comparison(), **{"sources_given": False, "join_problem": None} | given)
    assert len(found) == bool(expected)
    assert all(expected in note and helps for note, helps in found)


# -- The watch ---------------------------------------------------------------------------------------------------------


class Door:
    """What a look finds, and when it looked."""

    def __init__(self, answer: VersionInfo | Ended) -> None:
        self.answer = answer
        self.looks: list[float] = []
        self.checks = 0

    async def look(self, address: KaspadAddress, sources: Sources) -> VersionInfo:
        await trio.lowlevel.checkpoint()
        self.looks.append(trio.current_time())
        if isinstance(self.answer, Ended):
            raise JoinFailed(self.answer)
        return self.answer

    async def dial(self, address: KaspadAddress, source: str | None) -> Any:
        await trio.lowlevel.checkpoint()
        self.checks += 1
        if isinstance(self.answer, Ended):
            raise JoinFailed(self.answer)
        return trio.testing.memory_stream_pair()[0]


@asynccontextmanager
async def watching(door: Door, monkeypatch: pytest.MonkeyPatch, **given: Any) -> AsyncIterator[KaspadWatch]:
    monkeypatch.setattr(kaspad_module, "dial_kaspad", door.dial)
    settings = Settings(kaspad="127.0.0.1:16511", rpc=given.pop("rpc", "off"))
    watch = KaspadWatch(settings, PoolSources(), EventBus(lambda: 0.0), look=door.look, **given)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch.run)
        await watch.wait_looked()
        yield watch
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize(("reason", "longest"), [(End.NOT_RUNNING, QUICK_RETRY), (End.NOT_KASPAD, SLOW_RETRY)])
async def test_a_missing_kaspad_is_looked_for_with_backoff(
    reason: End, longest: float, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    door = Door(ended(reason))
    async with watching(door, monkeypatch) as watch:
        await trio.sleep(100)
        pauses = [later - earlier for earlier, later in zip(door.looks, door.looks[1:], strict=False)]
        assert pauses[0] == pytest.approx(0.5)
        assert all(pause == pytest.approx(longest) for pause in pauses[6:])
        assert watch.retry_at is not None
        door.answer = node()
        await trio.sleep(longest)
        assert watch.state.up
        assert watch.retry_at is None


async def test_a_kaspad_that_is_up_is_checked_and_not_bothered(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    door = Door(node())
    async with watching(door, monkeypatch) as watch:
        await trio.sleep(105)
        assert (len(door.looks), door.checks) == (1, 10)
        door.answer = ended(End.NOT_RUNNING)
        await trio.sleep(CHECK_EVERY)
        assert watch.state.condition is Condition.NOT_RUNNING
        assert watch.rpc is None


async def test_while_peers_are_joined_nothing_is_checked(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    door = Door(node())
    async with watching(door, monkeypatch, joined=lambda: 3) as watch:
        await trio.sleep(105)
        assert door.checks == 0
        door.answer = ended(End.NOT_RUNNING)
        watch.suspect()
        await trio.sleep(0.5)
        assert watch.state.condition is Condition.NOT_RUNNING


async def test_rpc_sees_a_restart_that_nobody_else_sees(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    door = Door(node(node_id="1"))
    told = ["1"]

    @asynccontextmanager
    async def open_facts(host: str, port: int) -> AsyncIterator[Any]:
        async def ask() -> RpcFacts:
            await trio.lowlevel.checkpoint()
            return RpcFacts(f"{host}:{port}", node_id=told[0], network="kaspa-simnet", synced=True)

        yield ask

    async with watching(door, monkeypatch, rpc=None, open_facts=open_facts) as watch:
        await trio.sleep(1)
        assert watch.rpc is not None
        assert watch.rpc.synced
        told[0], door.answer = "2", node(node_id="2")
        await trio.sleep(CHECK_EVERY + 1)
        assert watch.state.node_id == "2"
        assert watch.rpc.synced
        # Another kaspad's RPC: one more look, and no more.
        told[0] = "3"
        await trio.sleep(100)
        assert len(door.looks) == 3
        assert "another kaspad" in watch.rpc.problem
        assert not watch.rpc.peers


@pytest.mark.parametrize(
    ("error", "problem"),
    [
        (ConnectionRefusedError(111, "Connection refused"), "nothing listens there"),
        (OSError(113, "No route to host"), "No route to host"),
        (trio.TooSlowError(), "no answer in time"),
    ],
)
async def test_nothing_depends_on_rpc(
    error: Exception, problem: str, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    @asynccontextmanager
    async def open_facts(host: str, port: int) -> AsyncIterator[Any]:
        await trio.lowlevel.checkpoint()
        raise error
        yield

    door = Door(node())
    async with watching(door, monkeypatch, rpc=None, open_facts=open_facts) as watch:
        await trio.sleep(100)
        assert watch.state.up
        assert watch.rpc is not None
        assert watch.rpc.problem == problem
