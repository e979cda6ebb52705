"""The upgrader of both ends of a circuit, on connections in memory; what makes the punch is scripted."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path as File
from random import Random
from types import SimpleNamespace
from typing import TypeVar, cast

import pytest
import trio

from kas_libp2p import addresses, ping
from kas_libp2p.autonat._roles import Filtering
from kas_libp2p.config import Config, PunchConfig
from kas_libp2p.dcutr._machine import Reason
from kas_libp2p.dcutr.service import Outcome
from kas_libp2p.errors import ConnectionLost, DialError, NegotiationError, Refused, StreamReset
from kas_libp2p.events import (
    CircuitReplaced,
    Event,
    EventBus,
    FileDamaged,
    IntentTold,
    PathProven,
    PunchEnded,
    UpgradeAbandoned,
    UpgradeDecided,
)
from kas_libp2p.metadata import Path, PathKind, PeerId
from kas_libp2p.strategy._intent import PROTOCOL, Answer
from kas_libp2p.strategy._nat import PREDICTED, NatFacts, Sighting
from kas_libp2p.strategy._upgrade import State
from kas_libp2p.strategy._why import Facts
from kas_libp2p.strategy.upgrader import (
    LINGER,
    MOST_PREDICTED,
    PAUSE,
    REFUSED,
    ROUND_TIMEOUT,
    ROUNDS,
    SPREADS_PER_PEER,
    Upgrader,
    _cause_of,
)
from kas_libp2p.transport._punch import Target
from kas_libp2p.transport.connection import Connection
from kas_libp2p.transport.yamux.stream import YamuxStream
from tests.strategy.test_nat import nat_of
from tests.transport.pairs import ALICE, BOB, ECHO, Pair, connected

RELAY = PeerId("12D3KooWPjceQrSwdWXPyLLeABRXmuqt69Rg3sBYbU1Nft9HyQ6X")
RELAYED, PUNCHED = Path(PathKind.RELAYED, RELAY), Path(PathKind.PUNCHED, RELAY)
DELAY = 0.05
PR = NatFacts(nat_of("pr"))
T = TypeVar("T", bound=Event)


class Told(EventBus):
    def __init__(self) -> None:
        super().__init__(trio.current_time)
        self.all: list[Event] = []

    def emit(self, event: Event) -> None:
        super().emit(event)
        self.all.append(event)

    def only(self, kind: type[T]) -> list[T]:
        return [each for each in self.all if isinstance(each, kind)]


class End:
    """One side: an upgrader, and a node that does as little as it can."""

    def __init__(self, world: World, facts: NatFacts, config: PunchConfig) -> None:
        self.world = world
        self.facts = facts
        self.bus = Told()
        self.invited: list[float] = []
        self.abandoned: list[str] = []
        self.dialed: list[str] = []
        self.punch: Callable[[Connection], Pair | None] = lambda circuit: None
        self.ending = trio.Event()
        self.upgrader = Upgrader(
            Config(punch=config),
            self.bus,
            invite=self._invite,
            abandon=self._abandon,
            dial=self._dial,
            facts=lambda: (self.facts, ()),
            wall_clock=trio.current_time,
            dice=Random(1),
        )

    async def _invite(self, circuit: Connection) -> Outcome:
        """DCUtR, which takes two round trips."""
        started = trio.current_time()
        self.invited.append(started)
        self.ending = trio.Event()
        with trio.move_on_after(4 * DELAY):
            await self.ending.wait()
            return self._end(circuit, Reason.ABANDONED, started)
        punched = self.punch(circuit)
        if punched is None:
            return self._end(circuit, Reason.PUNCH_FAILED, started)
        self.world.up(punched)
        return self._end(circuit, Reason.PUNCHED, started)

    def _end(self, circuit: Connection, reason: Reason, started: float) -> Outcome:
        seconds = trio.current_time() - started
        outcome = Outcome(circuit.peer, True, reason, "", 1, seconds, None, None, None)
        self.bus.emit(
            PunchEnded(
                peer=circuit.peer,
                connection=circuit.number,
                inviter=True,
                reason=reason,
                text="",
                attempts=1,
                rtt=None,
                seconds=seconds,
            )
        )
        self.upgrader.punched(outcome)
        return outcome

    def _abandon(self, peer: PeerId, text: str) -> bool:
        self.abandoned.append(text)
        self.ending.set()
        return True

    async def _dial(self, peer: PeerId, address: str) -> None:
        self.dialed.append(address)
        raise DialError(address, hint="nobody answers")

    @property
    def state(self) -> State | None:
        return next((each.state for each in self.upgrader.status()), None)


class World:
    """Alice has called bob through a relay: `circuit`. `spare` is there to be the punched connection."""

    def __init__(self, nursery: trio.Nursery, circuit: Pair, spare: Pair, config: PunchConfig, bob: NatFacts) -> None:
        self.nursery = nursery
        self.circuit, self.spare = circuit, spare
        for pair, path in ((circuit, RELAYED), (spare, PUNCHED)):
            for each in (pair.alice, pair.bob):
                each.path = path
        self.alice, self.bob = End(self, PR, config), End(self, bob, config)
        self.bob.punch = lambda circuit: self.spare

    def up(self, pair: Pair) -> None:
        for end, connection in ((self.alice, pair.alice), (self.bob, pair.bob)):
            end.upgrader.connected(connection)
            self.nursery.start_soon(self._serve, end, pair, connection)
            self.nursery.start_soon(self._watch, end, connection)

    async def _serve(self, end: End, pair: Pair, connection: Connection) -> None:
        async with trio.open_nursery() as nursery:
            while True:
                nursery.start_soon(self._one, end, connection, await pair.inbound(connection))

    async def _one(self, end: End, connection: Connection, stream: YamuxStream) -> None:
        try:
            if await connection.accept(stream, [PROTOCOL, ping.ID, ECHO]) == PROTOCOL:
                await end.upgrader.intents.handle(stream)
                await stream.aclose()
            elif stream.protocol == ping.ID:
                await ping.handle(stream)
        except (NegotiationError, StreamReset):
            pass

    async def _watch(self, end: End, connection: Connection) -> None:
        await connection.wait_closed()
        end.upgrader.disconnected(connection)


@asynccontextmanager
async def world(*, bob: NatFacts = PR, **settings: object) -> AsyncIterator[World]:
    config = replace(PunchConfig(), **settings)  # type: ignore[arg-type]
    async with AsyncExitStack() as stack:
        circuit = await stack.enter_async_context(connected(delay=DELAY))
        spare = await stack.enter_async_context(connected(delay=DELAY))
        async with trio.open_nursery() as nursery:
            here = World(nursery, circuit, spare, config, bob)
            for each in (here.alice, here.bob):
                await nursery.start(each.upgrader.run)
            yield here
            nursery.cancel_scope.cancel()


async def test_a_relayed_connection_becomes_direct_and_is_closed(autojump_clock: trio.abc.Clock) -> None:
    async with world() as here:
        started = trio.current_time()
        here.up(here.circuit)
        assert here.bob.upgrader.status()[0].state is State.PUNCHING
        await trio.sleep(1.0)
        assert here.bob.invited == [started]  # in the very turn in which the circuit came up
        assert here.alice.invited == []
        for end in (here.alice, here.bob):
            assert end.state is State.PROVING
            told = end.bus.only(IntentTold)
            assert {(each.by_us, each.answer) for each in told} == {(True, "yes"), (False, "yes")}
        assert here.bob.upgrader.theirs(ALICE.peer_id) is not None
        assert here.alice.upgrader.shares_local(BOB.peer_id)
        await trio.sleep(ROUNDS * (PAUSE + 4 * DELAY) + LINGER + 1)
        for end, pair_end in ((here.alice, here.spare.alice), (here.bob, here.spare.bob)):
            (proof,) = end.bus.only(PathProven)
            assert proof.connection == pair_end.number
            assert proof.rtt == pytest.approx(2 * DELAY, abs=0.02)
            assert end.state is State.STABLE
        assert here.circuit.bob.close_reason is not None
        replaced = [each for end in (here.alice, here.bob) for each in end.bus.only(CircuitReplaced)]
        assert len(replaced) == 2
        assert all(each.seconds > 0.9 * LINGER for each in replaced)
        assert here.spare.bob.close_reason is None


async def test_a_circuit_in_use_is_not_cut(autojump_clock: trio.abc.Clock) -> None:
    async with world() as here:
        here.up(here.circuit)
        stream = await here.circuit.alice.open_stream(ECHO)
        await stream.send_all(b"hello")
        await trio.sleep(30.0)
        assert here.bob.bus.only(PathProven)
        assert here.circuit.bob.close_reason is None
        stream.reset()
        await trio.sleep(2.0)
        assert here.circuit.bob.close_reason is not None


async def test_a_no_ends_the_punch_after_one_round_trip(autojump_clock: trio.abc.Clock) -> None:
    async with world(bob=NatFacts(nat_of("sym"))) as here:
        here.alice.facts = NatFacts(nat_of("sym"))
        started = trio.current_time()
        here.up(here.circuit)
        await trio.sleep(2 * DELAY + 0.01)
        assert here.bob.state is State.COOLING
        assert here.bob.abandoned
        (event,) = here.bob.bus.only(UpgradeAbandoned)
        assert (event.stage, event.reason) == ("intent", "hopeless")
        assert event.seconds <= 2 * DELAY + 0.01
        assert not here.alice.upgrader.welcomes(here.circuit.alice), "what is read after the intent came with it"
        assert here.bob.upgrader.welcomes(here.circuit.bob)
        await trio.sleep(REFUSED)
        assert here.alice.upgrader.welcomes(here.circuit.alice), "what comes later is asked for anew"
        await trio.sleep(600)
        assert here.bob.invited == [started]
        assert not here.bob.bus.only(PathProven)
        why = here.bob.upgrader.why(
            ALICE.peer_id, Facts(here.bob.facts, here.alice.facts, RELAYED, 0.1, "ashburn", "off, see --port-mapping")
        )
        assert why[0].endswith("is relayed by ashburn, 100 ms.")
        assert "  No punch was tried: none can work." in why
        assert any("a port mapping on either side (ours: off, see --port-mapping)" in each for each in why)


async def test_switched_off_at_one_side_is_a_no_for_both(autojump_clock: trio.abc.Clock) -> None:
    async with world() as here:
        here.alice.upgrader._machine._config = replace(PunchConfig(), enabled=False)
        here.up(here.circuit)
        await trio.sleep(1.0)
        (told,) = [each for each in here.bob.bus.only(IntentTold) if not each.by_us]
        assert (told.answer, told.reason) == (Answer.NO, "disabled")
        assert here.bob.bus.only(UpgradeAbandoned)[0].reason == "declined"


async def test_a_punched_connection_that_dies_while_it_is_proven_leaves_the_circuit(
    autojump_clock: trio.abc.Clock,
) -> None:
    async with world() as here:
        here.up(here.circuit)
        await trio.sleep(1.0)
        here.spare.alice_raw.abort()
        await trio.sleep(10.0)
        assert here.bob.upgrader._memory.lifetime(ALICE.peer_id) is None  # no ping has been missed
        assert here.bob.bus.only(UpgradeAbandoned)[0].stage == "proving"
        assert here.circuit.bob.close_reason is None
        assert here.circuit.alice.close_reason is None


async def test_one_that_swallows_what_is_sent_is_dropped(autojump_clock: trio.abc.Clock) -> None:
    async with world() as here:
        here.up(here.circuit)
        await trio.sleep(1.0)
        assert here.bob.state is State.PROVING
        for raw in (here.spare.alice_raw, here.spare.bob_raw):
            raw.send_nowait = len  # type: ignore[method-assign,assignment]
        await trio.sleep(ROUND_TIMEOUT + PAUSE + 1)
        assert here.spare.bob.close_reason is not None
        assert here.bob.bus.only(UpgradeAbandoned)[0].reason == "unstable"
        assert here.circuit.bob.close_reason is None


async def test_failed_punches_are_far_apart(autojump_clock: trio.abc.Clock) -> None:
    async with world() as here:
        here.bob.punch = lambda circuit: None
        here.up(here.circuit)
        await trio.sleep(3600.0)
        assert 4 <= len(here.bob.invited) <= 6  # after 2, 6, 14, 30 and 62 minutes
        assert here.circuit.bob.close_reason is None
        words = here.bob.upgrader.why(ALICE.peer_id, Facts(PR, PR, RELAYED))
        assert any("nothing came through in 1 attempt" in each for each in words)
        here.bob.bus.emit(
            UpgradeDecided(
                peer=ALICE.peer_id,
                connection=1,
                decision="queue",
                reason="busy",
                chance="punch",
                text="so be it",
                wait=0,
            )
        )
        words = here.bob.upgrader.why(ALICE.peer_id, Facts(PR, PR, RELAYED))
        assert "  It waits for its turn: so be it." in words, "what happened in this very moment counts"


async def test_one_attempt_is_enough_where_the_first_works_or_none(autojump_clock: trio.abc.Clock) -> None:
    async with world(bob=NatFacts(replace(nat_of("pr"), filtering=Filtering.UNKNOWN))) as here:
        here.alice.facts = NatFacts(nat_of("sym"))
        here.up(here.circuit)
        await trio.sleep(3 * DELAY)
        here.bob.upgrader.attempt_failed(ALICE.peer_id, 1, "unanswered")
        assert here.bob.abandoned == ["a second attempt would do no better"]
        assert here.bob.state is State.COOLING


async def test_nothing_is_left_of_a_peer_that_went(autojump_clock: trio.abc.Clock) -> None:
    async with world() as here:
        here.bob.punch = lambda circuit: None
        here.up(here.circuit)
        await trio.sleep(0.05)
        here.circuit.alice.abort("it goes")
        await trio.sleep(20.0)
        assert here.bob.upgrader.status() == ()
        assert here.bob.upgrader._scopes == {}
        assert here.bob.upgrader._aimed == here.bob.upgrader._asking == here.bob.upgrader._kept == {}
        assert here.bob.upgrader._connections == {}


class AsItEnds(trio.abc.Instrument):
    """Does something as an upgrader's first task is over, which in half of all cases is the last one."""

    def __init__(self, work: Callable[[], None]) -> None:
        self._work = work
        self.failures: list[RuntimeError] = []

    def task_exited(self, task: trio.lowlevel.Task) -> None:
        if task.name.endswith("Upgrader._record"):
            try:
                self._work()
            except RuntimeError as error:
                self.failures.append(error)


