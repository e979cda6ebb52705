"""The life of an upgrade, as conversations with the machine."""

from __future__ import annotations

import itertools
from dataclasses import replace
from random import Random
from typing import TypeVar

import pytest

from kas_libp2p.autonat._observed import Mapping
from kas_libp2p.autonat._roles import Filtering
from kas_libp2p.config import DialConfig, PunchConfig
from kas_libp2p.events import CircuitReplaced, IntentTold, PathProven, UpgradeAbandoned, UpgradeDecided
from kas_libp2p.identity import Identity
from kas_libp2p.metadata import DIRECT, Path, PathKind, PeerId
from kas_libp2p.strategy._intent import Answer, Intent
from kas_libp2p.strategy._memory import WAITS, Cause, Memory, Side
from kas_libp2p.strategy._nat import Chance, Nat, NatFacts, Ports, Sighting, Unsolicited
from kas_libp2p.strategy._plan import QUIET_MOMENT, QUIET_RECHECK, ConnectionStrategy, Way
from kas_libp2p.strategy._upgrade import (
    ANSWERING_TIMEOUT,
    BUSY_WAIT,
    MAX_DIALED,
    MAX_QUEUED,
    PUNCHING_TIMEOUT,
    Command,
    Drop,
    Prove,
    Replace,
    State,
    Stop,
    Try,
    Upgrades,
)

ALICE, BOB, CAROL, RELAY, OTHER = (Identity.from_seed(bytes([n]) * 32).peer_id for n in range(1, 6))
PUNCHED = Path(PathKind.PUNCHED, RELAY)
HERE, THERE = "/ip4/11.1.0.1/tcp/16117", "/ip4/11.2.0.1/tcp/40000"

PR = NatFacts(Nat(Mapping.INDEPENDENT, Ports.KEPT, Filtering.PORT, Unsolicited.DROPPED))
SYM = NatFacts(Nat(Mapping.DEPENDENT, Ports.RANDOM, Filtering.PORT, Unsolicited.DROPPED))
SYMSEQ = NatFacts(
    Nat(
        Mapping.DEPENDENT,
        Ports.SEQUENTIAL,
        Filtering.PORT,
        sightings=tuple(Sighting(9.0 - n, 40000 + n) for n in range(3)),
    )
)
YES = Intent(Answer.YES, nat=PR, predicts=True)
T = TypeVar("T")


class Steady:
    """Chance that is none: waits are what the table says."""

    def uniform(self, low: float, high: float, /) -> float:
        return (low + high) / 2


class Talk:
    """A machine, and what it wanted last."""

    def __init__(self, ours: NatFacts = PR, **settings: object) -> None:
        self.memory = Memory(Steady())
        config = replace(PunchConfig(), **settings)  # type: ignore[arg-type]
        self.machine = Upgrades(config, ConnectionStrategy(DialConfig(), config), self.memory)
        self.commands: list[Command] = []
        self.machine.facts(ours, (HERE,), 0.0)

    def take(self, kind: type[T]) -> list[T]:
        return [each for each in self.commands if isinstance(each, kind)]

    def one(self, kind: type[T]) -> T:
        (found,) = self.take(kind)
        return found

    def circuit(
        self,
        peer: PeerId = ALICE,
        number: int = 1,
        now: float = 0.0,
        *,
        inbound: bool = True,
        relay: PeerId = RELAY,
        rtt: float | None = 0.1,
        claimed: tuple[str, ...] = (),
        seen_at: str = THERE,
    ) -> None:
        self.commands = self.machine.circuit_up(
            peer, number, relay, now, inbound=inbound, seen_at=seen_at, rtt=rtt, claimed=claimed
        )

    def told(self, intent: Intent, now: float, peer: PeerId = ALICE, number: int = 1) -> None:
        self.commands = self.machine.told(peer, number, intent, now)

    def direct(self, now: float, number: int = 2, path: Path = PUNCHED, peer: PeerId = ALICE) -> None:
        self.commands = self.machine.direct_up(peer, number, path, now)

    def proven(self, now: float, number: int = 2, peer: PeerId = ALICE) -> None:
        self.commands = self.machine.proven(peer, number, 0.05, now)

    def gone(self, number: int, now: float, *, broken: bool = False, peer: PeerId = ALICE, silence: float = 0) -> None:
        self.commands = self.machine.gone(peer, number, now, broken=broken, text="it ended", silence=silence)

    def failed(self, now: float, cause: Cause = Cause.UNREACHED, peer: PeerId = ALICE) -> None:
        self.commands = self.machine.ended(peer, cause, "nothing came through", now)

    def tick(self, now: float) -> None:
        self.commands = self.machine.on_timeout(now)

    def state(self, peer: PeerId = ALICE, now: float = 0.0) -> State:
        return next(each.state for each in self.machine.status(now) if each.peer == peer)

    @property
    def decided(self) -> tuple[str, str]:
        event = self.one(UpgradeDecided)
        return event.decision, event.reason


