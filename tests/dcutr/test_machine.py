"""Both sides as conversations: what goes in at a time, and what comes out."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kas_libp2p import addresses as addr
from kas_libp2p.dcutr._machine import (
    ATTEMPTS,
    CONNECT_TIMEOUT,
    IDENTIFY_TIMEOUT,
    NEXT_TIMEOUT,
    NOTHING_TO_DIAL,
    SYNC_TIMEOUT,
    AwaitIdentify,
    Command,
    End,
    Invited,
    Inviter,
    Open,
    Punch,
    Reason,
    Send,
    StopPunch,
    comes_first,
)
from kas_libp2p.dcutr._messages import Connect, Message, Sync
from kas_libp2p.transport._punch import Target
from tests.dcutr.world import ALICE, ALICE_AT, BOB, BOB_AT

TARGETS = (Target(addr.parse(ALICE_AT)),)


class Facts:
    """What a machine asks for.

    Attributes:
        told: what it asked to dial of, each time.
        refusal: what it is told when it asks to begin.
    """

    def __init__(self) -> None:
        self.ours = 0
        self.told: list[tuple[str, ...]] = []
        self.targets: tuple[Target, ...] = TARGETS
        self.refusal: End | None = None

    def our(self) -> tuple[str, ...]:
        self.ours += 1
        return (f"/ip4/11.3.0.1/tcp/{16116 + self.ours}",)

    def their(self, told: Sequence[str]) -> tuple[Target, ...]:
        self.told.append(tuple(told))
        return self.targets

    def admit(self) -> End | None:
        return self.refusal


def inviter() -> tuple[Inviter, Facts]:
    facts = Facts()
    return Inviter(facts.our, facts.their, facts.admit), facts


def invited() -> tuple[Invited, Facts]:
    facts = Facts()
    machine = Invited(facts.our, facts.their, facts.admit)
    assert machine.start(0.0) == []
    return machine, facts


def our_connect(attempt: int = 1) -> Send:
    return Send(Connect((f"/ip4/11.3.0.1/tcp/{16116 + attempt}",)))


THEIR_CONNECT = Connect((ALICE_AT,))

# The inviter


def test_inviter() -> None:
    machine, facts = inviter()
    assert machine.start(10.0) == [Open()]
    assert machine.opened(10.0) == [our_connect()]
    assert machine.deadline == 10.0 + CONNECT_TIMEOUT
    assert machine.receive(THEIR_CONNECT, 10.2) == [Send(Sync()), Punch(TARGETS, at=pytest.approx(10.3))]
    assert facts.told == [(ALICE_AT,)]
    assert machine.rtt == pytest.approx(0.2)
    assert machine.deadline == math.inf
    assert machine.punched() == [End(Reason.PUNCHED)]
    assert machine.over


def test_three_attempts_on_one_stream_each_anew() -> None:
    machine, facts = inviter()
    now = 0.0
    assert machine.start(now) == [Open()]
    commands = machine.opened(now)
    for attempt in range(1, ATTEMPTS + 1):
        assert commands[-1] == our_connect(attempt)
        rtt = 0.1 * attempt
        commands = machine.receive(Connect((BOB_AT,) * attempt), now + rtt)
        assert commands == [Send(Sync()), Punch(TARGETS, at=pytest.approx(now + 1.5 * rtt))]
        assert machine.rtt == pytest.approx(rtt)
        now += 5
        commands = machine.failed(f"attempt {attempt}", now)
    assert commands == [End(Reason.PUNCH_FAILED, "attempt 3")]
    assert facts.told == [(BOB_AT,), (BOB_AT,) * 2, (BOB_AT,) * 3]


def test_a_new_stream_where_the_peer_has_ended_the_last_one() -> None:
    """go ends it in order behind SYNC, rust resets it."""
    machine, _ = inviter()
    machine.start(0.0)
    machine.opened(0.0)
    machine.receive(THEIR_CONNECT, 0.1)
    assert machine.closed(Reason.REFUSED, "reset") == []
    assert machine.failed("no", 5.0) == [Open()]
    assert machine.on_timeout(1000.0) == []  # opening a stream waits for nobody
    assert machine.opened(5.0) == [our_connect(2)]
    assert machine.receive(THEIR_CONNECT, 5.1) == [Send(Sync()), Punch(TARGETS, at=pytest.approx(5.15))]


@pytest.mark.parametrize("reason", [Reason.UNSUPPORTED, Reason.REFUSED, Reason.LOST])
def test_the_end_of_the_stream_before_sync_is_a_no(reason: Reason) -> None:
    machine, _ = inviter()
    machine.start(0.0)
    machine.opened(0.0)
    assert machine.closed(reason, "why") == [End(reason, "why")]


@pytest.mark.parametrize("reason", [Reason.REFUSED, Reason.LOST])
def test_what_an_attempt_came_to_says_more_than_why_there_is_no_other(reason: Reason) -> None:
    machine, facts = inviter()
    machine.start(0.0)
    machine.opened(0.0)
    machine.receive(THEIR_CONNECT, 0.1)
    machine.failed("nobody answered", 5.0)
    assert machine.closed(reason, "no more") == [End(Reason.PUNCH_FAILED, "nobody answered")]
    machine, facts = inviter()
    machine.start(0.0)
    machine.opened(0.0)
    machine.receive(THEIR_CONNECT, 0.1)
    facts.refusal = End(Reason.RATE, "too many")
    assert machine.failed("nobody answered", 5.0) == [End(Reason.PUNCH_FAILED, "nobody answered")]


def test_an_invitation_that_must_not_be() -> None:
    machine, facts = inviter()
    facts.refusal = End(Reason.BUSY, "another")
    assert machine.start(0.0) == [facts.refusal]
    assert machine.attempt == 0


def test_no_answer_to_connect() -> None:
    machine, _ = inviter()
    machine.start(0.0)
    machine.opened(1.0)
    assert machine.on_timeout(10.9) == []
    assert machine.on_timeout(11.0) == [End(Reason.TIMEOUT, "the peer did not answer CONNECT within 10 s")]
    assert machine.receive(THEIR_CONNECT, 11.1) == []


def test_a_connect_that_tells_nothing_waits_for_identify() -> None:
    machine, facts = inviter()
    facts.targets = ()
    machine.start(0.0)
    machine.opened(0.0)
    assert machine.receive(Connect(), 0.1) == [AwaitIdentify()]
    assert machine.deadline == pytest.approx(0.1 + IDENTIFY_TIMEOUT)
    facts.targets = TARGETS
    assert machine.identified(0.15) == [Send(Sync()), Punch(TARGETS, at=pytest.approx(0.2))]
    assert machine.identified(0.3) == []
    assert facts.told == [(), ()]


@pytest.mark.parametrize("told", [True, False])
def test_nothing_to_dial_but_the_peer_may_get_through_to_us(told: bool) -> None:
    machine, facts = inviter()
    facts.targets = ()
    machine.start(0.0)
    machine.opened(0.0)
    machine.receive(Connect(), 0.1)
    assert (machine.identified(0.2) if told else machine.on_timeout(1.1)) == [Send(Sync()), NOTHING_TO_DIAL]


@pytest.mark.parametrize("messages", [[Sync()], [THEIR_CONNECT, THEIR_CONNECT], [THEIR_CONNECT, Sync()]])
def test_out_of_turn_towards_the_inviter(messages: list[Message]) -> None:
    machine, _ = inviter()
    machine.start(0.0)
    machine.opened(0.0)
    commands: list[Command] = []
    for message in messages:
        commands = machine.receive(message, 0.1)
    assert isinstance(commands[0], End)
    assert commands[0].reason is Reason.PROTOCOL


def test_a_round_trip_can_not_be_forged() -> None:
    """An answer to the CONNECT that is still to come."""
    machine, _ = inviter()
    machine.start(0.0)
    machine.opened(0.0)
    machine.receive(THEIR_CONNECT, 0.1)
    assert machine.receive(THEIR_CONNECT, 4.9) == [End(Reason.PROTOCOL, "CONNECT came out of turn")]
    assert machine.failed("no", 5.0) == []


# The invited


def test_invited() -> None:
    machine, facts = invited()
    assert machine.deadline == CONNECT_TIMEOUT
    assert machine.receive(THEIR_CONNECT, 0.1) == [our_connect()]
    assert facts.told == []
    assert machine.deadline == pytest.approx(0.1 + SYNC_TIMEOUT)
    assert machine.receive(Sync(), 0.2) == [Punch(TARGETS, at=0.2)]
    assert facts.told == [(ALICE_AT,)]
    assert machine.closed(Reason.REFUSED, "the peer ended the stream") == []
    assert machine.punched() == [End(Reason.PUNCHED)]


def test_the_invited_answers_further_attempts_on_the_same_stream() -> None:
    machine, facts = invited()
    for attempt in (1, 2, 3):
        now = 10.0 * attempt
        assert machine.receive(THEIR_CONNECT, now) == [our_connect(attempt)]
        assert machine.receive(Sync(), now + 0.1) == [Punch(TARGETS, at=now + 0.1)]
        assert machine.failed("nobody", now + 5) == []
        assert machine.deadline == now + 5 + NEXT_TIMEOUT
    assert machine.closed(Reason.REFUSED, "the peer ended the stream") == [End(Reason.PUNCH_FAILED, "nobody")]
    assert len(facts.told) == 3


def test_an_attempt_that_failed_says_more_than_one_that_was_none() -> None:
    machine, facts = invited()
    machine.receive(THEIR_CONNECT, 0.0)
    machine.receive(Sync(), 0.1)
    machine.failed("nobody answered", 5.0)
    facts.targets = ()
    machine.receive(THEIR_CONNECT, 6.0)
    machine.receive(Sync(), 6.1)
    assert machine.closed(Reason.REFUSED, "end") == [End(Reason.PUNCH_FAILED, "nobody answered")]


def test_a_new_connect_while_the_invited_dials_takes_the_place() -> None:
    machine, _ = invited()
    machine.receive(THEIR_CONNECT, 0.0)
    machine.receive(Sync(), 0.1)
    assert machine.receive(THEIR_CONNECT, 1.0) == [StopPunch(), our_connect(2)]
    assert machine.receive(Sync(), 1.1) == [Punch(TARGETS, at=1.1)]


def test_the_invited_after_a_stream_that_has_ended_waits_for_nothing() -> None:
    machine, _ = invited()
    machine.receive(THEIR_CONNECT, 0.0)
    machine.receive(Sync(), 0.1)
    machine.closed(Reason.REFUSED, "the peer ended the stream")
    assert machine.failed("nobody", 5.0) == [End(Reason.PUNCH_FAILED, "nobody")]


def test_nothing_to_dial_and_another_attempt_that_has() -> None:
    machine, facts = invited()
    facts.targets = ()
    machine.receive(Connect(), 0.0)
    assert machine.receive(Sync(), 0.1) == []
    facts.targets = TARGETS
    assert machine.receive(THEIR_CONNECT, 1.0) == [our_connect(2)]
    assert machine.receive(Sync(), 1.1) == [Punch(TARGETS, at=1.1)]
    machine, facts = invited()
    facts.targets = ()
    machine.receive(Connect(), 0.0)
    machine.receive(Sync(), 0.1)
    assert machine.closed(Reason.REFUSED, "end") == [NOTHING_TO_DIAL]


@pytest.mark.parametrize(
    "messages",
    [[Sync()], [THEIR_CONNECT, THEIR_CONNECT], [THEIR_CONNECT, Sync(), Sync()]],
    ids=["SYNC first", "CONNECT twice", "SYNC twice"],
)
def test_out_of_turn_towards_the_invited(messages: list[Message]) -> None:
    machine, _ = invited()
    commands: list[Command] = []
    for message in messages:
        commands = machine.receive(message, 0.1)
    assert isinstance(commands[0], End)
    assert commands[0].reason is Reason.PROTOCOL


def test_silence_towards_the_invited() -> None:
    machine, _ = invited()
    assert machine.on_timeout(9.9) == []
    assert machine.on_timeout(10.0) == [End(Reason.TIMEOUT, "no CONNECT came in time")]
    machine, _ = invited()
    machine.receive(THEIR_CONNECT, 1.0)
    assert machine.on_timeout(11.0) == [End(Reason.TIMEOUT, "no SYNC came in time")]
    machine, _ = invited()
    machine.receive(THEIR_CONNECT, 1.0)
    machine.receive(Sync(), 1.1)
    machine.failed("nobody", 6.0)
    assert machine.on_timeout(6.0 + NEXT_TIMEOUT) == [End(Reason.PUNCH_FAILED, "nobody")]


def test_the_inviter_gives_up_before_sync() -> None:
    machine, _ = invited()
    machine.receive(THEIR_CONNECT, 0.0)
    assert machine.closed(Reason.REFUSED, "reset") == [End(Reason.REFUSED, "reset")]


def test_the_invited_may_say_no() -> None:
    machine, facts = invited()
    facts.refusal = End(Reason.RATE, "too many")
    assert machine.receive(THEIR_CONNECT, 0.0) == [facts.refusal]
    assert machine.attempt == 0


# Both


def test_it_can_be_stopped_at_any_time_and_says_no_more() -> None:
    for machine in (inviter()[0], invited()[0]):
        assert machine.stop(Reason.ABANDONED, "intent") == [End(Reason.ABANDONED, "intent")]
        assert machine.stop(Reason.ABANDONED, "again") == []
        assert machine.receive(THEIR_CONNECT, 1.0) == []
        assert machine.failed("no", 1.0) == []
        assert machine.punched() == []
        assert machine.closed(Reason.LOST, "gone") == []
        assert machine.on_timeout(1e9) == []
    opening, _ = inviter()
    opening.start(0.0)
    opening.stop(Reason.ABANDONED, "intent")
    assert opening.opened(0.1) == []


def test_one_of_two_invitations_comes_first_and_both_know_which() -> None:
    assert comes_first(ALICE.peer_id, BOB.peer_id) is not comes_first(BOB.peer_id, ALICE.peer_id)


STEPS = st.sampled_from(["connect", "sync", "failed", "punched", "closed", "time", "identified", "opened"])


@given(st.booleans(), st.lists(STEPS, max_size=30), st.booleans())
def test_whatever_happens_it_punches_once_at_a_time_and_ends_once(
    invites: bool, steps: list[str], targets: bool
) -> None:
    machine: Inviter | Invited
    machine, facts = inviter() if invites else invited()
    facts.targets = TARGETS if targets else ()
    log = machine.start(0.0) if isinstance(machine, Inviter) else []
    now, punching = 0.0, 0
    for step in steps:
        now += 1.0
        new: list[Command] = []
        if step in ("connect", "sync"):
            new = machine.receive(THEIR_CONNECT if step == "connect" else Sync(), now)
        elif step == "failed" and punching:
            punching -= 1
            new = machine.failed("no", now)
        elif step == "punched" and punching:
            punching -= 1
            new = machine.punched()
        elif step == "closed":
            new = machine.closed(Reason.REFUSED, "end")
        elif step == "time" and machine.deadline < math.inf:
            new = machine.on_timeout(now := max(now, machine.deadline))
        elif isinstance(machine, Inviter) and step == "identified":
            new = machine.identified(now)
        elif isinstance(machine, Inviter) and step == "opened" and log[-1:] == [Open()]:
            new = machine.opened(now)
        for command in new:
            punching += isinstance(command, Punch)
            punching -= isinstance(command, StopPunch)
            assert punching in (0, 1)
            assert not (isinstance(command, Punch) and command.at < now)
        log += new
        ends = [each for each in log if isinstance(each, End)]
        assert len(ends) == machine.over
        assert not ends or log[-1] is ends[0]
        if machine.over:
            break
    connects = sum(isinstance(each, Send) and isinstance(each.message, Connect) for each in log)
    if isinstance(machine, Inviter):
        assert connects <= ATTEMPTS
    assert connects == facts.ours
