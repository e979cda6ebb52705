"""The live view, from the values that the control socket gives."""

from __future__ import annotations

import io

from rich.console import Console

from kas_bridge.top import _Top, screen

from .test_views import joined, status

PLACE = {
    "relay_id": "12D3KooWPqT5LKnDg9BizoExsXWiuebcitxtJa3LCHdcWT2jP7yG",
    "address": "/ip4/192.0.2.1/tcp/16117",
    "held": True,
    "circuits": 2,
    "rtt_ms": 18.4,
    "renew_in_s": 2640.0,
    "problem": "",
}
PROVEN = {"path": {"kind": "punched", "relay": PLACE["relay_id"]}, "rtt": 0.02, "relayed_rtt": 0.04}
EVENTS = [f"14:02:{second:02}  peer 12D3KooWPqT5…  punched" for second in range(60)]


def shown(width: int = 100, height: int = 30, **changes: object) -> list[str]:
    out = Console(file=io.StringIO(), width=width, height=height, highlight=False)
    values = status(**{"reservations": [PLACE], **changes})
    out.print(screen(values, [joined()], EVENTS, out, height))
    assert isinstance(out.file, io.StringIO)
    return [line.rstrip() for line in out.file.getvalue().splitlines()]


def test_everything_is_on_it() -> None:
    lines = shown()
    assert any("role" in line and "private" in line for line in lines)
    assert any("18 ms" in line and "reserved" in line for line in lines)
    assert any("kaspad 2.1.0" in line and "direct" in line and "23 ms" in line for line in lines)
    assert EVENTS[-1] in lines


def test_it_fills_the_height_and_never_exceeds_it() -> None:
    for height in (10, 20, 40):
        lines = shown(height=height)
        assert len(lines) <= max(height, len(shown(height=1)))
    assert len(shown(height=40)) == 39
    assert EVENTS[-1] in shown(height=20)


def test_no_line_is_wider_than_the_screen() -> None:
    for width in (80, 120):
        assert all(len(line) <= width for line in shown(width=width))


async def test_a_punch_that_begins_or_ends_is_looked_at_at_once() -> None:
    for name, looked in (("punch-started", True), ("path-proven", True), ("punch-dialed", False), ("pinged", False)):
        top = _Top([])
        top.hear({"event": name, "at": 0.0, "peer": PLACE["relay_id"], **PROVEN})
        assert top.stale.is_set() is looked, name


def test_a_punch_under_way_is_on_it() -> None:
    upgrade = {"peer_id": PLACE["relay_id"], "state": "punching", "since_s": 0.4}
    assert "12D3KooWPqT5… is being punched: both sides dial each other (0.4 s)" in shown(upgrades=[upgrade])


def test_a_place_that_is_not_held_says_why() -> None:
    place = PLACE | {"held": False, "address": "", "rtt_ms": None, "problem": "no answer within 10 s"}
    assert any("no answer within 10 s" in line for line in shown(reservations=[place]))