async def test_a_circuit_that_comes_as_the_node_ends_is_no_fault(autojump_clock: trio.abc.Clock) -> None:
    async def lost(protocol: str) -> YamuxStream:
        raise ConnectionLost("the node ends")

    circuit = SimpleNamespace(number=1, peer=BOB.peer_id, path=RELAYED, initiator=False, circuit=None, rtt=None)
    circuit.open_stream = lost
    for _ in range(20):
        end = End(cast(World, None), PR, PunchConfig())
        instrument = AsItEnds(partial(end.upgrader.connected, cast(Connection, circuit)))
        async with trio.open_nursery() as node:
            await node.start(end.upgrader.run)
            trio.lowlevel.add_instrument(instrument)
            node.cancel_scope.cancel()
        trio.lowlevel.remove_instrument(instrument)
        assert not instrument.failures
        assert end.state is State.PUNCHING


async def test_what_is_claimed_is_dialed_first_where_the_relay_saw_it(autojump_clock: trio.abc.Clock) -> None:
    async with world() as here:
        upgrader = here.bob.upgrader
        here.up(here.circuit)
        upgrader._machine._peers[ALICE.peer_id].circuits[here.circuit.bob.number].seen_at = "/ip4/11.5.0.1/tcp/9"
        upgrader.identified(here.circuit.bob, ["/ip4/11.5.0.1/tcp/16117", "/ip4/11.6.0.1/tcp/16117"], [])
        await trio.sleep(0.01)
        assert here.bob.dialed == ["/ip4/11.5.0.1/tcp/16117"]


