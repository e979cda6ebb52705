"""Relayed connections that become direct: ours with other implementations behind NATs, both ways, and theirs beside.

25 ms one way from each home to the relay, so that a circuit and the direct path have a round trip of 100 ms each. What
is told at the end of a test is the time from the end of Noise on the circuit to the verified direct connection.

A pair is caller x called, NATs and implementations alike. The called one invites.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from natlab import RunningLab
from tests.interop import punching
from tests.interop.ends import Programs
from tests.interop.punching import Puncher, ip_of

PAIRS = [("pr", "pr"), ("pr", "eimx"), ("fc", "sym"), ("pr-rst", "pr-rst")]
OTHERS = ("go", "rust", "rust-0.56")

THEIRS: dict[str, tuple[float | None, ...]] = {
    "go": (0.61, 0.65, None, 0.62),
    "rust": (0.51, None, None, 0.52),
    "rust-0.56": (0.52, 0.52, None, 0.52),
}
"""What others need among themselves, in seconds, for each of `PAIRS`; ``None``: it fails, or takes as long as that.

fc x sym: whoever called takes the connection that comes for an ordinary one, and both wait to be spoken to. go changes
roles in its third attempt, 21 s later; rust gives up after 32 s. rust 0.57 tells its listen port, not the port that
others see, so behind a NAT that changes ports nobody meets it who is not told by the relay where it is.

With ours it takes as long as among themselves where they are called (go: 0.52 s), and 0.41 s (rust) and 0.52 s (go)
where we are. fc x sym takes 1.1 s with go; with rust 0.6 s where we call, and 2.0 s where it calls: who speaks first is
found out by waiting. Ours with ours: 0.42, 0.43, 0.54, 0.44."""


@pytest.fixture(scope="session")
def punchers(programs: Programs) -> dict[str, Path | None]:
    """The programs that punch, by implementation; ours is none."""
    rust = programs["rust"].parent
    return {
        "ours": None,
        "go": programs["go"],
        "rust": rust / "kas-interop-punch",
        "rust-0.56": rust / "kas-interop-punch-056",
    }


def meet(lab: RunningLab, nats: tuple[str, str], caller: Path | None, called: Path | None, at: str) -> list[Puncher]:
    """Have one call the other through the relay at an address, until it has used the direct connection."""
    alice, bob = (lab.home(name, nat, delay="25ms") for name, nat in zip(("alice", "bob"), nats, strict=True))
    callee, circuit = punching.reserve(called, bob, at)
    peers = [punching.dial(caller, alice, circuit), callee]
    echoed = peers[0].wait("echoed")
    assert echoed["intact"], echoed
    assert not echoed.get("relayed"), echoed  # rust has closed the circuit by now
    for peer, other in zip(peers, (bob, alice), strict=True):
        direct = peer.wait("direct")
        assert ip_of(direct["remote"]) == other.public_address
        print(f"{peer.process}: direct after {direct['seconds']:.3f} s")
    return peers


def our_relay(lab: RunningLab) -> str:
    host = lab.public("relay")
    address: str = host.spawn_python(punching.relay, host.address).expect(r"^/ip4/11\S+$")[0]
    return address


def rust_s_relay(lab: RunningLab, programs: Programs) -> str:
    host = lab.public("relay")
    command = [str(programs["rust"]), "listen", "--relay-open", f"/ip4/{host.address}/tcp/{punching.RELAY_PORT}"]
    return host.spawn(command, stdin=True).expect(r'"(/ip4/11[^"]+/p2p/[^"]+)"')[1]


def check(ours: Puncher, nats: tuple[str, str]) -> None:
    """It went as it should: the first attempt does it, or the second where somebody who is refused has but one dial."""
    ended = ours.wait("punch-ended")
    # Who lets everybody in is dialed beside the punch, and either may be first.
    beside = "fc" in nats and "there is a direct connection" in ended["text"]
    assert ended["reason"] == ("abandoned" if beside else "punched"), ended
    assert ended["attempts"] <= (2 if nats == ("pr-rst", "pr-rst") else 1), ended


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("nats", PAIRS, ids=" x ".join)
class TestOurs:
    def test_we_call(
        self, lab: RunningLab, punchers: dict[str, Path | None], nats: tuple[str, str], other: str
    ) -> None:
        ours, _ = meet(lab, nats, None, punchers[other], our_relay(lab))
        check(ours, nats)

    def test_we_are_called(
        self, lab: RunningLab, punchers: dict[str, Path | None], nats: tuple[str, str], other: str
    ) -> None:
        _, ours = meet(lab, nats, punchers[other], None, our_relay(lab))
        check(ours, nats)


@pytest.mark.parametrize(("caller", "called"), [("ours", "rust-0.56"), ("rust-0.56", "ours"), ("ours", "ours")])
def test_through_rust_s_relay_which_tells_nobody_where_the_other_is(
    lab: RunningLab, programs: Programs, punchers: dict[str, Path | None], caller: str, called: str
) -> None:
    meet(lab, ("pr", "eimx"), punchers[caller], punchers[called], rust_s_relay(lab, programs))


@pytest.mark.parametrize("we_call", [True, False])
def test_js_that_can_be_dialed(lab: RunningLab, programs: Programs, we_call: bool) -> None:
    """js can't punch, as it dials from other ports than it listens on. But it tells where it listens."""
    at, host, home = our_relay(lab), lab.public("js"), lab.home("home", "pr", delay="25ms")
    js = host.spawn([str(programs["js"]), "listen", "--dcutr", f"/ip4/{host.address}/tcp/4001"], stdin=True)
    js_id = js.expect(r'"event":"started","peer":"([^"]+)"')[1]

    def order(number: int, **what: Any) -> None:
        js.stdin.write(json.dumps({"id": number, **what}).encode() + b"\n")
        assert js.expect(rf'"event":"(done|failed)","id":{number}\b.*')[1] == "done"

    if we_call:
        order(1, do="reserve", address=at)
        ours = punching.dial(None, home, f"{at}/p2p-circuit/p2p/{js_id}")
        assert ours.wait("echoed")["intact"]
    else:
        ours, circuit = punching.reserve(None, home, at)
        order(1, do="connect", address=circuit)
    assert ours.wait("direct")["remote"].startswith(f"/ip4/{host.address}/tcp/4001")
    if not we_call:
        order(2, do="echo", peer=circuit.rpartition("/")[2], size=1000)


@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize("nats", PAIRS, ids=" x ".join)
def test_theirs(lab: RunningLab, punchers: dict[str, Path | None], nats: tuple[str, str], kind: str) -> None:
    """The measure of ours. What fails takes half a minute to do so, and is no news."""
    if THEIRS[kind][PAIRS.index(nats)] is None:
        pytest.skip("it can't")
    meet(lab, nats, punchers[kind], punchers[kind], our_relay(lab))
