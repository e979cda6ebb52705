"""``kas-libp2p`` behind NATs, as an interop tester types it: a relay, a listener, and dials through the relay."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from kas_libp2p.cli import Exit
from natlab import Host, RunningLab
from natlab.processes import Process
from tests.command import COMMAND, events_of

pytestmark = pytest.mark.lab

DELAY = "12.5ms"
EXAMPLES = Path(__file__).parents[2] / "examples"


@dataclass
class Pair:
    """Alice, who dials, and bob, who listens, each behind a router.

    Attributes:
        alice: her host.
        listener: bob's command.
        circuit: his address through the relay.
        relays: the addresses of the relays.
    """

    alice: Host
    listener: Process
    circuit: str
    relays: list[str]

    def run(self, *arguments: str) -> Process:
        """Alice's command, to its end."""
        process = self.alice.spawn([*COMMAND, *arguments])
        process.wait()
        return process


def pair(lab: RunningLab, alice: str, bob: str, relays: int = 1) -> Pair:
    """Behind routers of these types."""
    there = []
    for number in range(relays):
        host = lab.public(f"relay{number}", delay=DELAY)
        relay = host.spawn([*COMMAND, "relay", "--port", "4001"])
        there.append(relay.expect(rf"/ip4/{host.address}/tcp/4001/p2p/\S+")[0])
    ours, theirs = lab.home("alice", nat=alice, delay=DELAY), lab.home("bob", nat=bob, delay=DELAY)
    listener = theirs.spawn([*COMMAND, "listen", *(word for each in there for word in ("--relay", each))])
    return Pair(ours, listener, listener.expect(rf"reachable at .*({there[0]}/p2p-circuit/[^\s,]+)")[1], there)


@pytest.mark.parametrize("nats", [("pr", "eimx"), ("eimx", "pr"), ("fc", "sym")], ids="+".join)
def test_two_homes_meet(lab: RunningLab, nats: tuple[str, str]) -> None:
    """With nothing but the circuit's address, on the first attempt."""
    homes = pair(lab, *nats)
    done = homes.run("dial", homes.circuit, "--wait", "punched", "--ping", "5", "--json")
    assert done.status == Exit.DONE, done.stdout + done.stderr
    events = events_of(done.stdout)
    (connected,) = of(events, "connected")
    kind = connected["path"]["kind"]
    # Who lets everybody in is dialed beside the punch, and either may be first.
    assert kind in (("punched", "direct") if "fc" in nats else ("punched",))
    assert connected["remote_address"].startswith(f"/ip4/{lab['bob'].public_address}/tcp/")
    assert connected["observed"].startswith(f"/ip4/{lab['alice'].public_address}/tcp/")
    (ended,) = of(events, "punch-ended")
    beside = kind == "direct" and "there is a direct connection" in ended["text"]
    assert (ended["reason"], ended["attempts"]) == ("abandoned" if beside else "punched", 1)
    (summary,) = of(events, "ping-summary")
    assert summary["answered"] == 5
    assert summary["min"] > 0.05  # the lines' delays
    if kind == "punched":
        homes.listener.expect(r"12D3KooW\S+  punched: direct, attempt 1, ")


def test_in_words(lab: RunningLab) -> None:
    """What a person reads: at the side that dials, and at the other; and that anybody may ask why."""
    homes = pair(lab, "pr", "eimx")
    alice, bob = lab["alice"].public_address, lab["bob"].public_address
    done = homes.run("dial", homes.circuit, "--wait", "punched", "--verbose")
    assert done.status == Exit.DONE, done.stdout + done.stderr
    stages = iter(re.findall(r"^ +\d+\.\d{3} s  (.*)$", done.stdout, re.MULTILINE))
    for expected in (
        rf"12D3KooW\S+ sees us at /ip4/{alice}/tcp/\d+",
        r"connected, relayed by 12D3KooW\S+",
        rf"CONNECT: it is at /ip4/{bob}/tcp/\d+",
        rf"CONNECT: we are at /ip4/{alice}/tcp/\d+",
        r"SYNC: came",
        rf"attempt 1: dials /ip4/{bob}/tcp/\d+",
        rf"connected, punched at /ip4/{bob}/tcp/\d+",
        r"punched: direct, attempt 1, .*",
    ):
        assert any(re.fullmatch(expected, stage) for stage in stages), f"{expected} in {done.stdout}"
    assert re.search(rf"dial 1 of /ip4/{bob}/tcp/\d+: (connected|EADDRNOTAVAIL|unanswered) after", done.stdout)
    assert re.search(rf"^  path      punched, .* to /ip4/{bob}/tcp/\d+$", done.stdout, re.MULTILINE)
    for expected in (r"CONNECT: we are at /ip4/", r"CONNECT: it is at .* \(round trip .* ms\)", "SYNC: sent"):
        homes.listener.expect(expected)
    done = homes.run("why", homes.circuit)
    assert done.status == Exit.DONE, done.stdout + done.stderr
    assert re.search(r"^12D3\S+ is direct: a hole was punched, .* ms.\n  It took the first attempt", done.stdout, re.M)


def test_two_homes_that_can_not_meet_are_told_why(lab: RunningLab) -> None:
    homes = pair(lab, "pr", "sym", relays=2)
    relays = [word for each in homes.relays for word in ("--relay", each)]
    done = homes.run("dial", homes.circuit, *relays, "--wait", "punched", "--ping", "1")
    assert done.status == Exit.RELAYED, done.stdout + done.stderr
    assert re.search(r"^12D3\S+ is relayed by 12D3\S+, .* ms\.$", done.stdout, re.MULTILINE)
    assert "  Their NAT gives every destination another port. " in done.stdout
    assert "  What would help: a port mapping on either side" in done.stdout
    assert "1 of 1 answered" in done.stdout  # through the relay
    assert re.fullmatch(r"kas-libp2p: the connection with 12D3\S+ stayed relayed: .*\n", done.stderr)


@pytest.mark.parametrize(
    ("nats", "says"),
    [
        ("pr+pr", r"punched, \d+ ms: new streams take that way, old ones stay\n12D3\S+ is direct: a hole was punched"),
        ("sym+sym", r"it stays relayed: .*\n12D3\S+ is relayed by 12D3"),
    ],
)
def test_the_program_that_waits_for_a_direct_connection(lab: RunningLab, nats: str, says: str) -> None:
    homes = pair(lab, *nats.split("+"))
    program = homes.alice.spawn([sys.executable, str(EXAMPLES / "direct.py"), homes.circuit])
    assert program.wait() == 0, program.stderr
    assert re.match(rf"\d+ ms through the relay\n{says}", program.stdout), program.stdout


def of(events: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    return [each for each in events if each["event"] == name]
