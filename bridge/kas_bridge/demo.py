"""``kas-bridge demo``: the main job, shown. Two bridges as real processes, in front of two nodes.

Without a kaspad the nodes are light ones (`kas_bridge.light`): handshake, round trips, a bulk of real Kaspa messages.
With one, they are two unmodified kaspads on a network of their own: one has a chain, the other starts empty and syncs
through the bridges, then both follow live blocks; the same blocks are synced over plain TCP beside it, also over a
distance.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import trio
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text
from trio import TaskStatus  # type: ignore[attr-defined,unused-ignore]  # libp2p brings stubs that lack it

from kas_bridge import views
from kas_bridge.light import PAYLOAD, TRANSACTIONS
from kas_libp2p.errors import KasError

LIGHT_BLOCKS = 512
"""Blocks that the light nodes exchange: 123 MB, a second or two."""

FULL_BLOCKS = 600
"""Filled blocks that the kaspads sync: 144 MB, enough to see a transport."""

LIVE_BLOCKS = 100
LIVE_RATE = 10.0
"""Blocks per second of the Kaspa network."""

DELAY = 0.05
"""Seconds each way in the part with distance: Europe to America's west coast."""

STEP_TIMEOUT = 60.0
"""Seconds for one step of the light demonstration: a hundred times what it takes."""


class DemoError(KasError):
    """The demonstration could not be shown. The text says at which step."""


class Stage:
    """Where the show takes place: a terminal, or a file that gets plain lines, or nothing but JSON in the end."""

    def __init__(self, *, quiet: bool) -> None:
        self._out: Console = views.console(error=quiet)
        self._quiet = quiet

    def say(self, text: str = "") -> None:
        """A line."""
        if not self._quiet:
            self._out.print(Text(text), soft_wrap=True)

    def title(self, text: str) -> None:
        """A line in bold."""
        if not self._quiet:
            self._out.print(Text(text, style="bold"), soft_wrap=True)

    def done(self, text: str) -> None:
        """A step that worked."""
        if not self._quiet:
            self._out.print(Text.assemble(("  ✓ ", "green"), text), soft_wrap=True)

    def table(self, table: Table) -> None:
        """A table."""
        if not self._quiet:
            self._out.print(table)

    @contextmanager
    def progress(self, what: str) -> Iterator[Meter]:
        """A bar on a terminal, a line now and then in a file."""
        if self._quiet or not self._out.is_terminal:
            yield Meter(self if not self._quiet else None, what, None)
            return
        columns = (TextColumn("    {task.description}"), BarColumn(bar_width=32), TextColumn("{task.fields[detail]}"))
        with Progress(*columns, console=self._out, transient=True) as bar:
            yield Meter(self, what, bar)


class Meter:
    """How far a step is."""

    EVERY = 5.0
    """Seconds between two lines in a file."""

    def __init__(self, stage: Stage | None, what: str, bar: Progress | None) -> None:
        self._stage = stage
        self._what = what
        self._bar = bar
        self._task = bar.add_task(what, total=None, detail="") if bar is not None else None
        self._said = time.monotonic()

    def show(self, done: float, total: float, detail: str) -> None:
        """Tell how much is done, and of how much."""
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=done, total=total, detail=detail)
        elif self._stage is not None and time.monotonic() - self._said >= self.EVERY:
            self._said = time.monotonic()
            self._stage.say(f"    {self._what}: {detail}")

    def blocks(self, what: str, done: int, total: int) -> None:
        """The same for blocks, as `kas_bridge.simnet` tells it."""
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, description=what)
        self.show(min(done, total), total, f"{done} of {total} blocks")


# -- With light nodes --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class LightResult:
    """What the light demonstration measured: seconds and bytes.

    Attributes:
        path: the way between the bridges, and their addresses.
        bridge_rtt: round trip between the bridges.
        node_rtt: round trip between the nodes, through everything; the median of 20 pings on an idle line.
    """

    peer_a: str
    peer_b: str
    path: str
    address: str
    dialect: str
    handshake: float
    bridge_rtt: float | None
    node_rtt: float
    blocks: int
    bytes: int
    seconds: float
    total_seconds: float = 0.0
    nodes: str = "light"


