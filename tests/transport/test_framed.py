from __future__ import annotations

import pytest
import trio

from kas_libp2p.errors import NegotiationError, RemoteProtocolError, StreamReset
from kas_libp2p.framing import frame
from kas_libp2p.transport.framed import receive_frame
from tests.transport.pairs import Pair, connected


async def test_what_follows_a_message_stays_unread() -> None:
    async with connected() as pair:
        mine, theirs = await pair.streams()
        await mine.send_all(frame(b"question") + b"and ")
        await mine.send_all(b"more")
        await trio.testing.wait_all_tasks_blocked()
        assert await receive_frame(theirs, 8) == b"question"
        assert theirs.unread == 8
        assert await theirs.receive_some() == b"and more"


async def test_a_message_in_pieces(autojump_clock: trio.testing.MockClock) -> None:
    async with connected() as pair:
        mine, theirs = await pair.streams()
        pair.nursery.start_soon(_dribble, mine, frame(bytes(300)) + b"!")
        assert await receive_frame(theirs, 300) == bytes(300)
        assert await theirs.receive_some() == b"!"


async def _dribble(stream: trio.abc.SendStream, data: bytes) -> None:
    for index in range(len(data)):
        await stream.send_all(data[index : index + 1])
        await trio.sleep(1)


async def test_an_answer_together_with_the_agreement(autojump_clock: trio.testing.MockClock) -> None:
    async with connected(delay=0.01) as pair:
        mine = await pair.alice.open_stream("/echo/1.0.0")
        theirs = await pair.accept(pair.bob)
        await theirs.send_all(frame(b"hello") + b"rest")
        assert await receive_frame(mine, 100) == b"hello"
        assert await mine.receive_some() == b"rest"


async def test_one_byte_too_many() -> None:
    async with connected() as pair:
        mine, theirs = await pair.streams()
        await mine.send_all(frame(bytes(101)))
        with pytest.raises(RemoteProtocolError, match="101 bytes"):
            await receive_frame(theirs, 100)


async def test_an_endless_length() -> None:
    async with connected() as pair:
        mine, theirs = await pair.streams()
        await mine.send_all(b"\xff" * 10)
        with pytest.raises(RemoteProtocolError, match="varint"):
            await receive_frame(theirs, 100)


async def test_the_end_before_the_message() -> None:
    async with connected() as pair:
        mine, theirs = await pair.streams()
        await mine.send_all(b"\x05abc")
        await mine.send_eof()
        with pytest.raises(RemoteProtocolError, match="before a whole message"):
            await receive_frame(theirs, 100)
        mine, theirs = await pair.streams()
        mine.reset()
        with pytest.raises(StreamReset):
            await receive_frame(theirs, 100)


async def test_a_protocol_that_the_peer_does_not_speak() -> None:
    async with connected() as pair:
        mine = await pair.alice.open_stream("/other/1.0.0")
        pair.nursery.start_soon(_refuse, pair)
        with pytest.raises(NegotiationError):
            await receive_frame(mine, 100)


async def _refuse(pair: Pair) -> None:
    with pytest.raises(NegotiationError):
        await pair.accept(pair.bob)
