"""What ``kas-bridge demo`` shows, and what it does where there can be no NATs. The lab group runs it as it is."""

from __future__ import annotations

import io
from dataclasses import fields, replace
from typing import Any

import pytest
import trio
from rich.console import Console
from trio.testing import MockClock

from kas_bridge import cli, demo, demo_nat
from kas_bridge.demo import STEP_TIMEOUT, Child, DemoError, LightResult, Stage
from kas_bridge.demo_nat import NatResult, _Story
from kas_bridge.simnet.meet import Meeting
from kas_libp2p.events import KaspaPeerEnded
from kas_libp2p.kaspa.join import End, Side
from natlab import LabError

from .test_views import BOB, ENDED, JOINED, MOVED, OF_A_PUNCH, PUNCHED, as_told

LEFT = KaspaPeerEnded(**ENDED, joined=True, reason=End.SUPERSEDED, by=Side.US, text="")  # type: ignore[arg-type]
NO = "this system allows us no namespaces: run as root"
RESULT = NatResult(
    nats=("pr", "eimx"),
    nodes="light",
    possible=True,
    path="punched",
    reason="",
    joined=2.1,
    circuit=1.7,
    direct=2.1,
    moved=5.8,
    reconnects=0,
    gap=0.0,
    peers=None,
    attempts=1,
    rtt=0.067,
    blocks=512,
    bytes=123_000_000,
    seconds=8.0,
    timeline=[],
    total_seconds=16.0,
)
RELAYED = replace(RESULT, nats=("pr", "sym"), possible=False, path="relayed", direct=None, moved=None, reason="No way.")


class Shown(Stage):
    """A terminal of 80 columns."""

    def __init__(self) -> None:
        super().__init__(quiet=False)
        self.file = io.StringIO()
        self._out = Console(file=self.file, width=80, force_terminal=True, color_system=None, highlight=False)

    @property
    def lines(self) -> list[str]:
        return [line.rstrip() for line in self.file.getvalue().splitlines()]


