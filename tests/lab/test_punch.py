"""Holes punched through real NATs: two nodes that know each other's outside address dial each other at one instant."""

from __future__ import annotations

import contextlib
import json
import socket
import sys
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

import pytest
import trio
from multiaddr import Multiaddr

from kas_libp2p import Config, addresses, open_node
from kas_libp2p.config import RelayConfig
from kas_libp2p.errors import PunchFailed
from kas_libp2p.events import Event, PunchAdopted, PunchDialed
from kas_libp2p.identity import Identity
from kas_libp2p.metadata import PathKind
from kas_libp2p.swarm import Swarm
from kas_libp2p.transport._punch import UNTRUSTED_PATIENCE, Target
from natlab import Host, RunningLab
from natlab.processes import Call

pytestmark = pytest.mark.lab

PORT = 16117
RELAY = Identity.from_seed(bytes(32)).peer_id
WINDOW = 20.0
"""Seconds that a pair which can meet is given: ten times what it takes, as the machine may be busy."""


async def serve() -> None:
    """A public node, which tells others where it sees them."""
    listen = f"/ip4/0.0.0.0/tcp/{PORT}", f"/ip6/::/tcp/{PORT}"
    async with open_node(Config(listen=listen)) as node:
        print(*node.addresses, sep="\n", flush=True)
        await trio.sleep_forever()


async def meet(name: str, relay: str) -> None:
    """A node for each line on standard input, on a port of its own. It tells how others see it, and on the next line
    punches as that says."""
    family = addresses.family(relay)
    identity = Identity.from_seed(name.ljust(32).encode())
    while line := await trio.to_thread.run_sync(sys.stdin.readline):
        trial, port = json.loads(line)
        listen = f"/ip4/0.0.0.0/tcp/{port}" if family == 4 else f"/ip6/::/tcp/{port}"
        config = Config(listen=(listen,), relay=RelayConfig(target=0))
        async with open_node(config, identity=identity) as node:
            await node.identify(relay)
            print(f"seen {trial}", json.dumps(node.reachability.candidates()), flush=True)
            order = json.loads(await trio.to_thread.run_sync(sys.stdin.readline))
            offset = trio.current_time() - time.monotonic()
            events = node.events()
            result: dict[str, Any] = {}
            try:
                connection = await node.swarm.punch(
                    Identity.from_seed(order["peer"].ljust(32).encode()).peer_id,
                    [Target(Multiaddr(each)) for each in order["targets"]],
                    initiator=order["initiator"],
                    relay=node.connections[0].peer,
                    at=order["at"] + offset,
                    window=order["window"],
                )
                result["seconds"] = trio.current_time() - offset - order["at"]
                result["initiator"] = connection.connection.initiator
                assert connection.path.kind is PathKind.PUNCHED
                rtt = await node.ping(connection.peer)
                result["rtt"] = rtt
            except PunchFailed as error:
                result["failed"] = str(error)
                result["seconds"] = trio.current_time() - offset - order["at"]
            told: list[Event] = []
            with trio.move_on_after(0.01):
                async for event in events:
                    if isinstance(event, PunchDialed | PunchAdopted):
                        told.append(event)
            result["events"] = [
                f"{each.after * 1000:.0f} {getattr(each, 'reason', 'adopted')} {each.seconds * 1000:.0f}"
                for each in told
            ]
            print(f"done {trial}", json.dumps(result), flush=True)
            await trio.to_thread.run_sync(sys.stdin.readline)  # the other side is done, too


@dataclass
class Pair:
    """Two nodes behind NATs.

    Attributes:
        calls: their processes.
        trials: how many there were.
    """

    calls: tuple[Call, Call]
    trials: int = 0

    def punch(
        self, *, first: bool, port: int = PORT, skew: float = 0.0, window: float = WINDOW, start: float = 0.1
    ) -> list[dict[str, Any]]:
        """One punch.

        Args:
            first: whether the first of the two is the initiator.
            port: of both; another for each trial, or routers remember the last one.
            skew: seconds by which the second begins after the first.
            start: seconds until the earlier begins.
        """
        self.trials += 1
        self.tell(*[[self.trials, port]] * 2)
        seen = [json.loads(call.expect(rf"^seen {self.trials} (.*)$")[1]) for call in self.calls]
        at = time.monotonic() + start + max(0.0, -skew)
        names = ("alice", "bob")
        orders = [
            {
                "peer": names[1 - number],
                "targets": seen[1 - number],
                "initiator": first is (number == 0),
                "at": at + skew * number,
                "window": window,
            }
            for number in range(2)
        ]
        self.tell(*orders)
        results = [json.loads(call.expect(rf"^done {self.trials} (.*)$")[1]) for call in self.calls]
        self.tell(0, 0)
        return results

    def tell(self, *lines: object) -> None:
        for call, line in zip(self.calls, lines, strict=True):
            assert call.stdin is not None
            call.stdin.write(json.dumps(line).encode() + b"\n")
            call.stdin.flush()


