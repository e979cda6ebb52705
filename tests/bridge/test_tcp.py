"""Bridges on real sockets: source addresses as kaspad sees them, and local addresses that kaspad dials."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from kas_bridge import datadir, listeners
from kas_bridge.app import Bridge
from kas_bridge.config import Settings
from kas_bridge.listeners import LocalAddresses
from kas_libp2p.errors import KasError, ListenError
from kas_libp2p.kaspa.grpc import GrpcChannel
from kas_libp2p.kaspa.join import End, JoinFailed, KaspadAddress, dial_kaspad
from kas_libp2p.kaspa.peer import LightPeer
from kas_libp2p.metadata import PeerId
from kas_libp2p.node import open_node

NETWORK = "kaspa-simnet"
ALICE, BOB = PeerId("12D3KooWAlice"), PeerId("12D3KooWBob")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Kaspad:
    """A light node behind a TCP listener.

    Attributes:
        seen: the IP addresses from which it was dialed, in order.
    """

    def __init__(self, light: LightPeer) -> None:
        self.light = light
        self.port = 0
        self.seen: list[str] = []

    async def listen(self, *, task_status: Any) -> None:
        made = await trio.open_tcp_listeners(0, host="127.0.0.1")
        self.port = made[0].socket.getsockname()[1]
        task_status.started()
        await trio.serve_listeners(self._serve, made)

    async def _serve(self, stream: trio.SocketStream) -> None:
        self.seen.append(stream.socket.getpeername()[0])
        await self.light.handle(GrpcChannel.server(stream))


@asynccontextmanager
async def machine(folder: Path, **given: Any) -> AsyncIterator[tuple[Bridge, Kaspad]]:
    async with AsyncExitStack() as stack:
        light = await stack.enter_async_context(LightPeer(NETWORK, user_agent="/kaspad:2.1.0/"))
        nursery = await stack.enter_async_context(trio.open_nursery())
        kaspad = Kaspad(light)
        await nursery.start(kaspad.listen)
        settings = Settings(
            **{  # type: ignore[arg-type]
                "data_dir": folder,
                "kaspad": f"127.0.0.1:{kaspad.port}",
                "rpc": "off",
                "listen": ("/ip4/127.0.0.1/tcp/0",),
            }
            | given
        )
        datadir.prepare(folder)
        node = await stack.enter_async_context(open_node(settings.overlay_config()))
        bridge = Bridge(settings, node)
        inner = await stack.enter_async_context(trio.open_nursery())
        await inner.start(bridge.run)
        yield bridge, kaspad
        inner.cancel_scope.cancel()
        nursery.cancel_scope.cancel()


async def until(condition: Callable[[], Any]) -> None:
    with trio.fail_after(20):
        while not condition():  # noqa: ASYNC110 - several objects' state, none of which sets an event for all
            await trio.sleep(0.005)


async def test_kaspad_sees_each_peer_from_its_own_address(tmp_path: Path) -> None:
    async with (
        machine(tmp_path / "b") as (b, kaspad_b),
        machine(tmp_path / "c") as (c, _),
        machine(tmp_path / "a", peer=(b.node.addresses[0], c.node.addresses[0])) as (a, kaspad_a),
    ):
        await until(lambda: a.status()["peers"]["joined"] == 2 and kaspad_a.light.peers)
        # The first is the look: it asks who is there, and stands for no peer.
        assert kaspad_a.seen[0] == "127.0.0.1"
        assert sorted(kaspad_a.seen[1:]) == sorted(row["source"] for row in a.peers()) == ["127.1.0.1", "127.1.0.2"]
        assert kaspad_b.seen == ["127.0.0.1", "127.1.0.1"]
        assert await kaspad_a.light.peers[0].ping() < 5


@pytest.mark.parametrize(
    ("settings", "seen"),
    [
        ({"source": ("one",)}, "127.0.0.1"),
        ({"source": ("127.7.7.7",)}, "127.7.7.7"),
        ({"source": ("127.9.0.0/24",)}, "127.9.0.1"),
    ],
)
async def test_other_sources(settings: dict[str, Any], seen: str, tmp_path: Path) -> None:
    async with (
        machine(tmp_path / "b") as (b, _),
        machine(tmp_path / "a", peer=(b.node.addresses[0],), **settings) as (a, kaspad),
    ):
        await until(lambda: a.status()["peers"]["joined"] == 1)
        assert kaspad.seen[1] == seen


async def test_a_name_with_an_ipv6_address_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        found = [
            (socket.AF_INET6, socket.SOCK_STREAM, 6, "", ("::1", port, 0, 0)),
            (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port)),
        ]

        async def resolve(*_: Any, **__: Any) -> Any:
            await trio.lowlevel.checkpoint()
            return found

        monkeypatch.setattr(trio.socket, "getaddrinfo", resolve)
        for source in ("127.1.0.9", None):
            stream = await dial_kaspad(KaspadAddress("localhost", port), source)
            assert stream.socket.getpeername() == ("127.0.0.1", port)
            await stream.aclose()


@pytest.mark.parametrize("silent", [False, True])
async def test_a_name_that_does_not_resolve(
    silent: bool, monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock
) -> None:
    async def resolve(*_: Any, **__: Any) -> Any:
        await trio.lowlevel.checkpoint()
        if silent:
            await trio.sleep_forever()
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(trio.socket, "getaddrinfo", resolve)
    with pytest.raises(JoinFailed) as failed:
        await dial_kaspad(KaspadAddress("kaspad.example"), None)
    assert failed.value.ended.reason is End.UNREACHABLE
    why = "no answer within 1 s" if silent else "Name or service not known"
    assert failed.value.ended.text == f"kaspad.example does not resolve: {why}"


async def test_a_pool_that_is_not_ours_is_told(tmp_path: Path) -> None:
    async with (
        machine(tmp_path / "b") as (b, _),
        machine(tmp_path / "a", peer=(b.node.addresses[0],), source=("203.0.113.0/24",)) as (a, _),
    ):
        await until(lambda: a.peers()[0]["problem"])
        (note,) = a.status()["notes"]
        assert "203.0.113.1 can't be used as a source address" in note["note"]
        assert "--source" in note["help"]
        assert "can't be used as a source address" in a.peers()[0]["problem"]


async def test_kaspad_dials_a_peer_at_its_local_address(tmp_path: Path) -> None:
    port = free_port()
    async with (
        machine(tmp_path / "b") as (b, kaspad_b),
        machine(tmp_path / "a", peer=(b.node.addresses[0],), kaspad_dials=True, listener_port=port) as (a, kaspad_a),
    ):
        await until(lambda: a.listening)
        (row,) = a.peers()
        assert (row["state"], row["listener"]) == ("listening", f"127.0.1.1:{port}")
        assert f"127.0.1.1:{port}" in str(a.why(b.node.peer_id))

        dialed = await trio.open_tcp_stream("127.0.1.1", port)
        peer = await kaspad_a.light.handshake(GrpcChannel.client(dialed, gzip=False))
        assert peer.info.user_agent == "/kaspad:2.1.0/"
        assert await peer.ping() < 5
        assert kaspad_b.seen == ["127.0.0.1", "127.1.0.1"]
        assert kaspad_a.seen == ["127.0.0.1"], "it was not joined from our side as well"
        await until(lambda: a.peers()[0]["state"] == "joined")
        assert a.peers()[0]["source"] is None

        # It is gone with its peer, so that kaspad does not wait for one that is not there.
        b.stop()
        await b.node.disconnect(a.node.peer_id)
        b.node.set_policy(lambda candidate: "gone")
        await until(lambda: not a.listening)
        with pytest.raises(OSError, match=r"127\.0\.1\.1"):
            await trio.open_tcp_stream("127.0.1.1", port)


# -- The addresses alone -----------------------------------------------------------------------------------------------


async def _nothing(stream: trio.SocketStream) -> None:
    await stream.aclose()


async def test_addresses_stay_with_their_peers(tmp_path: Path) -> None:
    path, port = tmp_path / "listeners.json", free_port()
    local = LocalAddresses(path, port)
    async with local.listening(ALICE, _nothing) as alice, local.listening(BOB, _nothing) as bob:
        assert (alice, bob) == (f"127.0.1.1:{port}", f"127.0.2.1:{port}")
        await (await trio.open_tcp_stream("127.0.2.1", port)).aclose()
    with pytest.raises(OSError, match=r"127\.0\.2\.1"):
        await trio.open_tcp_stream("127.0.2.1", port)
    again = LocalAddresses(path, port)
    async with again.listening(BOB, _nothing) as bob:
        assert bob == f"127.0.2.1:{port}"


async def test_a_port_that_is_taken(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.1.1", 0))
        taken.listen()
        local = LocalAddresses(None, taken.getsockname()[1])
        with pytest.raises(ListenError, match=r"can't listen on 127.0.1.1:\d+ for kaspad: .*--listener-port"):
            async with local.listening(ALICE, _nothing):
                pass


async def test_what_goes_wrong_inside_comes_out_as_it_is() -> None:
    local = LocalAddresses(None, free_port())
    with pytest.raises(KasError, match="inside"):
        async with local.listening(ALICE, _nothing):
            raise KasError("inside")


async def test_there_is_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listeners, "MAX_LISTENERS", 1)
    local = LocalAddresses(None, free_port())
    async with local.listening(ALICE, _nothing):
        with pytest.raises(listeners.PoolExhausted):
            async with local.listening(BOB, _nothing):
                pass