def test_who_was_called_invites_at_once_and_the_circuit_is_replaced_in_the_end() -> None:
    talk = Talk()
    talk.circuit()
    assert talk.decided == ("punch", "inviting")
    attempts = talk.one(Try).plan.attempts
    assert [(each.way, each.start) for each in attempts] == [(Way.PUNCH, 0.0)]
    talk.told(YES, 0.1)
    assert talk.one(IntentTold).nat == {4: "only lets in what was dialed; keeps the port"}
    talk.direct(0.35)
    assert talk.one(Prove).connection == 2
    talk.commands = talk.machine.ended(ALICE, None, "", 0.35)
    assert talk.commands == []
    talk.proven(3.35)
    proof = talk.one(PathProven)
    assert (proof.connection, proof.replaces, proof.rtt, proof.relayed_rtt) == (2, (1,), 0.05, 0.1)
    assert proof.seconds == pytest.approx(3.0)
    assert talk.one(Replace) == Replace(ALICE, 1, 2)
    assert talk.machine.is_replaced(ALICE, 2)
    talk.gone(1, 5.0)
    event = talk.one(CircuitReplaced)
    assert (event.connection, event.by, event.seconds) == (1, 2, pytest.approx(1.65))
    assert talk.state() is State.STABLE
    assert talk.memory.recall(ALICE, Side(), Side(), 5.0).seconds == pytest.approx(0.35)


def test_who_called_waits_to_be_invited_and_answers() -> None:
    talk = Talk()
    talk.circuit(inbound=False)
    assert talk.decided == ("wait", "invited")
    assert not talk.take(Try)
    answer, talk.commands = talk.machine.asked(ALICE, 1, YES, 0.05)
    assert (answer.answer, answer.nat) == (Answer.YES, PR)
    assert talk.decided == ("punch", "invited")
    assert [each.by_us for each in talk.take(IntentTold)] == [False, True]
    assert talk.state() is State.ANSWERING
    talk.direct(0.3)
    talk.proven(3.3)
    assert talk.one(Replace).circuit == 1


def test_a_second_circuit_starts_no_second_punch() -> None:
    talk = Talk()
    talk.circuit()
    talk.circuit(number=7, now=0.1, relay=OTHER)
    assert talk.commands == []
    talk.direct(0.4)
    talk.proven(3.4)
    assert {each.circuit for each in talk.take(Replace)} == {1, 7}


def test_where_each_side_made_a_circuit_both_say_yes_and_dcutr_knows_who_is_first() -> None:
    talk = Talk()
    talk.circuit(number=1, inbound=True)
    talk.circuit(number=3, inbound=False)
    answer, commands = talk.machine.asked(ALICE, 3, YES, 0.05)
    assert answer.answer is Answer.YES
    assert all(isinstance(each, IntentTold) for each in commands)
    assert talk.state() is State.PUNCHING


# What is not tried


def test_a_no_stops_the_punch_and_is_remembered() -> None:
    talk = Talk()
    talk.circuit()
    talk.told(Intent(Answer.NO, "disabled", nat=PR), 0.1)
    assert talk.one(Stop).text == "the peer says no: disabled"
    event = talk.one(UpgradeAbandoned)
    assert (event.stage, event.reason, event.wait) == ("intent", Cause.DECLINED, WAITS[Cause.DECLINED][0])
    talk.gone(1, 1.0)
    talk.circuit(number=3, now=2.0)
    assert talk.decided == ("wait", Cause.DECLINED)
    assert not talk.take(Try)