async def test_the_keepalive_of_a_punched_connection_is_shorter(autojump_clock: trio.abc.Clock) -> None:
    async with world(keepalive=15.0) as here:
        here.up(here.circuit)
        await trio.sleep(1.0)
        assert here.spare.bob._machine.keepalive == 15.0
        assert here.circuit.bob._machine.keepalive == Config().yamux.keepalive


async def test_where_mappings_die_early_peers_are_told_and_pinged_more_often(autojump_clock: trio.abc.Clock) -> None:
    async with world() as here:
        for number in range(2):
            here.alice.upgrader._memory.mapping_lost(PeerId(f"peer {number}"), 14.0)
        here.up(here.circuit)
        await trio.sleep(1.0)
        intent = here.bob.upgrader.theirs(ALICE.peer_id)
        assert intent is not None
        assert intent.nat.v4 is not None
        assert intent.nat.v4.lifetime == 14.0
        await trio.sleep(5.0)
        assert here.spare.alice._machine.keepalive == here.spare.bob._machine.keepalive == 7.0


async def test_a_silent_death_while_others_live_is_remembered(autojump_clock: trio.abc.Clock) -> None:
    async with world() as here:
        here.up(here.circuit)
        await trio.sleep(1.0)
        for raw in (here.spare.alice_raw, here.spare.bob_raw):
            raw.send_nowait = len  # type: ignore[method-assign,assignment]
        for end in (here.alice, here.bob):
            end.upgrader._machine.unproven = lambda *_: []  # type: ignore[method-assign]
        await trio.sleep(45.0)
        assert here.spare.bob.broke
        assert here.bob.upgrader._memory.lifetime(ALICE.peer_id) == PunchConfig().keepalive


