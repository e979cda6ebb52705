"""Whether nodes behind NATs become direct, and how fast: real nodes in a lab, each in a home of its own.

Each node is a process of its own (`natlab.Host.spawn_python`), opened as anybody would with `open_node`; relays stand
on the public side. Nothing but the relays' addresses is told to them, and, to who calls, the called one's circuit.

One lab holds many homes, and every pair of them can meet once: NATs remember, so a pair that met before is no test.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import trio

from kas_libp2p.autonat.roles import Filtering
from kas_libp2p.config import Config, PunchConfig, Purpose, RelayConfig, Role
from kas_libp2p.errors import KasError
from kas_libp2p.events import (
    ConnectionOpened,
    Event,
    PunchAttemptFailed,
    PunchConnect,
    PunchEnded,
    ReservationMade,
    UpgradeAbandoned,
    UpgradeDecided,
)
from kas_libp2p.metadata import PathKind, PeerId
from kas_libp2p.node import Node, open_node
from natlab import Call, LabError, RunningLab, preload
from natlab.punch import Group, group_of
from natlab.topology import lab_from_text

TYPES = ("open", "fw", "fc", "fcx", "ar", "pr", "pr-rst", "naive", "eimx", "sym", "symseq", "symblk", "cgn-pr")
"""What natlab's own matrix, of plain sockets, holds as well, and so what is known to be possible."""
PORT = 16117
"""Where every node listens: each has a host of its own."""
RELAYS = 3
"""Each in a network of its own. Two show how a NAT maps ports, three whether it counts them up."""
DELAY = 0.025
"""Seconds each way from a home to the relays, which have none of their own: homes are twice that apart."""
COUNTING = frozenset({"symseq"})
"""Types whose homes meet one other at a time: a second punch in the same moment would take the port that is guessed."""
PLACE_TIMEOUT = 60.0
"""Seconds for a node to start and to get its places; thirty at once take most of that."""
SETTLE_TIMEOUT = 40.0
"""Seconds until a node knows what its NAT lets in: relays try, and dials that nobody answers take their time."""
MEET_TIMEOUT = 20.0
"""Seconds until it is clear whether two become direct: three attempts, and a busy machine."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Meeting:
    """What came of it, as the caller saw it.

    Attributes:
        nats: the types of the caller's and of the called one's NAT.
        path: how they are connected in the end; empty if they did not meet at all.
        attempts: punches that were begun; 0: none was.
        seconds: from the circuit, secured end to end, to a verified direct connection; ``None``: there is none.
        rtt: round trip of the circuit in seconds; ``None``: it was not measured.
        given_up: seconds from the circuit until it was said that there will be no direct connection; ``None``: it was
            not said.
        started: seconds from the caller's start until it had its places.
        reason: why there is no direct connection; empty if there is.
    """

    nats: tuple[str, str]
    path: str
    attempts: int = 0
    seconds: float | None = None
    rtt: float | None = None
    given_up: float | None = None
    started: float = 0.0
    reason: str = ""

    @property
    def direct(self) -> bool:
        """Whether no relay is needed any more."""
        return self.path in (PathKind.DIRECT, PathKind.PUNCHED)


def possible(a: str, b: str) -> bool:
    """Whether two NATs of these types allow a direct connection, guessed ports included."""
    first, second = sorted((group_of(a), group_of(b)))
    if Group.G4 not in (first, second) or Group.G1 in (first, second):
        return True
    return first is not Group.G4 and "symseq" in (a, b)


# -- In the hosts ------------------------------------------------------------------------------------------------------


def _tell(**values: Any) -> None:
    sys.stdout.write(json.dumps(values) + "\n")
    sys.stdout.flush()


async def _relay(address: str) -> None:
    limits = RelayConfig(serve=True, purpose=Purpose.ANY, target=0)
    config = Config(listen=(f"/ip4/{address}/tcp/{PORT}",), role=Role.PUBLIC, relay=limits)
    async with open_node(config) as node:
        _tell(relay=node.addresses[0])
        await trio.sleep_forever()


async def _home(relays: tuple[str, ...], settled: bool, many: bool) -> None:
    """A node; each line of input is the number of a meeting, and the address to call: none asks for ours."""
    begun = trio.current_time()
    config = Config(
        listen=(f"/ip4/0.0.0.0/tcp/{PORT}", f"/ip6/::/tcp/{PORT}"),
        role=Role.AUTO if settled else Role.PRIVATE,
        relay=RelayConfig(relays=relays, target=len(relays), purpose=Purpose.ANY),
        punch=PunchConfig(birthday=many),
    )
    async with open_node(config) as node:
        await _place(node, len(relays))
        started = trio.current_time() - begun
        with trio.move_on_after(SETTLE_TIMEOUT if settled else 0):
            while not _knows(node):  # noqa: ASYNC110 - what is known comes from several places
                await trio.sleep(0.05)
        _tell(up=_address(node))
        async with trio.open_nursery() as nursery:
            async for number, other in _lines():
                if other:
                    nursery.start_soon(_call, node, number, other, started)
                else:
                    _tell(at=_address(node), meeting=number)


async def _lines() -> Any:
    stream = trio.lowlevel.FdStream(os.dup(0))
    rest = b""
    async for data in stream:
        *lines, rest = (rest + bytes(data)).split(b"\n")
        for each in lines:
            number, _, address = each.decode().partition(" ")
            yield int(number), address


async def _place(node: Node, count: int) -> None:
    """Wait for places on all relays."""
    found: set[PeerId] = set()
    with node.bus.subscribe() as events:
        while len(found) < count:
            event = await anext(events)
            if isinstance(event, ReservationMade):
                found.add(event.relay)


def _knows(node: Node) -> bool:
    """Whether it is clear what the NAT does."""
    status = node.reachability.status()
    return status.role is Role.PUBLIC or Filtering.UNKNOWN is not status.filtering


def _address(node: Node) -> str:
    """Where others reach it: directly if they can, else through a relay."""
    status = node.status()
    circuits = [address for each in status.reservations for address in each.addresses]
    public = [f"{each}/p2p/{node.peer_id}" for each in status.reachability.public_addresses]
    return next(iter([*public, *circuits]), "")


async def _call(node: Node, number: int, address: str, started: float) -> None:
    story = _Story(PeerId(address.rpartition("/")[2]))
    with node.bus.subscribe() as events, trio.move_on_after(MEET_TIMEOUT):
        async with trio.open_nursery() as nursery:

            async def ping() -> None:
                try:
                    await node.ping(address)
                except (KasError, trio.TooSlowError) as error:
                    story.reason = str(error)
                    nursery.cancel_scope.cancel()

            nursery.start_soon(ping)
            async for event in events:
                if story.hear(event, trio.current_time()):
                    nursery.cancel_scope.cancel()
    _tell(started=started, **story.result(), meeting=number)


class _Story:
    """What the caller learns."""

    def __init__(self, peer: PeerId) -> None:
        self.reason = ""
        self._peer = peer
        self._path = ""
        self._circuit: float | None = None
        self._direct: float | None = None
        self._over: float | None = None
        self._attempts = 0
        self._rtt: float | None = None

    def hear(self, event: Event, now: float) -> bool:
        """Whether it is clear now."""
        match event:
            case ConnectionOpened(peer=self._peer, path=path) if path.kind is PathKind.RELAYED:
                self._circuit, self._path = now, self._path or str(path.kind)
            case ConnectionOpened(peer=self._peer, path=path):
                self._direct, self._path = now, str(path.kind)
                return path.kind is PathKind.DIRECT
            case PunchConnect(peer=self._peer):
                self._attempts = max(self._attempts, event.attempt)
                self._rtt = event.rtt if event.rtt is not None else self._rtt
            case PunchAttemptFailed(peer=self._peer):
                self.reason = event.text
            case PunchEnded(peer=self._peer):
                self.reason = event.text or self.reason
                if self._direct is None:
                    self._over = self._over or now
                return True
            case UpgradeDecided(peer=self._peer, decision="leave") | UpgradeAbandoned(peer=self._peer):
                self._over, self.reason = now, event.text or event.reason
                return True
        return False

    def result(self) -> dict[str, Any]:
        direct, circuit = self._direct, self._circuit
        return {
            "path": self._path,
            "attempts": self._attempts,
            "seconds": None if direct is None or circuit is None else direct - circuit,
            "rtt": self._rtt,
            "given_up": None if self._over is None or circuit is None else self._over - circuit,
            "reason": "" if direct is not None else self.reason or "it was not said why",
        }


# -- From outside ------------------------------------------------------------------------------------------------------


class Homes:
    """Nodes in the homes of a lab, up and with their places. Made by `homes`."""

    def __init__(self, nodes: dict[str, tuple[str, Call]]) -> None:
        self._nodes = nodes
        self._numbers = itertools.count()
        self._lock = threading.Lock()

    def meet(self, caller: str, called: str) -> Meeting:
        """Have one node call another one, and see how they end up. Any thread may; a pair may only once.

        Raises:
            LabError: a process failed; the text holds its last lines.
        """
        nat, call = self._nodes[caller]
        other, called_one = self._nodes[called]
        address = self._ask(called_one, "")["at"]
        return Meeting(nats=(nat, other), **self._ask(call, address))

    def _ask(self, call: Call, address: str) -> dict[str, Any]:
        with self._lock:
            number = next(self._numbers)
            call.stdin.write(f"{number} {address}\n".encode())
        pattern = rf'^\{{.*"meeting": {number}\}}$'
        values: dict[str, Any] = json.loads(call.expect(pattern, MEET_TIMEOUT + PLACE_TIMEOUT).group(0))
        del values["meeting"]
        return values


@contextmanager
def homes(
    nats: Sequence[tuple[str, str]],
    *,
    settled: bool = True,
    many: bool = False,
    options: str = "",
    delay: float = DELAY,
    seed: int = 0,
) -> Iterator[Homes]:
    """Build a lab with these homes, and start a node in each.

    Args:
        nats: names, and types of NATs.
        settled: whether to wait until each knows what its NAT does, as nodes do that have been up for some seconds;
            else they count as private, and know as much as their relays have seen.
        many: whether all agree to try many ports at once where nothing else can work.
        options: of all homes' lines, as ``,loss=3%,jitter=30ms``.
        delay: seconds each way, of all homes' lines.
        seed: of what happens at random on the lines.

    Raises:
        Unsupported: this system can't hold a lab.
        LabError: a node did not start.
    """
    preload("kas_bridge.simnet.meet")
    sites = [f"{name}={nat},delay={delay * 1000:g}ms{options}" for name, nat in nats]
    relays = [f"relay{number}" for number in range(RELAYS)]
    with RunningLab(lab_from_text([f"seed={seed}", *sites, *(f"{each}=public" for each in relays)]), quiet=True) as lab:
        running: list[Call] = []
        try:
            running += (lab[each].spawn_python(_relay, lab[each].address) for each in relays)
            at = tuple(_told(each, "relay") for each in running)
            calls = [lab[name].spawn_python(_home, at, settled, many) for name, _ in nats]
            running += calls
            for each in calls:
                _told(each, "up")
            yield Homes({name: (nat, call) for (name, nat), call in zip(nats, calls, strict=True)})
        finally:
            for each in running:
                each.kill()


def _told(call: Call, what: str) -> str:
    try:
        line = call.expect(rf'^\{{"{what}": .*\}}$', PLACE_TIMEOUT).group(0)
    except LabError:
        if call.status is not None:
            call.result()  # raises what ended it
        raise
    return str(json.loads(line)[what])


def meetings(
    pairs: Iterable[tuple[str, str]],
    *,
    at_once: int = 4,
    settled: bool = True,
    many: bool = False,
    options: str = "",
    delay: float = DELAY,
    seed: int = 0,
    progress: Callable[[Meeting], None] = lambda meeting: None,
) -> list[Meeting]:
    """Have pairs of NAT types meet, in one lab.

    Args:
        pairs: the caller's and the called one's type. One that is there several times gets several homes.
        at_once: meetings under way at a time.
        settled, many, options, delay, seed: see `homes`.
        progress: told of each as it is over.

    Raises:
        Unsupported, LabError: see `homes`.
    """
    wanted = list(pairs)
    names: dict[tuple[str, str, int], str] = {}
    plan: list[tuple[str, str]] = []
    seen: dict[tuple[str, str], int] = {}
    for a, b in wanted:
        again = seen[a, b] = seen.get((a, b), -1) + 1
        ends = (("a", a, again), ("b", b, again))
        plan.append(tuple(names.setdefault(end, f"{end[0]}{len(names)}") for end in ends))  # type: ignore[arg-type]
    with (
        homes(
            [(name, end[1]) for end, name in names.items()],
            settled=settled,
            many=many,
            options=options,
            delay=delay,
            seed=seed,
        ) as lab,
        ThreadPoolExecutor(at_once) as pool,
    ):
        locks = {name: threading.Lock() for name in names.values()}

        def meet(index: int) -> Meeting:
            with ExitStack() as stack:
                for name, nat in zip(plan[index], wanted[index], strict=True):
                    if nat in COUNTING:
                        stack.enter_context(locks[name])
                meeting = lab.meet(*plan[index])
            progress(meeting)
            return meeting

        # Two that count guess each other's ports, and count far ahead with that: after all others.
        order = sorted(range(len(wanted)), key=lambda index: set(wanted[index]) <= COUNTING)
        found = dict(zip(order, pool.map(meet, order), strict=True))
        return [found[index] for index in range(len(wanted))]


def matrix(found: Collection[Meeting], types: Sequence[str]) -> Iterator[str]:
    """A table, a line at a time: ``●`` direct, ``·`` relayed as expected, ``✗`` relayed but should not be, ``!`` direct
    although nobody expected it."""
    width = max(map(len, types))
    by_pair = {each.nats: each for each in found}
    for row in range(width):
        yield " " * (width + 2) + " ".join(each.rjust(width)[row] for each in types)
    for a in types:
        cells = (by_pair.get((a, b)) for b in types)
        yield f"{a:<{width}}  " + " ".join(" " if each is None else _sign(each) for each in cells)


def _sign(meeting: Meeting) -> str:
    if meeting.direct:
        return "●" if possible(*meeting.nats) else "!"
    return "✗" if possible(*meeting.nats) else "·"