class _Child:
    """A process that prints one JSON object a line."""

    def __init__(self, process: trio.Process) -> None:
        self.process = process
        self._lines: list[bytes] = []
        self._rest = b""

    async def next(self) -> dict[str, Any]:
        """The next object.

        Raises:
            DemoError: the process ended.
        """
        assert self.process.stdout is not None
        while not self._lines:
            data = await self.process.stdout.receive_some(65536)
            if not data:
                raise DemoError(
                    f"{' '.join(map(str, self.process.args[1:4]))} ended; run it again with --json to see why"
                )
            *self._lines, self._rest = (self._rest + bytes(data)).split(b"\n")
        values: dict[str, Any] = json.loads(self._lines.pop(0))
        return values

    async def until(self, *events: str) -> dict[str, Any]:
        """The next object of one of these kinds."""
        while True:
            values = await self.next()
            if values["event"] in events:
                return values


async def _child(nursery: trio.Nursery, *arguments: str) -> _Child:
    """A process of this Python, ended with the nursery."""

    async def run(task_status: TaskStatus[trio.Process]) -> None:
        await trio.run_process(
            [sys.executable, *arguments],
            stdin=b"",
            stdout=subprocess.PIPE,
            check=False,
            deliver_cancel=_end,
            start_new_session=True,  # Ctrl-C in the terminal is for us, and we end it in order
            task_status=task_status,
        )

    process: trio.Process = await nursery.start(run)
    return _Child(process)


async def _end(process: trio.Process) -> None:
    process.terminate()
    with trio.move_on_after(3):
        await process.wait()
    if process.returncode is None:
        process.kill()


def _bridge(folder: Path, port: int, *flags: str) -> tuple[str, ...]:
    return (
        "-m",
        "kas_bridge",
        "run",
        "--json",
        f"--data-dir={folder}",
        f"--kaspad=127.0.0.1:{port}",
        "--network=simnet",
        "--rpc=off",
        "--listen=/ip4/127.0.0.1/tcp/0",
        *flags,
    )


async def light(stage: Stage) -> LightResult:
    """Show two bridges in front of light nodes.

    Raises:
        DemoError, trio.TooSlowError: a step failed, or took too long.
    """
    begun = time.monotonic()
    stage.title("Two bridges, each in front of a light Kaspa node. Every box is a process of its own:")
    stage.say()
    stage.say("    node A ── HTTP/2 ── bridge A ══ libp2p: TCP, Noise, Yamux ══ bridge B ── HTTP/2 ── node B")
    stage.say()
    with tempfile.TemporaryDirectory(prefix="kas-demo-") as name:
        folder = Path(name)
        async with trio.open_nursery() as nursery:
            result = await _light(stage, folder, nursery)
            nursery.cancel_scope.cancel()
    stage.done("bridges and nodes ended in order")
    return dataclasses.replace(result, total_seconds=time.monotonic() - begun)


async def _light(stage: Stage, folder: Path, nursery: trio.Nursery) -> LightResult:
    node_a = await _child(nursery, "-m", "kas_bridge.light", "serve", str(LIGHT_BLOCKS))
    node_b = await _child(nursery, "-m", "kas_bridge.light", "fetch", str(LIGHT_BLOCKS))
    with trio.fail_after(STEP_TIMEOUT):
        port_a = (await node_a.until("listening"))["port"]
        port_b = (await node_b.until("listening"))["port"]
    stage.done(f"node A and node B listen on 127.0.0.1:{port_a} and :{port_b}, as a kaspad does")
    with trio.fail_after(STEP_TIMEOUT):
        bridge_a = await _child(nursery, *_bridge(folder / "a", port_a))
        started_a = await bridge_a.until("bridge-started")
        address = started_a["addresses"][0]
        stage.done(f"bridge A is up: {address}")
        bridge_b = await _child(nursery, *_bridge(folder / "b", port_b, f"--peer={address}"))
        started_b = await bridge_b.until("bridge-started")
        stage.done(f"bridge B is up, and connects to that peer: {started_b['peer_id']}")
        joined = await bridge_b.until("kaspa-peer-joined")
        await node_b.until("joined")
    stage.done(
        f"the nodes shook hands through the overlay in {views.seconds(joined['seconds'])};"
        f" B takes A for a peer at {joined['source']}"
    )
    with trio.fail_after(STEP_TIMEOUT):
        pings = (await node_b.until("pings", "failed")).get("seconds", [])
        with stage.progress("blocks from A to B") as meter:
            while True:
                event = await node_b.until("progress", "fetched", "failed")
                if event["event"] == "failed":
                    raise DemoError(f"the blocks did not arrive: {event['reason']}")
                rate = views.rate(event["bytes"] / event["seconds"])
                detail = f"{event['blocks']} of {LIGHT_BLOCKS} blocks, {views.size(event['bytes'])}, {rate}"
                meter.show(event["blocks"], LIGHT_BLOCKS, detail)
                if event["event"] == "fetched":
                    break
        stage.done(
            f"{event['blocks']} blocks of {views.size(TRANSACTIONS * PAYLOAD)} went from A to B in"
            f" {views.seconds(event['seconds'])}: each was checked, byte by byte"
        )
        pings += (await node_b.until("pings", "failed")).get("seconds", [])
        row = await _row(folder / "b")
    median = statistics.median(pings)
    stage.done(f"{len(pings)} pings between the nodes, before and after: {views.milliseconds(median * 1000)} (median)")
    return LightResult(
        peer_a=started_a["peer_id"],
        peer_b=started_b["peer_id"],
        path=row["path"],
        address=row["address"],
        dialect=row["dialect"],
        handshake=joined["seconds"],
        bridge_rtt=None if row["rtt_ms"] is None else row["rtt_ms"] / 1000,
        node_rtt=median,
        blocks=event["blocks"],
        bytes=event["bytes"],
        seconds=event["seconds"],
    )