SYMSEQ = NatFacts(
    replace(nat_of("symseq"), sightings=tuple(Sighting(9.0 - index, 40000 + index) for index in range(3)))
)


def target(address: str, **more: bool) -> Target:
    return Target(addresses.parse(address), **more)


async def test_guessed_ports_are_dialed_in_place_of_those_that_lead_to_others(autojump_clock: trio.abc.Clock) -> None:
    async with world() as here:
        here.alice.facts = SYMSEQ
        here.up(here.circuit)
        targets = [
            target("/ip4/11.2.0.1/tcp/40002"),
            target("/ip4/11.7.0.1/tcp/16117", trusted=False),
            target("/ip6/2d00:1::1/tcp/16117"),
            target("/ip4/192.168.0.7/tcp/16117", local=True),
        ]
        upgrader = here.bob.upgrader
        await trio.sleep(0.01)
        await upgrader.told(ALICE.peer_id, trio.current_time() + 10)
        aimed = upgrader.aim(ALICE.peer_id, targets)
        assert [str(each.address) for each in aimed] == [
            *(f"/ip4/11.2.0.1/tcp/{port}" for port in range(40003, 40003 + PREDICTED)),
            *(str(each.address) for each in targets[1:]),
        ]
        assert len(upgrader.aim(ALICE.peer_id, targets)) == 2 * PREDICTED + 3
        for _ in range(9):
            assert len(upgrader.aim(ALICE.peer_id, targets)) <= MOST_PREDICTED + 3
        await trio.sleep(1.0)
        assert len(upgrader.aim(ALICE.peer_id, targets)) == PREDICTED + 3  # of another punch the first attempt


