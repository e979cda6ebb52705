"""What ``kas-libp2p`` says for people, event by event. How it works with a peer is in test_cli.py."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable

import pytest
import trio

from kas_libp2p import tool
from kas_libp2p.events import (
    AcceptFailed,
    ConnectionClosed,
    Event,
    EventBus,
    EventsLost,
    HandlerFailed,
    IdentifyFailed,
    InboundRefused,
    InternalError,
    LimitHit,
    PeerIdentified,
    PeerMisbehaved,
    StreamFailed,
    UpgradeFailed,
)
from kas_libp2p.metadata import PeerId
from kas_libp2p.tool import PerfProgress, PerfSummary, Report, StreamServed

PEER = PeerId("12D3KooWDxzbYi9JivZZxT7StM3pGGw1DMshva24XZTYKiUNLEdV")
SHORT = "12D3KooWDxzb…"
WHERE = "/ip4/192.0.2.1/tcp/4001"


class Terminal(io.StringIO):
    """Output that is seen."""

    def isatty(self) -> bool:
        return True


async def shown(report: Report, *events: Event) -> None:
    bus = EventBus(lambda: 0.0)
    told = bus.listen()
    for event in events:
        bus.emit(event)
    bus.close()
    with trio.fail_after(1):
        await report.run(told)


@pytest.mark.parametrize(
    ("event", "says"),
    [
        (
            UpgradeFailed(address=WHERE, stage="noise", reason="it left", seconds=1.0),
            f"{WHERE}  got no further than noise: it left",
        ),
        (InboundRefused(address=WHERE, reason="max_per_ip"), f"{WHERE}  refused: max_per_ip"),
        (LimitHit(reason="max_streams", peer=PEER, address=WHERE), f"{SHORT}  refused: max_streams is reached"),
        (
            PeerMisbehaved(peer=None, address=WHERE, layer="yamux", reason="too much"),
            f"{WHERE}  broke yamux: too much",
        ),
        (IdentifyFailed(peer=PEER, reason="silent"), f"{SHORT}  tells nothing about itself: silent"),
        (StreamFailed(peer=PEER, reason="nothing agreed on"), "came to nothing: nothing agreed on"),
        (HandlerFailed(peer=PEER, protocol="/x", reason="oops"), "a fault of ours ended a stream of /x: oops"),
        (InternalError(peer=None, where="a dial", reason="oops"), "a fault of ours ended a dial: oops"),
        (AcceptFailed(address=WHERE, reason="EMFILE", pause=1.0), "hands over no connection"),
        (EventsLost(count=1), "1 event was not shown"),
        (
            ConnectionClosed(connection=1, peer=PEER, reason="bye", seconds=61.0, received=1500, sent=0),
            f"{SHORT}  left after 61 s: bye (in 1.5 kB, out 0 B)",
        ),
        (
            StreamServed(peer=PEER, protocol="/perf/1.0.0", seconds=2.0, received=2_000_000, sent=8),
            "/perf/1.0.0 ended: 2.0 MB in, 8 B out in 2.0 s",
        ),
    ],
    ids=lambda value: value.name if isinstance(value, Event) else "",
)
async def test_what_a_listener_says(event: Event, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    await shown(Report(False, tool._ListenWords(False)), event)
    (line,) = capsys.readouterr().out.splitlines()
    assert says in line


async def test_a_listener_says_once_who_a_peer_is(capsys: pytest.CaptureFixture[str]) -> None:
    def who(agent: str) -> PeerIdentified:
        return PeerIdentified(peer=PEER, agent=agent, protocol_version="", protocols=(), addresses=(), observed=None)

    closed = ConnectionClosed(connection=1, peer=PEER, reason="bye", seconds=1.0, received=0, sent=0)
    events = (who("a"), who("a"), who("b"), closed, who("b"))
    await shown(Report(False, tool._ListenWords(False)), *events)
    told = [line.partition("  is ")[2] for line in capsys.readouterr().out.splitlines() if "  is " in line]
    assert told == ["a", "b", "b"]
    await shown(Report(False, tool._ListenWords(True)), *events)
    assert len(capsys.readouterr().out.splitlines()) == len(events)


PROGRESS = [
    PerfProgress(peer=PEER, uploaded=50_000_000, downloaded=0, seconds=0.5),
    PerfProgress(peer=PEER, uploaded=100_000_000, downloaded=0, seconds=1.0),
    PerfProgress(peer=PEER, uploaded=100_000_000, downloaded=100_000_000, seconds=1.5),
]
SUMMARY = PerfSummary(
    peer=PEER,
    uploaded=100_000_000,
    upload_seconds=1.0,
    upload_rate=1e8,
    downloaded=200_000_000,
    download_seconds=1.0,
    download_rate=2e8,
)


async def progress_on(output: io.StringIO, monkeypatch: pytest.MonkeyPatch, *events: Event) -> str:
    monkeypatch.setattr(sys, "stdout", output)
    await shown(Report(False, tool._PerfWords(100_000_000, 200_000_000)), *events)
    monkeypatch.undo()
    return output.getvalue()


async def test_progress_is_one_line_of_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    text = await progress_on(Terminal(), monkeypatch, *PROGRESS, SUMMARY)
    _, *rest = text.split(tool.CLEAR_LINE)
    assert text.startswith("  upload    50.0 MB of 100 MB, 50 %, 100 MB/s")
    assert rest[1] == "  download  100 MB of 200 MB, 50 %, 200 MB/s"
    assert rest[2].splitlines() == [
        "  upload      100 MB in   1.0 s   100 MB/s",
        "  download    200 MB in   1.0 s   200 MB/s",
    ]


async def test_what_follows_unfinished_progress_begins_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (await progress_on(Terminal(), monkeypatch, *PROGRESS)).endswith("MB/s\n")


async def test_progress_is_not_for_files(monkeypatch: pytest.MonkeyPatch) -> None:
    text = await progress_on(io.StringIO(), monkeypatch, *PROGRESS, SUMMARY)
    assert len(text.splitlines()) == 2


async def test_as_json_everything_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    silent: Callable[[Event], list[str]] = lambda _: []  # noqa: E731
    await shown(Report(True, silent), *PROGRESS, SUMMARY)
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [each["event"] for each in events] == ["perf-progress"] * 3 + ["perf-summary"]
    assert events[-1]["download_rate"] == 2e8