async def _row(folder: Path) -> dict[str, Any]:
    """What ``kas-bridge peers`` shows of the one peer."""
    from kas_bridge.control import ask
    from kas_bridge.datadir import socket_paths

    rows: list[dict[str, Any]] = (await ask(socket_paths(folder), {"action": "peers"}))["peers"]
    return rows[0]


def show_light(stage: Stage, result: LightResult) -> None:
    """The closing summary."""
    table = _facts("Summary")
    rtt = f", {views.milliseconds(result.bridge_rtt * 1000)} of it between the bridges" if result.bridge_rtt else ""
    for name, text in (
        ("path", f"{result.path}, {result.address}, encrypted and authenticated (Noise), {result.dialect}"),
        ("handshake", f"{views.seconds(result.handshake)} from the stream to both nodes being ready"),
        ("round trip", f"{views.milliseconds(result.node_rtt * 1000)} from node to node{rtt}"),
        ("carried", f"{result.blocks} blocks, {views.size(result.bytes)} in {views.seconds(result.seconds)}"),
        ("rate", views.rate(result.bytes / result.seconds)),
        ("all of it", f"took {views.seconds(result.total_seconds)}"),
    ):
        table.add_row(name, text)
    stage.say()
    stage.table(table)


def _facts(title: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True, style="bold", width=13)
    table.add_column(overflow="fold")
    return table


# -- With real kaspads -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class KaspadResult:
    """What the demonstration with kaspads measured: seconds, bytes, blocks.

    Attributes:
        syncs: seconds until both nodes had the same tip, by way and by delay each way.
        live: median and 99th percentile of a live block's time from A to B.
        skipped: what could not be shown, and why.
    """

    kaspad: str
    version: str
    blocks: int
    full: int
    bytes: int
    syncs: list[dict[str, Any]] = field(default_factory=list)
    live_blocks: int = 0
    live_median: float = 0.0
    live_p99: float = 0.0
    path: str = ""
    rtt: float | None = None
    total_seconds: float = 0.0
    skipped: str = ""
    nodes: str = "kaspad"