BLOCK = NatFacts(replace(nat_of("symblk"), sightings=tuple(Sighting(9.0, port) for port in (41100, 41002, 41471))))


@pytest.mark.parametrize("agreed", [True, False])
async def test_many_ports_are_dialed_and_dialed_from_if_both_agreed(
    autojump_clock: trio.abc.Clock, agreed: bool
) -> None:
    async with world(birthday=True) as here:
        here.alice.facts = BLOCK
        here.alice.upgrader._machine._config = replace(PunchConfig(), birthday=agreed)
        here.up(here.circuit)
        await trio.sleep(0.12)
        there, here_at = target("/ip4/11.2.0.1/tcp/41100"), target("/ip4/11.1.0.1/tcp/16117")
        six = target("/ip6/2d00:1::1/tcp/16117")
        assert here.bob.upgrader.tries_many(ALICE.peer_id) is agreed
        assert here.alice.upgrader.tries_many(BOB.peer_id) is agreed
        if not agreed:
            assert here.bob.upgrader.aim(ALICE.peer_id, [there, six]) == (there, six)
            assert here.alice.upgrader.aim(BOB.peer_id, [here_at, six]) == (here_at, six)
            return
        hits = here.bob.upgrader.aim(ALICE.peer_id, [there, six])
        ports = [addresses.ip_port(each.address) for each in hits[:-1]]
        assert len(set(ports)) == 64
        assert all(where is not None and where[0] == "11.2.0.1" and 40960 <= where[1] < 41472 for where in ports)
        assert hits[-1] == six
        sources = here.alice.upgrader.aim(BOB.peer_id, [here_at, six])
        assert sources == (here_at, *(replace(here_at, source=number) for number in range(1, 33)), six)
        for _ in range(SPREADS_PER_PEER - 1):
            assert len(here.bob.upgrader.aim(ALICE.peer_id, [there])) == 64
        assert here.bob.upgrader.aim(ALICE.peer_id, [there]) == (there,)  # that was enough for ten minutes


