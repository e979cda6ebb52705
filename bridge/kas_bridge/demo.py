"""``kas-bridge demo``: the main job, shown. Two bridges as real processes, in front of two nodes.

Without a kaspad the nodes are light ones (`kas_bridge.light`): handshake, round trips, a bulk of real Kaspa messages.
With one, they are two unmodified kaspads on a network of their own: one has a chain, the other starts empty and syncs
through the bridges, then both follow live blocks; the same blocks are synced over plain TCP beside it, also over a
distance.
"""

from __future__ import annotations

import dataclasses
import json
import math
import signal
import statistics
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import trio
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text
from trio import TaskStatus  # type: ignore[attr-defined,unused-ignore]  # libp2p brings stubs that lack it

from kas_bridge import views
from kas_bridge.light import PAYLOAD, TRANSACTIONS
from kas_bridge.simnet.process import within
from kas_libp2p.errors import KasError

if TYPE_CHECKING:
    from kas_bridge.simnet.wire import Namespace

T = TypeVar("T")

LIGHT_BLOCKS = 512
"""Blocks that the light nodes exchange: 123 MB, a second or two."""

FULL_BLOCKS = 600
"""Filled blocks that the kaspads sync: 144 MB, enough to see a transport."""

LIVE_BLOCKS = 100
LIVE_RATE = 10.0
"""Blocks per second of the Kaspa network."""

DELAY = 0.05
"""Seconds each way in the part with distance: Europe to America's west coast."""

DISTURBED = 0.2
"""Cores that others keep busy above which a comparison is worth little."""

STEP_TIMEOUT = 60.0
"""Seconds for one step of the light demonstration, and for one block: a hundred times what it takes. How long all of
the blocks take depends on the machine and the way."""

# Seconds that the demonstration with kaspads takes on two shared cores, so that it can say so beforehand: what does not
# depend on the chain (starting nodes and bridges, live blocks), and for each filled block.
NEAR_SECONDS, NEAR_EACH = 30.0, 0.015
FAR_SECONDS, FAR_EACH = 6.0, 0.04
MINING_EACH = 0.015

DRAWING = """
    {node} A ── bridge A ═════════ libp2p ═════════ bridge B ── {node} B
   {space}    HTTP/2       TCP, Noise, Yamux          HTTP/2
"""


class DemoError(KasError):
    """The demonstration could not be shown. The text says at which step."""


class Stage:
    """Where the show takes place: a terminal, or a file that gets plain lines, or nothing but JSON in the end."""

    def __init__(self, *, quiet: bool) -> None:
        self._out: Console = views.console(error=quiet)
        self._quiet = quiet

    def say(self, text: str = "") -> None:
        """A line."""
        self._print("", text)

    def title(self, text: str) -> None:
        """A line in bold."""
        self._print("", text, style="bold")

    def done(self, text: str) -> None:
        """A step that worked."""
        self._print("  ✓ ", text)

    def left_out(self, text: str) -> None:
        """A step that is not possible here."""
        self._print("  - ", text)

    def happened(self, when: str, text: str) -> None:
        """What happened at some time, somewhere."""
        self._print(f"  {when}  ", text, mark_style="dim")

    def _print(self, mark: str, text: str, style: str = "", mark_style: str = "green") -> None:
        if self._quiet:
            return
        lines = [text]
        if self._out.is_terminal:
            room = self._out.width - len(mark)
            lines = [
                part
                for line in text.splitlines() or [""]
                for part in textwrap.wrap(line, room, break_long_words=False, break_on_hyphens=False) or [""]
            ]
        self._out.print(
            Text.assemble((mark, mark_style), (f"\n{' ' * len(mark)}".join(lines), style)),
            soft_wrap=True,
        )

    def drawing(self, node: str) -> None:
        """Who stands where."""
        if not self._quiet:
            self._out.print(Text(DRAWING.format(node=node, space=" " * len(node))), soft_wrap=True)

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
        self._task = bar.add_task(what, total=None, detail="starting …") if bar is not None else None
        self._said = time.monotonic()

    def show(self, done: float, total: float, detail: str) -> None:
        """Tell how much is done, and of how much."""
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=done, total=total, detail=detail)
        elif self._stage is not None and time.monotonic() - self._said >= self.EVERY:
            self._said = time.monotonic()
            self._stage.say(f"    {self._what}: {detail}")

    def blocks(self, _: str, done: int, total: int) -> None:
        """The same for blocks, as `kas_bridge.simnet` tells it."""
        self.show(min(done, total), total, f"{done} of {total} blocks")