def test_later_is_heeded() -> None:
    talk = Talk()
    talk.circuit()
    talk.told(Intent(Answer.LATER, "busy", wait=30.0, nat=PR), 0.0)
    assert talk.one(UpgradeAbandoned).wait == 30.0
    assert talk.machine.next_deadline() == 30.0
    talk.tick(30.0)
    assert talk.decided == ("punch", "inviting")


def test_a_hopeless_pair_is_known_after_one_round_trip_and_not_tried_again() -> None:
    talk = Talk(ours=SYM)
    talk.circuit()
    assert talk.one(UpgradeDecided).chance == Chance.UNKNOWN  # the peer has not told yet
    talk.told(Intent(Answer.YES, nat=SYM), 0.1)
    assert talk.one(Stop)
    event = talk.one(UpgradeAbandoned)
    assert (event.stage, event.reason, event.seconds) == ("intent", Cause.HOPELESS, pytest.approx(0.1))
    assert "No punch can work between the two." in event.text
    talk.gone(1, 60.0)
    for circuit, now in enumerate((61.0, 600.0, 3000.0), start=3):
        talk.circuit(number=circuit, now=now)
        assert talk.decided == ("wait", Cause.HOPELESS)
        talk.gone(circuit, now + 1)


def test_the_invited_side_says_that_it_is_hopeless() -> None:
    talk = Talk(ours=SYM)
    talk.circuit(inbound=False)
    answer, talk.commands = talk.machine.asked(ALICE, 1, Intent(Answer.YES, nat=SYM), 0.1)
    assert (answer.answer, answer.reason) == (Answer.NO, "hopeless")
    assert talk.one(UpgradeAbandoned).reason == Cause.HOPELESS
    other = Talk(ours=SYM)
    other.circuit()
    other.told(answer, 0.1)
    assert other.one(UpgradeAbandoned).reason == Cause.HOPELESS


@pytest.mark.parametrize(
    ("predict", "predicts", "tried"), [(True, True, True), (False, True, False), (True, False, False)]
)
def test_prediction_needs_both_sides(predict: bool, predicts: bool, tried: bool) -> None:
    talk = Talk(predict=predict)
    talk.circuit()
    talk.told(Intent(Answer.YES, nat=SYMSEQ, predicts=predicts), 0.1)
    assert bool(talk.take(Stop)) is not tried


@pytest.mark.parametrize(("ours", "theirs", "tried"), [(True, True, True), (True, False, False), (False, True, False)])
def test_many_ports_are_tried_only_if_both_sides_agree(ours: bool, theirs: bool, tried: bool) -> None:
    talk = Talk(birthday=ours)
    talk.circuit()
    talk.told(Intent(Answer.YES, nat=SYM, birthday=theirs), 0.1)
    assert bool(talk.take(Stop)) is not tried


def test_switched_off_is_switched_off() -> None:
    talk = Talk(enabled=False)
    talk.circuit()
    assert talk.decided == ("leave", "disabled")
    talk.circuit(CAROL, 5, inbound=False)
    answer, _ = talk.machine.asked(CAROL, 5, YES, 0.1)
    assert (answer.answer, answer.reason) == (Answer.NO, "disabled")


def test_quiet_leaves_a_good_relay_alone_and_looks_again() -> None:
    talk = Talk(quiet=True)
    talk.circuit(rtt=0.02)
    assert talk.decided == ("leave", "quiet")
    assert talk.machine.next_deadline() == QUIET_MOMENT
    talk.tick(QUIET_MOMENT)
    assert talk.one(UpgradeDecided).text == "the relay's 20 ms are good enough"
    talk.machine.measured(ALICE, 1, 0.4)
    talk.tick(QUIET_MOMENT + QUIET_RECHECK)
    assert talk.decided == ("punch", "inviting")


def test_quiet_answers_later() -> None:
    talk = Talk(quiet=True)
    talk.circuit(inbound=False, rtt=0.02)
    answer, _ = talk.machine.asked(ALICE, 1, YES, QUIET_MOMENT)
    assert (answer.answer, answer.reason, answer.wait) == (Answer.LATER, "quiet", QUIET_RECHECK)


# Failures


