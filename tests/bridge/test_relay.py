"""Bridges that nobody can dial: a relay between them, its loss, and what the operators are shown. On the mock clock."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from kas_bridge import views
from kas_bridge._control import ActionError
from kas_bridge.config import RelayPreset, RelaySettings
from kas_bridge.relay import Relay
from kas_libp2p.config import Purpose, Role, SessionConfig
from kas_libp2p.events import CircuitClosed, CircuitOpened, KaspaPeerEnded
from kas_libp2p.identity import Identity
from kas_libp2p.metadata import PathKind
from kas_libp2p.node import open_node

from .world import Machine, World, until, world

PLAIN = SessionConfig(enabled=False)


class Box:
    """A relay's process."""

    def __init__(self, relay: Relay, address: str, scope: trio.CancelScope) -> None:
        self.relay = relay
        self.address = address
        self.end = scope.cancel

    @property
    def peer(self) -> str:
        return self.relay.node.peer_id


@asynccontextmanager
async def _running(w: World, number: int, given: dict[str, Any]) -> AsyncIterator[Box]:
    """``kas-bridge relay`` in a network of its own."""
    ip = f"11.{number}.0.1"
    settings = RelaySettings(data_dir=w.folder / f"r{number}", listen=(f"/ip4/{ip}/tcp/16117",), **given)
    settings.data_dir.mkdir(exist_ok=True)
    started = trio.Event()
    found: list[Box] = []

    async def live() -> None:
        with trio.CancelScope() as scope:
            identity = Identity.from_seed(bytes([100 + number]) * 32)
            async with open_node(settings.overlay_config(), identity=identity, network=w.internet.host(ip)) as node:
                relay = Relay(settings, node, wall_clock=trio.current_time)
                found.append(Box(relay, node.addresses[0], scope))
                started.set()
                await relay.run()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(live)
        await started.wait()
        yield found[0]
        nursery.cancel_scope.cancel()


async def relay_in(w: World, number: int, **given: Any) -> Box:
    return await w.enter(_running(w, number, given))


async def private(w: World, *through: Box, **settings: Any) -> Machine:
    """A bridge that can't be dialed, with its places."""
    machine = await w.machine(
        listen=(),
        role=Role.PRIVATE,
        relay=tuple(each.address for each in through),
        relay_target=len(through),
        **settings,
    )
    await until(lambda: len(machine.node.addresses) == len(through))
    return machine


def joined_by(a: Machine, b: Machine) -> str | None:
    """The relay through which they are joined."""
    (row,) = (each for each in a.bridge.peers() if each["peer_id"] == b.peer)
    return row["relay_id"] if row["state"] == "joined" else None


