"""A stock py-libp2p host understands us: its own TCP, Noise and Yamux at the other end, both ways."""

import random

import libp2p
import pytest
import trio
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.crypto.x25519 import create_new_key_pair as create_noise_pair
from libp2p.peer.peerinfo import info_from_p2p_addr
from libp2p.security.noise.transport import PROTOCOL_ID, Transport
from libp2p.stream_muxer.yamux.yamux import PROTOCOL_ID as YAMUX
from libp2p.stream_muxer.yamux.yamux import Yamux
from multiaddr import Multiaddr

from kas_libp2p.config import Config
from kas_libp2p.metadata import PeerId
from kas_libp2p.transport.tcp import Dialer, listen
from kas_libp2p.transport.upgrade import upgrade
from tests.transport.pairs import ALICE, ECHO

DATA = random.Random(7).randbytes(600_000)  # more than two windows
PATIENCE = 30.0  # seconds; stock takes 20 ms


@pytest.fixture
async def stock():
    """A stock host that listens and echoes."""
    keys = create_new_key_pair()
    noise = Transport(keys, noise_privkey=create_noise_pair().private_key)
    host = libp2p.new_host(key_pair=keys, sec_opt={PROTOCOL_ID: noise}, muxer_opt={YAMUX: Yamux})

    async def echo(stream):
        while data := await stream.read(65536):
            await stream.write(data)
        await stream.close()

    host.set_stream_handler(ECHO, echo)
    with trio.fail_after(PATIENCE):
        async with host.run(listen_addrs=[Multiaddr("/ip4/127.0.0.1/tcp/0")]):
            yield host


async def exchange(write, read, finish):
    """Send everything and read it back."""
    got = bytearray()
    async with trio.open_nursery() as nursery:

        async def send():
            for start in range(0, len(DATA), 50_000):
                await write(DATA[start : start + 50_000])
            await finish()

        nursery.start_soon(send)
        while len(got) < len(DATA):
            piece = await read()
            assert piece
            got += piece
    assert bytes(got) == DATA


async def test_we_dial_stock(stock):
    (address,) = {str(address).split("/p2p/")[0] for address in stock.get_addrs()}
    raw = await Dialer().dial(address)
    expected = PeerId(str(stock.get_id()))
    connection = await upgrade(raw, identity=ALICE, initiator=True, expected=expected, config=Config())
    async with trio.open_nursery() as nursery:
        nursery.start_soon(connection.run, lambda stream: stream.reset())
        await trio.testing.wait_all_tasks_blocked()
        stream = await connection.open_stream(ECHO)
        await exchange(stream.send_all, stream.receive_some, stream.send_eof)
        assert stream.protocol == ECHO
        assert await connection.ping() > 0
        await connection.aclose()


async def test_stock_dials_us(stock):
    listener = await listen("/ip4/127.0.0.1/tcp/0")
    async with trio.open_nursery() as nursery:

        async def serve():
            connection = await upgrade(
                await listener.accept(), identity=ALICE, initiator=False, expected=None, config=Config()
            )
            assert connection.peer == str(stock.get_id())
            await connection.run(lambda stream: nursery.start_soon(answer, connection, stream))

        async def answer(connection, stream):
            try:
                await connection.accept(stream, [ECHO])
                async for data in stream:
                    await stream.send_all(data)
                await stream.aclose()
            except trio.BrokenResourceError:
                pass  # stock's identify, which nobody serves here

        nursery.start_soon(serve)
        address = f"{listener.addresses()[0]}/p2p/{ALICE.peer_id}"
        await stock.connect(info_from_p2p_addr(Multiaddr(address)))
        stream = await stock.new_stream(info_from_p2p_addr(Multiaddr(address)).peer_id, [ECHO])
        await exchange(stream.write, lambda: stream.read(65536), stream.close_write)
        nursery.cancel_scope.cancel()
    listener.close()