def test_a_failed_punch_cools_down_longer_each_time_and_is_tried_again() -> None:
    talk = Talk()
    talk.circuit()
    now = 1.0
    for row in range(4):
        talk.failed(now)
        wait = talk.one(UpgradeAbandoned).wait
        assert wait == WAITS[Cause.UNREACHED][0] * 2**row
        talk.tick(now + wait - 0.1)
        assert talk.commands == []
        now += wait
        talk.tick(now)
        assert talk.decided == ("punch", "inviting")


def test_no_second_attempt_where_it_would_do_no_better() -> None:
    cone = NatFacts(Nat(Mapping.INDEPENDENT, Ports.KEPT))  # whom it lets in is not known
    for theirs, stopped in ((SYM, True), (cone, False), (NatFacts(Nat()), False)):
        talk = Talk(ours=cone)
        talk.circuit()
        talk.told(Intent(Answer.YES, nat=theirs), 0.1)
        talk.commands = talk.machine.attempt_failed(ALICE, 1, "unanswered", 3.0)
        assert bool(talk.take(Stop)) is stopped
        assert [(each.stage, each.reason) for each in talk.take(UpgradeAbandoned)] == [("punch", "unreached")] * stopped
        talk.commands = talk.machine.attempt_failed(ALICE, 2, "unanswered", 6.0)
        assert talk.commands == []


def test_the_invited_side_remembers_as_well() -> None:
    talk = Talk()
    talk.circuit(inbound=False)
    talk.machine.asked(ALICE, 1, YES, 0.0)
    talk.failed(2.0)
    assert talk.one(UpgradeAbandoned).reason == Cause.UNREACHED
    answer, _ = talk.machine.asked(ALICE, 1, YES, 10.0)
    assert (answer.answer, answer.reason) == (Answer.LATER, "unreached")
    assert answer.wait == pytest.approx(WAITS[Cause.UNREACHED][0] - 8.0)


@pytest.mark.parametrize("cause", Cause)
def test_a_peer_that_invites_has_changed_its_mind_but_not_the_way(cause: Cause) -> None:
    talk = Talk()
    talk.memory.failed(ALICE, cause, "", 0.0)
    talk.circuit(inbound=False, now=0.5)
    answer, _ = talk.machine.asked(ALICE, 1, YES, 0.5)
    asked_to_wait = cause in (Cause.UNREACHED, Cause.UNSTABLE, Cause.BROKEN)
    assert answer.answer is (Answer.LATER if asked_to_wait else Answer.YES)


def test_a_plain_invitation_that_failed_counts_too() -> None:
    talk = Talk()
    talk.circuit(inbound=False)
    talk.failed(2.0)  # rust tells no intent
    assert talk.one(UpgradeAbandoned).stage == "punch"


def test_another_nat_on_our_side_ends_the_wait_at_once() -> None:
    talk = Talk(ours=SYM)
    talk.circuit()
    talk.told(Intent(Answer.YES, nat=SYM), 0.1)
    talk.commands = talk.machine.facts(PR, (HERE,), 60.0)
    assert talk.one(UpgradeAbandoned).reason == Cause.HOPELESS  # port-restricted and symmetric: no better
    talk.commands = talk.machine.facts(NatFacts(Nat(filtering=Filtering.OPEN)), (HERE,), 120.0)
    assert talk.decided == ("punch", "inviting")


def test_what_becomes_known_of_the_same_nat_ends_no_wait() -> None:
    talk = Talk(ours=NatFacts(Nat()))
    talk.circuit()
    talk.failed(1.0)
    talk.commands = talk.machine.facts(PR, (HERE,), 60.0)
    assert talk.commands == []


def test_a_peer_at_another_address_is_tried_at_once() -> None:
    talk = Talk()
    talk.circuit()
    talk.failed(1.0)
    talk.gone(1, 2.0)
    talk.circuit(number=3, now=40.0)
    assert talk.decided == ("wait", Cause.UNREACHED)
    talk.gone(3, 41.0)
    talk.circuit(number=5, now=50.0, seen_at="/ip4/11.77.0.1/tcp/999")
    assert talk.decided == ("punch", "inviting")


def test_a_peer_that_says_another_thing_each_time_is_not_punched_each_time() -> None:
    talk = Talk()
    tried = 0
    for number in range(1, 21):
        now = number * 1.0
        talk.circuit(number=number, now=now, seen_at=f"/ip4/11.{number}.0.1/tcp/999")
        tried += len(talk.take(Try))
        talk.failed(now)
        talk.gone(number, now)
    assert tried == 1


