"""``kas-bridge demo``, the main job: two nodes behind home routers that nobody touched meet through a relay, and become
direct where the two NATs allow it; neither node notices that its peer moves there.

Everything is real: network namespaces with nftables for the routers (natlab), ``kas-bridge relay`` on the public side,
``kas-bridge run`` in front of a node at each home. What is told comes from the events of the bridges.
"""

from __future__ import annotations

import itertools
import re
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import trio

from kas_bridge import reach, views
from kas_bridge.demo import (
    LIGHT_BLOCKS,
    MINING_EACH,
    STEP_TIMEOUT,
    Child,
    DemoError,
    Stage,
    fact_table,
    fetched,
    start_child,
)
from kas_bridge.simnet.lab import LabHost, inside, pair_at, relay_at
from kas_bridge.simnet.measure import wait_synced
from kas_bridge.simnet.meet import COUNTING as GUESSED
from kas_bridge.simnet.meet import TYPES, Meeting, matrix, meetings, possible
from kas_bridge.simnet.mine import filled_chain, is_made
from kas_bridge.simnet.node import version_of
from kas_bridge.simnet.process import within
from kas_bridge.simnet.watch import PeerWatch
from natlab import RunningLab
from natlab.punch import expected, group_of
from natlab.topology import lab_from_text

