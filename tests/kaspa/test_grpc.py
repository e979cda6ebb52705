"""gRPC on HTTP/2: the two ends against each other, and against peers that break the rules."""

import gzip
import random
import select
import socket
import tracemalloc
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.errors import ErrorCodes
from h2.events import ConnectionTerminated, DataReceived, ResponseReceived, TrailersReceived
from hyperframe.frame import GoAwayFrame
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import memory_stream_pair

from kas_libp2p.errors import ConnectionLost, GrpcError, KasError, RemoteProtocolError
from kas_libp2p.kaspa._grpc import COLLECTED, P2P_PATH, PIECE_COST, GrpcMachine, GrpcSettings
from kas_libp2p.kaspa._liveness import ANSWER_WITHIN, PROBE_AFTER
from kas_libp2p.kaspa.channel import BATCH, PackedPiece, PathHung, Piece, running
from kas_libp2p.kaspa.dialect import REFERENCE
from kas_libp2p.kaspa.grpc import LINGER, LOOK_EVERY, GrpcChannel
from kas_libp2p.kaspa.tcp import KaspadStream

from .overlay import MemoryOverlay, overlay_pair


def machines(**changes: object) -> tuple[GrpcMachine, GrpcMachine]:
    settings = GrpcSettings(**changes)  # type: ignore[arg-type]
    return GrpcMachine(client=True, settings=settings, now=0), GrpcMachine(client=False, settings=settings, now=0)


def noise(size: int) -> bytes:
    """What gzip makes no smaller."""
    return random.Random(size).randbytes(size)


def exchange(left: GrpcMachine, right: GrpcMachine, chunk: int = 1 << 20) -> None:
    while True:
        moved = False
        for one, other in ((left, right), (right, left)):
            data = one.data_to_send(1 << 20)
            for start in range(0, len(data), chunk):
                other.receive(data[start : start + chunk], 0)
                moved = True
        if not moved:
            return


def whole(pieces: list[Piece]) -> list[bytes]:
    messages: list[bytearray] = []
    for data, remaining, first, size in pieces:
        if first:
            messages.append(bytearray())
        messages[-1] += data
        assert len(messages[-1]) + remaining == size
    return [bytes(each) for each in messages]


@given(
    messages=st.lists(st.binary(max_size=400), max_size=20),
    big=st.integers(0, 200_000),
    chunk=st.integers(1, 5000),
    packed=st.booleans(),
)
def test_messages_come_out_as_they_went_in_however_the_bytes_are_cut(
    messages: list[bytes], big: int, chunk: int, packed: bool
) -> None:
    client, server = machines(gzip=packed)
    messages = [*messages, bytes(big)]
    client.send([Piece.of(each) for each in messages], 0)
    client.send_eof()
    got: list[Piece] = []
    while not server.ended:
        exchange(client, server, chunk)
        got += server.take(1 << 20)
        assert client.error is None
        assert server.error is None
    assert whole(got) == messages


def test_a_reader_that_does_not_read_stops_the_peer_after_one_window() -> None:
    client, server = machines(stream_window=1 << 20, connection_window=1 << 20)
    client.send([Piece.of(bytes(8 << 20))], 0)
    exchange(client, server)
    assert BATCH <= server.waiting <= (1 << 20) + BATCH
    assert client.queued > 6 << 20
    total = 0
    while server.waiting:
        total += sum(len(piece.data) for piece in server.take(1 << 30))
        exchange(client, server)
    assert total == 8 << 20


def test_a_packed_message_larger_than_the_window_gets_through() -> None:
    message = noise(3 << 20)
    client, server = machines(gzip=True, stream_window=1 << 20, connection_window=1 << 20)
    server_pieces: list[Piece] = []
    exchange(client, server)
    client.send([Piece.of(message)], 0)
    exchange(client, server)
    server_pieces += server.take(1 << 30)
    assert whole(server_pieces) == [message]