def test_a_peer_that_learns_dcutr_late_is_invited_then() -> None:
    talk = Talk()
    talk.circuit()
    talk.failed(0.1, Cause.UNSUPPORTED)
    talk.commands = talk.machine.claims(ALICE, (), 0.2, punches=False)
    assert talk.commands == []
    talk.commands = talk.machine.claims(ALICE, (), 0.3, punches=True)
    assert talk.decided == ("punch", "inviting")


def test_the_circuit_may_end_in_the_middle() -> None:
    talk = Talk()
    talk.circuit()
    talk.gone(1, 0.2)
    assert talk.one(Stop)
    assert talk.one(UpgradeAbandoned).reason == Cause.INTERRUPTED
    assert len(talk.machine) == 0
    talk.circuit(number=3, now=2.0)
    assert talk.decided == ("punch", "inviting")


@pytest.mark.parametrize("inbound", [True, False])
def test_a_punch_that_nobody_ends_is_given_up(inbound: bool) -> None:
    talk = Talk(max_concurrent=1)
    talk.circuit(inbound=inbound)
    if not inbound:
        talk.machine.asked(ALICE, 1, YES, 0.0)
    talk.circuit(CAROL, 5)
    assert talk.decided == ("queue", "busy")
    talk.tick(PUNCHING_TIMEOUT if inbound else ANSWERING_TIMEOUT)
    assert talk.one(Stop).peer == ALICE
    assert talk.one(Try).peer == CAROL


# Direct connections that don't last


def test_a_connection_that_breaks_while_it_is_proven_leaves_the_circuit_in_use() -> None:
    talk = Talk()
    talk.circuit()
    talk.direct(0.4)
    talk.gone(2, 1.5, broken=True)
    event = talk.one(UpgradeAbandoned)
    assert (event.stage, event.reason) == ("proving", Cause.UNSTABLE)
    assert not talk.take(Replace)
    talk.tick(1.5 + event.wait)
    assert talk.decided == ("punch", "inviting")


def test_a_connection_that_does_not_answer_is_dropped() -> None:
    talk = Talk()
    talk.circuit()
    talk.direct(0.4)
    talk.commands = talk.machine.unproven(ALICE, 2, "no answer", 3.0)
    assert talk.one(Drop) == Drop(ALICE, 2, "no answer")
    assert talk.one(UpgradeAbandoned).reason == Cause.UNSTABLE
    talk.gone(2, 3.1)
    assert talk.commands == []


def test_one_that_comes_and_goes_is_used_less_and_less() -> None:
    talk = Talk()
    waits = []
    now = 0.0
    numbers = itertools.count(1)
    for _ in range(5):
        circuit, direct = next(numbers), next(numbers)
        talk.circuit(number=circuit, now=now)
        assert talk.decided == ("punch", "inviting")
        talk.direct(now + 0.4, number=direct)
        talk.proven(now + 3.4, number=direct)
        talk.gone(circuit, now + 5)
        talk.gone(direct, now + 60, broken=True)
        waits.append(talk.one(UpgradeAbandoned).wait)
        assert len(talk.machine) == 0
        now += 60 + waits[-1]
    assert waits == [60.0 * 2**row for row in range(5)]


def test_what_is_ended_again_and_again_is_no_peer_that_starts_anew() -> None:
    talk = Talk()
    now, reasons = 0.0, []
    numbers = itertools.count(1)
    for _ in range(6):
        circuit, direct = next(numbers), next(numbers)
        talk.circuit(number=circuit, now=now)
        assert talk.decided == ("punch", "inviting")
        talk.direct(now + 0.4, number=direct)
        talk.proven(now + 3.4, number=direct)
        talk.gone(circuit, now + 5)
        talk.gone(direct, now + 30, broken=False)
        event = talk.one(UpgradeAbandoned)
        reasons.append(event.reason)
        now += 30 + event.wait
    assert reasons == [*["interrupted"] * 3, *["unstable"] * 3]
    assert talk.memory.recall(ALICE, Side(), Side(), now).streak == 3