HOME_DELAY, RELAY_DELAY = 0.015, 0.020
"""Seconds each way on the lines of the two homes and of the relay: 60 ms between the homes, 140 by way of the relay."""
PORT = 16117
"""The bridges' usual port. Each is alone in its home."""
NAT_TIMEOUT, POLL = 15.0, 0.1
"""Seconds for bridge A to see what its router lets in, as one that has been up for a while has; and between two looks.
Without, it takes an attempt of some seconds to see that a pair can't meet."""
SETTLE_TIMEOUT = 30.0
"""Seconds until the peers are joined and it is clear whether they become direct: a new way proves itself first."""
_IN_DETAIL = ("punch-", "kaspa-peer-joined", "kaspa-peer-ended", "intent-told")
"""Events that are told even where an operator would not be bothered with them."""
FULL_BLOCKS = 300
"""Filled blocks that the kaspads sync: 72 MB, of which the relay carries what fits into the first seconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NatResult:
    """What was seen.

    Attributes:
        nats: the types of the two routers.
        possible: whether the two NATs allow a direct connection at all, as plain sockets have shown.
        path: how the peers are joined in the end.
        reason: why there is no direct connection, as the bridges say; empty if there is.
        joined: seconds from the start of bridge B until the nodes had shaken hands, through the relay.
        circuit: seconds from the start of bridge B until the bridges had a connection through the relay.
        direct: seconds from the start of bridge B to a verified direct connection; ``None``: there was none.
        moved: seconds until both sides of the nodes' connection were there.
        reconnects: how often a node's peer left and came again.
        gap: seconds for which a node missed its peer then, at most; 0: it did not.
        peers: different peers that a kaspad had over all that, by its own word; ``None``: the nodes are light ones.
        attempts: punches that were begun; 0: none was.
        rtt: of the path in seconds, between the bridges; ``None``: not known.
        timeline: seconds since the start of bridge B, at whom, and what happened there.
    """

    nats: tuple[str, str]
    nodes: str
    possible: bool
    path: str
    reason: str
    joined: float
    circuit: float | None
    direct: float | None
    moved: float | None
    reconnects: int
    gap: float
    peers: int | None
    attempts: int
    rtt: float | None
    blocks: int
    bytes: int
    seconds: float
    timeline: list[tuple[float, str, str]]
    total_seconds: float


def parse_nats(text: str) -> tuple[str, str]:
    """Two NAT types, as ``pr,eimx``.

    Raises:
        DemoError: it is something else; the text lists the types.
        TopologyError: no such type.
    """
    names = [each.strip() for each in text.split(",")]
    if len(names) != 2:
        raise DemoError(f"--nat takes two types with a comma between them, as pr,eimx, not {text!r} (natlab types)")
    for each in names:
        group_of(each)
    return names[0], names[1]


def no_lab() -> str:
    """Why there can be no NATs on this machine; empty if there can."""
    from natlab import LabError

    try:
        RunningLab(quiet=True).close()
    except (LabError, OSError) as error:
        return str(error)
    return ""


@dataclass(slots=True)
class _Story:
    """What happens at both bridges, in the order of time."""

    stage: Stage
    relays: frozenset[str]
    begun: float = 0.0
    """Seconds since the epoch: the start of bridge B."""
    timeline: list[tuple[float, str, str]] = field(default_factory=list)
    times: dict[tuple[str, str], float] = field(default_factory=dict)
    """When something happened for the first time, by whom and what."""
    verdict: trio.Event = field(default_factory=trio.Event)
    reason: str = ""
    attempts: int = 0
    reconnects: int = 0
    gap: float = 0.0
    gone: dict[str, float] = field(default_factory=dict)
    """Since when a node has missed its peer."""

    async def follow(self, name: str, bridge: Child) -> None:
        """Tell what one bridge tells, for as long as it runs."""
        while True:
            self.hear(name, await bridge.next())

    def hear(self, name: str, event: dict[str, Any]) -> None:
        at = event["at"] - self.begun
        kind = event["event"]
        if kind == "kaspa-peer-joined":
            kind = f"{event['path']['kind']} join"
            if name in self.gone:
                self.reconnects += 1
                self.gap = max(self.gap, at - self.gone.pop(name))
        elif kind == "kaspa-peer-ended" and event["joined"]:
            self.gone[name] = at
        elif kind == "session-moved":
            kind = f"{event['path']['kind']} move"
        elif kind == "connection-opened" and event["peer"] not in self.relays:
            kind = f"{event['path']['kind']} connection"
        elif kind == "punch-ended":
            self.attempts = event["attempts"]
        self.times.setdefault((name, kind), at)
        if kind == "upgrade-abandoned" or (kind == "upgrade-decided" and event["decision"] == "leave"):
            self.reason = self.reason or event["text"]
            self.verdict.set()
        elif kind.startswith(("punched", "direct")) and self.there(event["path"]["kind"]) is not None:
            self.verdict.set()
        line = views.event_line(event, verbose=event["event"].startswith(_IN_DETAIL))
        if line is None or at < 0 or event["event"] == "port-mapping-failed":
            return
        text = re.sub(r"^peer \S+  ", "", line.partition("  ")[2])  # there is one only
        self.timeline.append((at, name, text))
        self.stage.happened(f"{at:6.2f} s  {name}", text)

    def there(self, path: str) -> float | None:
        """When the nodes' connection was on a path of this kind, at both sides."""
        found = [self.times.get((name, f"{path} move"), self.times.get((name, f"{path} join"))) for name in "AB"]
        return None if None in found else max(each for each in found if each is not None)

    def first(self, kind: str) -> float | None:
        """When both had seen it."""
        found = [self.times.get((name, kind)) for name in "AB"]
        return None if None in found else max(each for each in found if each is not None)


@asynccontextmanager
async def _homes(nats: tuple[str, str]) -> AsyncIterator[tuple[LabHost, LabHost, tuple[LabHost, LabHost]]]:
    """A lab with two homes, and hosts of two relays: it takes two who see a NAT's ports to tell how it maps them."""
    homes = [f"{name}={nat},delay={HOME_DELAY * 1000:g}ms" for name, nat in zip(("alice", "bob"), nats, strict=True)]
    relays = [f"relay{number}=public,delay={RELAY_DELAY * 1000:g}ms" for number in (1, 2)]
    with RunningLab(lab_from_text([*homes, *relays]), quiet=True) as lab:
        async with inside(lab, lab["alice"], lab["bob"], lab["relay1"], lab["relay2"]) as (alice, bob, one, two):
            yield alice, bob, (one, two)


