"""Garbage at each layer, and a wrong peer: why is told and counted; what was open at that layer ends, and only that."""

from __future__ import annotations

import random
from contextlib import suppress

import pytest
import trio
from trio.testing import MockClock

from kas_libp2p import addresses, identify, ping
from kas_libp2p.errors import DialError, NegotiationError, PeerIdMismatch, Stage, StreamReset
from kas_libp2p.events import (
    AddressFailed,
    ConnectionClosed,
    KaspaPeerEnded,
    LimitHit,
    PeerIdentified,
    PeerMisbehaved,
    StreamFailed,
    UpgradeFailed,
)
from kas_libp2p.framing import encode_varint
from kas_libp2p.framing import frame as framed
from kas_libp2p.kaspa._messages import Hello, Kind, encode
from kas_libp2p.kaspa._messages import frame as message_frame
from kas_libp2p.kaspa.join import End
from kas_libp2p.metadata import Dialect
from kas_libp2p.transport._multistream import HEADER, line
from kas_libp2p.transport.yamux import _machine as yamux
from kas_libp2p.transport.yamux.stream import YamuxStream
from tests.abuse.house import DELAY, ECHO, besieged
from tests.test_identify import MALLORY, message, seal_record
from tests.transport.pairs import Foreign
from tests.transport.yamux.test_machine import DATA, FIN, PING, RST, SYN, UPDATE, frame

JUNK = random.Random(11).randbytes(65536)
NOISE = line(b"/noise")
LONG_VARINTS = {"ten bytes": b"\x80" * 10 + b"\x01", "2^63": b"\x80" * 9 + b"\x01", "2^70": b"\xff" * 10 + b"\x7f"}
PATIENCE = 5 * DELAY

# TCP and multistream

BEFORE_NOISE = {
    "HTTP": b"GET / HTTP/1.1\r\n\r\n",
    "TLS": bytes.fromhex("1603010200010001fc0303"),
    "random": JUNK,
    "zeros": bytes(65536),
    "1 MiB line": HEADER + encode_varint(1 << 20) + JUNK,
    "4097 bytes": HEADER + encode_varint(4097) + JUNK,
    "no line feed": HEADER + framed(b"/noise/"),
    "endless proposals": HEADER + line(b"/tls/1.0.0") * 40,
    "endless ls": HEADER + line(b"ls") * 40,
    **{f"length of {name}": HEADER + data for name, data in LONG_VARINTS.items()},
}
IN_NOISE = {
    "random": 3 * JUNK,
    "zeros": bytes(65536),
    "64 KiB": b"\x00\x20" + JUNK[:32] + b"\xff\xff" + JUNK,
    "too short": b"\x00\x01\x00",
    "empty": b"\x00\x00",
    "a key that gives no secret": b"\x00\x20" + bytes(32),
    "too short third": b"\x00\x20" + JUNK[:32] + b"\x00\x0f" + JUNK[:15],
}


@pytest.mark.parametrize(
    ("said", "stage"),
    [
        *(pytest.param(data, Stage.SECURITY_NEGOTIATION, id=f"multistream {n}") for n, data in BEFORE_NOISE.items()),
        *(pytest.param(HEADER + NOISE + data, Stage.NOISE, id=f"noise {n}") for n, data in IN_NOISE.items()),
    ],
)
async def test_before_a_connection(said: bytes, stage: Stage, autojump_clock: MockClock) -> None:
    async with besieged() as h:
        begun = trio.current_time()
        raw = await h.pipe()
        await raw.send_all(said)
        await trio.sleep(PATIENCE)
        ((at, failed),) = h.of(UpgradeFailed)
        assert failed.stage == stage
        assert failed.reason
        assert at - begun < 10 * DELAY, "it was refused for what it said, not for being slow"
        assert h.count("upgrade-failed", stage) == 1
        assert set(h.node.status().in_use.values()) == {0}
        assert h.internet.pipes[-1][1].closed == "aborted"