def between(lab: RunningLab, relay: Host, alice: Host, bob: Host, family: int = 4) -> Pair:
    where = relay.address if family == 4 else relay.address6
    server = relay.spawn_python(serve).expect(rf"^/ip{family}/{where}/\S+$")[0]
    return Pair((alice.spawn_python(meet, "alice", server), bob.spawn_python(meet, "bob", server)))


POSSIBLE = [
    ("pr", "pr"),
    ("pr", "eimx"),
    ("eimx", "eimx"),
    ("fc", "sym"),
    ("sym", "fc"),
    ("ar", "sym"),
    ("open", "sym"),
    ("pr-rst", "pr-rst"),
    ("naive", "naive"),
    ("pr", "pr-rst"),
    ("cgn-pr", "pr"),
]


@pytest.mark.parametrize("types", POSSIBLE, ids="+".join)
def test_two_homes_meet(lab: RunningLab, types: tuple[str, str]) -> None:
    alice, bob = (lab.home(name, nat, delay="12.5ms") for name, nat in zip(("alice", "bob"), types, strict=True))
    pair = between(lab, lab.public("relay"), alice, bob)
    for number, first in enumerate((True, False)):
        results = pair.punch(first=first, port=PORT + number)
        for result in results:
            assert "failed" not in result, result
        assert [each["initiator"] for each in results] == [first, not first]
        print("+".join(types), first, results)


def test_two_firewalls_meet(lab: RunningLab) -> None:
    alice, bob = (lab.home(name, ipv6="fw", delay="12.5ms") for name in ("alice", "bob"))
    results = between(lab, lab.public("relay"), alice, bob, family=6).punch(first=True)
    assert not any("failed" in each for each in results), results
    print(results)


def test_two_homes_that_can_not_meet_know_it_when_the_window_ends(lab: RunningLab) -> None:
    alice, bob = (lab.home(name, nat, delay="12.5ms") for name, nat in (("alice", "pr"), ("bob", "sym")))
    pair = between(lab, lab.public("relay"), alice, bob)
    for result in pair.punch(first=True, window=0.7):
        assert "unanswered" in result["failed"]
        assert 0.7 <= result["seconds"] < WINDOW  # the system would go on for two minutes


CROWD = 50
ETH_P_IP, ETH_P_ALL = 0x0800, 0x0003


async def crowd(hub: bool, other: str, count: int) -> None:
    """One node that punches to a crowd, or the crowd: as many nodes in one process. Behind routers that keep ports."""
    ours = [Identity.from_seed(f"{hub} {number}".ljust(32).encode()) for number in range(1 if hub else count)]
    theirs = [Identity.from_seed(f"{not hub} {number}".ljust(32).encode()) for number in range(count if hub else 1)]
    async with trio.open_nursery() as nursery:
        swarms = [Swarm(each) for each in ours]
        for number, swarm in enumerate(swarms):
            await nursery.start(swarm.carry)
            await swarm.listen(Multiaddr(f"/ip4/0.0.0.0/tcp/{PORT + number}"))
        print("ready", flush=True)
        while line := await trio.to_thread.run_sync(sys.stdin.readline):
            at, first, last = json.loads(line)
            took: list[float] = []

            async def one(swarm: Swarm, number: int, took: list[float], at: float) -> None:
                offset = trio.current_time() - time.monotonic()
                where = Target(Multiaddr(f"/ip4/{other}/tcp/{PORT + number}"))
                peer = theirs[number].peer_id
                await swarm.punch(peer, [where], initiator=hub, relay=RELAY, at=at + offset, window=WINDOW)
                took.append(trio.current_time() - offset - at)

            async with trio.open_nursery() as punching:
                for number in range(first, last):
                    swarm, target = (swarms[0], number) if hub else (swarms[number], 0)
                    punching.start_soon(one, swarm, target, took, at)
            print(f"took {first}", json.dumps(sorted(took)), flush=True)
        nursery.cancel_scope.cancel()