@pytest.mark.parametrize(("intent", "cause"), [(None, Cause.UNSTABLE), (YES, Cause.INTERRUPTED)])
def test_a_foreign_peer_that_ends_what_it_does_not_use_is_left_alone_at_once(
    intent: Intent | None, cause: Cause
) -> None:
    """rust ends an idle connection after 10 s, while the circuit is in use."""
    talk = Talk()
    talk.circuit()
    if intent is not None:
        talk.told(intent, 0.1)
    talk.direct(0.4)
    talk.proven(3.4)
    talk.gone(2, 13.4, broken=False)
    event = talk.one(UpgradeAbandoned)
    assert (event.reason, event.wait) == (cause, WAITS[cause][0])


def test_one_that_lasted_is_punched_again_at_once() -> None:
    talk = Talk()
    talk.circuit()
    talk.failed(0.5)
    talk.tick(121.0)
    talk.direct(121.4)
    talk.proven(124.4)
    talk.tick(talk.machine.next_deadline())
    assert talk.memory.recall(ALICE, Side(), Side(), 800.0).streak == 0
    talk.gone(2, 124.4 + PunchConfig().steady + 1, broken=True)
    assert talk.decided == ("punch", "inviting")


@pytest.mark.parametrize(("lived", "failed"), [(4.0, True), (6.0, False)])
def test_when_one_has_lasted_is_a_setting(lived: float, failed: bool) -> None:
    talk = Talk(steady=5.0)
    talk.circuit()
    talk.direct(0.4)
    talk.proven(3.4)
    while talk.machine.next_deadline() <= 3.4 + lived:
        talk.tick(talk.machine.next_deadline())
    talk.gone(2, 3.4 + lived, broken=True)
    assert bool(talk.take(UpgradeAbandoned)) is failed


def test_a_peer_that_starts_anew_is_no_failure() -> None:
    talk = Talk()
    talk.circuit()
    talk.direct(0.4)
    talk.proven(3.4)
    talk.gone(1, 5.0)
    talk.gone(2, 60.0, broken=False)  # its process ended, and the system said so
    talk.circuit(number=3, now=61.0)
    assert talk.decided == ("punch", "inviting")


def test_a_circuit_beside_a_stable_connection_casts_doubt_on_it() -> None:
    talk = Talk()
    talk.circuit()
    talk.direct(0.4)
    talk.proven(3.4)
    talk.gone(1, 5.0)
    talk.circuit(number=3, now=100.0)
    assert talk.one(Prove).connection == 2
    assert not talk.take(Replace)
    talk.proven(103.0)
    assert talk.one(Replace).circuit == 3


def test_a_silent_death_says_how_long_a_nat_remembers() -> None:
    talk = Talk()
    talk.circuit()
    talk.direct(0.4)
    talk.gone(2, 40.0, broken=True, silence=20.0)
    assert talk.memory.lifetime(ALICE) == 20.0


def test_the_other_direct_connection_takes_the_place_of_one_that_ended() -> None:
    talk = Talk()
    talk.circuit()
    talk.direct(0.4)
    talk.direct(0.5, number=4, path=DIRECT)
    assert talk.commands == []
    talk.gone(2, 1.0)
    assert talk.one(Prove).connection == 4


def test_a_direct_connection_alone_is_none_of_our_business() -> None:
    talk = Talk()
    talk.direct(0.0, path=DIRECT)
    assert talk.commands == []
    assert len(talk.machine) == 0


# Doors that are open


def test_what_the_peer_claims_is_dialed_beside_the_punch_if_the_relay_has_seen_it_there() -> None:
    talk = Talk()
    own, foreign = "/ip4/11.2.0.1/tcp/16117", "/ip4/11.66.0.1/tcp/16117"
    talk.circuit(claimed=(foreign, own), rtt=0.12)
    attempts = talk.one(Try).plan.attempts
    assert [(each.way, each.address, each.start) for each in attempts] == [
        (Way.DIRECT, own, 0.0),
        (Way.PUNCH, "", 0.12),
    ]
    talk.direct(0.3, path=DIRECT)
    assert talk.take(Stop)
    assert talk.one(Prove)