@pytest.mark.parametrize("said", [JUNK[:1000], HEADER + line(b"/mplex/6.7.0") * 40, HEADER + b"\x80" * 10])
async def test_instead_of_a_multiplexer(said: bytes, autojump_clock: MockClock) -> None:
    async with besieged() as h:
        foreign = Foreign(await h.pipe(), initiator=True, identity=h.stranger(), muxers=())
        await foreign.shake_first()
        await foreign.say(said)
        await trio.sleep(PATIENCE)
        ((_, failed),) = h.of(UpgradeFailed)
        assert failed.stage == Stage.MUXER_NEGOTIATION
        assert h.count("upgrade-failed", Stage.MUXER_NEGOTIATION) == 1
        assert set(h.node.status().in_use.values()) == {0}


# Noise and Yamux, on a connection that is up

WINDOW = yamux.INITIAL_WINDOW
OPENED = frame(UPDATE, SYN, 1, 0)
IN_YAMUX = {
    "random": JUNK,
    "another version": b"\x01" + bytes(11),
    "an unknown type": frame(9, 0, 0, 0),
    "HTTP": b"GET / HTTP/1.1\r\n\r\n",
    "one byte above the window": OPENED + frame(DATA, 0, 1, bytes(WINDOW)) + frame(DATA, 0, 1, b"x"),
    "a frame of 4 GiB": OPENED + frame(DATA, 0, 1, 0xFFFFFFFF),
    "SYN above the window": frame(DATA, SYN, 1, bytes(WINDOW + 1)),
    "credit beyond all measure": OPENED + frame(UPDATE, 0, 1, 0xFFFFFFFF) * 2,
    "data for a stream that never was": frame(DATA, 0, 7, b"x"),
    "data behind the end": OPENED + frame(DATA, FIN, 1, b"x") + frame(DATA, 0, 1, b"x"),
    "a stream of ours": frame(UPDATE, SYN, 2, 0),
    "stream 0": frame(UPDATE, SYN, 0, 0),
    "one stream twice": OPENED * 2,
    "a flood of pings": b"".join(frame(PING, SYN, 0, n) for n in range(20_000)),
    "a flood of resets": b"".join(frame(UPDATE, SYN, n, 0) + frame(UPDATE, RST, n, 0) for n in range(1, 20_001, 2)),
    "a flood of streams": b"".join(frame(UPDATE, SYN, n, 0) for n in range(1, 20_001, 2)),
}


@pytest.mark.parametrize("said", IN_YAMUX.values(), ids=IN_YAMUX)
async def test_instead_of_yamux(said: bytes, autojump_clock: MockClock) -> None:
    async with besieged() as h:
        foreign = await h.foreign()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_hear_all, foreign)
            with suppress(trio.BrokenResourceError):  # it was closed before all was said
                for start in range(0, len(said), 65519):
                    await foreign.say(said[start : start + 65519])
            await trio.sleep(PATIENCE)
            nursery.cancel_scope.cancel()
        ((_, event),) = h.of(PeerMisbehaved)
        assert event.layer == "yamux"
        assert event.reason.startswith("yamux: ")
        assert h.count("peer-misbehaved", "yamux") == 1
        assert h.of(ConnectionClosed)[-1][1].reason == event.reason
        assert set(h.node.status().in_use.values()) == {0}


async def _hear_all(foreign: Foreign) -> None:
    with suppress(trio.BrokenResourceError):
        while await foreign.hear():
            pass


@pytest.mark.parametrize(
    "said", [b"\x00\x20" + bytes(32), b"\x00\x01\x00", b"\xff\xff" + JUNK], ids=["forged", "short", "64 KiB"]
)
async def test_instead_of_a_sealed_message(said: bytes, autojump_clock: MockClock) -> None:
    async with besieged() as h:
        foreign = await h.foreign()
        await foreign.raw.send_all(said)
        await trio.sleep(PATIENCE)
        ((_, event),) = h.of(PeerMisbehaved)
        assert event.layer == "noise"
        assert h.count("peer-misbehaved", "noise") == 1
        assert set(h.node.status().in_use.values()) == {0}


# Streams: the connection stays, and its other streams too


@pytest.mark.parametrize("said", BEFORE_NOISE.values(), ids=BEFORE_NOISE)
async def test_instead_of_a_proposal(said: bytes, autojump_clock: MockClock) -> None:
    async with besieged() as h:
        stranger = await h.connected()
        well = await stranger.open_stream(ECHO)
        stream = await stranger.open_stream()
        await _say_on(stream, said)
        await trio.sleep(PATIENCE)
        with pytest.raises(StreamReset):
            await _read_all(stream)
        ((_, event),) = h.of(StreamFailed)
        assert event.reason
        assert h.count("stream-failed") == 1
        await well.send_all(b"still here")
        assert await well.receive_some() == b"still here"