@pytest.fixture
def _no_namespaces(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise LabError(NO)

    monkeypatch.setattr(demo_nat, "RunningLab", refuse)


@pytest.mark.usefixtures("_no_namespaces")
@pytest.mark.parametrize("nat", ["pr,eimx", "sym,sym"])
def test_without_namespaces_it_takes_place_on_loopback_and_says_so(nat: str, monkeypatch: pytest.MonkeyPatch) -> None:
    result = LightResult(**{each.name: 1 for each in fields(LightResult)})
    shown: list[Any] = []

    async def light(stage: Stage) -> LightResult:
        return result

    monkeypatch.setattr(demo, "light", light)
    monkeypatch.setattr(demo, "show_light", lambda stage, found: shown.append(found))
    stage = Shown()
    assert cli._demo(stage, nat, None, compare=False, blocks=None, delay=True)["nodes"] == result.nodes
    assert shown == [result]
    assert " ".join(stage.lines).strip() == f"(On loopback, without NATs: {NO}.)"


@pytest.mark.usefixtures("_no_namespaces")
def test_every_pair_needs_them(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_nat, "meetings", demo_nat.RunningLab)
    with pytest.raises(SystemExit) as ended:
        cli.demo(all_pairs=True, light=True)
    assert ended.value.code == cli.FAILED
    assert NO in capsys.readouterr().err


@pytest.mark.parametrize("nats", ["pr", "pr,pr,pr", ""])
def test_it_takes_two_types(nats: str) -> None:
    with pytest.raises(DemoError, match="two types"):
        demo_nat.parse_nats(nats)


def test_what_happens_is_told_in_the_order_of_time_and_fits_a_terminal() -> None:
    stage = Shown()
    story = _Story(stage, frozenset({BOB}), begun=1.0)
    happened = [JOINED, *(event for event, _ in OF_A_PUNCH)]
    for number, event in enumerate(happened):
        story.hear("A", as_told(event) | {"at": 2.0 + number})
    assert [at for at, _, _ in story.timeline] == [1.0 + number for number in range(len(happened)) if number != 1]
    assert "    1.00 s  A  joined: kaspad 2.1.0, relayed (…P7yG), we dialed, seen by kaspad" in stage.lines
    assert "               as 127.1.0.1 (handshake 0.1 s)" in stage.lines
    assert max(map(len, stage.lines)) <= 80
    assert (story.attempts, story.first("punched join")) == (1, None)
    assert not story.verdict.is_set()
    assert story.there("punched") is None


def test_a_session_that_has_moved_at_both_sides_is_the_end() -> None:
    story = _Story(Shown(), frozenset({BOB}), begun=1.0)
    for name in "AB":
        story.hear(name, as_told(JOINED) | {"at": 2.0})
    for at, name in ((41.0, "A"), (41.1, "B")):
        assert not story.verdict.is_set()
        story.hear(name, as_told(MOVED) | {"at": at})
    assert story.verdict.is_set()
    assert story.there("punched") == pytest.approx(40.1)
    assert (story.reconnects, story.gap) == (0, 0.0)
    assert story.timeline[-1][2].startswith("moved: punched (…P7yG)")


def test_a_peer_that_leaves_and_comes_again_is_counted() -> None:
    story = _Story(Shown(), frozenset({BOB}), begun=1.0)
    for name in "AB":
        story.hear(name, as_told(JOINED) | {"at": 2.0})
        story.hear(name, as_told(LEFT) | {"at": 3.0})
        assert not story.verdict.is_set()
        story.hear(name, as_told(replace(JOINED, path=PUNCHED)) | {"at": 3.25})
    assert (story.reconnects, story.gap, story.there("punched")) == (2, 0.25, 2.25)
    assert story.verdict.is_set()


@pytest.mark.parametrize(
    ("result", "says"),
    [
        (
            RESULT,
            [
                "met            after 2.1 s through the relay",
                "direct         0.4 s after the bridges had met, at the first attempt",
                "moved          after 5.8 s, proven; neither node noticed\n",
                "carried        512 blocks, 123 MB in 8.0 s",
                "round trip     67 ms between the bridges now",
                "Direct: two nodes behind pr and eimx, which nobody can dial, need no relay.",
            ],
        ),
        (
            replace(RESULT, reconnects=2, gap=0.2),
            ["moved          after 5.8 s, proven; a peer left 2 times, for 0.2 s at most"],
        ),
        (replace(RESULT, peers=1), ["kaspads        had one and the same peer each, by their own word"]),
        (replace(RESULT, peers=2), ["kaspads        had up to 2 peers, one by one"]),
        (RELAYED, ["relayed        No way.", "Relayed: between pr and sym no direct connection is possible"]),
        (replace(RELAYED, possible=True), ["Relayed, although pr and sym allow a direct connection"]),
    ],
)
def test_the_summary(result: NatResult, says: list[str]) -> None:
    stage = Shown()
    demo_nat.show(stage, result)
    text = "\n".join(stage.lines)
    assert [each for each in says if each not in text] == []
    assert max(map(len, stage.lines)) <= 80


def test_the_matrix_and_what_is_wrong_in_it() -> None:
    stage = Shown()
    found = [
        Meeting(nats=("pr", "fc"), path="punched", attempts=1, seconds=0.4),
        Meeting(nats=("pr", "sym"), path="relayed", reason="No way."),
        Meeting(nats=("symseq", "pr"), path="relayed", attempts=3, reason="missed"),
    ]
    assert demo_nat.show_every_pair(stage, found), "a guess may fail"
    assert "symseq x pr: missed" in stage.lines
    assert stage.lines[-1] == "1 of 3 pairs are direct; 1 that can be are not."
    assert max(map(len, stage.lines)) <= 80
    assert not demo_nat.show_every_pair(stage, [*found, Meeting(nats=("pr", "pr"), path="relayed", reason="?")])


class Slow(Child):
    """A light node to which a block comes now and then, and at last no more."""

    def __init__(self, blocks: int, *, fetched: bool) -> None:
        told = [{"event": "progress", "blocks": 1 + n, "bytes": 240_000 * n, "seconds": 1.0 + n} for n in range(blocks)]
        self.told = told + [told[-1] | {"event": "fetched"}] * fetched

    async def next(self) -> dict[str, Any]:
        await trio.sleep(0.9 * STEP_TIMEOUT)
        if not self.told:
            await trio.sleep_forever()
        return self.told.pop(0)


async def test_blocks_may_take_as_long_as_they_like(autojump_clock: MockClock) -> None:
    event = await demo.fetched(Stage(quiet=True), Slow(10, fetched=True))
    assert event["blocks"] == 10


async def test_the_step_that_took_too_long_is_named(autojump_clock: MockClock) -> None:
    with pytest.raises(trio.TooSlowError, match=r"^the next block from A to B took more than 60 s: try again when"):
        await demo.fetched(Stage(quiet=True), Slow(10, fetched=False))