async def test_two_private_bridges_are_joined(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with world(tmp_path) as w:
        box = await relay_in(w, 1)
        b = await private(w, box)
        a = await private(w, box, peer=(b.address,))
        await until(lambda: a.kaspad.light.peers and b.kaspad.light.peers)
        assert await a.kaspad.light.peers[0].ping() < 0.1
        row = a.row(b)
        assert (row["state"], row["path"], row["relay_id"]) == ("joined", PathKind.RELAYED, box.peer)
        assert row["limits"]["max_s"] == 7200
        assert 7100 < row["limits"]["left_s"] <= 7200
        assert row["limits"]["bytes_left"] is None

        status = a.bridge.status()
        assert status["reachability"]["role"] == "private"
        assert status["reachability"]["reachable"] == [a.address]
        (place,) = status["reservations"]
        assert (place["relay_id"], place["held"], place["reachable"]) == (box.peer, True, [a.address])
        assert 3500 < place["renew_in_s"] <= 3600
        (known,) = status["relays"]
        assert (known["known"], known["place"]) == ("configured", "reserved")
        text = "\n".join(views.status(status))
        assert "role      private: it is configured" in text
        assert f"relays    {box.peer[:12]}…{box.peer[-4:]} at 11.1.0.1" in text
        assert f"reachable {a.address}" in text

        why = "\n".join(views.why(a.bridge.why(b.peer)))
        assert f"is joined, relayed (…{box.peer[-4:]})" in why
        assert "The relay ends this circuit in 120 min; it moves to the next one before." in why
        assert "a port mapping on either side (ours: it is off, see port-mapping)" in why
        assert "IPv6 on both (ours: none; theirs: none)" in why


async def test_what_the_relays_operator_sees(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with world(tmp_path) as w:
        box = await relay_in(w, 1)
        b = await private(w, box)
        a = await private(w, box)
        with box.relay.events.subscribe() as events:
            a.bridge.connect(b.address)
            await until(lambda: a.kaspad.light.peers)
            status = box.relay.status()
            assert (status["mode"], status["reachability"]["role"]) == ("relay", "public")
            assert {each["peer_id"] for each in status["relay"]["places"]} == {a.peer, b.peer}
            (circuit,) = status["relay"]["circuits"]
            assert (circuit["source"], circuit["destination"]) == (a.peer, b.peer)
            assert circuit["forth"] > 0 < circuit["back"]
            text = "\n".join(views.status(status))
            assert "carries   2 places of 256, 1 circuit of 512, for peers with a Kaspa stream (default limits)" in text
            assert f"{a.peer[:12]}… → {b.peer[:12]}… for" in text
            rows = {each["peer_id"]: each for each in box.relay.peers()}
            assert {peer: (row["place"], row["circuits"]) for peer, row in rows.items()} == {
                a.peer: (True, 1),
                b.peer: (True, 1),
            }

            # The operator of a relay keeps somebody out.
            await box.relay.ban(a.peer)
            await until(lambda: [each["peer_id"] for each in box.relay.peers()] == [b.peer])
            seen = [each async for each in _until(events, CircuitClosed)]
        assert any(isinstance(each, CircuitOpened) for each in seen)
        assert seen[-1].reason == "source_lost"
        assert await box.relay.disconnect(b.peer[-6:])
        for ask in (box.relay.connect, box.relay.why):
            with pytest.raises(ActionError, match="this is a relay, in front of no kaspad"):
                ask(b.peer)
        box.relay.stop("by the test")


async def _until(events: Any, kind: type) -> AsyncIterator[Any]:
    async for event in events:
        yield event
        if isinstance(event, kind):
            return


async def test_a_relay_is_lost_and_another_takes_over_at_once(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with world(tmp_path) as w:
        one = await relay_in(w, 1)
        two = await relay_in(w, 2)
        b = await private(w, one, two, session=PLAIN)
        a = await private(w, one, two, session=PLAIN)
        a.bridge.connect(b.address)
        await until(lambda: joined_by(a, b))
        await trio.sleep(5)
        lost, other = (one, two) if joined_by(a, b) == one.peer else (two, one)
        lost.end()
        assert await until(lambda: joined_by(a, b) == other.peer) < 1
        (ended,) = (each for each in a.of("kaspa-peer-ended") if isinstance(each, KaspaPeerEnded))
        assert (ended.by, ended.reason) == ("path", "path lost")
        assert f"the relay {lost.peer[:12]}… ended the circuit" in ended.text
        assert await a.kaspad.light.peers[-1].ping() < 0.1
        # What is left is told: one place of two, and why not the other.
        await until(lambda: len(a.node.addresses) == 1)
        assert [each["relay_id"] for each in a.bridge.status()["reservations"] if each["held"]] == [other.peer]


async def test_a_circuit_whose_time_is_over_is_made_anew(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with world(tmp_path) as w:
        box = await relay_in(w, 1, relay_limits=RelayPreset.REFERENCE)
        b = await private(w, box, session=PLAIN)
        a = await private(w, box, peer=(b.address,), session=PLAIN)
        await until(lambda: joined_by(a, b))
        limits = a.row(b)["limits"]
        assert (limits["max_bytes"], limits["max_s"]) == (128 * 1024, 120)
        out = views.console()
        with out.capture() as shown:
            out.print(views.peers(a.bridge.peers(), [], out))
        assert f"{b.peer[:12]}…: its relay ends the circuit in " in shown.get()
        await until(lambda: a.of("kaspa-peer-ended"), 200)
        assert a.of("kaspa-peer-ended")[0].by == "path"  # type: ignore[attr-defined]
        assert await until(lambda: joined_by(a, b)) < 1


async def test_a_relay_for_the_overlay_lets_a_bridge_in_at_the_first_asking(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with world(tmp_path) as w:
        box = await relay_in(w, 1)
        kaspad = await w.kaspad()
        kaspad.stop()  # a bridge serves the Kaspa stream whether its kaspad is there or not
        a = await w.machine(kaspad, listen=(), role=Role.PRIVATE, relay=(box.address,))
        await until(lambda: a.node.addresses)
        assert [each for each in box.relay.events.counts if each[0] == "relay-request-served" and each[1]] == []
        assert not a.of("reservation-failed")


async def test_known_relays_survive_a_restart(tmp_path: Path, autojump_clock: MockClock) -> None:
    folder = tmp_path / "a"
    async with world(tmp_path) as w:
        box = await relay_in(w, 1)
        await private(w, box, data_dir=folder)
        await trio.sleep(60)  # it is measured before it is worth remembering
    assert (folder / "relays.json").exists()
    async with world(tmp_path) as w:
        await relay_in(w, 1)
        again = await w.machine(listen=(), role=Role.PRIVATE, data_dir=folder)
        assert await until(lambda: again.node.addresses) < 1


async def test_a_public_bridge_is_a_relay_if_its_operator_wants_that(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with world(tmp_path) as w:
        no = await w.machine(role=Role.PUBLIC)
        yes = await w.machine(role=Role.PUBLIC, serve_relay=True, relay_purpose=Purpose.ANY)
        assert no.bridge.status()["relay"] is None
        assert yes.bridge.status()["relay"]["purpose"] == "any"
        a = await w.machine(listen=(), role=Role.PRIVATE, relay=(yes.address,))
        await until(lambda: a.node.addresses)
        assert [each["peer_id"] for each in yes.bridge.status()["relay"]["places"]] == [a.peer]


async def test_a_relay_that_a_peer_took_later_is_known_as_well(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with world(tmp_path) as w:
        one, two = await relay_in(w, 1), await relay_in(w, 2)
        b = await private(w, one)
        a = await private(w, one, peer=(b.address,))
        await until(lambda: joined_by(a, b))
        b.node.use_relays(one.address, two.address)
        await until(lambda: len(b.node.addresses) == 2)
        await trio.sleep(10)  # it tells its peers when its addresses have been quiet for a while
        one.end()
        assert await until(lambda: joined_by(a, b) == two.peer) < 1


async def test_peers_tell_one_another_of_relays_and_who_runs_them(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with world(tmp_path) as w:
        one, two = (
            await relay_in(w, 1, relay_operator="one.example"),
            await relay_in(w, 2, relay_operator="two.example"),
        )
        b = await private(w, one, two)
        await trio.sleep(60)  # in which it visits them
        a = await w.machine(listen=(), role=Role.PRIVATE, relay=(one.address,), relay_target=2, peer=(b.address,))
        await until(lambda: len(a.node.addresses) == 2)
        places = {each["relay_id"]: each for each in a.bridge.status()["reservations"] if each["held"]}
        assert {each["operator"] for each in places.values()} == {"one.example", "two.example"}
        (heard,) = (each for each in a.bridge.status()["relays"] if each["relay_id"] == two.peer)
        assert (heard["known"], heard["told_by"]) == ("met", b.peer)
        text = "\n".join(views.status(a.bridge.status()))
        assert f"{two.peer[:12]}…{two.peer[-4:]} at 11.2.0.1, run by two.example, score 0." in text
        assert "run by two.example" in "\n".join(views.status(two.relay.status()))