def test_what_it_claims_later_is_dialed_once() -> None:
    talk = Talk()
    talk.circuit()
    own = "/ip4/11.2.0.1/tcp/16117"
    talk.commands = talk.machine.claims(ALICE, [own, "/ip4/192.168.0.7/tcp/1", own + "/p2p-circuit"], 0.1, punches=True)
    assert [each.address for each in talk.one(Try).plan.attempts] == [own]
    talk.commands = talk.machine.claims(ALICE, [own], 0.2, punches=True)
    assert talk.commands == []


def test_who_claims_another_address_each_time_is_dialed_at_few_of_them_until_the_next_punch() -> None:
    talk = Talk()
    talk.circuit()
    dialed = 0
    for number in range(40):
        own = [f"/ip4/11.2.0.1/tcp/{2000 + 4 * number + each}" for each in range(4)]
        talk.commands = talk.machine.claims(ALICE, own, 0.1 * number, punches=True)
        dialed += sum(len(each.plan.attempts) for each in talk.take(Try))
    assert dialed == MAX_DIALED
    talk.failed(4.0)
    talk.commands = talk.machine.on_timeout(4.0 + WAITS[Cause.UNREACHED][0])
    assert len(talk.one(Try).plan.of(Way.DIRECT)) == 4  # a punch of its own


@pytest.mark.parametrize("port", [22, 443, 1023])
def test_a_well_known_port_is_not_dialed(port: int) -> None:
    talk = Talk()
    talk.circuit(claimed=(f"/ip4/11.2.0.1/tcp/{port}",))
    assert [each.way for each in talk.one(Try).plan.attempts] == [Way.PUNCH]


def test_nothing_is_dialed_where_no_relay_has_seen_the_peer() -> None:
    talk = Talk()
    talk.circuit(seen_at="", claimed=(THERE,))
    assert [each.way for each in talk.one(Try).plan.attempts] == [Way.PUNCH]


# Many at once


def test_more_than_allowed_wait_and_the_relays_take_turns() -> None:
    talk = Talk(max_concurrent=1)
    talk.circuit()
    crowd = [PeerId(f"crowd {n}") for n in range(5)]
    for number, peer in enumerate(crowd, start=10):
        talk.circuit(peer, number)
        assert talk.decided == ("queue", "busy")
    talk.circuit(CAROL, 50, relay=OTHER)
    order = []
    talk.failed(1.0)
    while tries := talk.take(Try):
        order.append(tries[0].peer)
        talk.failed(2.0, peer=tries[0].peer)
    assert order == [crowd[0], CAROL, *crowd[1:]]


def test_the_queue_is_bounded_and_a_crowd_crowds_out_itself() -> None:
    talk = Talk(max_concurrent=1)
    talk.circuit()
    for number in range(MAX_QUEUED):
        talk.circuit(PeerId(f"crowd {number}"), 10 + number)
    talk.circuit(PeerId("one more"), 5000)
    assert talk.one(UpgradeAbandoned).peer == "one more"
    talk.circuit(CAROL, 5001, relay=OTHER)
    assert talk.one(UpgradeAbandoned).peer == f"crowd {MAX_QUEUED - 1}"
    assert talk.decided == ("queue", "busy")
    assert sum(each.state is State.QUEUED for each in talk.machine.status(0.0)) == MAX_QUEUED


def test_a_full_house_asks_a_peer_to_come_later() -> None:
    talk = Talk(max_concurrent=1)
    talk.circuit()
    talk.circuit(CAROL, 5, inbound=False)
    answer, _ = talk.machine.asked(CAROL, 5, YES, 0.1)
    assert (answer.answer, answer.reason, answer.wait) == (Answer.LATER, "busy", BUSY_WAIT)


def test_a_queued_peer_that_leaves_is_forgotten() -> None:
    talk = Talk(max_concurrent=1)
    talk.circuit()
    talk.circuit(CAROL, 5)
    talk.gone(5, 1.0, peer=CAROL)
    talk.failed(2.0)
    assert not talk.take(Try)
    assert len(talk.machine) == 1


def test_jitter_keeps_two_sides_from_coming_back_at_once() -> None:
    waits = {Memory(Random(seed)).failed(ALICE, Cause.UNREACHED, "", 0.0) for seed in range(10)}
    assert len(waits) == 10
    assert all(96.0 <= each <= 144.0 for each in waits)
