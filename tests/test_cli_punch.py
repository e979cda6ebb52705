"""``kas-libp2p dial --wait punched`` and ``why``, with the peer that they dial, on a network in memory."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, NoReturn

import pytest
import trio
from multiaddr import Multiaddr
from trio.testing import MockClock

from kas_libp2p import Config, Node, open_node, tool
from kas_libp2p.config import PunchConfig, Purpose, RelayConfig, Role
from kas_libp2p.events import (
    CircuitReplaced,
    Event,
    IntentTold,
    PathProven,
    PunchAdopted,
    PunchAttemptFailed,
    PunchConnect,
    PunchDialed,
    PunchEnded,
    PunchStarted,
    PunchSync,
    PunchTargetRefused,
    UpgradeAbandoned,
    UpgradeDecided,
)
from kas_libp2p.metadata import Path, PathKind, PeerId
from kas_libp2p.swarm import SwarmConnection
from tests.command import events_of
from tests.network import MemoryHost, MemoryInternet, eventually
from tests.relay.scripted import node_at

DELAY = 0.02
BOB_AT, ALICE_AT = "/ip4/11.0.0.2/tcp/4001", "/ip4/11.0.0.3/tcp/4001"
PEER = PeerId("12D3KooWDxzbYi9JivZZxT7StM3pGGw1DMshva24XZTYKiUNLEdV")
SHORT = "12D3KooWDxzb…"
AT = "/ip4/192.0.2.1/tcp/4001"


@pytest.fixture
def internet(monkeypatch: pytest.MonkeyPatch) -> MemoryInternet:
    """The command runs at 11.0.0.3."""
    internet = MemoryInternet(delay=DELAY)
    monkeypatch.setattr(tool, "open_node", partial(open_node, network=internet.host("11.0.0.3")))
    return internet


@pytest.fixture
def nats(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody is let in by surprise."""

    async def refused(host: MemoryHost, address: Multiaddr) -> NoReturn:
        raise ConnectionRefusedError(111, "Connection refused")

    monkeypatch.setattr(MemoryHost, "dial_fresh", refused)


@pytest.fixture
def closed(internet: MemoryInternet, nats: None) -> None:
    """Nobody is let in at all."""
    for each in (BOB_AT, ALICE_AT):
        internet.refused[each] = ConnectionRefusedError(111, "Connection refused")


@asynccontextmanager
async def bob_behind_a_relay(internet: MemoryInternet, *, punches: bool = True) -> AsyncIterator[tuple[Node, Node]]:
    """A relay, and bob, who has a place on it."""
    serving = RelayConfig(serve=True, purpose=Purpose.ANY)
    async with node_at(internet, 1, Config(listen=("/ip4/11.0.0.1/tcp/1",), role=Role.PUBLIC, relay=serving)) as relay:
        config = Config(
            listen=(BOB_AT,),
            role=Role.PRIVATE,
            relay=RelayConfig(relays=relay.addresses),
            punch=PunchConfig(enabled=punches),
        )
        async with node_at(internet, 2, config) as bob:
            await eventually(lambda: any("p2p-circuit" in each for each in bob.addresses))
            yield relay, bob


async def dial(*targets: str, **settings: Any) -> None:
    """``dial --wait punched --listen ...``."""
    how: dict[str, Any] = {"key_file": None, "listen_on": (ALICE_AT,), "pings": 0, "stay": False, "as_json": True}
    with trio.fail_after(300):
        await tool.dial(targets, **(how | {"wait": True} | settings))


def circuit_to(bob: Node) -> str:
    return next(each for each in bob.addresses if "p2p-circuit" in each)


