"""gRPC on HTTP/2: the two ends against each other, and against peers that break the rules."""

import gzip

import pytest
import trio
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import DataReceived, ResponseReceived, TrailersReceived
from hypothesis import given, settings
from hypothesis import strategies as st
from trio.testing import memory_stream_pair

from kas_libp2p.errors import ConnectionLost, GrpcError, KasError, RemoteProtocolError
from kas_libp2p.kaspa._grpc import P2P_PATH, GrpcMachine, GrpcSettings
from kas_libp2p.kaspa.channel import BATCH, Piece, running
from kas_libp2p.kaspa.grpc import GrpcChannel


def machines(**changes: object) -> tuple[GrpcMachine, GrpcMachine]:
    settings = GrpcSettings(**changes)  # type: ignore[arg-type]
    return GrpcMachine(client=True, settings=settings, now=0), GrpcMachine(client=False, settings=settings, now=0)


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


@settings(deadline=None)
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
    client.send([Piece.of(each) for each in messages])
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
    client.send([Piece.of(bytes(8 << 20))])
    exchange(client, server)
    assert BATCH <= server.waiting <= (1 << 20) + BATCH
    assert client.queued > 6 << 20
    total = 0
    while server.waiting:
        total += sum(len(piece.data) for piece in server.take(1 << 30))
        exchange(client, server)
    assert total == 8 << 20


def test_a_packed_message_larger_than_the_window_gets_through() -> None:
    import random

    message = random.Random(1).randbytes(3 << 20)
    client, server = machines(gzip=True, stream_window=1 << 20, connection_window=1 << 20)
    server_pieces: list[Piece] = []
    exchange(client, server)
    client.send([Piece.of(message)])
    exchange(client, server)
    server_pieces += server.take(1 << 30)
    assert whole(server_pieces) == [message]


class Foreign:
    """A peer that speaks HTTP/2 by itself, to say what ours would not."""

    def __init__(self, headers: list[tuple[str, str]] | None = None) -> None:
        self.h2 = H2Connection(H2Configuration(client_side=True, header_encoding="utf-8"))
        self.h2.initiate_connection()
        self.server = GrpcMachine(client=False, settings=GrpcSettings(max_message=100_000), now=0)
        self.events: list[object] = []
        self.h2.send_headers(
            1,
            headers
            or [
                (":method", "POST"),
                (":scheme", "http"),
                (":authority", "x"),
                (":path", P2P_PATH),
                ("content-type", "application/grpc"),
                ("grpc-accept-encoding", "gzip,identity"),
            ],
        )
        self.turn()

    def turn(self) -> None:
        self.server.receive(self.h2.data_to_send(), 0)
        answer = self.server.data_to_send(1 << 20)
        if answer:
            self.events += self.h2.receive_data(answer)

    def say(self, data: bytes) -> KasError | None:
        self.h2.send_data(1, data)
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
        with pytest.raises(ConnectionLost, match="ping within 10 s"):
            await channel.receive()
        assert trio.current_time() - begun == pytest.approx(40)
    await right.aclose()


async def test_two_living_ends_keep_each_other_for_hours(autojump_clock: trio.abc.Clock) -> None:
    left, right = memory_stream_pair()
    async with running(GrpcChannel.client(left)) as client, running(GrpcChannel.server(right)) as server:
        await trio.sleep(7200)
        await client.send(b"still here")
        assert await server.receive() == b"still here"


async def test_an_orderly_end_delivers_what_was_sent_and_then_nothing() -> None:
    left, right = memory_stream_pair()
    client, server = GrpcChannel.client(left), GrpcChannel.server(right)
    async with running(server):
        async with running(client):
            await client.send(b"last")
            await client.aclose()
        assert await server.receive() == b"last"
        assert await server.receive() is None


async def test_a_stream_that_breaks_ends_both_directions_with_the_reason() -> None:
    left, right = memory_stream_pair()
    async with running(GrpcChannel.client(left)) as client:
        await right.aclose()
        with pytest.raises(ConnectionLost):
            await client.receive()
        with pytest.raises(ConnectionLost):
            await client.send(b"x")
