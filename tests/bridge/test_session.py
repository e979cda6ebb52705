"""Bridges whose peers live in sessions: paths come and go, kaspad has one and the same peer. On the mock clock."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from kas_bridge import views
from kas_bridge._keeper import KeptState
from kas_bridge.config import RelayLimitChanges
from kas_libp2p.config import SessionConfig
from kas_libp2p.errors import KasError
from kas_libp2p.events import Event, KaspaPeerEnded, SessionEnded, SessionMoved
from kas_libp2p.kaspa import p2p_pb2 as pb
from kas_libp2p.metadata import Dialect, PathKind

from .test_app import is_joined, joined
from .test_leave_relay import direct_beside, opened_by, proven
from .test_relay import PLAIN, joined_by, private, relay_in
from .world import Kaspad, Machine, World, until, world


class Unbroken:
    """What must not change while paths do: the two nodes' one peer each."""

    def __init__(self, *pair: Machine) -> None:
        self.pair = pair
        self.peers = [machine.kaspad.light.peers[0] for machine in pair]
        self.ended = [len(machine.of("kaspa-peer-ended")) for machine in pair]

    async def check(self) -> None:
        """Both nodes have had this one peer all the time, and it answers."""
        for machine, peer, ended in zip(self.pair, self.peers, self.ended, strict=True):
            assert machine.kaspad.light.peers == [peer]
            assert peer.ended is None
            assert len(machine.of("kaspa-peer-ended")) == ended
            with trio.fail_after(5):
                await peer.ping()


def last(machine: Machine, kind: type[Event]) -> Any:
    return [each for each in machine.events if isinstance(each, kind)][-1]


def why(a: Machine, b: Machine) -> str:
    return "\n".join(views.why(a.bridge.why(b.peer)))


def table(machine: Machine) -> str:
    out = views.console()
    with out.capture() as shown:
        out.print(views.peers(machine.bridge.peers(), [], out))
    return shown.get()


async def direct_pair(w: World, **settings: Any) -> tuple[Machine, Machine, Unbroken]:
    """Two machines of which the first dials the second, which can be dialed."""
    a, b = await joined(w, **settings)
    await until(lambda: is_joined(a, b) and is_joined(b, a))
    return a, b, Unbroken(a, b)


# -- Moves -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("b_opens", [False, True])
async def test_from_the_relay_to_a_direct_path(b_opens: bool, tmp_path: Path, autojump_clock: MockClock) -> None:
    async with world(tmp_path) as w:
        box = await relay_in(w, 1)
        b = await private(w, box)
        a = await private(w, box)
        await opened_by(a, b, b_opens)
        await until(lambda: is_joined(a, b) and is_joined(b, a))
        pair = Unbroken(a, b)
        assert a.row(b)["path"] == PathKind.RELAYED
        assert a.row(b)["dialect"] == Dialect.MESSAGES
        assert a.row(b)["session"]["moves"] == 0
        assert "since it began" in why(a, b)
        await direct_beside(a, b)
        await trio.sleep(10)  # past the dwell
        proven(a, b)
        await until(lambda: a.row(b)["path"] == b.row(a)["path"] == PathKind.DIRECT)
        await pair.check()
        for machine, other in ((a, b), (b, a)):
            moved = last(machine, SessionMoved)
            assert (moved.previous.kind, moved.path.kind) == (PathKind.RELAYED, PathKind.DIRECT)
            assert (moved.resent, moved.seconds_without) == (0, 0)
            row = machine.row(other)
            assert (row["session"]["moves"], row["session"]["gaps"], row["session"]["waiting_s"]) == (1, 0, None)
            assert not machine.of("stream-failed"), "no other stream was tried"
            assert "Its Kaspa session moved to the direct path" in why(machine, other)
            assert "nothing had to be sent again" in why(machine, other)


async def test_a_circuit_whose_time_is_over_is_left_before(tmp_path: Path, autojump_clock: MockClock) -> None:
    """A relay with the reference's time: its circuits end every two minutes, and no node sees anything of it."""
    async with world(tmp_path) as w:
        limits = RelayLimitChanges(max_circuit_seconds=120.0)
        box = await relay_in(w, 1, relaying=limits)
        b = await private(w, box)
        a = await private(w, box, peer=(b.address,))
        await until(lambda: joined_by(a, b) and joined_by(b, a))
        pair = Unbroken(a, b)
        await trio.sleep(600)
        await pair.check()
        for machine, other in ((a, b), (b, a)):
            session = machine.row(other)["session"]
            assert (session["moves"] >= 5, session["gaps"]) == (True, 0), "each time before it was cut"