@pytest.mark.usefixtures("nats")
async def test_it_waits_until_it_is_direct(
    internet: MemoryInternet, autojump_clock: MockClock, capsys: pytest.CaptureFixture[str]
) -> None:
    async with bob_behind_a_relay(internet) as (relay, bob):
        await dial(circuit_to(bob), pings=2)
    events = events_of(capsys.readouterr().out)
    (connected,) = (each for each in events if each["event"] == "connected")
    assert connected["path"] == {"kind": "punched", "relay": relay.peer_id}
    paths = [each["path"]["kind"] for each in events if each["event"] == "connection-opened"]
    assert paths == ["direct", "relayed", "punched"]  # the relay's, and bob's two
    names = [each["event"] for each in events]
    stages = ["punch-connect", "punch-sync", "punch-started", "punch-ended", "connected", "pinged"]
    assert [each for each in dict.fromkeys(names) if each in stages] == stages
    assert "explained" not in names
    pings = [each["seconds"] for each in events if each["event"] == "pinged"]
    assert pings == [pytest.approx(2 * DELAY)] * 2


@pytest.mark.usefixtures("nats")
async def test_in_words(
    internet: MemoryInternet, autojump_clock: MockClock, capsys: pytest.CaptureFixture[str]
) -> None:
    async with bob_behind_a_relay(internet) as (_, bob):
        await dial(circuit_to(bob), as_json=False)
    lines = capsys.readouterr().out.splitlines()
    stages = [line.partition(" s  ")[2] for line in lines if " s  " in line]
    assert f"CONNECT: it is at {BOB_AT}" in stages
    assert f"CONNECT: we are at {ALICE_AT}" in stages
    assert "SYNC: came" in stages
    (attempt,) = (each for each in stages if each.startswith("attempt 1: dials "))
    assert BOB_AT in attempt
    assert any(each.startswith("connected, punched at /ip4/11.0.0.2/tcp/") for each in stages)
    assert stages[-1].startswith("punched: direct, attempt 1, ")
    assert f"connected to {bob.peer_id}" in lines
    assert any(line.startswith("  path      punched, /ip4/11.0.0.3/") for line in lines)


@pytest.mark.usefixtures("nats")
async def test_a_peer_and_its_relay_are_enough(
    internet: MemoryInternet, autojump_clock: MockClock, capsys: pytest.CaptureFixture[str]
) -> None:
    async with bob_behind_a_relay(internet) as (relay, bob):
        await dial(bob.peer_id, relays=relay.addresses)
    connected = [each for each in events_of(capsys.readouterr().out) if each["event"] == "connected"]
    assert [each["path"]["kind"] for each in connected] == ["punched"]


async def test_it_is_as_well_if_the_other_side_can_just_dial(
    internet: MemoryInternet, autojump_clock: MockClock, capsys: pytest.CaptureFixture[str]
) -> None:
    async with bob_behind_a_relay(internet) as (_, bob):
        await dial(circuit_to(bob))
    connected = [each for each in events_of(capsys.readouterr().out) if each["event"] == "connected"]
    assert [(each["path"]["kind"], each["direction"]) for each in connected] == [("direct", "inbound")]


async def test_what_is_direct_is_not_waited_for(internet: MemoryInternet, autojump_clock: MockClock) -> None:
    async with node_at(internet, 2, Config(listen=(BOB_AT,))) as bob:
        began = trio.current_time()
        await dial(bob.addresses[0])
        assert trio.current_time() - began < 1


@pytest.mark.usefixtures("closed")
async def test_nothing_comes_through(
    internet: MemoryInternet, autojump_clock: MockClock, capsys: pytest.CaptureFixture[str]
) -> None:
    async with bob_behind_a_relay(internet) as (_, bob):
        with pytest.raises(tool.StayedRelayed, match=f"{bob.peer_id} stayed relayed: nothing came through"):
            await dial(circuit_to(bob), pings=1)
    events = events_of(capsys.readouterr().out)
    failed = [each["attempt"] for each in events if each["event"] == "punch-attempt-failed"]
    assert failed == [1, 2, 3]
    (explained,) = (each for each in events if each["event"] == "explained")
    assert (explained["peer"], explained["path"]["kind"]) == (bob.peer_id, "relayed")
    assert any("nothing came through in 3 attempts" in each for each in explained["lines"])
    assert any(each["event"] == "pinged" for each in events)  # through the relay