@asynccontextmanager
async def _relays(stage: Stage, folder: Path, hosts: tuple[LabHost, LabHost]) -> AsyncIterator[tuple[str, str]]:
    """Both relays, up; their multiaddrs."""
    one, two = hosts
    async with relay_at(folder / "relay1", one) as (_, first), relay_at(folder / "relay2", two) as (_, second):
        stage.done(f"two relays are up on the public side, at {one.address} and {two.address}")
        yield first, second


def drawing(node: str, nats: Sequence[str]) -> str:
    """Who stands where."""
    width = max(map(len, nats))
    first, second = (f"{node} {name} ── bridge {name} ── router ({nat})" for name, nat in zip("AB", nats, strict=True))
    first, second = (f"{each} {'─' * (2 + width - len(nat))}" for each, nat in zip((first, second), nats, strict=True))
    return f"\n    {first}┐\n    {' ' * len(first)}├── the internet ── relays\n    {second}┘\n"


def _ids(relays: tuple[str, str]) -> frozenset[str]:
    return frozenset(each.rpartition("/")[2] for each in relays)


def _bridge(folder: Path, port: int, relays: tuple[str, str], *flags: str) -> tuple[str, ...]:
    return (
        *("-m", "kas_bridge", "run", "--json", "--verbose", "--network=simnet", "--rpc=off"),
        *(f"--data-dir={folder}", f"--kaspad=127.0.0.1:{port}", f"--listen=/ip4/0.0.0.0/tcp/{PORT}"),
        *(*(f"--relay={each}" for each in relays), *flags),
    )


async def light(stage: Stage, nats: tuple[str, str]) -> NatResult:
    """Show it with light nodes.

    Raises:
        DemoError, LabError, ProcessEnded, trio.TooSlowError: a step failed, or took too long.
    """
    total = time.monotonic()
    stage.title("Two light nodes behind home routers. Nobody touches the routers:")
    stage.say(drawing("node", nats))
    with tempfile.TemporaryDirectory(prefix="kas-demo-") as name:
        folder = Path(name)
        async with (
            _homes(nats) as (alice, bob, there),
            _relays(stage, folder, there) as relays,
            trio.open_nursery() as nursery,
        ):
            node_a = await start_child(nursery, "-m", "kas_bridge.light", "serve", str(LIGHT_BLOCKS), inside=alice)
            node_b = await start_child(nursery, "-m", "kas_bridge.light", "fetch", str(LIGHT_BLOCKS), inside=bob)
            with within(STEP_TIMEOUT, "the start of the light nodes"):
                port_a = (await node_a.until("listening"))["port"]
                port_b = (await node_b.until("listening"))["port"]
            story = _Story(stage, _ids(relays))
            await _meet(story, nursery, folder, relays, (alice, port_a), (bob, port_b))
            moved = await fetched(stage, node_b)
            stage.done(f"{moved['blocks']} blocks went from A to B, each of them checked byte by byte")
            row = (await _ask(folder / "b", "peers"))["peers"][0]
            result = _result(story, nats, "light", row, moved, time.monotonic() - total)
            nursery.cancel_scope.cancel()
    return result