@pytest.mark.parametrize("size", [1, 31, 33])
async def test_half_a_ping(size: int, autojump_clock: MockClock) -> None:
    async with besieged() as h:
        stranger = await h.connected()
        stream = await stranger.open_stream(ping.ID)
        await stream.send_all(bytes(size))
        await stream.send_eof()
        await trio.sleep(PATIENCE)
        ((_, event),) = h.of(PeerMisbehaved)
        assert (event.layer, event.reason) == (ping.ID, f"a ping of {size % 32} bytes, it has 32")
        assert h.count("peer-misbehaved", ping.ID) == 1


# Identify

LISTEN = [addresses.parse("/ip4/12.0.0.1/tcp/1")]
IN_IDENTIFY = {
    "random": JUNK[:4096],
    "no protobuf": framed(b"\xff\xff\xff"),
    "truncated": framed(message(agentVersion="x" * 100)[:-50])[:-1],
    "8 KiB and one": encode_varint(8193) + JUNK[:8193],
    "11 messages": message(agentVersion="x") * 11,
    "1800 protocols": b"".join(message(protocols=[f"/p/{n}/{part}" for n in range(300)]) for part in range(6)),
    "an oversized key": message(publicKey=bytes(4096)),
    "another's key": message(publicKey=MALLORY.public_key),
    "another's record": message(signedPeerRecord=seal_record(MALLORY, LISTEN, 1)),
    **{f"length of {name}": data for name, data in LONG_VARINTS.items()},
}


@pytest.mark.parametrize("said", IN_IDENTIFY.values(), ids=IN_IDENTIFY)
@pytest.mark.parametrize("how", ["asked", "push"])
async def test_instead_of_who_it_is(how: str, said: bytes, autojump_clock: MockClock) -> None:
    async with besieged() as h:

        async def answer(stream: YamuxStream) -> None:
            await stream.connection.accept(stream, [identify.ID])
            await _say(stream, said)

        asked = how == "asked"
        stranger = await h.connected((lambda stream: h.nursery.start_soon(answer, stream)) if asked else None)
        if not asked:
            await _say(await stranger.open_stream(identify.PUSH), said)
        await trio.sleep(PATIENCE)
        ((_, event),) = h.of(PeerMisbehaved)
        assert event.layer == "identify"
        assert h.count("peer-misbehaved", "identify") == 1
        assert h.node.known_peer_at("12.0.0.1", 1) is None
        well = await stranger.open_stream(ECHO)
        await well.send_all(b"still here")
        assert await well.receive_some() == b"still here"


async def _say(stream: YamuxStream, said: bytes) -> None:
    with suppress(StreamReset):  # it had heard enough
        await stream.send_all(said)
        await stream.send_eof()


async def test_a_push_every_10_ms(autojump_clock: MockClock) -> None:
    async with besieged() as h:
        stranger = await h.connected()
        before = len(h.of(PeerIdentified))
        for n in range(500):
            stream = await stranger.open_stream(identify.PUSH)
            await _say(stream, message(agentVersion=f"x{n}"))
            await stream.aclose()
            await trio.sleep(0.01)
        await trio.sleep(PATIENCE)
        believed = len(h.of(PeerIdentified)) - before
        assert believed <= 10 + 5  # go's limit: 10 at once, then one in 5 s
        assert len(h.of(LimitHit)) == 500 - believed
        assert h.count("limit-hit", "identify_push") + h.count("limit-hit", "max_streams_per_peer") == 500 - believed


async def test_a_record_never_moves_another_peer(autojump_clock: MockClock) -> None:
    """RUSTSEC-2022-0009: a record is believed only about the peer that the connection proved."""
    async with besieged() as h:
        stranger = await h.connected()
        told = message(
            listenAddrs=[addresses.with_peer(LISTEN[0], h.friend.peer_id).to_bytes()],
            signedPeerRecord=seal_record(MALLORY, LISTEN, 1 << 62),
        )
        await _say(await stranger.open_stream(identify.PUSH), told)
        await trio.sleep(PATIENCE)
        assert h.node.known_peer_at("12.0.0.1", 1) is None
        assert h.node.peer_info(MALLORY.peer_id) is None