def test_a_crowd_at_once(lab: RunningLab) -> None:
    alice, bob = (lab.home(name, "pr", delay="12.5ms") for name in ("alice", "bob"))
    calls = [
        alice.spawn_python(crowd, True, bob.public_address, CROWD + 1),
        bob.spawn_python(crowd, False, alice.public_address, CROWD + 1),
    ]
    for call in calls:
        call.expect("^ready$")
    took: list[list[float]] = []
    for first, last in ((0, 1), (1, CROWD + 1)):
        line = json.dumps([time.monotonic() + 0.5, first, last]).encode() + b"\n"
        for call in calls:
            assert call.stdin is not None
            call.stdin.write(line)
            call.stdin.flush()
        took.append(json.loads(calls[0].expect(rf"^took {first} (.*)$")[1]))
        calls[1].expect(rf"^took {first} (.*)$")
    (alone,), many = took
    assert len(many) == CROWD
    print(f"alone {alone * 1000:.0f} ms; {CROWD} at once: p50 {many[CROWD // 2] * 1000:.0f}, ", end="")
    print(f"p95 {many[int(CROWD * 0.95)] * 1000:.0f}, last {many[-1] * 1000:.0f} ms")


async def provoked(targets: list[str]) -> tuple[dict[str, int], float]:
    """Whom a node sends how many SYNs when a peer names these addresses and nobody else has seen it there; and for how
    many seconds the machine held it up at most."""
    sent: Counter[str] = Counter()
    late = 0.0

    async def tick() -> None:
        nonlocal late
        while True:
            due = trio.current_time() + 0.02
            await trio.sleep_until(due)
            late = max(late, trio.current_time() - due)

    with socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(ETH_P_ALL)) as tap:
        tap.setblocking(False)
        swarm = Swarm(Identity.from_seed(bytes(32)))
        async with trio.open_nursery() as nursery:
            await nursery.start(swarm.carry)
            await swarm.listen(Multiaddr(f"/ip4/0.0.0.0/tcp/{PORT}"))
            nursery.start_soon(tick)
            with pytest.raises(PunchFailed):
                await swarm.punch(
                    RELAY,
                    [Target(Multiaddr(each), trusted=False) for each in targets],
                    initiator=True,
                    relay=RELAY,
                    at=trio.current_time(),
                    window=1.2,  # by then the system would have sent each SYN again
                )
            nursery.cancel_scope.cancel()
        with contextlib.suppress(BlockingIOError):
            while True:
                packet, (_, protocol, kind, *_) = tap.recvfrom(100)
                if (protocol, kind, packet[9]) == (ETH_P_IP, socket.PACKET_OUTGOING, socket.IPPROTO_TCP):
                    assert packet[33] & 0x12 == 0x02, "nothing but SYNs: nobody is there"
                    sent[socket.inet_ntoa(packet[16:20])] += 1
    return dict(sent), late


def provoked_in_time(alice: Host, targets: list[str]) -> dict[str, int]:
    """The same of a run in which a dial could be given up before the system sent its SYN again."""
    for _ in range(8):
        sent, late = alice.python(provoked, targets)
        if late < UNTRUSTED_PATIENCE / 2:
            return sent
    raise AssertionError("this machine is too busy to end a dial within a second")


def test_what_a_peer_can_make_us_send(lab: RunningLab) -> None:
    alice, answers, silent = lab.home("alice", "pr"), lab.public("answers"), lab.home("silent", "pr")
    bad = ["/ip4/127.0.0.1", "/ip4/10.0.0.1", "/ip4/172.16.0.1", "/ip4/192.168.1.1", "/ip4/100.64.0.1"]
    bad += ["/ip4/169.254.1.1", "/ip4/224.0.0.1", "/ip4/240.0.0.1", "/ip4/255.255.255.255", "/ip4/0.0.0.0"]
    targets = [f"{each}/tcp/4001" for each in bad]
    targets += [f"/ip4/{answers.address}/tcp/{port}" for port in (22, 25, 443)]
    assert provoked_in_time(alice, targets) == {}
    sent = provoked_in_time(
        alice, [*targets, f"/ip4/{silent.public_address}/tcp/4001", f"/ip4/{answers.address}/tcp/4001"]
    )
    assert sent == {silent.public_address: 1, answers.address: 3}
