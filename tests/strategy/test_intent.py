"""Upgrade intent: what goes over the wire, and what a hostile peer tries with it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from kas_libp2p.autonat._observed import Mapping
from kas_libp2p.autonat._roles import Filtering
from kas_libp2p.errors import NegotiationError, RemoteProtocolError, StreamReset
from kas_libp2p.events import Event, EventBus, LimitHit, PeerMisbehaved
from kas_libp2p.framing import FrameDecoder, frame
from kas_libp2p.identity import Identity
from kas_libp2p.metadata import Path, PathKind
from kas_libp2p.pb import upgrade_pb2 as pb
from kas_libp2p.strategy._intent import (
    MAX_MESSAGE,
    MAX_REASON,
    MAX_WAIT,
    PROTOCOL,
    Answer,
    Intent,
    decode,
    encode,
)
from kas_libp2p.strategy._nat import MAX_SIGHTINGS, Nat, NatFacts, Ports, Sighting, Unsolicited
from kas_libp2p.strategy.intent import PEER_BURST, PEER_INTERVAL, TIMEOUT, Intents
from kas_libp2p.transport.connection import Connection
from kas_libp2p.transport.framed import receive_frame
from kas_libp2p.transport.yamux.stream import YamuxStream
from tests.transport.pairs import ALICE, ECHO, Pair, connected

FULL = Nat(
    Mapping.DEPENDENT,
    Ports.SEQUENTIAL,
    Filtering.PORT,
    Unsolicited.REFUSED,
    lifetime=90.0,
    sightings=tuple(Sighting(float(MAX_SIGHTINGS - n), 65535 - MAX_SIGHTINGS + n) for n in range(MAX_SIGHTINGS)),
)
LONGEST = Intent(Answer.LATER, "r" * MAX_REASON, MAX_WAIT, NatFacts(FULL, FULL), True, True, True)
YES = Intent(Answer.YES, nat=NatFacts(Nat(Mapping.NONE)))
CAROL = Identity.from_seed(bytes([7]) * 32).peer_id
RELAYED = Path(PathKind.RELAYED, ALICE.peer_id)


def unframed(data: bytes) -> bytes:
    decoder = FrameDecoder(MAX_MESSAGE)
    decoder.feed(data)
    message = decoder.next_frame()
    assert message is not None
    assert not decoder.pending
    return message


@pytest.mark.parametrize("intent", [Intent(Answer.YES), Intent(Answer.NO, "disabled"), YES, LONGEST])
def test_what_is_told_is_heard(intent: Intent) -> None:
    assert decode(unframed(encode(intent))) == intent


def test_a_full_one_fits() -> None:
    assert len(encode(LONGEST)) < MAX_MESSAGE / 2


@given(
    st.builds(
        Nat,
        st.sampled_from(Mapping),
        st.sampled_from(Ports),
        st.sampled_from(Filtering),
        st.sampled_from(Unsolicited),
        st.none() | st.integers(1, 86400).map(float),
    )
)
def test_every_nat_is_told_as_it_is(nat: Nat) -> None:
    assert decode(unframed(encode(Intent(Answer.YES, nat=NatFacts(v6=nat))))).nat == NatFacts(v6=nat)


@given(st.binary(max_size=300))
def test_whatever_comes_is_an_intent_or_refused(data: bytes) -> None:
    try:
        intent = decode(data)
    except RemoteProtocolError:
        return
    encode(intent)


@given(st.integers(0, 2**32 - 1), st.lists(st.integers(0, 2**32 - 1), max_size=40), st.text(max_size=200))
def test_what_a_peer_claims_is_believed_up_to_caps(number: int, ports: list[int], reason: str) -> None:
    nat = pb.Nat(lifetime_s=number, sightings=[pb.Nat.Sighting(age_ms=number, port=each) for each in ports])
    intent = decode(pb.Intent(answer=pb.Intent.NO, wait_s=number, reason=reason, v4=nat).SerializeToString())
    assert intent.wait <= MAX_WAIT
    assert len(intent.reason) <= MAX_REASON
    assert intent.reason.isprintable()
    assert intent.nat.v4 is not None
    assert len(intent.nat.v4.sightings) <= MAX_SIGHTINGS
    assert all(each.port <= 65535 for each in intent.nat.v4.sightings)


@pytest.mark.parametrize("data", [b"", b"\x08\x00", b"\x08\x09", b"\xff\xff", b"\x12\x02hi"])
def test_an_intent_without_an_answer_is_none(data: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        decode(data)


def test_numbers_that_we_do_not_know_are_unknown() -> None:
    raw = b"\x08\x01\x2a\x08" + b"\x08\x63\x10\x63\x18\x63\x20\x63"  # answer yes; v4 of kinds 99
    assert decode(raw).nat == NatFacts(Nat())


# On streams


class Told(EventBus):
    def __init__(self) -> None:
        super().__init__(lambda: 0.0)
        self.all: list[Event] = []

    def emit(self, event: Event) -> None:
        self.all.append(event)


class Ends:
    """Bob was called by alice through a relay: he invites, she answers."""

    def __init__(self, ends: Pair) -> None:
        self.pair = ends
        self.alice_bus, self.bob_bus = Told(), Told()
        self.heard: list[Intent] = []
        self.answer = YES
        self.alice = Intents(self.alice_bus, answer=self._answer)
        self.bob = Intents(self.bob_bus, answer=self._answer)
        for each in (ends.alice, ends.bob):
            each.path = RELAYED

    def _answer(self, connection: Connection, theirs: Intent) -> Intent:
        self.heard.append(theirs)
        return self.answer

    async def serve(self, handle: Callable[[YamuxStream], Awaitable[None]] | None = None) -> None:
        stream = await self.pair.accept(self.pair.alice, PROTOCOL)
        try:
            await (handle or self.alice.handle)(stream)
        except RemoteProtocolError:
            stream.reset()  # as the swarm does
            raise
        if not stream.over:
            await stream.aclose()

    async def offer_nothing_of_that(self, stream: YamuxStream) -> None:
        with suppress(NegotiationError, StreamReset):
            await self.pair.alice.accept(stream, [ECHO])


@asynccontextmanager
async def ends() -> AsyncIterator[Ends]:
    async with connected(delay=0.01) as both:
        yield Ends(both)


async def test_one_round_trip_tells_both_sides(autojump_clock: trio.abc.Clock) -> None:
    async with ends() as both:
        stream = await both.bob.open(both.pair.bob, LONGEST)
        await both.serve()
        assert await both.bob.wait(stream) == YES
        assert both.heard == [LONGEST]
        await trio.sleep(0.1)
        assert not both.pair.bob.streams
        assert not both.pair.alice.streams


async def test_a_peer_of_another_kind_tells_nothing_and_costs_nothing(autojump_clock: trio.abc.Clock) -> None:
    async with ends() as both:
        stream = await both.bob.open(both.pair.bob, YES)
        inbound = await both.pair.inbound(both.pair.alice)
        both.pair.nursery.start_soon(both.offer_nothing_of_that, inbound)
        assert await both.bob.wait(stream) is None
        assert both.bob_bus.all == []


async def test_one_that_is_silent_is_given_up(autojump_clock: trio.testing.MockClock) -> None:
    async with ends() as both:
        stream = await both.bob.open(both.pair.bob, YES)
        started = trio.current_time()
        assert await both.bob.wait(stream) is None
        assert trio.current_time() - started == pytest.approx(TIMEOUT, abs=0.1)
        assert both.bob_bus.all == []


@pytest.mark.parametrize(
    "answer", [frame(b""), frame(b"\xff\xff"), b"\xff" * 12, frame(b"x" * (MAX_MESSAGE + 1)), b"\x09abc"]
)
async def test_garbage_for_an_answer_is_told_and_counts_as_none(autojump_clock: trio.abc.Clock, answer: bytes) -> None:
    async with ends() as both:
        stream = await both.bob.open(both.pair.bob, YES)

        async def wicked(stream: YamuxStream) -> None:
            await receive_frame(stream, MAX_MESSAGE)
            await stream.send_all(answer)

        await both.serve(wicked)
        assert await both.bob.wait(stream) is None
        (event,) = both.bob_bus.all
        assert isinstance(event, PeerMisbehaved)
        assert event.layer == PROTOCOL
        assert both.pair.bob.close_reason is None  # a witness: the connection goes on
        mine, theirs = await both.pair.streams()
        await mine.send_all(b"hello")
        assert await theirs.receive_some() == b"hello"


@pytest.mark.parametrize("sent", [frame(b""), frame(b"\xff\xff"), b"\xff" * 12, frame(b"x" * (MAX_MESSAGE + 1))])
async def test_garbage_for_an_intent_ends_at_its_stream(autojump_clock: trio.abc.Clock, sent: bytes) -> None:
    async with ends() as both:
        stream = await both.pair.bob.open_stream(PROTOCOL)
        await stream.send_all(sent)
        with pytest.raises(RemoteProtocolError):
            await both.serve()
        assert both.heard == []


async def test_an_intent_that_never_comes_holds_a_stream_for_seconds_only(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with ends() as both:
        await both.pair.bob.open_stream(PROTOCOL)
        started = trio.current_time()
        with pytest.raises(RemoteProtocolError, match="did not come within"):
            await both.serve()
        assert trio.current_time() - started == pytest.approx(TIMEOUT, abs=0.1)


async def test_silent_ones_and_floods_keep_nobody_else_waiting(autojump_clock: trio.testing.MockClock) -> None:
    """Mallory stalls in one intent and sends garbage in others; a witness is told in one round trip all the same."""
    async with ends() as wicked, ends() as witness:
        witness.alice = wicked.alice  # one service of hers for both peers
        witness.pair.alice.peer = CAROL
        await wicked.pair.bob.open_stream(PROTOCOL)
        wicked.pair.nursery.start_soon(_suppressed, wicked.serve)
        for _ in range(PEER_BURST + 5):
            stream = await wicked.pair.bob.open_stream(PROTOCOL)
            await stream.send_all(frame(b"\xff\xff"))
            wicked.pair.nursery.start_soon(_suppressed, wicked.serve)
        started = trio.current_time()
        stream = await witness.bob.open(witness.pair.bob, YES)
        await witness.serve()
        assert await witness.bob.wait(stream) == YES
        assert trio.current_time() - started == pytest.approx(0.02, abs=0.005)
        await trio.sleep(TIMEOUT + 1)
        assert not wicked.pair.alice.streams


async def _suppressed(serve: Callable[[], Awaitable[None]]) -> None:
    with suppress(RemoteProtocolError, StreamReset):
        await serve()


async def test_only_on_a_circuit_and_only_from_who_was_called(autojump_clock: trio.abc.Clock) -> None:
    async with ends() as both:
        stream = await both.pair.alice.open_stream(PROTOCOL)
        await stream.send_all(encode(YES))
        inbound = await both.pair.accept(both.pair.bob, PROTOCOL)
        with pytest.raises(RemoteProtocolError, match="side that made the circuit"):
            await both.bob.handle(inbound)
        both.pair.alice.path = Path(PathKind.PUNCHED, ALICE.peer_id)
        await both.bob.open(both.pair.bob, YES)
        with pytest.raises(RemoteProtocolError, match="direct"):
            await both.serve()
        assert both.heard == []


async def test_a_peer_that_asks_again_and_again_is_refused_and_counted(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with ends() as both:

        async def ask() -> Intent | None:
            stream = await both.bob.open(both.pair.bob, YES)
            await both.serve()
            return await both.bob.wait(stream)

        for _ in range(PEER_BURST):
            assert await ask() == YES
        assert await ask() is None
        (event,) = both.alice_bus.all
        assert isinstance(event, LimitHit)
        assert event.reason == "upgrade_intents"
        await trio.sleep(PEER_INTERVAL)
        assert await ask() == YES


async def test_the_answer_can_be_lost_without_harm(autojump_clock: trio.abc.Clock) -> None:
    async with ends() as both:
        stream = await both.bob.open(both.pair.bob, YES)

        async def cut(stream: YamuxStream) -> None:
            stream.reset()

        await both.serve(cut)
        assert await both.bob.wait(stream) is None
        with pytest.raises(StreamReset):
            await stream.receive_some()
        assert both.bob_bus.all == []