async def kaspads(stage: Stage, nats: tuple[str, str], kaspad: Path, *, full: int = FULL_BLOCKS) -> NatResult:
    """Show it with two unmodified kaspads, of which one has a chain and the other is empty.

    Args:
        kaspad: the binary of both.
        full: filled blocks of the chain.

    Raises:
        KasError, LabError, ProcessEnded, trio.TooSlowError: a step failed, or took too long.
    """
    total = time.monotonic()
    stage.title(f"Two unmodified kaspads {version_of(kaspad)} behind home routers. Nobody touches the routers:")
    stage.say(drawing("kaspad", nats))
    if not is_made(full):
        stage.say(f"(The chain is mined once: about {views.seconds(MINING_EACH * full + 10)}.)")
    with stage.progress("kaspad A mines") as meter:
        chain = await filled_chain(kaspad, full, progress=meter.blocks)
    stage.done(f"kaspad A has a chain of {chain.blocks} blocks, {chain.full} of them filled; kaspad B is empty")
    with tempfile.TemporaryDirectory(prefix="kas-demo-") as name:
        folder = Path(name)
        async with (
            _homes(nats) as (alice, bob, there),
            _relays(stage, folder, there) as relays,
            pair_at(chain, kaspad, folder, alice, bob) as pair,
            trio.open_nursery() as nursery,
        ):
            story = _Story(stage, _ids(relays))
            watches = [PeerWatch(node) for node in (pair.source, pair.target)]
            for watch in watches:
                nursery.start_soon(watch.run)
            begun = time.monotonic()
            await _meet(story, nursery, folder, relays, (alice, pair.source.p2p_port), (bob, pair.target.p2p_port))
            with stage.progress("kaspad B syncs") as meter:
                blocks = await wait_synced(pair, meter.blocks)
            moved = {"blocks": blocks, "bytes": chain.bytes, "seconds": time.monotonic() - begun}
            stage.done(f"kaspad B synced all {blocks} blocks: both have the same tip")
            row = (await _ask(folder / "b", "peers"))["peers"][0]
            result = _result(story, nats, "kaspad", row, moved, time.monotonic() - total)
            result = replace(result, peers=max(len(watch.peers) for watch in watches))
            nursery.cancel_scope.cancel()
    return result


async def _meet(
    story: _Story,
    nursery: trio.Nursery,
    folder: Path,
    relays: tuple[str, str],
    a: tuple[LabHost, int],
    b: tuple[LabHost, int],
) -> None:
    """Start the two bridges, and tell what happens until it is clear how they are joined."""
    stage = story.stage
    (alice, port_a), (bob, port_b) = a, b
    bridge_a = await start_child(nursery, *_bridge(folder / "a", port_a, relays), inside=alice)
    with within(STEP_TIMEOUT, "the start of bridge A until it had a place on a relay"):
        place = await bridge_a.until("reservation-made")
    address = place["addresses"][0]
    stage.done(f"bridge A has a place on a relay: {views.short(address.rpartition('/')[2])} can be dialed through it")
    with stage.progress("bridge A finds out what its router does"), trio.move_on_after(NAT_TIMEOUT):
        while (nat := await _nat_of(folder / "a"))["filtering"] == "unknown":  # noqa: ASYNC110 - another process's state
            await trio.sleep(POLL)
        stage.done(f"bridge A has found out what its router is: {reach.nat_name(nat)}")
    stage.done("bridge B starts, and is told that address; seconds from here on:")
    stage.say()
    story.begun = time.time()
    nursery.start_soon(story.follow, "A", bridge_a)
    bridge_b = await start_child(nursery, *_bridge(folder / "b", port_b, relays, f"--peer={address}"), inside=bob)
    nursery.start_soon(story.follow, "B", bridge_b)
    with trio.move_on_after(SETTLE_TIMEOUT):
        await story.verdict.wait()
    stage.say()


async def _nat_of(folder: Path) -> dict[str, Any]:
    nat: dict[str, Any] = (await _ask(folder, "status"))["reachability"]["nat"]
    return nat


async def _ask(folder: Path, action: str) -> dict[str, Any]:
    from kas_bridge.control import ask
    from kas_bridge.datadir import socket_paths

    return await ask(socket_paths(folder), {"action": action})


def _result(
    story: _Story, nats: tuple[str, str], nodes: str, row: dict[str, Any], moved: dict[str, Any], total: float
) -> NatResult:
    joined = story.first("relayed join")
    if joined is None:
        joined = story.first(f"{row['path']} join")
    if joined is None:
        raise DemoError("the nodes did not meet; kas-bridge demo --json tells the events")
    return NatResult(
        nats=nats,
        nodes=nodes,
        possible=expected(*nats, delay=HOME_DELAY * 2),
        path=row["path"],
        reason=story.reason if row["path"] == "relayed" else "",
        joined=joined,
        circuit=story.first("relayed connection"),
        attempts=story.attempts,
        direct=story.first(f"{row['path']} connection") if row["path"] != "relayed" else None,
        moved=story.there(row["path"]) if row["path"] != "relayed" else None,
        reconnects=story.reconnects,
        gap=story.gap,
        peers=None,
        rtt=None if row["rtt_ms"] is None else row["rtt_ms"] / 1000,
        blocks=moved["blocks"],
        bytes=moved["bytes"],
        seconds=moved["seconds"],
        timeline=story.timeline,
        total_seconds=total,
    )


