"""What peers tell one another of relays: messages, whom to ask and when, whom to answer."""

from __future__ import annotations

import itertools
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kas_libp2p.config import MAX_OPERATOR
from kas_libp2p.errors import RemoteProtocolError
from kas_libp2p.framing import FrameDecoder, encode_varint, frame
from kas_libp2p.metadata import PeerId
from kas_libp2p.pb import relays_pb2 as pb
from kas_libp2p.relay._exchange import (
    ALL_BURST,
    ASK_AGAIN,
    ASK_PAUSE,
    JITTER,
    MAX_MESSAGE,
    MAX_RELAYS,
    NETWORK_BURST,
    PEER_BURST,
    PEER_INTERVAL,
    Answer,
    Answering,
    Asking,
    answer_to,
    decode_answer,
    decode_request,
    encode_answer,
    encode_request,
    origin_of,
)
from kas_libp2p.relay._pool import Appetite, Told
from tests.relay.test_pool_simulation import peer

A, B, C = map(peer, range(3))


def unframed(data: bytes) -> bytes:
    decoder = FrameDecoder(MAX_MESSAGE)
    decoder.feed(data)
    message = decoder.next_frame()
    assert message is not None
    return message


def told(number: int, **more: object) -> Told:
    return Told(peer(number), (f"/ip4/20.{number % 250}.{number // 250}.1/tcp/16117",), **more)  # type: ignore[arg-type]


# Messages


def test_an_answer_is_read_as_it_was_written() -> None:
    six = Told(B, ("/ip4/20.1.0.1/tcp/16117", "/ip6/2a00::1/tcp/16117"), "Relays Ltd", 0, 3600.0)
    answer = Answer("mine.example", 200, (told(1), six))
    assert decode_answer(unframed(encode_answer(answer))) == answer
    assert decode_answer(unframed(encode_answer(Answer()))) == Answer()
    assert decode_request(unframed(encode_request(5))) == 5


def test_the_largest_answer_can_be_read() -> None:
    addresses = tuple(f"/ip6/2a00:1000:1000:1000:1000:1000:1000:{n}/tcp/16117" for n in (1000, 1001))
    relay = Told(A, addresses, "\U0001f4a1" * MAX_OPERATOR, 2**40, 1e12)
    answer = decode_answer(unframed(encode_answer(Answer("\U0001f4a1" * MAX_OPERATOR, 2**40, (relay,) * 100))))
    assert len(answer.relays) == MAX_RELAYS
    assert answer.relays[0].operator == answer.operator == "\U0001f4a1" * MAX_OPERATOR
    assert answer.free == 2**32 - 1


def test_what_is_no_relay_or_address_is_left_out() -> None:
    message = pb.Answer(
        operator=b"\xff\x00\x1b[31m" + b"x" * 1000,
        relays=[
            pb.Relay(id=b"no peer"),
            pb.Relay(),
            pb.Relay(id=b"\x12\x20" + bytes(32), addrs=[b"junk", b"\x04\x14\x01\x02\x03\x06\x3e\xf5", b"\x04\x14" * 9]),
        ],
    )
    answer = decode_answer(message.SerializeToString())
    assert answer.operator.isprintable()
    assert len(answer.operator) == MAX_OPERATOR
    (relay,) = answer.relays
    assert relay.addresses == ("/ip4/20.1.2.3/tcp/16117",)
    assert (relay.free, answer.free) == (None, None)


def test_an_answer_of_10_000_relays_is_not_read() -> None:
    liar = pb.Answer(relays=[pb.Relay(id=b"\x12\x20" + bytes(32))] * 10_000)
    with pytest.raises(RemoteProtocolError):
        unframed(frame(liar.SerializeToString()))
    few = pb.Answer(relays=[pb.Relay(id=b"\x12\x20" + bytes(32))] * 200)
    assert len(decode_answer(few.SerializeToString()).relays) == MAX_RELAYS


def test_a_request_for_everything_is_one_for_what_fits() -> None:
    assert decode_request(unframed(encode_request(2**32 - 1))) == MAX_RELAYS
    assert decode_request(b"") == 0


@given(st.binary(max_size=400))
def test_garbage_raises_nothing_else(data: bytes) -> None:
    for decode in (decode_request, decode_answer):
        try:
            decode(data)
        except RemoteProtocolError:
            continue
    for junk in (encode_varint(2**40), frame(bytes(MAX_MESSAGE + 1))):
        with pytest.raises(RemoteProtocolError):
            unframed(junk + data)


# Asking


def asking() -> Asking:
    return Asking(Random(0))


def test_whoever_connects_is_asked_soon_and_once() -> None:
    machine = asking()
    machine.met(A, 0.0)
    assert machine.choose(Appetite.SOME, 0.0) is None
    assert 0.0 < machine.deadline <= JITTER
    now = machine.deadline
    machine.met(A, now)  # a push
    assert machine.choose(Appetite.SOME, now) == A
    machine.asked(A, now)
    assert machine.choose(Appetite.SOME, now + 10 * ASK_AGAIN) is None
    assert machine.deadline == float("inf")


