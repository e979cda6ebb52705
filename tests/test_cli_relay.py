"""The command kas-libp2p with a relay: three processes on loopback, and a fourth that dials through."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kas_libp2p import Config, tool
from kas_libp2p.cli import Exit
from kas_libp2p.events import (
    CircuitClosed,
    CircuitOpened,
    Event,
    RelayRequestServed,
    ReservationFailed,
    ReservationLost,
    ReservationMade,
)
from kas_libp2p.metadata import PeerId
from tests.command import PATIENCE, Running, events_of, run_command, running

PEER = PeerId("12D3KooWDxzbYi9JivZZxT7StM3pGGw1DMshva24XZTYKiUNLEdV")
SHORT = "12D3KooWDxzb…"


@pytest.fixture(scope="module")
def relay() -> Iterator[Running]:
    with running("relay", "/ip4/127.0.0.1/tcp/0", "--limits", "reference", "--json") as process:
        process.wait_for("started")
        yield process


@pytest.fixture(scope="module")
def hidden(relay: Running) -> Iterator[Running]:
    """A listener that has a place on the relay."""
    with running("listen", "/ip4/127.0.0.1/tcp/0", "--relay", relay.address, "--json") as process:
        process.wait_for("reservation-made")
        yield process


def circuit(hidden: Running) -> str:
    (address,) = hidden.wait_for("reservation-made")["addresses"]
    return str(address)


def test_a_listener_says_where_it_can_be_reached(relay: Running, hidden: Running) -> None:
    made = hidden.wait_for("reservation-made")
    assert made["relay"] == relay.started["peer_id"]
    assert circuit(hidden) == f"{relay.address}/p2p-circuit/p2p/{hidden.started['peer_id']}"
    assert (made["max_bytes"], made["max_seconds"], made["renewed"]) == (131072, 120, False)
    assert "/libp2p/circuit/relay/0.2.0/hop" in relay.started["protocols"]
    served = relay.wait_for("relay-request-served", request="reserve")
    assert (served["peer"], served["status"]) == (hidden.started["peer_id"], "OK")


def test_dial_shows_the_way_and_its_limits(relay: Running, hidden: Running) -> None:
    done = run_command("dial", circuit(hidden), "--json")
    assert done.returncode == Exit.DONE, done.stderr
    connected = next(event for event in events_of(done.stdout) if event["event"] == "connected")
    assert connected["path"] == {"kind": "relayed", "relay": relay.started["peer_id"]}
    assert connected["limits"]["max_bytes"] == 131072
    assert 0 < connected["limits"]["bytes_left"] < 131072
    carried = relay.wait_for("circuit-closed", source=events_of(done.stdout)[0]["peer_id"])
    assert (carried["destination"], carried["reason"]) == (hidden.started["peer_id"], "closed")


def test_dial_in_words(hidden: Running) -> None:
    done = run_command("dial", circuit(hidden))
    assert "path      relayed by 12D3" in done.stdout
    assert "limits    131 kB and 2 min" in done.stdout


def test_on_loopback_nothing_is_punched_and_that_is_said(hidden: Running) -> None:
    done = run_command("dial", circuit(hidden), "--wait", "punched", "--json")
    assert done.returncode == Exit.RELAYED, done.stderr
    *events, error = events_of(done.stdout)
    assert (error["event"], error["code"]) == ("error", Exit.RELAYED)
    assert "stayed relayed" in error["message"]
    assert [each["path"]["kind"] for each in events if each["event"] in ("connected", "explained")] == ["relayed"] * 2
    done = run_command("why", circuit(hidden))
    assert done.returncode == Exit.DONE, done.stderr
    assert f"{str(hidden.started['peer_id'])[:12]}… is relayed by 12D3" in done.stdout


def test_ping_through(hidden: Running) -> None:
    done = run_command("ping", circuit(hidden), "-c", "3", "-i", "0", "--json")
    summary = next(event for event in events_of(done.stdout) if event["event"] == "ping-summary")
    assert summary["answered"] == 3


def test_perf_through_until_the_limit(hidden: Running) -> None:
    done = run_command("perf", circuit(hidden), "--upload", "20kB", "--download", "20kB", "--json")
    assert done.returncode == Exit.DONE
    done = run_command("perf", circuit(hidden), "--upload", "1MB", "--json")
    assert done.returncode == Exit.PEER
    assert "ended the circuit: its 131 kB are used up" in events_of(done.stdout)[-1]["message"]


def test_nobody_there(relay: Running) -> None:
    done = run_command("dial", f"{relay.address}/p2p-circuit/p2p/{PEER}", "--json")
    assert done.returncode == Exit.UNREACHABLE
    (failure,) = events_of(done.stdout)[-1]["failures"]
    assert failure["stage"] == "relay"
    assert "NO_RESERVATION" in failure["reason"]


@pytest.mark.parametrize("wrong", ["nonsense", "/ip4/127.0.0.1/tcp/1"])
def test_what_is_no_relay(wrong: str) -> None:
    done = run_command("listen", "/ip4/127.0.0.1/tcp/0", "--relay", wrong)
    assert done.returncode == Exit.MISUSED
    assert wrong in done.stderr


def test_a_relay_for_the_overlay_only(hidden: Running) -> None:
    with running("relay", "/ip4/127.0.0.1/tcp/0", "--purpose", "overlay", "--json") as choosy:
        with running("listen", "/ip4/127.0.0.1/tcp/0", "--relay", choosy.address, "--json") as listener:
            assert "PERMISSION_DENIED" in listener.wait_for("reservation-failed")["reason"]
        assert choosy.wait_for("relay-request-served")["reason"] == "purpose"


def test_a_relay_that_is_killed_takes_its_own_circuits_only(relay: Running, tmp_path: Path) -> None:
    key = tmp_path / "key"
    with running("relay", "/ip4/127.0.0.1/tcp/0", "--key", key, "--json") as other:
        address = other.address
        arguments = ("--relay", relay.address, "--relay", address, "--json")
        with running("listen", "/ip4/127.0.0.1/tcp/0", *arguments) as listener:
            here = {
                each: str(listener.wait_for("reservation-made", relay=each)["addresses"][0])
                for each in (relay.started["peer_id"], other.started["peer_id"])
            }
            with (
                running("dial", here[other.started["peer_id"]], "--stay", "--json") as doomed,
                running("dial", here[relay.started["peer_id"]], "--stay", "--json") as untouched,
            ):
                doomed.wait_for("connected")
                untouched.wait_for("connected")
                other.process.kill()
                killed = time.time()
                lost = listener.wait_for("reservation-lost", relay=other.started["peer_id"])
                assert lost["at"] - killed < Config().yamux.keepalive, "its end is seen, and no ping was needed"
                assert doomed.process.wait(PATIENCE) in (Exit.DONE, Exit.PEER)
                ended = [each for each in events_of(doomed.text) if each["event"] == "connection-closed"]
                assert any(" is gone: " in each["reason"] for each in ended)
                where = address.removesuffix(f"/p2p/{other.started['peer_id']}")
                with running("relay", where, "--key", key, "--json") as again:
                    again.wait_for("relay-request-served", status="OK")
                assert untouched.process.poll() is None
                gone = [
                    each["connection"] for each in events_of(untouched.text) if each["event"] == "connection-closed"
                ]
                assert not gone


@pytest.mark.parametrize(
    ("event", "says"),
    [
        (
            ReservationMade(
                relay=PEER,
                addresses=("/somewhere",),
                lifetime=3600,
                max_bytes=131072,
                max_seconds=120,
                renewed=False,
                seconds=0.1,
            ),
            f"{SHORT}  has a place for us for 60 min (131 kB and 2 min per circuit): reachable at /somewhere",
        ),
        (
            ReservationMade(
                relay=PEER,
                addresses=("/somewhere",),
                lifetime=7200,
                max_bytes=None,
                max_seconds=None,
                renewed=True,
                seconds=0.1,
            ),
            f"{SHORT}  keeps our place for 2 h (no limit per circuit)",
        ),
        (ReservationFailed(relay=PEER, reason="full", seconds=0.1), f"{SHORT}  has no place for us: full"),
        (ReservationLost(relay=PEER, reason="it left"), f"{SHORT}  our place there is gone: it left"),
        (
            RelayRequestServed(peer=PEER, request="connect", status="NO_RESERVATION", reason="no_reservation"),
            f"{SHORT}  asked to connect: NO_RESERVATION (no_reservation)",
        ),
        (RelayRequestServed(peer=PEER, request="reserve", status="OK", reason=""), f"{SHORT}  has a place here"),
        (CircuitOpened(circuit=3, source=PEER, destination=PEER), f"circuit 3  from {SHORT} to {SHORT}"),
        (
            CircuitClosed(circuit=3, source=PEER, destination=PEER, reason="closed", seconds=2, forth=1000, back=1),
            "circuit 3  ended after 2.0 s: closed (1.0 kB forth, 1 B back)",
        ),
    ],
)
def test_words(event: Event, says: str) -> None:
    (line,) = tool._ListenWords(verbose=True)(event)
    assert says in line


def test_small_events_are_left_out() -> None:
    renewed = ReservationMade(
        relay=PEER, addresses=(), lifetime=1, max_bytes=None, max_seconds=None, renewed=True, seconds=0.1
    )
    granted = RelayRequestServed(peer=PEER, request="connect", status="OK", reason="")
    assert not tool._ListenWords(verbose=False)(renewed)
    assert not tool._ListenWords(verbose=True)(granted)
