"""``kas-bridge top``: what goes on, live. Peers and their paths, relays, punches under way, and the last events.

It asks the control socket once a second, and when it hears of an event that changes what it shows, as a punch. What it
shows is made of plain values, so that a test needs no bridge and no terminal.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import trio
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from kas_bridge import reach, views
from kas_bridge.control import ControlError, ask, follow

EVERY = 1.0
"""Seconds between two looks: what changes faster is told by events."""
GATHER = 0.1
"""Seconds between two looks at least: events come in crowds."""
MOVING = ("upgrade-", "punch-started", "punch-ended", "path-proven", "kaspa-peer-", "session-")
"""Events after which another look is worth it: a punch is over in less time than passes between two."""
EVENTS = 100
"""Event lines that are kept; as many as fit are shown."""
SILENT = 3.0
"""Seconds after which an answer that has not come is pointed out."""


def screen(
    status: dict[str, Any], rows: list[dict[str, Any]], events: Sequence[str], out: Console, height: int
) -> RenderableType:
    """The whole picture.

    Args:
        status, rows: the answers to ``status`` and ``peers``.
        events: lines, the latest last.
        out: where it goes; gives the width.
        height: lines that there are.
    """
    relay = status["mode"] == "relay"
    up = f"{status['peer_id'][:12]}…{status['peer_id'][-4:]} · up {views.seconds(status['uptime_s'])}"
    head = Text.assemble(
        ("kas-bridge relay " if relay else "kas-bridge ", "bold"), (status["version"], "bold"), f" · {up}"
    )
    facts = [] if relay else views.labelled("kaspad", views.kaspad_line(status["kaspad"], first=False)[:1])
    facts += views.labelled("role", [reach.role_line(status)])
    if status["relay"] is not None:
        facts += views.labelled("carries", [reach.serving_line(status["relay"])])
    parts: list[RenderableType] = [head, *(_line(each, out) for each in facts)]
    if status["reservations"]:
        parts += [Text(""), _relays(status["reservations"])]
    parts += [Text(""), views.peers(rows, status["upgrades"], out, relay=relay)]
    used = len(out.render_lines(Group(*parts), out.options, pad=False))
    room = height - used - 2
    if room > 0 and events:
        parts += [Text(""), *(_line(each, out, style="dim") for each in events[-room:])]
    return Group(*parts)


def _line(text: str, out: Console, style: str = "") -> Text:
    line = Text(text, style=style, no_wrap=True, overflow="ellipsis")
    line.truncate(out.width, overflow="ellipsis")
    return line


def _relays(reservations: list[dict[str, Any]]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for name in ("RELAY", "AT", "RTT", "GOOD FOR", "CAME IN", "STATE"):
        table.add_column(name, no_wrap=True, justify="right" if name in ("RTT", "GOOD FOR", "CAME IN") else "left")
    for each in reservations[: reach.MAX_SHOWN]:
        table.add_row(
            reach.relay_name(each["relay_id"]),
            reach.host_of(each["address"]) if each["address"] else "-",
            views.milliseconds(each["rtt_ms"]),
            views.seconds(each["renew_in_s"]) if each["held"] else "-",
            str(each["circuits"]),
            "reserved" if each["held"] else each["problem"] or "being asked",
        )
    return table


class _Top:
    """What is on the screen."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = paths
        self.status: dict[str, Any] | None = None
        self.rows: list[dict[str, Any]] = []
        self.events: deque[str] = deque(maxlen=EVENTS)
        self.problem = ""
        self.changed = trio.Event()
        self.stale = trio.Event()

    def hear(self, event: dict[str, Any]) -> None:
        if event["event"].startswith(MOVING):
            self.stale.set()
        line = views.event_line(event)
        if line is not None:
            self.events.append(line)
            self.changed.set()

    async def look(self) -> None:
        status = await ask(self.paths, {"action": "status"}, timeout=SILENT)
        self.rows = (await ask(self.paths, {"action": "peers"}, timeout=SILENT))["peers"]
        self.status = status
        self.changed.set()


async def show(paths: Sequence[Path], out: Console) -> None:
    """Show it until cancelled, or until the bridge ends.

    Raises:
        ControlError: no bridge answers.
    """
    top = _Top(paths)
    await top.look()
    with Live(console=out, screen=True, auto_refresh=False) as live:
        async with trio.open_nursery() as nursery:

            async def hear() -> None:
                await follow(paths, top.hear)
                nursery.cancel_scope.cancel()

            async def look() -> None:
                while True:
                    with trio.move_on_after(EVERY - GATHER):
                        await top.stale.wait()
                    await trio.sleep(GATHER)
                    top.stale = trio.Event()
                    try:
                        await top.look()
                        top.problem = ""
                    except ControlError as error:  # the end of the events ends it; else it is busy
                        top.problem = str(error)
                        top.changed.set()

            nursery.start_soon(hear)
            nursery.start_soon(look)
            while True:
                assert top.status is not None
                top.changed = trio.Event()
                picture = screen(top.status, top.rows, tuple(top.events), out, out.height - bool(top.problem))
                live.update(Group(Text(top.problem, style="red"), picture) if top.problem else picture, refresh=True)
                await top.changed.wait()