def test_nobody_is_asked_while_nothing_is_wanted() -> None:
    machine = asking()
    machine.met(A, 0.0)
    assert machine.choose(Appetite.NONE, JITTER) is None
    assert machine.deadline == float("inf")
    assert machine.choose(Appetite.HUNGRY, JITTER) == A


def test_who_was_asked_is_asked_again_only_for_want_and_not_too_soon() -> None:
    machine = asking()
    machine.met(A, 0.0)
    machine.met(B, 0.0)
    asked: list[tuple[float, PeerId]] = []
    now = 0.0
    while now < 3600:
        chosen = machine.choose(Appetite.HUNGRY, now)
        if chosen is None:
            assert machine.deadline > now
            now = machine.deadline
        else:
            asked.append((now, chosen))
            machine.asked(chosen, now)
    for each in (A, B):
        times = [at for at, who in asked if who == each]
        assert 3600 / (1.2 * ASK_AGAIN) <= len(times) <= 3600 / ASK_AGAIN + 1
        assert min(after - before for before, after in itertools.pairwise(times)) >= ASK_AGAIN
    times = [at for at, _ in asked]
    assert min(after - before for before, after in itertools.pairwise(times)) >= ASK_PAUSE


def test_who_comes_back_is_not_asked_sooner() -> None:
    machine = asking()
    now = 0.0
    times = []
    while now < 3600:
        machine.met(A, now)
        now += JITTER
        if machine.choose(Appetite.HUNGRY, now) == A:
            machine.asked(A, now)
            times.append(now)
        machine.gone(A, now)
        now += 2
        assert machine.choose(Appetite.HUNGRY, now) is None  # it is not there
    assert min(after - before for before, after in itertools.pairwise(times)) >= ASK_AGAIN


def test_a_visit_asks_out_of_turn_but_no_more_often() -> None:
    machine = asking()
    assert machine.may_ask(A, 0.0)
    machine.asked(A, 0.0)
    assert not machine.may_ask(A, ASK_AGAIN - 1)
    machine.met(A, 1.0)
    assert not machine.may_ask(A, ASK_AGAIN - 1)
    assert machine.may_ask(A, 1.2 * ASK_AGAIN)


def test_who_came_and_went_is_forgotten() -> None:
    machine = asking()
    for number in range(2000):
        machine.met(peer(number), float(number))
        machine.asked(peer(number), float(number))
        machine.gone(peer(number), float(number))
    assert len(machine._peers) <= 1.2 * ASK_AGAIN + 1
    machine.gone(A, 2000 + 2 * ASK_AGAIN)
    assert not machine._peers


# Answering


def test_a_flood_by_one_peer_ends_at_its_rate() -> None:
    machine = Answering()
    answers = [machine.admit(A, "net", 0.0) for _ in range(1000)]
    assert answers.count(None) == PEER_BURST
    assert answers[-1] == "relays_per_peer"
    assert machine.admit(B, "net", 0.0) is None
    assert machine.admit(A, "net", PEER_INTERVAL) is None


def test_so_does_one_by_a_network_and_one_in_all() -> None:
    machine = Answering()
    answers = [machine.admit(peer(number), "net", 0.0) for number in range(1000)]
    assert answers.count(None) == NETWORK_BURST
    assert answers[-1] == "relays_per_network"
    answers = [machine.admit(peer(number), f"net {number}", 0.0) for number in range(1000, 2000)]
    assert answers.count(None) == ALL_BURST - NETWORK_BURST
    assert answers[-1] == "relays_in_all"


def test_what_is_told() -> None:
    known = (told(0), told(1), told(2), Told(peer(3), ()), told(4))
    answer = answer_to(A, 2, known, operator="me", free=7)
    assert answer == Answer("me", 7, (told(1), told(2)))
    assert answer_to(B, 100, known, operator="", free=None).relays == (told(0), told(2), told(4))


def test_who_may_be_one_counts_as_one() -> None:
    assert origin_of(A, "/ip4/20.1.2.3/tcp/1", None) == origin_of(B, "/ip4/20.1.9.9/tcp/2", None)
    assert origin_of(A, "/ip4/20.1.2.3/tcp/1", None) != origin_of(A, "/ip4/20.2.2.3/tcp/1", None)
    circuit = f"/ip4/20.1.2.3/tcp/1/p2p/{C}/p2p-circuit"
    assert origin_of(A, circuit, C) == origin_of(B, circuit, C) != origin_of(B, circuit, A)
    assert origin_of(A, "/ip4/127.0.0.1/tcp/1", None) != origin_of(B, "/ip4/127.0.0.1/tcp/1", None)