async def test_a_peer_that_does_not_punch(
    internet: MemoryInternet, autojump_clock: MockClock, capsys: pytest.CaptureFixture[str]
) -> None:
    async with bob_behind_a_relay(internet, punches=False) as (_, bob):
        began = trio.current_time()
        with pytest.raises(tool.StayedRelayed, match="began no punch within 15 s"):
            await dial(circuit_to(bob), as_json=False)
        assert tool.INVITED_WITHIN < trio.current_time() - began < tool.INVITED_WITHIN + 3
    assert "  No punch was tried: that is for the other side to begin, and it has not." in capsys.readouterr().out


@pytest.mark.usefixtures("nats")
async def test_why_explains_what_is_direct_too(
    internet: MemoryInternet, autojump_clock: MockClock, capsys: pytest.CaptureFixture[str]
) -> None:
    async with bob_behind_a_relay(internet) as (_, bob):
        await dial(circuit_to(bob), as_json=False, why=True)
    *stages, first, last = capsys.readouterr().out.splitlines()
    assert "punched: direct, attempt 1" in stages[-1]
    assert "is direct: a hole was punched, 4" in first
    assert last.startswith("  It took the first attempt and ")


async def test_why_explains_what_stayed_relayed_and_is_content(
    internet: MemoryInternet, autojump_clock: MockClock, capsys: pytest.CaptureFixture[str]
) -> None:
    async with bob_behind_a_relay(internet, punches=False) as (_, bob):
        await dial(circuit_to(bob), why=True)
    explained = events_of(capsys.readouterr().out)[-3:]
    (lines,) = (each["lines"] for each in explained if each["event"] == "explained")
    assert "is relayed by" in lines[0]


@pytest.mark.parametrize(
    ("event", "says"),
    [
        (
            UpgradeDecided(
                peer=PEER, connection=1, decision="leave", reason="quiet", chance="punch", text="so it is", wait=0.0
            ),
            "stays relayed: so it is",
        ),
        (
            UpgradeDecided(
                peer=PEER, connection=1, decision="queue", reason="busy", chance="punch", text="2 others", wait=0.0
            ),
            "-queue (busy): 2 others",
        ),
        (
            IntentTold(
                peer=PEER, connection=1, by_us=False, answer="later", reason="busy", wait=2.0, nat={4: "is a puzzle"}
            ),
            "-it says later busy; its NAT is a puzzle",
        ),
        (
            PunchConnect(peer=PEER, connection=1, by_us=False, attempt=1, addresses=(AT,), rtt=0.08, seconds=0.1),
            f"CONNECT: it is at {AT} (round trip 80.00 ms)",
        ),
        (
            PunchConnect(peer=PEER, connection=1, by_us=True, attempt=1, addresses=(), rtt=None, seconds=0.1),
            "CONNECT: we are at no address",
        ),
        (PunchSync(peer=PEER, connection=1, by_us=True, attempt=1, seconds=0.1), "SYNC: sent"),
        (
            PunchStarted(
                peer=PEER,
                connection=1,
                inviter=True,
                attempt=2,
                targets=(AT,),
                untrusted=(),
                refused={},
                wait=0.04,
                seconds=0.1,
            ),
            f"attempt 2: dials {AT}, in 40.00 ms",
        ),
        (PunchTargetRefused(peer=PEER, address=AT, reason="private"), f"-{AT} is not dialed: private"),
        (
            PunchDialed(peer=PEER, address=AT, attempt=3, reason="ECONNREFUSED", after=0.1, seconds=0.05),
            f"-dial 3 of {AT}: ECONNREFUSED after 50 ms",
        ),
        (
            PunchAdopted(peer=PEER, address=AT, foreseen=True, after=0.1, seconds=0.05),
            f"its own dial came in from {AT}",
        ),
        (
            PunchAttemptFailed(peer=PEER, connection=1, inviter=True, attempt=1, text="no answer", seconds=0.1),
            "attempt 1 failed: no answer",
        ),
        (
            PunchEnded(
                peer=PEER, connection=1, inviter=True, reason="punched", text="", attempts=1, rtt=0.1, seconds=0.2
            ),
            "punched: direct, attempt 1, 0.2 s",
        ),
        (
            PunchEnded(
                peer=PEER, connection=1, inviter=True, reason="lost", text="it left", attempts=1, rtt=0.1, seconds=0.2
            ),
            "-the punch ended (lost): it left",
        ),
        (
            UpgradeAbandoned(
                peer=PEER, connection=1, stage="punch", reason="unreached", text="details", wait=9.0, seconds=1.0
            ),
            "stays relayed for now: nothing came through",
        ),
        (
            UpgradeAbandoned(
                peer=PEER, connection=1, stage="proving", reason="interrupted", text="it left", wait=9.0, seconds=1.0
            ),
            "the direct connection did not last: it left",
        ),
        (
            PathProven(
                peer=PEER,
                connection=2,
                path=Path(PathKind.PUNCHED, PEER),
                replaces=(1,),
                rtt=0.025,
                relayed_rtt=0.06,
                seconds=3.0,
            ),
            "the direct connection is stable: 25.00 ms, 60.00 ms through the relay",
        ),
        (CircuitReplaced(peer=PEER, connection=1, by=2, seconds=1.0), "-its circuit is closed"),
    ],
    ids=lambda value: value.name if isinstance(value, Event) else "",
)
def test_words(event: Event, says: str) -> None:
    """With a dash before what is only said if everything is wanted."""
    (line,) = tool._ListenWords(verbose=True)(event)
    assert f"{SHORT}  {says.removeprefix('-')}" in line
    assert len(tool._ListenWords(verbose=False)(event)) == (not says.startswith("-"))