# Kaspa

IN_MESSAGES = {
    "random": JUNK,
    "TLS": bytes.fromhex("1603010200010001fc0303"),
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\n",
    "no Version": encode(Hello()) + message_frame(Kind.MESSAGE, b"\x9a\x01\x00"),
    "a truncated Version": encode(Hello()) + message_frame(Kind.MESSAGE, b"\xa2\x01\x7fshort"),
    "no hello": message_frame(Kind.MESSAGE, b"\xa2\x01\x00"),
}
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
IN_HTTP2 = {
    "random": JUNK,
    "HTTP/1": b"GET / HTTP/1.1\r\n\r\n",
    "a frame of 16 MiB": PREFACE + bytes.fromhex("000000040000000000ffffff0000000000000000"),
    "no settings": PREFACE + bytes.fromhex("000008060000000000") + bytes(8),
}


@pytest.mark.parametrize(
    ("dialect", "said"),
    [
        *(pytest.param(Dialect.MESSAGES, data, id=f"messages {name}") for name, data in IN_MESSAGES.items()),
        *(pytest.param(Dialect.HTTP2, data, id=f"http2 {name}") for name, data in IN_HTTP2.items()),
    ],
)
async def test_instead_of_kaspa(dialect: Dialect, said: bytes, autojump_clock: MockClock) -> None:
    async with besieged() as h:
        stranger = await h.connected()
        before = len(h.kaspad.opened)
        stream = await stranger.open_stream(dialect)
        await _say_on(stream, said)
        await trio.sleep(1.0)
        (ended,) = [event for _, event in h.of(KaspaPeerEnded) if not event.joined]
        assert ended.reason == End.PEER_BROKE
        assert ended.text
        layer = "messages" if dialect is Dialect.MESSAGES else "http2"
        assert h.count("peer-misbehaved", layer) == 1
        assert len(h.kaspad.opened) == before, "kaspad saw nothing of it"
        well = await stranger.open_stream(ECHO)
        await well.send_all(b"still here")
        assert await well.receive_some() == b"still here"


async def _say_on(stream: YamuxStream, said: bytes) -> None:
    with suppress(StreamReset):  # it had heard enough
        await stream.send_all(said)


async def _read_all(stream: YamuxStream) -> None:
    while await stream.receive_some():
        pass


# The wrong peer


async def test_another_peer_than_the_one_we_want(autojump_clock: MockClock) -> None:
    async with besieged() as h:
        host = h.internet.host("12.0.0.5")
        (listener,) = await host.listen([addresses.parse("/ip4/12.0.0.5/tcp/1")])
        wanted, other = h.stranger(), h.stranger()

        async def pretend() -> None:
            raw = await listener.accept()
            with suppress(trio.BrokenResourceError, EOFError):  # it was found out
                await Foreign(raw, identity=other).shake()

        h.nursery.start_soon(pretend)
        with pytest.raises(DialError) as caught:
            await h.node.connect(f"/ip4/12.0.0.5/tcp/1/p2p/{wanted.peer_id}", ECHO)
        (failure,) = caught.value.failures
        assert isinstance(failure.error, PeerIdMismatch)
        assert other.peer_id in str(failure)
        await trio.sleep(PATIENCE)
        ((_, event),) = h.of(AddressFailed)
        assert (event.peer, event.stage) == (wanted.peer_id, Stage.NOISE)
        assert h.count("address-failed", Stage.NOISE) == 1
        assert set(h.node.status().in_use.values()) == {0}


async def test_who_answers_our_proposal_with_garbage(autojump_clock: MockClock) -> None:
    async with besieged() as h:
        seen: list[YamuxStream] = []
        stranger = await h.connected(seen.append)
        (back,) = h.node.connections
        stream = await back.open_stream(ECHO)
        await trio.sleep(PATIENCE)
        await _say_on(seen[-1], JUNK[:100])
        with pytest.raises(NegotiationError, match="does not speak multistream"):
            await stream.receive_some()
        well = await stranger.open_stream(ECHO)
        await well.send_all(b"still here")
        assert await well.receive_some() == b"still here"