class Foreign:
    """A peer that speaks HTTP/2 by itself, to say what ours would not."""

    headers = (
        (":method", "POST"),
        (":scheme", "http"),
        (":authority", "x"),
        (":path", P2P_PATH),
        ("content-type", "application/grpc"),
        ("grpc-accept-encoding", "gzip,identity"),
    )

    def __init__(self, headers: list[tuple[str, str]] | None = None, *, max_message: int = 100_000) -> None:
        self.h2 = H2Connection(H2Configuration(client_side=True, header_encoding="utf-8"))
        self.h2.initiate_connection()
        self.server = GrpcMachine(client=False, settings=GrpcSettings(max_message=max_message), now=0)
        self.events: list[object] = []
        self.h2.send_headers(1, headers or self.headers)
        self.turn()

    def turn(self) -> None:
        self.server.receive(self.h2.data_to_send(), 0)
        answer = self.server.data_to_send(1 << 20)
        if answer:
            self.events += self.h2.receive_data(answer)

    def say(self, data: bytes) -> KasError | None:
        for start in range(0, len(data), 16384):
            self.h2.send_data(1, data[start : start + 16384])
        self.turn()
        return self.server.error


def test_the_server_answers_with_headers_at_once() -> None:
    foreign = Foreign()
    assert any(isinstance(event, ResponseReceived) for event in foreign.events)
    assert not any(isinstance(event, DataReceived) for event in foreign.events)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        pytest.param(b"\2\0\0\0\1x", "flag 2", id="unknown flag"),
        pytest.param(b"\0\xff\xff\xff\xff", "4294967295 bytes", id="too large, before its bytes arrive"),
        pytest.param(b"\1\0\0\0\0", "empty", id="empty and compressed"),
        pytest.param(b"\1\0\0\0\4junk", "damaged", id="not gzip"),
        pytest.param(
            b"\1" + len(bomb := gzip.compress(bytes(200_000))).to_bytes(4, "big") + bomb, "more than", id="bomb"
        ),
        pytest.param(
            b"\1" + (len(cut := gzip.compress(b"hello")[:-1])).to_bytes(4, "big") + cut, "cut short", id="cut short"
        ),
    ],
)
def test_a_message_that_breaks_the_rules_ends_the_call(data: bytes, words: str) -> None:
    error = Foreign().say(data)
    assert isinstance(error, RemoteProtocolError)
    assert words in str(error)


def test_another_path_is_refused_with_a_status() -> None:
    foreign = Foreign(
        [
            (":method", "POST"),
            (":scheme", "http"),
            (":authority", "x"),
            (":path", "/somewhere/Else"),
            ("content-type", "application/grpc"),
        ]
    )
    headers = [dict(e.headers or ()) for e in foreign.events if isinstance(e, ResponseReceived)]
    assert headers
    assert headers[0]["grpc-status"] == "12"
    assert isinstance(foreign.server.error, RemoteProtocolError)