async def interruptible(stage: Stage, work: Callable[[], Awaitable[T]]) -> T:
    """Show something that SIGINT and SIGTERM end in order: processes, namespaces and temporary folders are gone then.

    Raises:
        KeyboardInterrupt: one of them came.
    """
    result: list[T] = []
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async with trio.open_nursery() as nursery:

            async def watch() -> None:
                await anext(signals)
                stage.say("    ending what was started …")
                nursery.cancel_scope.cancel()

            nursery.start_soon(watch)
            result.append(await work())
            nursery.cancel_scope.cancel()
    if not result:
        raise KeyboardInterrupt
    return result[0]


# -- With light nodes --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class LightResult:
    """What the light demonstration measured: seconds and bytes.

    Attributes:
        path: the way between the bridges, and their addresses.
        node_rtt: round trip between the nodes, through everything; the median of 20 pings on an idle line.
    """

    peer_a: str
    peer_b: str
    path: str
    address: str
    dialect: str
    handshake: float
    node_rtt: float
    blocks: int
    bytes: int
    seconds: float
    total_seconds: float = 0.0
    nodes: str = "light"


class Child:
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


async def start_child(nursery: trio.Nursery, *arguments: str, inside: Namespace | None = None) -> Child:
    """A process of this Python, ended with the nursery; in a namespace if there is one."""
    command: list[str] = [sys.executable, *arguments]
    fds: tuple[int, ...] = ()
    if inside is not None:
        command, fds = inside.command(command)

    async def run(task_status: TaskStatus[trio.Process]) -> None:
        await trio.run_process(
            command,
            pass_fds=fds,
            stdin=b"",
            stdout=subprocess.PIPE,
            check=False,
            deliver_cancel=_end,
            start_new_session=True,  # Ctrl-C in the terminal is for us, and we end it in order
            task_status=task_status,
        )

    process: trio.Process = await nursery.start(run)
    return Child(process)


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
    stage.title("Two bridges, each in front of a light Kaspa node. Each is a process of its own:")
    stage.drawing("node")
    with tempfile.TemporaryDirectory(prefix="kas-demo-") as name:
        folder = Path(name)
        async with trio.open_nursery() as nursery:
            result = await _light(stage, folder, nursery)
            nursery.cancel_scope.cancel()
    stage.done("bridges and nodes ended in order")
    return dataclasses.replace(result, total_seconds=time.monotonic() - begun)


async def _light(stage: Stage, folder: Path, nursery: trio.Nursery) -> LightResult:
    node_a = await start_child(nursery, "-m", "kas_bridge.light", "serve", str(LIGHT_BLOCKS))
    node_b = await start_child(nursery, "-m", "kas_bridge.light", "fetch", str(LIGHT_BLOCKS))
    with within(STEP_TIMEOUT, "the start of the light nodes"):
        port_a = (await node_a.until("listening"))["port"]
        port_b = (await node_b.until("listening"))["port"]
    stage.done(f"node A and node B listen on 127.0.0.1:{port_a} and :{port_b}, as a kaspad does")
    with within(STEP_TIMEOUT, "the start of the bridges until the nodes had met"):
        bridge_a = await start_child(nursery, *_bridge(folder / "a", port_a))
        started_a = await bridge_a.until("bridge-started")
        address = started_a["addresses"][0]
        stage.done(f"bridge A is up: {views.short(started_a['peer_id'])} at {address.partition('/p2p/')[0]}")
        bridge_b = await start_child(nursery, *_bridge(folder / "b", port_b, f"--peer={address}"))
        started_b = await bridge_b.until("bridge-started")
        stage.done(f"bridge B is up: {views.short(started_b['peer_id'])}; it connects to bridge A")
        joined = await bridge_b.until("kaspa-peer-joined")
        await node_b.until("joined")
    stage.done(
        f"the nodes shook hands through the overlay in {views.seconds(joined['seconds'])};"
        f" B takes A for a peer at {joined['source']}"
    )
    with within(STEP_TIMEOUT, "measuring round trips"):
        pings = (await node_b.until("pings", "failed")).get("seconds", [])
    event = await fetched(stage, node_b)
    stage.done(
        f"{event['blocks']} blocks of {views.size(TRANSACTIONS * PAYLOAD)} went from A to B in"
        f" {views.seconds(event['seconds'])}: each was checked, byte by byte"
    )
    with within(STEP_TIMEOUT, "measuring round trips once more"):
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
        node_rtt=median,
        blocks=event["blocks"],
        bytes=event["bytes"],
        seconds=event["seconds"],
    )


