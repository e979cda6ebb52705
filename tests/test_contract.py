"""The peer for the hole-punch test of the libp2p project: what its environment may say, and its Redis."""

from __future__ import annotations

import pytest
import trio
from trio.testing import memory_stream_pair

from kas_libp2p import redis
from kas_libp2p.contract import Contract
from kas_libp2p.errors import ConfigError, ConnectionLost, RemoteProtocolError
from tests.redis import serve

TOLD = {
    "IS_DIALER": "true",
    "REDIS_ADDR": "hole-punch-redis:6379",
    "TEST_KEY": "a1b2c3d4",
    "TRANSPORT": "tcp",
    "SECURE_CHANNEL": "noise",
    "MUXER": "yamux",
    "DIALER_IP": "10.40.50.99",
    "WAN_SUBNET": "10.40.50.64/27",
    "WAN_ROUTER_IP": "10.40.50.98",
    "DEBUG": "false",
}
"""What the test tells a dialer."""


class TestEnvironment:
    def test_a_dialer_s(self) -> None:
        assert Contract.from_environment(TOLD) == Contract(
            dialer=True,
            redis=("hole-punch-redis", 6379),
            key="a1b2c3d4",
            ip="10.40.50.99",
            route=("10.40.50.64/27", "10.40.50.98"),
            debug=False,
        )

    def test_a_listener_s_with_as_little_as_it_may_be(self) -> None:
        told = {name: value for name, value in TOLD.items() if "WAN" not in name and name not in ("DEBUG", "DIALER_IP")}
        listener = Contract.from_environment({**told, "IS_DIALER": "false", "REDIS_ADDR": "redis"})
        assert (listener.dialer, listener.redis, listener.ip, listener.route) == (
            False,
            ("redis", 6379),
            "0.0.0.0",
            None,
        )

    @pytest.mark.parametrize(
        ("name", "value", "said"),
        [
            ("IS_DIALER", None, "IS_DIALER must be true or false"),
            ("IS_DIALER", "yes", "IS_DIALER must be true or false"),
            ("REDIS_ADDR", None, "REDIS_ADDR is missing"),
            ("REDIS_ADDR", "redis:port", "host:port"),
            ("TEST_KEY", "", "TEST_KEY is missing"),
            ("TRANSPORT", "quic-v1", "TRANSPORT must be tcp"),
            ("SECURE_CHANNEL", "tls", "SECURE_CHANNEL must be noise"),
            ("MUXER", "mplex", "MUXER must be yamux"),
            ("DIALER_IP", "lan0", "is wrong"),
            ("WAN_SUBNET", None, "belong together"),
            ("WAN_SUBNET", "10.40.50.65/27", "is wrong"),
            ("WAN_ROUTER_IP", "-x", "is wrong"),
        ],
    )
    def test_what_is_wrong_is_named(self, name: str, value: str | None, said: str) -> None:
        told = {each: text for each, text in (TOLD | {name: value}).items() if text is not None}
        with pytest.raises(ConfigError, match=said):
            Contract.from_environment(told)


async def answering(data: bytes) -> redis.Redis:
    """A client whose server has sent this, and ends."""
    ours, theirs = memory_stream_pair()
    await theirs.send_all(data)
    await theirs.send_eof()
    return redis.Redis(ours)


class TestRedis:
    async def test_what_is_set_is_got(self) -> None:
        ours, theirs = memory_stream_pair()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve, theirs, {})
            async with redis.Redis(ours) as client:
                assert await client.get("key") is None
                await client.set("key", "/ip4/10.1.2.3/tcp/1/p2p/é")
                assert await client.get("key") == "/ip4/10.1.2.3/tcp/1/p2p/é"

    @pytest.mark.parametrize("data", [b"-ERR no\r\n", b":1\r\n", b"$x\r\n", b"$5000\r\n", b"$" * 5000])
    async def test_an_answer_that_is_none(self, data: bytes) -> None:
        with pytest.raises(RemoteProtocolError, match="redis answers"):
            await (await answering(data)).get("key")

    async def test_a_refused_set(self) -> None:
        with pytest.raises(RemoteProtocolError, match="READONLY"):
            await (await answering(b"-READONLY it is\r\n")).set("key", "value")

    async def test_a_server_that_leaves(self) -> None:
        with pytest.raises(ConnectionLost):
            await (await answering(b"$4000\r\nxyz")).get("key")