@pytest.mark.parametrize("garbage", [b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x02\x00" * 20, bytes(100)])
def test_garbage_instead_of_a_preface_is_the_peers_fault(garbage: bytes) -> None:
    _, server = machines()
    server.receive(garbage, 0)
    assert isinstance(server.error, RemoteProtocolError)


def test_a_status_comes_through_with_its_words() -> None:
    client, server = machines()
    exchange(client, server)
    server.send_eof(8, "too many pending inbound handshakes, 100 %")
    exchange(client, server)
    assert isinstance(client.error, GrpcError)
    assert (client.error.status, client.error.message) == (8, "too many pending inbound handshakes, 100 %")


def test_trailers_of_an_orderly_end_say_zero() -> None:
    foreign = Foreign()
    foreign.server.send_eof()
    foreign.turn()
    trailers = [dict(e.headers or ()) for e in foreign.events if isinstance(e, TrailersReceived)]
    assert trailers == [{"grpc-status": "0"}]


async def test_silence_is_pinged_and_then_given_up(autojump_clock: trio.abc.Clock) -> None:
    left, right = memory_stream_pair()
    channel = GrpcChannel.client(left, keepalive=30, keepalive_timeout=10)
    async with running(channel):
        begun = trio.current_time()
        with pytest.raises(ConnectionLost, match=r"nothing came for 40\.0 s"):
            await channel.receive()
        assert trio.current_time() - begun == pytest.approx(40)
    await right.aclose()


@asynccontextmanager
async def reference(*pair: MemoryOverlay) -> AsyncIterator[list[GrpcChannel]]:
    """Two ends that speak as kaspad's overlay does; a message has gone each way."""
    left, right = (make(end, settings=REFERENCE) for make, end in zip(MAKERS, pair, strict=True))
    async with running(left), running(right):
        for one, other in ((left, right), (right, left)):
            await one.send(b"hello")
            assert await other.receive() == b"hello"
        yield [left, right]


MAKERS = (GrpcChannel.client, GrpcChannel.server)


async def listen(channel: GrpcChannel) -> float:
    """When the path was found to hang."""
    with pytest.raises(PathHung, match="nothing came for"):
        async for _ in channel:
            pass
    return trio.current_time()


@pytest.mark.parametrize("queued", [0, 8 << 20], ids=["nothing queued", "more queued than fits"])
async def test_a_path_that_hangs_while_data_is_owed_is_found_within_seconds(
    queued: int, autojump_clock: trio.abc.Clock
) -> None:
    """The other end is a foreign one as far as we know: it says nothing but what HTTP/2 has it say."""
    left, right = overlay_pair(delay=0.2)
    async with reference(left, right) as (one, other), trio.open_nursery() as nursery:
        nursery.start_soon(listen, other)
        await trio.sleep(30)  # quiet and well: nobody gives up
        left.hang()
        hung_at = trio.current_time()
        if queued:
            nursery.start_soon(send_in_vain, one, noise(queued))
        assert await listen(one) - hung_at <= PROBE_AFTER + ANSWER_WITHIN + 0.5 + LOOK_EVERY
    assert left.was_reset
    assert right.was_reset


async def send_in_vain(channel: GrpcChannel, message: bytes) -> None:
    with pytest.raises(PathHung):
        await channel.send(message)


async def test_a_slow_path_with_a_deep_queue_is_alive_until_it_hangs(autojump_clock: trio.abc.Clock) -> None:
    left, right = overlay_pair(window=1 << 20, rate=50_000)  # a ping waits twenty seconds
    async with reference(left, right) as (one, other), trio.open_nursery() as nursery:
        begun = trio.current_time()
        nursery.start_soon(one.send, noise(1 << 20))
        assert len(await other.receive() or b"") == 1 << 20
        assert trio.current_time() - begun > 20
        nursery.start_soon(listen, other)
        nursery.start_soon(send_in_vain, one, noise(3 << 20))
        await trio.sleep(10)
        left.hang()
        hung_at = trio.current_time()
        assert await listen(one) - hung_at <= PROBE_AFTER + ANSWER_WITHIN + LOOK_EVERY


async def test_an_idle_path_that_hangs_is_found_too(autojump_clock: trio.abc.Clock) -> None:
    left, right = overlay_pair()
    async with reference(left, right) as (one, other), trio.open_nursery() as nursery:
        nursery.start_soon(listen, other)
        await trio.sleep(1000)
        before = left.outgoing.total
        await trio.sleep(300)
        assert left.outgoing.total - before <= 2 * 10 * 17, "a ping or an answer each half minute"
        left.hang()
        hung_at = trio.current_time()
        assert await listen(one) - hung_at <= REFERENCE.keepalive + ANSWER_WITHIN + LOOK_EVERY


async def test_a_peer_that_reads_nothing_is_alive(autojump_clock: trio.abc.Clock) -> None:
    async with reference(*overlay_pair()) as (one, _), trio.open_nursery() as nursery:
        nursery.start_soon(one.send, noise(10 << 20))
        with trio.move_on_after(60) as scope:
            await one.receive()
        assert scope.cancelled_caught
        nursery.cancel_scope.cancel()


async def test_two_living_ends_keep_each_other_for_hours(autojump_clock: trio.abc.Clock) -> None:
    left, right = memory_stream_pair()
    async with running(GrpcChannel.client(left)) as client, running(GrpcChannel.server(right)) as server:
        await trio.sleep(7200)
        await client.send(b"still here")
        assert await server.receive() == b"still here"


async def test_an_orderly_end_delivers_what_was_sent_and_then_nothing(autojump_clock: trio.abc.Clock) -> None:
    left, right = memory_stream_pair()
    client, server = GrpcChannel.client(left), GrpcChannel.server(right)
    async with running(server):
        async with running(client):
            await client.send(b"last")
            await client.aclose()
        assert await server.receive() == b"last"
        assert await server.receive() is None


@pytest.mark.parametrize("answers", [True, False])
async def test_a_call_is_not_reset_before_its_end_was_read(answers: bool, autojump_clock: trio.abc.Clock) -> None:
    left, right = memory_stream_pair()
    server = GrpcMachine(client=False, settings=GrpcSettings(), now=0)
    taken: list[Piece] = []
    async with running(GrpcChannel.client(left)) as client, trio.open_nursery() as nursery:
        await client.send(b"no, because")
        begun = trio.current_time()
        nursery.start_soon(client.aclose)
        while not server.ended:
            server.receive(await right.receive_some(), 0)
            taken += server.take(BATCH)
        assert whole(taken) == [b"no, because"]
        assert server.error is None
        if answers:
            server.send_eof()
            await right.send_all(server.data_to_send(BATCH))
        while data := await right.receive_some():
            server.receive(data, 0)
        assert trio.current_time() - begun == pytest.approx(0 if answers else LINGER)


async def test_a_stream_that_breaks_ends_both_directions_with_the_reason() -> None:
    left, right = memory_stream_pair()
    async with running(GrpcChannel.client(left)) as client:
        await right.aclose()
        with pytest.raises(ConnectionLost):
            await client.receive()
        with pytest.raises(ConnectionLost):
            await client.send(b"x")


def gzipped(message: bytes) -> bytes:
    packed = gzip.compress(message, 9)
    return b"\1" + len(packed).to_bytes(4, "big") + packed


def test_a_bomb_is_unpacked_as_it_is_taken_by_steps_and_without_memory() -> None:
    size, gone, takes = 40 << 20, 0, 0
    foreign = Foreign(max_message=size)
    packed = gzipped(bytes(size))
    tracemalloc.start()
    try:
        assert foreign.say(packed) is None
        while gone < size:
            pieces = foreign.server.take(BATCH)
            takes += 1
            assert pieces or foreign.server.busy
            assert sum(len(piece.data) for piece in pieces) <= BATCH
            assert all(piece.size == size for piece in pieces)
            gone += sum(len(piece.data) for piece in pieces)
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert takes > 2 * size // BATCH * 0.9
    assert most < 4 << 20
    assert not foreign.server.busy
    assert foreign.say(gzipped(b"and on")) is None
    assert whole(foreign.server.take(BATCH)) == [b"and on"]


def passing(**changes: object) -> tuple[Foreign, GrpcMachine, GrpcMachine]:
    """A foreign client, the end that it calls, and, what passes on from there: a client, and its server."""
    foreign = Foreign(**changes)  # type: ignore[arg-type]
    client, server = machines(passes_gzip=True)
    exchange(client, server)
    assert client.takes_packed
    foreign.server.gives_packed = True
    return foreign, client, server


def test_a_large_packed_message_streams_through_as_it_is() -> None:
    message = noise(5 << 20)
    foreign, client, server = passing(max_message=6 << 20)
    packed = gzipped(message)
    held = 0
    got: list[Piece] = []
    for start in range(0, len(packed), 32 * 1024):
        assert foreign.say(packed[start : start + 32 * 1024]) is None
        while pieces := foreign.server.take(BATCH):
            assert {type(each) for each in pieces} == {PackedPiece}
            client.send(pieces, 0)
        held = max(held, foreign.server.waiting + client.queued)
        exchange(client, server)
        got += server.take(BATCH)
    assert held < 2 * COLLECTED, "nobody held all of it"
    while server.waiting or server.busy:
        got += server.take(BATCH)
    assert whole(got) == [message]
    assert foreign.say(gzipped(b"and on")) is None
    assert whole(foreign.server.take(BATCH)) == [b"and on"], "a small one is unpacked"


@pytest.mark.parametrize("part", ["bomb", "damaged"])
def test_what_must_not_be_unpacked_never_passes_to_its_end(part: str) -> None:
    foreign, _, _ = passing(max_message=2_000_000)
    content = noise(1_000_000) + (bytes(8 << 20) if part == "bomb" else b"")
    packed = bytearray(gzipped(content))
    packed[-1] ^= part == "damaged"
    for start in range(0, len(packed), 16384):
        foreign.say(bytes(packed[start : start + 16384]))
        passed = foreign.server.take(BATCH)
        while foreign.server.busy:
            passed += foreign.server.take(BATCH)
        assert all(piece.remaining for piece in passed)
    assert isinstance(foreign.server.error, RemoteProtocolError)


def test_tiny_messages_that_nobody_reads_make_no_objects() -> None:
    foreign = Foreign()
    said = b"\0\0\0\0\1x" * 2000 + bytes(5) * 2000
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        for _ in range(60):
            assert foreign.say(said[:12_000]) is None
            assert foreign.say(said[12_000:]) is None
        kept = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert kept < 3 * 60 * len(said)
    count = 0
    while pieces := foreign.server.take(BATCH):
        assert len(pieces) <= BATCH // PIECE_COST + 1
        count += len(pieces)
    assert count == 60 * 4000
    assert foreign.server.waiting == 0


def test_an_end_within_a_message_is_the_peers_fault_after_what_was_whole() -> None:
    for part in (b"\0\0", b"\0\0\0\0\5", b"\0\0\0\0\5half", gzipped(b"x")[:-1]):
        foreign = Foreign()
        foreign.h2.send_data(1, b"\0\0\0\0\5whole" + part, end_stream=True)
        foreign.turn()
        assert foreign.server.take(BATCH)[0].data == b"whole"
        assert foreign.server.take(BATCH)[1:] == []
        assert not foreign.server.ended
        assert isinstance(foreign.server.error, RemoteProtocolError)
        assert "middle of a message" in str(foreign.server.error)


def test_the_end_comes_after_the_last_message_was_taken() -> None:
    foreign = Foreign()
    foreign.h2.send_data(1, gzipped(b"first") + b"\0\0\0\0\4last", end_stream=True)
    foreign.turn()
    assert not foreign.server.ended
    assert whole(foreign.server.take(BATCH)) == [b"first", b"last"]
    assert foreign.server.ended
    assert foreign.server.error is None


def test_who_breaks_the_rules_of_grpc_is_told() -> None:
    foreign = Foreign()
    foreign.say(b"\2\0\0\0\1x")
    (told,) = [event for event in foreign.events if isinstance(event, ConnectionTerminated)]
    assert told.error_code == ErrorCodes.PROTOCOL_ERROR


@pytest.mark.parametrize(("status", "wanted"), [("0", None), ("8", GrpcError)])
def test_a_peer_that_says_goodbye_still_says_its_status(status: str, wanted: type[KasError] | None) -> None:
    client, server = machines()
    exchange(client, server)
    server.send([Piece.of(b"last")], 0)
    server.send_eof(int(status))
    data = server.data_to_send(1 << 20)
    client.receive(goaway(last=1) + data, 0)
    assert whole(client.take(BATCH)) == [b"last"]
    assert client.ended == (wanted is None)
    assert (type(client.error) if client.error else None) == wanted


def test_a_peer_that_leaves_before_the_call_does_not_take_it_up() -> None:
    client, server = machines()
    client.receive(server.data_to_send(1 << 20) + goaway(last=0), 0)
    assert isinstance(client.error, ConnectionLost)
    assert "did not take up" in str(client.error)


def test_a_peer_that_leaves_with_an_error_says_it() -> None:
    client, server = machines()
    exchange(client, server)
    client.receive(goaway(last=1, code=11, detail=b"enough"), 0)
    assert str(client.error) == "the peer ended HTTP/2 with code 11 enough"


def goaway(*, last: int, code: int = 0, detail: bytes = b"") -> bytes:
    frame = GoAwayFrame(0, last_stream_id=last, error_code=code, additional_data=detail)
    return frame.serialize()


async def test_a_large_packed_message_lets_others_run() -> None:
    left, right = memory_stream_pair()
    size = 32 << 20
    turns = 0

    async def others() -> None:
        nonlocal turns
        while True:
            await trio.lowlevel.checkpoint()
            turns += 1

    foreign = Foreign(max_message=size)
    async with running(GrpcChannel.server(right)) as server, trio.open_nursery() as nursery:
        h2 = H2Connection(H2Configuration(client_side=True))
        h2.initiate_connection()
        h2.send_headers(1, foreign.headers)
        packed = gzipped(bytes(size))
        while packed:
            h2.send_data(1, packed[:16384])
            packed = packed[16384:]
        await left.send_all(h2.data_to_send())
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(others)
        assert len(await server.receive() or b"") == size
        nursery.cancel_scope.cancel()
    assert turns > 2 * size // BATCH * 0.9


async def test_a_sender_that_waits_is_let_go_when_the_stream_is_over(autojump_clock: trio.abc.Clock) -> None:
    left, right = memory_stream_pair()
    with trio.fail_after(5):  # no ping wakes it by then
        async with running(GrpcChannel.server(right)) as server:
            h2 = H2Connection(H2Configuration(client_side=True))
            h2.initiate_connection()
            h2.send_headers(1, Foreign.headers, end_stream=True)
            await left.send_all(h2.data_to_send())
            assert await server.receive() is None
            async with trio.open_nursery() as nursery:
                nursery.start_soon(server.send, bytes(1 << 20))
                await trio.testing.wait_all_tasks_blocked()
                h2.reset_stream(1, ErrorCodes.NO_ERROR)  # it has all it wants
                await left.send_all(h2.data_to_send())


async def test_taking_what_waited_lets_the_peer_go_on(autojump_clock: trio.abc.Clock) -> None:
    left, right = memory_stream_pair()
    with trio.fail_after(5):
        async with (
            running(GrpcChannel.client(left)) as client,
            running(GrpcChannel.server(right)) as server,
            trio.open_nursery() as nursery,
        ):
            nursery.start_soon(client.send, bytes(8 << 20))
            await trio.testing.wait_all_tasks_blocked()
            assert client._machine.queued > 4 << 20  # the window is full
            assert len(await server.receive() or b"") == 8 << 20


# -- Towards kaspad, over TCP ------------------------------------------------------------------------------------------


@asynccontextmanager
async def over_tcp(**settings: int) -> AsyncIterator[tuple[GrpcChannel, GrpcChannel, socket.socket]]:
    """A client as the bridge has it, a server, and the server's socket. Both have said their first words."""
    ours, theirs = socket.socketpair()
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16384)
    async with (
        running(GrpcChannel.client(KaspadStream(trio.socket.from_stdlib_socket(ours)))) as client,
        running(GrpcChannel.server(trio.SocketStream(trio.socket.from_stdlib_socket(theirs)), **settings)) as server,
    ):
        await client.send(b"version")
        assert await server.receive() == b"version"
        await server.send(b"version")
        assert await client.receive() == b"version"
        await trio.testing.wait_all_tasks_blocked(0.01)
        yield client, server, theirs


async def test_a_message_leaves_in_the_turn_of_who_sends() -> None:
    async with over_tcp() as (client, server, theirs):
        for _ in range(3):
            await client.send(b"inv")
            assert select.select([theirs], (), (), 0)[0]
            assert await server.receive() == b"inv"
            await trio.testing.wait_all_tasks_blocked(0.01)


async def test_what_the_socket_does_not_take_at_once_follows_whole_and_in_order() -> None:
    sent = [noise(size) for size in (100, 70_000, 3_000_000, 1, 0, 200_000, 50)]
    async with over_tcp(stream_window=65535) as (client, server, _), trio.open_nursery() as nursery:

        async def send() -> None:
            for number, message in enumerate(sent):
                with trio.CancelScope() as scope:
                    if number % 2:
                        scope.cancel()  # it is queued nevertheless
                    await client.send(message)

        nursery.start_soon(send)
        await trio.testing.wait_all_tasks_blocked(0.01)
        for message in sent:
            assert await server.receive() == message


async def test_a_kaspad_that_has_gone_is_noticed_by_who_sends() -> None:
    async with over_tcp() as (client, _, theirs):
        theirs.shutdown(socket.SHUT_RDWR)
        await client.send(b"inv")
        with pytest.raises(ConnectionLost):
            await client.receive()
        with pytest.raises(ConnectionLost):
            await client.send(b"inv")