async def fetched(stage: Stage, node: Child) -> dict[str, Any]:
    """Wait until a light node has all blocks, however long that takes, as long as some come.

    Raises:
        DemoError: one was not what was asked for.
        trio.TooSlowError: none came for `STEP_TIMEOUT` seconds.
    """
    with stage.progress("blocks from A to B") as meter:
        while True:
            with within(STEP_TIMEOUT, "the next block from A to B"):
                event = await node.until("progress", "fetched", "failed")
            if event["event"] == "failed":
                raise DemoError(f"the blocks did not arrive: {event['reason']}")
            rate = views.rate(event["bytes"] / event["seconds"])
            detail = f"{event['blocks']} of {LIGHT_BLOCKS} blocks, {views.size(event['bytes'])}, {rate}"
            meter.show(event["blocks"], LIGHT_BLOCKS, detail)
            if event["event"] == "fetched":
                return event


async def _row(folder: Path) -> dict[str, Any]:
    """What ``kas-bridge peers`` shows of the one peer."""
    from kas_bridge.control import ask
    from kas_bridge.datadir import socket_paths

    rows: list[dict[str, Any]] = (await ask(socket_paths(folder), {"action": "peers"}))["peers"]
    return rows[0]


def show_light(stage: Stage, result: LightResult) -> None:
    """The closing summary."""
    table = fact_table("Summary")
    for name, text in (
        ("path", f"{result.path}, {result.address}, encrypted and authenticated (Noise), {result.dialect}"),
        ("handshake", f"{views.seconds(result.handshake)} from the stream to both nodes being ready"),
        ("round trip", f"{views.milliseconds(result.node_rtt * 1000)} from node to node, through both bridges"),
        ("carried", f"{result.blocks} blocks, {views.size(result.bytes)} in {views.seconds(result.seconds)}"),
        ("rate", views.rate(result.bytes / result.seconds)),
        ("all of it", f"took {views.seconds(result.total_seconds)}"),
    ):
        table.add_row(name, text)
    stage.say()
    stage.table(table)