async def kaspads(stage: Stage, kaspad: Path, *, full: int = FULL_BLOCKS, distance: bool = True) -> KaspadResult:
    """Show two bridges in front of two real nodes, and plain TCP beside them.

    Args:
        kaspad: the binary of both nodes.
        full: filled blocks of the chain.
        distance: also with `DELAY` each way, where network namespaces are allowed.

    Raises:
        KasError, ProcessEnded, trio.TooSlowError: a step failed.
    """
    from kas_bridge.simnet.bridges import Bridges
    from kas_bridge.simnet.measure import PlainTcp, Sync, live, pair_of, sync, timed_sync
    from kas_bridge.simnet.mine import FULL, filled_chain
    from kas_bridge.simnet.node import version_of
    from kas_bridge.simnet.wire import Wire, WireError

    begun = time.monotonic()
    version = version_of(kaspad)
    stage.title(f"Two unmodified kaspads {version} on a network of their own (simnet), a bridge in front of each:")
    stage.say()
    stage.say("    kaspad A ── HTTP/2 ── bridge A ══ libp2p: TCP, Noise, Yamux ══ bridge B ── HTTP/2 ── kaspad B")
    stage.say()
    with stage.progress("mining") as meter:
        chain = await filled_chain(kaspad, full, progress=meter.blocks)
    stage.done(
        f"kaspad A has a chain of {chain.blocks} blocks, {chain.full} of them filled with"
        f" {views.size(chain.size)} of signed transactions"
    )
    syncs: list[Sync] = []
    bridges, plain = Bridges(), PlainTcp()
    async with pair_of(chain, kaspad, bridges) as pair, bridges.prepare(pair) as link:
        with stage.progress("kaspad B syncs through the bridges") as meter:
            syncs.append(await timed_sync(chain, pair, bridges, link, 0.0, meter.blocks))
        row = (await link.target.ask("peers"))["peers"][0]
        stage.done(
            f"kaspad B, empty, synced through the bridges in {views.seconds(syncs[-1].seconds)}: both have the same tip"
        )
        with stage.progress("live blocks") as meter:
            stage.say(f"    {LIVE_BLOCKS} live blocks of {views.size(FULL)}, {LIVE_RATE:g} per second …")
            arrivals = await live(chain, pair, bridges, size=FULL, count=LIVE_BLOCKS, rate=LIVE_RATE)
        stage.done(
            f"{LIVE_BLOCKS} live blocks mined on A, each on B after {views.milliseconds(arrivals.quantile(0.5) * 1000)}"
            f" (median; 99 % within {views.milliseconds(arrivals.quantile(0.99) * 1000)})"
        )
    with stage.progress("the same over plain TCP") as meter:
        syncs.append(await sync(chain, kaspad, plain, progress=meter.blocks))
    stage.done(f"the same blocks over plain TCP, kaspad to kaspad: {views.seconds(syncs[-1].seconds)}")
    skipped = ""
    if distance:
        try:
            Wire(DELAY).close()
        except (WireError, OSError) as error:
            skipped = f"with distance: this system gives no network namespaces ({error})"
            stage.say(f"  - {skipped}")
        else:
            far = f"{DELAY * 1000:g} ms each way"
            for way in (bridges, plain):
                with stage.progress(f"{way.name}, {far}") as meter:
                    syncs.append(await sync(chain, kaspad, way, delay=DELAY, progress=meter.blocks))
                stage.done(f"the same with {far} of delay, {way.name}: {views.seconds(syncs[-1].seconds)}")
    return KaspadResult(
        kaspad=str(kaspad),
        version=version,
        blocks=chain.blocks,
        full=chain.full,
        bytes=chain.bytes,
        syncs=[{"way": each.way, "delay": each.delay, "seconds": each.seconds} for each in syncs],
        live_blocks=LIVE_BLOCKS,
        live_median=arrivals.quantile(0.5),
        live_p99=arrivals.quantile(0.99),
        path=row["path"],
        rtt=None if row["rtt_ms"] is None else row["rtt_ms"] / 1000,
        total_seconds=time.monotonic() - begun,
        skipped=skipped,
    )


def show_kaspads(stage: Stage, result: KaspadResult) -> None:
    """The closing summary."""
    stage.say()
    table = Table(
        title=f"Sync of {result.blocks} blocks, {views.size(result.bytes)} of transactions",
        title_justify="left",
        title_style="bold",
        box=None,
        pad_edge=False,
        padding=(0, 3, 0, 0),
    )
    table.add_column("")
    for name in ("PLAIN TCP", "TWO BRIDGES", "RATE", "BRIDGES TAKE"):
        table.add_column(name, justify="right", no_wrap=True)
    for delay in sorted({each["delay"] for each in result.syncs}):
        times = {each["way"]: each["seconds"] for each in result.syncs if each["delay"] == delay}
        plain, bridges = times["plain TCP"], times["two bridges"]
        table.add_row(
            "this host" if not delay else f"{delay * 1000:g} ms each way",
            views.seconds(plain),
            views.seconds(bridges),
            views.rate(result.bytes / bridges),
            f"{bridges / plain:.2f} x",
        )
    stage.table(table)
    stage.say()
    facts = _facts("")
    rtt = f", {views.milliseconds(result.rtt * 1000)} between the bridges" if result.rtt else ""
    facts.add_row("path", f"{result.path}{rtt}, encrypted and authenticated (Noise)")
    facts.add_row(
        "live",
        f"{result.live_blocks} blocks at {LIVE_RATE:g} per second, from A to B in"
        f" {views.milliseconds(result.live_median * 1000)} (median),"
        f" 99 % within {views.milliseconds(result.live_p99 * 1000)}",
    )
    if result.skipped:
        facts.add_row("not shown", result.skipped)
    facts.add_row("all of it", f"took {views.seconds(result.total_seconds)}")
    stage.table(facts)