def verdict(result: NatResult) -> str:
    """What it came to, in a sentence."""
    pair = f"{result.nats[0]} and {result.nats[1]}"
    if result.path != "relayed":
        assert result.direct is not None
        return f"Direct: two nodes behind {pair}, which nobody can dial, need no relay."
    if not result.possible:
        return f"Relayed: between {pair} no direct connection is possible, and the relay carries on."
    return f"Relayed, although {pair} allow a direct connection: this should not be."


def show(stage: Stage, result: NatResult) -> None:
    """The closing summary."""
    table = fact_table("Summary")
    table.add_row("met", f"after {views.seconds(result.joined)} through the relay")
    if result.reason:
        table.add_row("relayed", result.reason)
    if result.direct is not None and result.circuit is not None:
        tries = f"at the {views.ordinal(result.attempts)} attempt" if result.attempts else "by a dial"
        took = views.seconds(result.direct - result.circuit)
        table.add_row("direct", f"{took} after the bridges had met, {tries}")
    if result.moved is not None:
        noticed = "neither node noticed"
        if result.reconnects:
            times = views.plural(result.reconnects, "time")
            noticed = f"a peer left {times}, for {views.seconds(result.gap)} at most"
        table.add_row("moved", f"after {views.seconds(result.moved)}, proven; {noticed}")
    if result.peers is not None:
        had = "one and the same peer each, by their own word"
        table.add_row("kaspads", f"had {had}" if result.peers == 1 else f"had up to {result.peers} peers, one by one")
    carried = f"{result.blocks} blocks, {views.size(result.bytes)} in {views.seconds(result.seconds)}"
    table.add_row("carried", carried)
    if result.rtt is not None:
        table.add_row("round trip", f"{views.milliseconds(result.rtt * 1000)} between the bridges now")
    table.add_row("all of it", f"took {views.seconds(result.total_seconds)}")
    stage.say()
    stage.table(table)
    stage.say()
    stage.title(verdict(result))


def every_pair(stage: Stage) -> list[Meeting]:
    """Have nodes meet behind every pair of NAT types, and show who becomes direct.

    Raises:
        LabError: a process failed.
    """
    stage.title(f"Nodes behind every pair of {len(TYPES)} types of NAT meet through a relay: about two minutes.")
    stage.say()
    pairs = [*itertools.product(TYPES, TYPES)]
    done = itertools.count(1)
    with stage.progress("meetings") as meter:

        def told(meeting: Meeting) -> None:
            number = next(done)
            way = "direct" if meeting.direct else "relayed"
            meter.show(number, len(pairs), f"{number} of {len(pairs)}: {' x '.join(meeting.nats)} {way}")

        return meetings(pairs, progress=told)


def show_every_pair(stage: Stage, found: list[Meeting]) -> bool:
    """The matrix, and what it came to; returns whether that is as expected. A port that is guessed may be missed."""
    for line in matrix(found, TYPES):
        stage.say(line)
    times = sorted(each.seconds for each in found if each.seconds is not None)
    odd = [each for each in found if possible(*each.nats) and not each.direct]
    stage.say()
    stage.say("● direct   · relayed, as it must be   ! direct, by luck   ✗ relayed, wrongly")
    stage.say(f"From the circuit to a verified direct connection: {views.seconds(statistics.median(times))} (median).")
    for each in odd:
        stage.say(f"{' x '.join(each.nats)}: {each.reason}")
    stage.say()
    direct = sum(each.direct for each in found)
    stage.title(f"{direct} of {len(found)} pairs are direct; {len(odd)} that can be are not.")
    return all(GUESSED & set(each.nats) for each in odd)