async def test_after_a_wrong_guess_ports_that_seem_to_be_counted_may_be_drawn(
    autojump_clock: trio.abc.Clock,
) -> None:
    """Three ports of a block stand in order once in a while."""
    async with world(birthday=True) as here:
        here.alice.facts = SYMSEQ
        here.alice.upgrader._machine._config = replace(PunchConfig(), birthday=True)
        here.up(here.circuit)
        await trio.sleep(0.12)
        there, here_at = target("/ip4/11.2.0.1/tcp/40002"), target("/ip4/11.1.0.1/tcp/16117")
        bob, alice = here.bob.upgrader, here.alice.upgrader
        first = bob.aim(ALICE.peer_id, [there])
        assert alice.aim(BOB.peer_id, [here_at]) == (here_at,)
        assert not bob.tries_many(ALICE.peer_id)
        assert not alice.tries_many(BOB.peer_id)
        second = bob.aim(ALICE.peer_id, [there])
        assert second[:PREDICTED] == first
        assert 2 * PREDICTED < len({*second}) == len(second) <= 2 * PREDICTED + 64
        where = [addresses.ip_port(each.address) for each in second[2 * PREDICTED :]]
        assert all(each is not None and 39936 <= each[1] < 40448 for each in where)
        assert len(alice.aim(BOB.peer_id, [here_at])) == 1 + 32
        assert bob.tries_many(ALICE.peer_id)
        assert alice.tries_many(BOB.peer_id)


async def test_at_a_nat_that_counts_for_certain_many_ports_are_not_tried(autojump_clock: trio.abc.Clock) -> None:
    """Though they may be at the other one's."""
    crossing = [Sighting(9.0 - index, port) for index, port in enumerate((40958, 40959, 40961))]  # two blocks
    async with world(birthday=True) as here:
        here.bob.facts = SYMSEQ
        here.alice.facts = NatFacts(replace(nat_of("symseq"), sightings=tuple(crossing)))
        here.alice.upgrader._machine._config = replace(PunchConfig(), birthday=True)
        here.up(here.circuit)
        await trio.sleep(0.12)
        for attempt in (1, 2):
            aimed = here.bob.upgrader.aim(ALICE.peer_id, [target("/ip4/11.2.0.1/tcp/40962")])
            assert len(aimed) == attempt * PREDICTED