class TestOthers:
    """A peer of another kind: it tells no intent, and makes each attempt an invitation of its own, as go does."""

    @staticmethod
    @asynccontextmanager
    async def inviting(internet: MemoryInternet, opens_at: int | None = None) -> AsyncIterator[Node]:
        """Bob, who invites whoever comes through the relay three times. His NAT lets in from an attempt on."""
        async with bob_behind_a_relay(internet, punches=False) as (_, bob), trio.open_nursery() as nursery:

            async def invite(connection: SwarmConnection) -> None:
                for attempt in range(3):
                    await trio.sleep(5)
                    if attempt == opens_at:
                        internet.refused.clear()
                    with trio.move_on_after(2):  # one attempt
                        await bob.dcutr.invite(connection.connection)

            def connected(connection: SwarmConnection) -> None:
                if connection.path.kind is PathKind.RELAYED:
                    nursery.start_soon(invite, connection)

            bob.swarm.on_connected.append(connected)
            yield bob
            nursery.cancel_scope.cancel()

    async def test_a_later_attempt_counts(
        self, closed: None, internet: MemoryInternet, autojump_clock: MockClock, capsys: pytest.CaptureFixture[str]
    ) -> None:
        async with self.inviting(internet, opens_at=1) as bob:
            await dial(circuit_to(bob))
        events = events_of(capsys.readouterr().out)
        ended = [each["reason"] for each in events if each["event"] == "punch-ended"]
        assert ended == ["punch_failed", "punched"]

    async def test_after_the_last_one_it_is_over(
        self, closed: None, internet: MemoryInternet, autojump_clock: MockClock, capsys: pytest.CaptureFixture[str]
    ) -> None:
        async with self.inviting(internet) as bob:
            began = trio.current_time()
            with pytest.raises(tool.StayedRelayed, match="nothing came through"):
                await dial(circuit_to(bob))
            assert trio.current_time() - began < 3 * (5 + 2 + 1)
        events = events_of(capsys.readouterr().out)
        assert len([each for each in events if each["event"] == "punch-ended"]) == 3