async def test_a_relay_is_lost_and_another_carries_on(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with world(tmp_path) as w:
        one, two = await relay_in(w, 1), await relay_in(w, 2)
        b = await private(w, one, two)
        a = await private(w, one, two)
        a.bridge.connect(b.address)
        await until(lambda: joined_by(a, b) and joined_by(b, a))
        await trio.sleep(5)
        pair = Unbroken(a, b)
        gone, other = (one, two) if joined_by(a, b) == one.peer else (two, one)
        gone.end()
        assert await until(lambda: joined_by(a, b) == joined_by(b, a) == other.peer) < 2
        await pair.check()


async def test_a_path_that_hangs_is_left_and_nobody_notices(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with world(tmp_path) as w:
        a, b, pair = await direct_pair(w)
        await trio.sleep(100)
        w.hang()
        with trio.fail_after(8):
            await pair.peers[0].ping()  # asked when nothing arrives any more, answered on the next path
        await pair.check()
        assert a.row(b)["session"]["moves"] >= 1
        assert not a.bridge.ends


# -- No path -----------------------------------------------------------------------------------------------------------


class Cut:
    """Nobody reaches anybody any more, until this is undone."""

    def __init__(self, w: World) -> None:
        self._there = w.internet.listeners
        self._kept = dict(self._there)
        self._there.clear()
        w.hang()

    def undo(self) -> None:
        self._there.update(self._kept)


async def test_without_any_path_it_waits_and_goes_on(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with world(tmp_path) as w:
        a, b, pair = await direct_pair(w)
        cut = Cut(w)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pair.peers[0].ping)
            await until(lambda: a.of("session-waiting"), 10)
            await trio.sleep(3)
            session = a.row(b)["session"]
            assert session["state"] == "waiting"
            assert session["waiting_s"] == pytest.approx(3.0, abs=0.2)
            assert session["waiting_s"] + session["ends_in_s"] == pytest.approx(30.0)
            assert "no path for 3" in table(a)
            assert "ends in 27 s" in table(a)
            assert "has no path for 3" in why(a, b)
            assert "It waits for another path" in why(a, b)
            status = a.bridge.status()
            assert (status["sessions"]["in_use"], status["sessions"]["waiting"]) == (1, 1)
            assert "1 of at most 256, 1 without a path now" in "\n".join(views.status(status))
            cut.undo()
            await until(lambda: a.of("session-moved") and b.of("session-moved"), 10)
        await pair.check()
        assert last(a, SessionMoved).seconds_without == pytest.approx(last(b, SessionMoved).seconds_without, abs=6)
        assert a.row(b)["session"]["gaps"] == 1


async def test_what_gathered_meanwhile_is_paced_into_kaspad(tmp_path: Path, autojump_clock: MockClock) -> None:
    """The node behind has said a thousand things that the other one must not hear at once."""
    async with world(tmp_path) as w:
        a, _, pair = await direct_pair(w)
        heard: list[float] = []
        answer = pair.peers[1]._answer

        async def hear(raw: bytes) -> None:
            heard.append(trio.current_time())
            await answer(raw)

        pair.peers[1]._answer = hear  # type: ignore[method-assign]
        cut = Cut(w)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pair.peers[0].ping)
            await until(lambda: a.of("session-waiting"), 10)
            for nonce in range(1000):
                message = pb.KaspadMessage(ping=pb.Ping(nonce=nonce))
                await pair.peers[0].channel.send(message.SerializeToString())
            cut.undo()
            await until(lambda: len(heard) > 1000, 20)
        begun = heard[0]
        assert sum(at < begun + 0.1 for at in heard) < 300
        assert heard[-1] - begun > 0.5
        await pair.check()


async def test_without_a_path_for_too_long_it_ends_with_the_reason(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with world(tmp_path) as w:
        a, b, pair = await direct_pair(w)
        cut = Cut(w)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_ping_in_vain, pair.peers[0])
            await until(lambda: a.of("session-waiting") and b.of("session-waiting"), 20)
            assert 29 < await until(lambda: a.of("kaspa-peer-ended") and b.of("kaspa-peer-ended"), 40) < 36
        for machine in (a, b):
            ended, session = last(machine, KaspaPeerEnded), last(machine, SessionEnded)
            assert (ended.by, ended.reason, session.code) == ("path", "path lost", "lost")
            assert ended.text == session.reason
            assert "30 s" in ended.text
            assert machine.of("session-waiting")
        (kept,) = a.bridge.keeper.all()
        assert kept.state is not KeptState.HERE
        cut.undo()
        assert await until(lambda: is_joined(a, b) and is_joined(b, a)) < 10


async def _ping_in_vain(peer: Any) -> None:
    with pytest.raises(KasError):
        await peer.ping()


async def test_patience_is_a_setting(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with world(tmp_path) as w:
        short = SessionConfig(patience=5.0)
        b = await w.machine(session=short)
        a = await w.machine(peer=(b.address,), session=short)
        await until(lambda: is_joined(a, b) and is_joined(b, a))
        Cut(w)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_ping_in_vain, a.kaspad.light.peers[0])
            await until(lambda: a.of("session-waiting"), 20)
            assert await until(lambda: a.of("kaspa-peer-ended"), 40) < 6


# -- Starting anew -----------------------------------------------------------------------------------------------------


class Restartable:
    """A machine that can be ended and started again, with its key and its kaspad."""

    def __init__(self, w: World, **settings: Any) -> None:
        self._world = w
        self._settings = settings
        self._scope = trio.CancelScope()
        self._over = trio.Event()

    async def start(self, kaspad: Kaspad) -> Machine:
        started: list[Machine] = []
        ready, self._over = trio.Event(), trio.Event()

        async def live() -> None:
            with trio.CancelScope() as self._scope:
                async with self._world._machine(50, kaspad, {**self._settings}) as machine:
                    started.append(machine)
                    ready.set()
                    await trio.sleep_forever()
            self._over.set()

        self._world.nursery.start_soon(live)
        await ready.wait()
        return started[0]

    async def again(self, machine: Machine, *, killed: bool) -> Machine:
        if killed:
            self._world.hang()  # nobody is told
        else:
            machine.bridge.stop("for the test")
            await until(lambda: not machine.bridge.joiner.peers)
        self._scope.cancel()
        await self._over.wait()
        return await self.start(machine.kaspad)


@pytest.mark.parametrize("who_keeps", ["it", "the other"])
@pytest.mark.parametrize("killed", [False, True])
async def test_a_bridge_that_starts_anew(
    killed: bool, who_keeps: str, tmp_path: Path, autojump_clock: MockClock
) -> None:
    """Both sides end what was within two seconds of the new start, and the nodes meet again."""
    async with world(tmp_path) as w:
        a = await w.machine()
        again = Restartable(w, peer=(a.address,) if who_keeps == "it" else ())
        b = await again.start(await w.kaspad())
        if who_keeps == "the other":
            a.bridge.connect(b.address)
        await until(lambda: is_joined(a, b) and is_joined(b, a))
        await trio.sleep(60)
        old = a.kaspad.light.peers[0]
        b = await again.again(b, killed=killed)
        async with trio.open_nursery() as nursery:
            if killed and who_keeps == "the other":
                nursery.start_soon(_ping_in_vain, old)  # else it has no reason to look
            took = await until(lambda: is_joined(a, b) and is_joined(b, a) and a.kaspad.light.peers != [old], 20)
            nursery.cancel_scope.cancel()
        assert took < (8 if killed and who_keeps == "the other" else 2.5)
        assert len(a.kaspad.light.peers) == len(b.kaspad.light.peers) == 1
        ended = last(a, KaspaPeerEnded)
        assert ended.reason == ("peer restarted" if killed else "peer stopped")
        with trio.fail_after(5):
            await a.kaspad.light.peers[0].ping()


async def test_a_stop_ends_it_at_the_other_side(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with world(tmp_path) as w:
        a, b, _ = await direct_pair(w)
        b.bridge.stop("for the test")
        assert await until(lambda: not is_joined(a, b)) < 2
        assert last(a, KaspaPeerEnded).reason == "peer stopped"
        assert not a.bridge.status()["sessions"]["waiting"]


# -- With others -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("without", ["a", "b", "both"])
async def test_who_has_none_gets_a_plain_stream(without: str, tmp_path: Path, autojump_clock: MockClock) -> None:
    async with world(tmp_path) as w:
        b = await w.machine(**({"session": PLAIN} if without != "a" else {}))
        a = await w.machine(peer=(b.address,), **({"session": PLAIN} if without != "b" else {}))
        await until(lambda: is_joined(a, b) and is_joined(b, a))
        assert a.row(b)["session"] is None
        assert a.row(b)["dialect"] == Dialect.MESSAGES
        assert not a.of("session-opened")
        assert ("  sessions  off;" in "\n".join(views.status(a.bridge.status()))) is (without != "b")
        await Unbroken(a, b).check()