async def test_nothing_is_guessed_where_that_is_switched_off(autojump_clock: trio.abc.Clock) -> None:
    async with world(predict=False) as here:
        here.alice.facts = SYMSEQ
        here.up(here.circuit)
        await trio.sleep(0.3)
        targets = [target("/ip4/11.2.0.1/tcp/40002")]
        assert here.bob.upgrader.aim(ALICE.peer_id, targets) == tuple(targets)


async def test_nobody_is_waited_for_who_was_not_asked_or_does_not_tell(autojump_clock: trio.abc.Clock) -> None:
    async with world() as here:
        started = trio.current_time()
        await here.bob.upgrader.told(ALICE.peer_id, started + 10)
        assert trio.current_time() == started
        here.up(here.circuit)
        await trio.sleep(0.01)
        await here.bob.upgrader.told(ALICE.peer_id, started + 0.05)
        assert trio.current_time() == started + 0.05
        await here.bob.upgrader.told(ALICE.peer_id, started + 10)
        assert trio.current_time() == pytest.approx(started + 2 * DELAY, abs=0.01)


async def test_decisions_are_told_with_their_times(autojump_clock: trio.abc.Clock) -> None:
    async with world() as here:
        here.up(here.circuit)
        await trio.sleep(10.0)
        names = [each.name for each in here.bob.bus.all]
        assert names == [
            "upgrade-decided",
            "intent-told",
            "intent-told",
            "punch-ended",
            "path-proven",
            "circuit-replaced",
        ]
        assert here.bob.bus.only(UpgradeDecided)[0].chance == "unknown"
        words = here.bob.upgrader.why(ALICE.peer_id, Facts(path=PUNCHED, rtt=0.1))
        assert words[0].endswith("is direct: a hole was punched, 100 ms.")
        assert words[1].startswith("  It took the first attempt and 0.2 s")


async def test_what_came_of_it_is_remembered_in_a_file(autojump_clock: trio.abc.Clock, tmp_path: File) -> None:
    path = tmp_path / "punches.json"
    async with world(state_file=path) as here:
        here.bob.punch = lambda circuit: None
        here.up(here.circuit)
        await trio.sleep(1.0)
        here.bob.upgrader.save()
        (saved,) = json.loads(path.read_text())["peers"]
        assert (saved["peer"], saved["cause"]) == (ALICE.peer_id, "unreached")
        again = End(here, PR, PunchConfig(state_file=path))
        await here.nursery.start(again.upgrader.run)
        again.upgrader.connected(here.circuit.bob)
        assert again.state is State.COOLING
    path.write_text("junk")
    async with world(state_file=path) as here:
        assert here.alice.bus.only(FileDamaged) or here.bob.bus.only(FileDamaged)


@pytest.mark.parametrize(
    ("reason", "failure", "cause"),
    [
        (Reason.UNSUPPORTED, None, "unsupported"),
        (Reason.REFUSED, None, "declined"),
        (Reason.TIMEOUT, None, "declined"),
        (Reason.NO_CANDIDATES, None, "no_address"),
        (Reason.PROTOCOL, None, "broken"),
        (Reason.BUSY, None, "busy"),
        (Reason.RATE, None, "busy"),
        (Reason.PUNCH_FAILED, None, "unreached"),
        (Reason.PUNCH_FAILED, Refused("max_outbound", "there are too many"), "busy"),
        (Reason.LOST, None, "interrupted"),
    ],
)
def test_how_a_punch_ended_becomes_a_cause(reason: Reason, failure: Refused | None, cause: str) -> None:
    assert _cause_of(Outcome(ALICE.peer_id, True, reason, "", 1, 0.1, None, None, failure)) == cause