def fact_table(title: str) -> Table:
    """An empty table of names and what is to be said of each."""
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
        live: median and 99th percentile of a live block's time from A to B, by way.
        rtt: round trip between the bridges, with the cipher and two schedulers in it.
        others: cores that other programs on this machine kept busy meanwhile, at most.
        skipped: what could not be shown, and why.
    """

    kaspad: str
    version: str
    blocks: int
    full: int
    bytes: int
    syncs: list[dict[str, Any]]
    live_blocks: int
    live_size: int
    live: list[dict[str, Any]]
    path: str
    rtt: float | None
    others: float
    total_seconds: float
    skipped: str
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
    from kas_bridge.simnet.bridges import BridgeLink, Bridges
    from kas_bridge.simnet.measure import Live, PlainTcp, Sync, live, pair_of, sync, timed_sync
    from kas_bridge.simnet.mine import FULL, filled_chain
    from kas_bridge.simnet.node import version_of

    begun = time.monotonic()
    version = version_of(kaspad)
    stage.title(f"Two unmodified kaspads {version} on a network of their own (simnet), a bridge in front of each:")
    stage.drawing("kaspad")
    skipped = _no_wire() if distance else ""
    stage.say(_beforehand(full, distance=distance and not skipped))
    stage.say()
    with stage.progress("kaspad A mines") as meter:
        chain = await filled_chain(kaspad, full, progress=meter.blocks)
    stage.done(
        f"kaspad A has a chain of {chain.blocks} blocks, {chain.full} of them filled with"
        f" {views.size(chain.size)} of signed transactions"
    )
    syncs: list[Sync] = []
    lives: list[Live] = []
    row: dict[str, Any] = {}
    for way, by in ((Bridges(), "through the bridges"), (PlainTcp(), "over plain TCP")):
        async with pair_of(chain, kaspad, way) as pair, way.prepare(pair) as link:
            with stage.progress(f"kaspad B syncs {by}") as meter:
                syncs.append(await timed_sync(chain, pair, way, link, 0.0, meter.blocks))
            if isinstance(link, BridgeLink):
                row = (await link.target.ask("peers"))["peers"][0]
            stage.done(f"kaspad B, empty, synced {by} in {views.seconds(syncs[-1].seconds)}: both have the same tip")
            with stage.progress("A mines, B follows") as meter:
                lives.append(
                    await live(chain, pair, way, size=FULL, count=LIVE_BLOCKS, rate=LIVE_RATE, progress=meter.blocks)
                )
            stage.done(
                f"{LIVE_BLOCKS} live blocks of {views.size(FULL)}, {LIVE_RATE:g} per second: each was at B after"
                f" {_at(lives[-1].quantile(0.5))} (median)"
            )
    if skipped:
        stage.left_out(skipped)
    elif distance:
        far = f"{DELAY * 1000:g} ms each way"
        for way, by in ((Bridges(), "through the bridges"), (PlainTcp(), "over plain TCP")):
            with stage.progress(f"{by}, {far}") as meter:
                syncs.append(await sync(chain, kaspad, way, delay=DELAY, progress=meter.blocks))
            stage.done(f"the same over a distance of {far}, {by}: {views.seconds(syncs[-1].seconds)}")
    return KaspadResult(
        kaspad=str(kaspad),
        version=version,
        blocks=chain.blocks,
        full=chain.full,
        bytes=chain.bytes,
        syncs=[{"way": each.way, "delay": each.delay, "seconds": each.seconds} for each in syncs],
        live_blocks=LIVE_BLOCKS,
        live_size=FULL,
        live=[{"way": each.way, "median": each.quantile(0.5), "p99": each.quantile(0.99)} for each in lives],
        path=row["path"],
        rtt=None if row["rtt_ms"] is None else row["rtt_ms"] / 1000,
        others=max([*(each.others for each in syncs), *(each.others for each in lives)]),
        total_seconds=time.monotonic() - begun,
        skipped=skipped,
    )


def _no_wire() -> str:
    """Why there can be no distance here; empty if there can."""
    from kas_bridge.simnet.wire import Wire, WireError

    try:
        Wire(DELAY).close()
    except (WireError, OSError) as error:
        return f"no distance: {error}"
    return ""


def _beforehand(full: int, *, distance: bool) -> str:
    from kas_bridge.simnet.mine import is_made

    takes = NEAR_SECONDS + NEAR_EACH * full + (FAR_SECONDS + FAR_EACH * full if distance else 0)
    mining = "" if is_made(full) else f", and {_tens(MINING_EACH * full)} more this once to mine the chain"
    return f"This takes about {_tens(takes)}{mining}."


def _tens(value: float) -> str:
    return views.seconds(math.ceil(value / 10) * 10)


def _at(value: float) -> str:
    return views.milliseconds(value * 1000)


def show_kaspads(stage: Stage, result: KaspadResult) -> None:
    """The closing summary."""
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), title="Summary", title_justify="left")
    table.title_style = "bold"
    table.add_column("")
    for name in ("PLAIN TCP", "TWO BRIDGES", "RATIO"):
        table.add_column(name, justify="right", no_wrap=True)

    def row(name: str, times: dict[str, float], show: Callable[[float], str]) -> None:
        plain, bridges = times["plain TCP"], times["two bridges"]
        table.add_row(f"  {name}", show(plain), show(bridges), f"{bridges / plain:.2f} x")

    table.add_row(f"sync of {result.blocks} blocks, {views.size(result.bytes)}")
    for delay in sorted({each["delay"] for each in result.syncs}):
        times = {each["way"]: each["seconds"] for each in result.syncs if each["delay"] == delay}
        row("this host" if not delay else f"{delay * 1000:g} ms each way", times, views.seconds)
    table.add_row(f"live blocks of {views.size(result.live_size)}, {LIVE_RATE:g} per second")
    for name, key in (("median", "median"), ("99 % within", "p99")):
        row(name, {each["way"]: each[key] for each in result.live}, _at)
    stage.say()
    stage.table(table)
    stage.say()
    facts = fact_table("")
    rtt = f", {_at(result.rtt)} between the bridges" if result.rtt else ""
    facts.add_row("path", f"{result.path}{rtt}, encrypted and authenticated (Noise)")
    rates = [
        f"{views.rate(result.bytes / each['seconds'])} {'over ' if each['delay'] else 'on '}"
        f"{'that distance' if each['delay'] else 'this host'}"
        for each in result.syncs
        if each["way"] == "two bridges"
    ]
    facts.add_row("rate", f"{', '.join(rates)}, through the bridges")
    if result.others > DISTURBED:
        busy = f"other programs took up to {result.others:.1f} cores meanwhile: don't trust the times"
        facts.add_row("disturbed", busy)
    if result.skipped:
        facts.add_row("not shown", result.skipped)
    facts.add_row("all of it", f"took {views.seconds(result.total_seconds)}")
    stage.table(facts)
