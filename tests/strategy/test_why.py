"""What a person is told about the path to a peer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from kas_libp2p.events import (
    Event,
    IntentTold,
    Listening,
    PathProven,
    PunchConnect,
    PunchDialed,
    PunchEnded,
    PunchStarted,
    SessionEnded,
    SessionMoved,
    SessionOpened,
    SessionWaiting,
    UpgradeAbandoned,
    UpgradeDecided,
)
from kas_libp2p.identity import Identity
from kas_libp2p.metadata import DIRECT, Path, PathKind, PeerId
from kas_libp2p.strategy._nat import NatFacts
from kas_libp2p.strategy._why import MAX_EVENTS, MAX_PEERS, Facts, History, explain
from tests.strategy.test_nat import nat_of

ALICE, BOB = (Identity.from_seed(bytes([n]) * 32).peer_id for n in (1, 2))
NAME = f"{ALICE[:12]}…"
RELAYED, PUNCHED = Path(PathKind.RELAYED, BOB), Path(PathKind.PUNCHED, BOB)
PR, SYM = NatFacts(nat_of("pr")), NatFacts(nat_of("sym"))
NOW = 1000.0


def decided(decision: str, reason: str, text: str = "") -> UpgradeDecided:
    return UpgradeDecided(
        peer=ALICE, connection=1, decision=decision, reason=reason, chance="unknown", text=text, wait=0.0, at=900.0
    )


def abandoned(stage: str, reason: str, text: str = "because", wait: float = 160.0) -> UpgradeAbandoned:
    return UpgradeAbandoned(
        peer=ALICE, connection=1, stage=stage, reason=reason, text=text, wait=wait, seconds=1.0, at=960.0
    )


def connect(by_us: bool, *addresses: str) -> PunchConnect:
    return PunchConnect(
        peer=ALICE, connection=1, by_us=by_us, attempt=1, addresses=addresses, rtt=None, seconds=0.1, at=950.0
    )


def dialed(address: str, reason: str, attempt: int = 1) -> PunchDialed:
    return PunchDialed(peer=ALICE, address=address, attempt=attempt, reason=reason, after=0.0, seconds=1.0, at=955.0)


def started(attempt: int = 1) -> PunchStarted:
    return PunchStarted(
        peer=ALICE,
        connection=1,
        inviter=True,
        attempt=attempt,
        targets=(),
        untrusted=(),
        refused={},
        wait=0.05,
        seconds=0.1,
        at=952.0,
    )


def ended(reason: str, attempts: int) -> PunchEnded:
    return PunchEnded(
        peer=ALICE,
        connection=1,
        inviter=True,
        reason=reason,
        text="",
        attempts=attempts,
        rtt=0.1,
        seconds=0.21,
        at=960.0,
    )


def told(history: Sequence[Event], facts: Facts) -> list[str]:
    return explain(ALICE, history, facts, NOW)


def test_a_hopeless_pair() -> None:
    facts = Facts(PR, SYM, RELAYED, 0.133, "ashburn", "UPnP is off on the router")
    assert told([decided("punch", "inviting"), abandoned("intent", "hopeless", wait=3600.0)], facts) == [
        f"{NAME} is relayed by ashburn, 133 ms.",
        "  No punch was tried: none can work.",
        "  It is tried again in 59 min, or when either side's address or NAT changes.",
        "  Their NAT gives every destination another port, at random. Ours only lets in what was dialed."
        " Only trying many ports at once could work between the two.",
        "  What would help: a port mapping on either side (ours: UPnP is off on the router), or IPv6 on both"
        " (ours: none; theirs: none), or many ports tried at once, if both operators allow it (punch.birthday).",
    ]


def test_a_punch_that_nothing_came_of() -> None:
    there, here = "/ip4/11.2.0.1/tcp/40000", "/ip6/2d00:1::1/tcp/16117"
    history = [
        decided("punch", "inviting"),
        connect(True, here, "/ip4/11.1.0.1/tcp/16117"),
        connect(False, there),
        started(),
        dialed("/ip4/11.9.9.9/tcp/1", "unanswered"),
        started(2),
        dialed(there, "ECONNREFUSED"),
        dialed(there, "ECONNREFUSED", 2),
        dialed(there, "unanswered", 3),
        ended("punch_failed", 3),
        abandoned("punch", "unreached"),
    ]
    assert told(history, Facts(PR, PR, RELAYED)) == [
        f"{NAME} is relayed by {BOB[:12]}….",
        "  A punch was tried 40 s ago, and nothing came through in 3 attempts.",
        "  Dialed 11.2.0.1:40000 3 times: refused (RST), no answer.",
        "  It is tried again in 120 s, or when either side's address or NAT changes.".replace("120 s", "2 min"),
        "  They say they are at 11.2.0.1:40000.",
        "  We said that we are at [2d00:1::1]:16117, 11.1.0.1:16117.",
        "  Their NAT only lets in what was dialed. Ours only lets in what was dialed. A punch works between the two.",
    ]


@pytest.mark.parametrize(
    ("history", "line"),
    [
        ([], "No punch was tried yet."),
        ([decided("punch", "inviting")], "A punch is being agreed on."),
        ([decided("punch", "inviting"), started(2)], "A punch is under way, attempt 2."),
        (  # as go invites anew for each attempt
            [started(), ended("punch_failed", 1), abandoned("punch", "unreached"), started(), ended("punch_failed", 1)],
            "A punch was tried 40 s ago, and nothing came through in 1 attempt.",
        ),
        (
            [decided("queue", "busy", "8 others are being punched")],
            "It waits for its turn: 8 others are being punched.",
        ),
        ([decided("wait", "invited")], "No punch was tried: that is for the other side to begin, and it has not."),
        (
            [decided("leave", "quiet", "the relay's 20 ms are good enough")],
            "No punch is tried, as quiet is preferred: the relay's 20 ms are good enough.",
        ),
        ([decided("leave", "disabled")], "No punch is tried: it is switched off here (punch.enabled)."),
        (
            [abandoned("intent", "declined", "the peer says no: disabled")],
            "No punch was made 40 s ago: the peer says no: disabled.",
        ),
        (
            [abandoned("punch", "unsupported", "the peer does not speak it")],
            "A punch was begun 40 s ago, and came to nothing: the peer does not speak it.",
        ),
        (
            [abandoned("proving", "unstable", "it answered 2 of 6 pings")],
            "A direct connection came up, and did not answer for long enough (40 s ago): it answered 2 of 6 pings.",
        ),
        (
            [abandoned("stable", "unstable", "it broke"), decided("wait", "unstable")],
            "A direct connection came up, and did not last (40 s ago): it broke.",
        ),
        ([decided("wait", "hopeless", "No punch can work.")], "It is left alone: No punch can work."),
    ],
)
def test_every_stage_has_its_words(history: list[Event], line: str) -> None:
    assert told(history, Facts(PR, PR, RELAYED))[1] == f"  {line}"


def test_what_they_told_counts_even_if_nobody_else_remembers_it() -> None:
    intent = IntentTold(
        peer=ALICE,
        connection=1,
        by_us=False,
        answer="no",
        reason="disabled",
        wait=0.0,
        nat={4: "only lets in what was dialed; keeps the port"},
    )
    lines = told([intent], Facts(PR, None, RELAYED))
    assert "  Their NAT only lets in what was dialed; keeps the port." in lines


def test_how_it_became_direct() -> None:
    proof = PathProven(
        peer=ALICE, connection=2, path=PUNCHED, replaces=(1,), rtt=0.023, relayed_rtt=0.041, seconds=3.4, at=965.0
    )
    assert told([ended("punched", 1), proof], Facts(path=PUNCHED, rtt=0.023)) == [
        f"{NAME} is direct: a hole was punched, 23 ms.",
        "  It took the first attempt and 0.2 s, 40 s ago.",
        "  It was proven in 3.4 s, with 23 ms; through the relay it was 41 ms.",
    ]
    assert told([], Facts(path=DIRECT)) == [
        f"{NAME} is direct.",
        "  Nothing stands between: there is no better way.",
    ]
    assert told([], Facts())[0] == f"{NAME} is not connected."


SESSION = {"peer": ALICE, "session": "ab"}
OPENED = SessionOpened(**SESSION, by_us=True, path=RELAYED, at=700.0)  # type: ignore[arg-type]
MOVED = SessionMoved(
    **SESSION,  # type: ignore[arg-type]
    path=PUNCHED,
    previous=RELAYED,
    by_us=True,
    reason="the direct path has proven itself",
    resent=0,
    seconds_without=0.0,
    at=820.0,
)
WAITS = SessionWaiting(**SESSION, path=PUNCHED, reason="nothing came for 4 s", at=997.0)  # type: ignore[arg-type]
OVER = SessionEnded(
    **SESSION,  # type: ignore[arg-type]
    code="lost",
    reason="no path for 30 s",
    by_peer=False,
    seconds=300.0,
    moves=1,
    at=990.0,
)


@pytest.mark.parametrize(
    ("history", "lines"),
    [
        (
            [OPENED],
            ["Its Kaspa session has been on the circuit of frankfurt since it began 5 min ago. It stays: it lasts."],
        ),
        (
            [OPENED, MOVED],
            [
                "Its Kaspa session moved to the punched path 3 min ago: the direct path has proven itself."
                " It stays: it lasts.",
                "Before that it was on the circuit of frankfurt; nothing had to be sent again.",
            ],
        ),
        (
            [
                replace(
                    MOVED, by_us=False, reason="", path=RELAYED, previous=PUNCHED, resent=12_000, seconds_without=2.1
                )
            ],
            [
                "Its Kaspa session moved to the circuit of frankfurt 3 min ago: the other side moved it."
                " It stays: it lasts.",
                "Before that it was on the punched path, without any path for 2.1 s between; 12.0 kB were sent again.",
            ],
        ),
        (
            [replace(MOVED, path=RELAYED, reason="15 s of the circuit's 2 min are left")],
            [
                "Its Kaspa session moved to another circuit of frankfurt 3 min ago: 15 s of the circuit's 2 min are"
                " left. It stays: it lasts.",
                "Before that it was on the circuit of frankfurt; nothing had to be sent again.",
            ],
        ),
        (
            [OPENED, MOVED, WAITS],
            [
                "Its Kaspa session lost the punched path 3.0 s ago: nothing came for 4 s.",
                "It waits for another path (it lasts), and kaspad sees nothing of it.",
            ],
        ),
        ([OPENED, WAITS, OVER], ["Its Kaspa session ended 10 s ago: no path for 30 s."]),
        (
            [OPENED, replace(OPENED, session="new"), OVER],
            ["Its Kaspa session has been on the circuit of frankfurt since it began 5 min ago. It stays: it lasts."],
        ),
    ],
)
def test_where_its_session_is(history: list[Event], lines: list[str]) -> None:
    facts = Facts(PR, PR, RELAYED, relay="frankfurt", stays="it lasts")
    assert told(history, facts)[-len(lines) :] == [f"  {line}" for line in lines]
    assert len(told(history, facts)) == len(told([], facts)) + len(lines)


def test_events_of_others_are_passed_over() -> None:
    other = replace(abandoned("punch", "unreached"), peer=BOB)
    assert told([other, Listening(address="/ip4/1.2.3.4/tcp/1")], Facts(PR, PR, RELAYED))[1] == (
        "  No punch was tried yet."
    )


def test_what_is_kept_is_bounded() -> None:
    history = History()
    history.add(Listening(address="x"))
    assert len(history) == 0
    for _ in range(MAX_EVENTS + 10):
        history.add(decided("punch", "inviting"))
    assert len(history.of(ALICE)) == MAX_EVENTS
    for number in range(MAX_PEERS):
        history.add(replace(decided("punch", "inviting"), peer=PeerId(f"peer {number}")))
    assert len(history) == MAX_PEERS
    assert history.of(ALICE) == ()
