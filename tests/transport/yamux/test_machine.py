"""The rules of Yamux, one conversation each. `Talk` is the peer: it says frames and hears frames."""

import struct
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kas_libp2p.config import KIB, MIB, YamuxConfig
from kas_libp2p.errors import LocalProtocolError, Refused, RemoteProtocolError
from kas_libp2p.transport.yamux import _machine as yamux
from kas_libp2p.transport.yamux._machine import (
    BUSY_WINDOW,
    HEADER_SIZE,
    INITIAL_WINDOW,
    LINGER,
    MAX_FRAME,
    SHORT_LINGER,
    TURNS,
    GoAway,
    Machine,
)

DATA, UPDATE, PING, GO_AWAY = range(4)
SYN, ACK, FIN, RST = 1, 2, 4, 8
CONFIG = YamuxConfig()


def frame(kind, flags, id, length_or_payload):
    if isinstance(length_or_payload, int):
        return struct.pack(">BBHII", 0, kind, flags, id, length_or_payload)
    return struct.pack(">BBHII", 0, kind, flags, id, len(length_or_payload)) + length_or_payload


def frames(wire):
    """What was sent, as tuples of the arguments of `frame`."""
    found = []
    while wire:
        version, kind, flags, id, length = struct.unpack_from(">BBHII", wire)
        assert version == 0
        wire = wire[12:]
        if kind == DATA:
            found.append((kind, flags, id, wire[:length]))
            assert len(found[-1][3]) == length
            wire = wire[length:]
        else:
            found.append((kind, flags, id, length))
    return found


class Talk:
    """A machine and its peer, who knows no rules."""

    def __init__(self, *, initiator=False, rtt=None, **config):
        self.now = 0.0
        self.machine = Machine(replace(CONFIG, **config), initiator=initiator, now=0.0, rtt=rtt)

    def say(self, *args):
        return self.say_bytes(frame(*args))

    def say_bytes(self, data):
        return self.machine.receive(memoryview(data), self.now)

    def opened(self, id=1):
        """A stream that the peer opens; its acknowledgement is heard."""
        (stream,) = self.say(UPDATE, SYN, id, 0).opened
        assert (UPDATE, ACK, id, 0) in self.hear()
        return stream

    def open(self):
        stream = self.machine.open(self.now)
        assert self.hear() == [(UPDATE, SYN, stream.id, 0)]
        return stream

    def hear(self, limit=MAX_FRAME):
        return frames(self.hear_bytes(limit))

    def hear_bytes(self, limit=MAX_FRAME):
        wire = b""
        while self.machine.pending:
            pieces, size = self.machine.take(limit)
            assert sum(map(len, pieces)) == size
            wire += b"".join(pieces)
        return wire

    def read(self, stream, most=1 << 40):
        """What the shell does to read."""
        got = b""
        while stream.chunks and len(got) < most:
            chunk = stream.chunks.popleft()[stream.offset :]
            stream.offset = 0
            if len(chunk) > most - len(got):
                keep = most - len(got)
                stream.chunks.appendleft(chunk[keep:])
                chunk = chunk[:keep]
            got += chunk
            stream.unread -= len(chunk)
            if stream.allowed + stream.unread <= stream.grant_at:
                self.machine.consumed(stream, self.now)
        return got

    def breaks_a_rule(self, message, *args):
        with pytest.raises(RemoteProtocolError, match=message):
            self.say(*args)
        assert (GO_AWAY, 0, 0, GoAway.PROTOCOL_ERROR) in self.hear()


# Opening


def test_the_initiator_has_odd_ids_and_the_responder_even_ones():
    initiator, responder = Talk(initiator=True), Talk()
    assert [initiator.open().id for _ in range(3)] == [1, 3, 5]
    assert [responder.open().id for _ in range(3)] == [2, 4, 6]


def test_a_stream_is_acknowledged_at_once():
    talk = Talk()
    batch = talk.say(UPDATE, SYN, 1, 0)
    assert [stream.id for stream in batch.opened] == [1]
    assert talk.hear() == [(UPDATE, ACK, 1, 0)]


def test_a_stream_may_be_opened_with_data():
    talk = Talk()
    batch = talk.say(DATA, SYN, 1, b"hello")
    (stream,) = batch.opened
    assert batch.changed == [stream]
    assert talk.read(stream) == b"hello"


def test_a_stream_may_be_opened_with_a_larger_window():
    talk = Talk()
    (stream,) = talk.say(UPDATE, SYN, 1, 1000).opened
    assert stream.send_window == INITIAL_WINDOW + 1000


def test_a_stream_may_be_opened_and_reset_in_one_frame():
    talk = Talk()
    batch = talk.say(UPDATE, SYN | RST, 1, 0x1001)
    assert batch.opened[0].reset == (True, 0x1001)
    assert not talk.machine.streams


@pytest.mark.parametrize(("initiator", "id"), [(False, 2), (True, 1), (False, 0), (True, 0)])
def test_an_id_of_the_wrong_parity(initiator, id):
    Talk(initiator=initiator).breaks_a_rule("not its to use", UPDATE, SYN, id, 0)


def test_an_id_is_used_once():
    talk = Talk()
    talk.opened(1)
    talk.breaks_a_rule("opened stream 1 twice", UPDATE, SYN, 1, 0)
    talk = Talk()
    talk.opened(1)
    talk.say(UPDATE, RST, 1, 0)
    talk.breaks_a_rule("opened stream 1 again", UPDATE, SYN, 1, 0)


def test_ids_may_arrive_out_of_order():
    talk = Talk()
    for id in (5, 1, 3, 9, 7):
        talk.opened(id)
    talk.breaks_a_rule("opened stream 5 twice", UPDATE, SYN, 5, 0)


def test_ids_may_be_skipped_without_costing_memory():
    talk = Talk()
    talk.opened(0x7FFF_FFFF)
    assert len(talk.machine._skipped) <= yamux.SKIPPED_IDS
    talk.opened(0x7FFF_FFFF - 2)
    talk.breaks_a_rule("again", UPDATE, SYN, 1, 0)


def test_more_streams_than_allowed_are_refused_and_counted():
    talk = Talk(max_inbound_streams=2)
    talk.opened(1)
    talk.opened(3)
    batch = talk.say(DATA, SYN, 5, b"too many")
    assert batch.opened == []
    assert batch.refused == ["yamux.max_inbound_streams"]
    assert talk.machine.hits == {"yamux.max_inbound_streams": 1}
    assert talk.hear() == [(UPDATE, RST, 5, 0x1002)]
    talk.say(DATA, FIN, 5, b"and what followed before the peer knew")
    talk.say(UPDATE, RST, 1, 0)
    talk.opened(7)


def test_our_own_streams_have_limits_too():
    talk = Talk(initiator=True, max_outbound_streams=2)
    talk.open()
    stream = talk.open()
    with pytest.raises(Refused) as caught:
        talk.machine.open(0)
    assert caught.value.limit == "yamux.max_outbound_streams"
    talk.machine.reset(stream)
    talk.machine.open(0)


def test_no_more_than_256_streams_stay_unacknowledged():
    talk = Talk(initiator=True, max_outbound_streams=1000, max_memory=1 << 30)
    streams = [talk.machine.open(0) for _ in range(256)]
    with pytest.raises(Refused, match="acknowledgements"):
        talk.machine.open(0)
    talk.say(UPDATE, ACK, streams[7].id, 0)
    talk.machine.open(0)
    talk.say(UPDATE, ACK, streams[7].id, 0)  # a second one counts for nothing
    with pytest.raises(Refused):
        talk.machine.open(0)
    talk.say(UPDATE, RST, streams[8].id, 0)
    talk.machine.open(0)


def test_memory_bounds_the_number_of_streams():
    talk = Talk(max_memory=2 * INITIAL_WINDOW)
    talk.opened(1)
    talk.open()
    assert talk.say(UPDATE, SYN, 3, 0).refused == ["yamux.max_memory"]
    with pytest.raises(Refused, match=r"yamux\.max_memory"):
        talk.machine.open(0)
    assert talk.machine.reserved == 2 * INITIAL_WINDOW


# Windows, receiving


def test_a_peer_may_send_exactly_the_window():
    talk = Talk()
    stream = talk.opened()
    talk.say(DATA, 0, 1, bytes(INITIAL_WINDOW))
    assert stream.unread == INITIAL_WINDOW
    talk.breaks_a_rule("only 0 were granted", DATA, 0, 1, b"x")


def test_one_byte_above_the_window_ends_the_connection_before_it_comes():
    talk = Talk()
    talk.opened()
    talk.breaks_a_rule("got 262145 bytes, but only 262144", DATA, 0, 1, INITIAL_WINDOW + 1)


def test_opening_with_more_than_the_window():
    Talk().breaks_a_rule("only 262144 are granted", DATA, SYN, 1, INITIAL_WINDOW + 1)


def test_half_a_window_is_granted_at_a_time():
    talk = Talk()
    stream = talk.opened()
    talk.say(DATA, 0, 1, bytes(INITIAL_WINDOW))
    talk.now = 1000.0
    talk.read(stream, INITIAL_WINDOW // 2 - 1)
    assert talk.hear() == []
    talk.read(stream, 1)
    assert talk.hear() == [(UPDATE, 0, 1, INITIAL_WINDOW // 2)]


def test_what_a_frame_has_announced_is_not_granted_again():
    talk = Talk()
    stream = talk.opened()
    wire = frame(DATA, 0, 1, bytes(INITIAL_WINDOW))
    talk.now = 1000.0
    talk.say_bytes(wire[:112])
    assert talk.read(stream) == bytes(100)
    assert talk.hear() == []
    talk.say_bytes(wire[112 : INITIAL_WINDOW // 2 + 12])
    talk.read(stream)
    assert talk.hear() == [(UPDATE, 0, 1, INITIAL_WINDOW // 2)]


def test_what_is_not_read_is_not_granted():
    talk = Talk()
    stream = talk.opened()
    talk.say(DATA, 0, 1, bytes(INITIAL_WINDOW))
    assert talk.hear() == []
    talk.now = 1e6
    assert talk.machine.on_timeout(1.0) is None
    assert stream.unread == INITIAL_WINDOW
    assert stream.reset is None


def test_who_does_not_read_stalls_only_itself():
    talk = Talk()
    lazy, busy = talk.opened(1), talk.opened(3)
    talk.say(DATA, 0, 1, bytes(INITIAL_WINDOW))
    for _ in range(100):
        talk.now += 10
        talk.say(DATA, 0, 3, bytes(INITIAL_WINDOW))
        assert len(talk.read(busy)) == INITIAL_WINDOW
        assert sum(f[3] for f in talk.hear()) == INITIAL_WINDOW
    assert lazy.unread == INITIAL_WINDOW


def test_a_frame_as_large_as_the_window_comes_in_pieces():
    talk = Talk(max_memory=64 * MIB)
    stream = talk.opened()
    stream.allowed = stream.window = 16 * MIB
    data = bytes(range(256)) * 60_000
    wire = frame(DATA, FIN, 1, data)
    got = b""
    for start in range(0, len(wire), 100_000):
        batch = talk.say_bytes(wire[start : start + 100_000])
        assert batch.changed[:1] == [stream]
        got += talk.read(stream)
        assert stream.eof == (start + 100_000 >= len(wire))
    assert got == data


def test_many_small_frames_make_one_piece():
    talk = Talk()
    stream = talk.opened()
    batch = talk.say_bytes(b"".join(frame(DATA, 0, 1, b"%04d" % number) for number in range(1000)))
    assert batch.changed == [stream]
    assert len(stream.chunks) == 1


def test_tiny_frames_do_not_cost_more_than_their_bytes():
    talk = Talk()
    stream = talk.opened()
    for _ in range(10_000):
        talk.say(DATA, 0, 1, b"x")
    assert len(stream.chunks) <= 10_000 // (yamux.SMALL // 2) + 1
    assert talk.read(stream) == b"x" * 10_000


def test_joining_small_pieces_leaves_alone_what_is_half_read():
    talk = Talk()
    stream = talk.opened()
    talk.say(DATA, 0, 1, b"abc")
    stream.offset = 1
    stream.unread = 2
    talk.say(DATA, 0, 1, b"def")
    assert talk.read(stream) == b"bcdef"


# Windows that grow


def run_at(talk, stream, rate, seconds, step=INITIAL_WINDOW // 4):
    """Data that comes as the window allows, at a rate in bytes per second, and is read at once."""
    until = talk.now + seconds
    while talk.now < until:
        size = min(step, stream.allowed)
        assert size > 0
        talk.now += size / rate
        talk.say(DATA, 0, stream.id, bytes(size))
        talk.read(stream)


def test_a_window_settles_at_a_few_times_rate_and_round_trip():
    talk = Talk(rtt=0.1)
    stream = talk.opened()
    run_at(talk, stream, 10e6, 5)  # 10 MB/s x 100 ms = 1 MB
    assert 1e6 < stream.window <= 4 * 1.05e6
    assert talk.machine.reserved == stream.window


def test_a_slow_stream_keeps_the_first_window():
    talk = Talk(rtt=0.1)
    stream = talk.opened()
    run_at(talk, stream, 0.5e6, 10)
    assert stream.window == INITIAL_WINDOW


def test_a_window_fills_no_queue_on_a_long_way():
    talk = Talk(rtt=0.02)
    stream = talk.opened()
    run_at(talk, stream, 5e6, 5)
    assert stream.window == INITIAL_WINDOW


def run_far(talk, stream, rate, rtt, seconds, step):
    """The same from a peer far away, which a grant reaches late: what it leads to comes a round trip after it.

    Returns:
        bytes per second in the last half of the time.
    """
    begun, until = talk.now, talk.now + seconds
    usable, granted, got = stream.allowed, [], 0
    while talk.now < until:
        while granted and (granted[0][0] <= talk.now or not usable):
            at, grant = granted.pop(0)
            talk.now, usable = max(talk.now, at), usable + grant
        size = min(step, usable)
        talk.now, usable = talk.now + size / rate, usable - size
        talk.say(DATA, 0, stream.id, bytes(size))
        talk.read(stream)
        got += size * (talk.now > begun + seconds / 2)
        granted += [(talk.now + rtt, f[3]) for f in talk.hear() if f[0] == UPDATE]
    return got / (seconds / 2)


@pytest.mark.parametrize("step", [4_000, INITIAL_WINDOW // 16, 65_500, 82_000, 100_000])
@pytest.mark.parametrize("rate", [0.8e6, 2e6, 3e6, 5e6, 20e6])
def test_a_peer_far_away_is_not_kept_waiting_for_grants(rate, step):
    """It used to be at rates at which sending half a window takes a while: its waiting made the stream look slow."""
    rtt = 0.14
    talk = Talk(rtt=rtt)
    stream = talk.opened()
    assert run_far(talk, stream, rate, rtt, 20, step) > 0.95 * rate
    assert stream.window <= max(2 * INITIAL_WINDOW, 4.2 * rate * rtt)


def test_a_burst_now_and_then_is_no_fast_stream():
    talk = Talk(rtt=0.001)
    stream = talk.opened()
    for _ in range(20):
        talk.now += 0.3
        for _ in range(2):  # a whole window at once
            talk.say(DATA, 0, 1, bytes(INITIAL_WINDOW // 2))
            talk.read(stream)
    assert stream.window == INITIAL_WINDOW


def test_windows_of_fast_streams_grow_alike_on_a_short_way():
    """Whether the data comes evenly, or in bursts as from a peer whose processor is busy with others meanwhile."""
    talk = Talk(rtt=0.0001)
    even, bursts = talk.opened(1), talk.opened(3)
    run_at(talk, even, 100e6, 1)
    for _ in range(50):
        size = bursts.allowed
        talk.now += size / 100e6
        talk.say(DATA, 0, 3, bytes(size))
        talk.read(bursts)
    assert even.window == bursts.window == BUSY_WINDOW


def test_a_window_grows_to_its_limit_and_no_further():
    talk = Talk(rtt=0.5, max_window=2 * MIB)
    stream = talk.opened()
    run_at(talk, stream, 1e9, 0.1)
    assert stream.window == 2 * MIB


def test_growth_is_granted_with_what_was_read():
    talk = Talk(rtt=1.0)
    stream = talk.opened()
    talk.now = 0.01
    talk.say(DATA, 0, 1, bytes(INITIAL_WINDOW // 2))
    talk.read(stream)
    assert (UPDATE, 0, 1, INITIAL_WINDOW // 2 + INITIAL_WINDOW) in talk.hear()


def test_the_shortest_of_the_last_round_trips_counts():
    talk = Talk(rtt=5.0)
    value = talk.machine.ping(0.0)
    talk.hear()
    talk.now = 0.02
    assert talk.say(PING, ACK, 0, value).pongs == [(value, 0.02)]
    stream = talk.opened()
    run_at(talk, stream, 10e6, 5)
    assert stream.window <= MIB


def test_growth_asks_for_a_round_trip():
    talk = Talk(rtt=0.1)
    stream = talk.opened()
    run_at(talk, stream, 10e6, 1)
    assert [f for f in talk.hear() if f[0] == PING] == [(PING, SYN, 0, 0)]


def test_half_of_the_memory_is_kept_for_new_streams():
    talk = Talk(rtt=1.0, max_memory=4 * MIB)
    first = talk.opened(1)
    run_at(talk, first, 1e9, 0.1)
    assert first.window - INITIAL_WINDOW <= 2 * MIB
    id = 3
    while talk.machine.reserved + INITIAL_WINDOW <= 4 * MIB:
        talk.opened(id)
        id += 2
    assert id > 10
    assert talk.say(UPDATE, SYN, id, 0).refused == ["yamux.max_memory"]


def test_who_has_more_than_a_share_gives_back_when_others_want_to_grow():
    talk = Talk(rtt=1.0, max_memory=4 * MIB)
    first, second = talk.opened(1), talk.opened(3)
    run_at(talk, first, 1e9, 0.1)
    large = first.window
    assert large == 2 * MIB
    for _ in range(50):
        run_at(talk, first, 1e9, 0.01)
        run_at(talk, second, 1e9, 0.01)
        assert talk.machine.reserved <= 4 * MIB
        assert first.allowed + first.unread <= first.window
    share = INITIAL_WINDOW + 2 * MIB // 2
    assert first.window == share
    assert share // 2 < second.window <= share


def test_memory_comes_back():
    talk = Talk(rtt=1.0)
    stream = talk.opened()
    run_at(talk, stream, 1e9, 0.1)
    assert talk.machine.reserved > MIB
    talk.say(DATA, 0, 1, b"unread")
    talk.say(UPDATE, FIN, 1, 0)
    assert talk.machine.reserved == 6
    talk.machine.finish(stream)
    talk.hear()
    assert not talk.machine.streams
    assert talk.read(stream) == b"unread"
    assert talk.machine.reserved == 0
    assert talk.machine._grown == 0


# Windows, sending


def test_we_send_no_more_than_was_granted():
    talk = Talk(initiator=True)
    stream = talk.open()
    talk.machine.write(stream, bytes(INITIAL_WINDOW + 100))
    assert sum(len(f[3]) for f in talk.hear()) == INITIAL_WINDOW
    assert stream.queued == 100
    assert not talk.machine.pending
    assert talk.machine.sendable()
    talk.say(UPDATE, 0, 1, 30)
    assert talk.hear() == [(DATA, 0, 1, bytes(30))]
    talk.say(UPDATE, ACK, 1, 1000)
    assert talk.hear() == [(DATA, 0, 1, bytes(70))]
    assert not talk.machine.sendable()


def test_an_end_waits_for_what_is_queued():
    talk = Talk(initiator=True)
    stream = talk.open()
    talk.machine.write(stream, bytes(INITIAL_WINDOW + 1))
    talk.machine.finish(stream)
    assert talk.hear()[-1][1] == 0
    talk.say(UPDATE, 0, 1, 1)
    assert talk.hear() == [(DATA, 0, 1, b"\0"), (DATA, FIN, 1, b"")]
    talk.say(UPDATE, 0, 1, 1)
    assert talk.hear() == []


def test_small_writes_leave_in_one_frame():
    talk = Talk(initiator=True)
    stream = talk.open()
    for number in range(100):
        talk.machine.write(stream, b"%02d" % number)
    ((kind, _, _, data),) = talk.hear()
    assert kind == DATA
    assert data == b"".join(b"%02d" % number for number in range(100))


def test_a_large_write_leaves_in_frames_that_others_accept():
    talk = Talk(initiator=True)
    stream = talk.open()
    talk.say(UPDATE, ACK, 1, 16 * MIB)
    data = bytes(range(256)) * 12_000
    talk.machine.write(stream, data)
    heard = talk.hear(16 * MIB)
    assert b"".join(f[3] for f in heard) == data
    assert max(len(f[3]) for f in heard) <= MAX_FRAME <= MIB


def test_credit_beyond_all_measure():
    talk = Talk(initiator=True)
    talk.open()
    talk.say(UPDATE, ACK, 1, 0xFFFF_FFFF - INITIAL_WINDOW)
    talk.breaks_a_rule("was granted more than", UPDATE, 0, 1, 1)


def test_writers_hear_when_their_queue_is_low():
    talk = Talk(initiator=True, send_high_water=1000)
    stream = talk.open()
    talk.machine.write(stream, bytes(999))
    talk.hear()
    assert talk.machine.drained == []
    talk.machine.write(stream, bytes(1500))
    talk.machine.take(400)
    assert stream.queued == 1112  # the header counts
    assert talk.machine.drained == []
    talk.machine.take(400)
    assert talk.machine.drained == [stream]


# Turns


def test_streams_send_by_turns():
    talk = Talk(initiator=True)
    streams = [talk.open() for _ in range(3)]
    for stream in streams:
        talk.machine.write(stream, bytes(100 * KIB))
    limit = TURNS * 16 * KIB
    sizes = [(id, HEADER_SIZE + len(data)) for _, _, id, data in talk.hear(limit)]
    assert [id for id, _ in sizes[: 2 * TURNS]] == [1, 3, 5, 1, 3, 5, 1, 3, 5, 1]
    assert {size for _, size in sizes[: 2 * TURNS]} == {16 * KIB}


def test_a_turn_is_small_where_little_is_taken_at_once():
    talk = Talk(initiator=True)
    for stream in (talk.open(), talk.open()):
        talk.machine.write(stream, bytes(100 * KIB))
    _, size = talk.machine.take(TURNS * KIB)
    assert size == TURNS * KIB


def test_a_stream_that_had_nothing_to_send_goes_first():
    talk = Talk(initiator=True)
    bulk = [talk.open() for _ in range(4)]
    small = talk.open()
    for stream in bulk:
        talk.machine.write(stream, bytes(200 * KIB))
    talk.machine.take(64 * KIB)
    talk.machine.write(small, b"small")
    pieces, _ = talk.machine.take(64 * KIB)
    assert frames(b"".join(pieces))[0] == (DATA, 0, small.id, b"small")


def test_a_crowd_of_small_streams_does_not_starve_the_large_one():
    talk = Talk(initiator=True)
    bulk = talk.open()
    others = [talk.open() for _ in range(3)]
    talk.machine.write(bulk, bytes(100 * KIB))
    talk.machine.take(10 * KIB)
    sent = 0
    for _ in range(10):
        for other in others:
            talk.machine.write(other, bytes(10))
        pieces, _ = talk.machine.take(10 * KIB)
        sent += sum(len(f[3]) for f in frames(b"".join(pieces)) if f[2] == bulk.id)
    assert sent > 80 * KIB


def test_answers_go_before_data():
    talk = Talk(initiator=True)
    stream = talk.open()
    talk.machine.write(stream, b"data")
    talk.say(PING, SYN, 0, 7)
    assert talk.hear() == [(PING, ACK, 0, 7), (DATA, 0, 1, b"data")]


# Ends


def test_each_direction_ends_by_itself():
    talk = Talk()
    stream = talk.opened()
    assert talk.say(UPDATE, FIN, 1, 0).changed == [stream]
    assert stream.eof
    talk.machine.write(stream, b"still")
    talk.machine.finish(stream)
    assert 1 in talk.machine.streams
    assert talk.hear() == [(DATA, 0, 1, b"still"), (DATA, FIN, 1, b"")]
    assert 1 not in talk.machine.streams
    assert talk.machine.reserved == 0


def test_the_end_may_come_with_data():
    talk = Talk()
    stream = talk.opened()
    talk.say(DATA, FIN, 1, b"last")
    assert talk.read(stream) == b"last"
    assert stream.eof


def test_data_behind_the_end():
    talk = Talk()
    talk.opened()
    talk.say(DATA, FIN, 1, b"last")
    talk.breaks_a_rule("only 0 were granted", DATA, 0, 1, b"one more")


def test_a_second_end_changes_nothing():
    talk = Talk()
    talk.opened()
    talk.say(DATA, FIN, 1, b"")
    assert talk.say(UPDATE, FIN, 1, 0).changed == []


def test_a_reset_of_the_peer_carries_a_code_and_no_credit():
    talk = Talk()
    stream = talk.opened()
    talk.say(DATA, 0, 1, b"unread")
    talk.machine.write(stream, b"unsent")
    batch = talk.say(UPDATE, RST, 1, 0x1003)
    assert batch.changed == [stream]
    assert stream.reset == (True, 0x1003)
    assert stream.unread == 0
    assert stream.send_window == INITIAL_WINDOW
    assert talk.hear() == []
    assert talk.machine.reserved == 0


def test_our_reset_says_the_code_and_drops_what_is_queued():
    talk = Talk()
    stream = talk.opened()
    talk.machine.write(stream, b"unsent")
    talk.machine.reset(stream, 0x1001)
    assert talk.hear() == [(UPDATE, RST, 1, 0x1001)]
    talk.machine.reset(stream, 7)
    assert talk.hear() == []
    assert stream.reset == (False, 0x1001)


def test_a_reset_in_the_middle_of_a_frame():
    talk = Talk()
    stream = talk.opened()
    talk.say_bytes(frame(DATA, FIN, 1, bytes(1000))[:500])
    talk.machine.reset(stream)
    assert talk.hear() == [(UPDATE, RST, 1, 0)]
    batch = talk.say_bytes(bytes(512))
    assert batch.changed == []
    talk.opened(3)


def test_data_for_a_stream_that_was_reset_is_dropped_up_to_its_window():
    talk = Talk()
    stream = talk.opened()
    talk.say(DATA, 0, 1, bytes(1000))
    talk.machine.reset(stream)
    talk.say(DATA, 0, 1, bytes(INITIAL_WINDOW - 1001))
    talk.say(DATA, FIN, 1, b"x")
    talk.breaks_a_rule("closed streams got more", DATA, 0, 1, b"x")


def test_data_for_a_stream_that_never_was():
    Talk().breaks_a_rule("never opened", DATA, 0, 1, b"x")
    Talk().breaks_a_rule("never opened", DATA, 0, 2, b"x")
    Talk().breaks_a_rule("never opened", UPDATE, 0, 77, 1)
    talk = Talk()
    talk.opened(5)
    talk.breaks_a_rule("never opened", DATA, 0, 3, b"x")


def test_a_late_window_update_is_ignored():
    talk = Talk()
    stream = talk.opened()
    talk.machine.reset(stream)
    talk.hear()
    for _ in range(10_000):
        talk.say(UPDATE, 0, 1, 1000)
    assert talk.hear() == []


def test_a_closed_stream_takes_a_little_more_then_resets():
    talk = Talk()
    stream = talk.opened()
    talk.machine.write(stream, b"bye")
    talk.machine.close(stream, talk.now)
    assert talk.hear() == [(DATA, 0, 1, b"bye"), (DATA, FIN, 1, b"")]
    talk.say(DATA, 0, 1, bytes(INITIAL_WINDOW // 2 - 1))
    assert stream.unread == 0
    assert talk.hear() == []
    talk.say(DATA, FIN, 1, b"x")
    assert talk.hear() == [(UPDATE, RST, 1, 0)]
    assert not talk.machine.streams


def test_a_closed_stream_is_gone_when_the_peer_closes_too():
    talk = Talk()
    stream = talk.opened()
    talk.say(DATA, 0, 1, b"unread")
    talk.machine.close(stream, talk.now)
    talk.hear()
    talk.say(UPDATE, FIN, 1, 0)
    assert not talk.machine.streams
    assert talk.machine.reserved == 0
    assert talk.machine.next_deadline() == CONFIG.keepalive


def test_a_closed_stream_whose_peer_never_closes_is_reset_in_the_end():
    talk = Talk()
    stream = talk.opened()
    talk.machine.close(stream, 5.0)
    talk.hear()
    talk.now = 20.0
    talk.say(PING, ACK, 0, 99)
    assert talk.machine.next_deadline() == 5.0 + LINGER
    assert talk.machine.on_timeout(5.0 + LINGER) is None
    assert (UPDATE, RST, 1, 0) in talk.hear()
    assert not talk.machine.streams


def test_a_closed_stream_whose_peer_waits_for_us_to_read_is_reset_soon():
    talk = Talk()
    stream = talk.opened()
    talk.say(DATA, 0, 1, bytes(INITIAL_WINDOW))
    talk.machine.close(stream, 5.0)
    assert talk.machine.next_deadline() == 5.0 + SHORT_LINGER
    talk.machine.on_timeout(5.0 + SHORT_LINGER)
    assert (UPDATE, RST, 1, 0) in talk.hear()


def test_closing_twice_or_after_the_end():
    talk = Talk()
    stream = talk.opened()
    talk.say(DATA, FIN, 1, b"x")
    talk.machine.close(stream, 0.0)
    talk.machine.close(stream, 0.0)
    assert talk.hear() == [(DATA, FIN, 1, b"")]
    talk.machine.close(stream, 0.0)
    talk.machine.reset(stream)
    assert talk.hear() == []
    assert talk.machine.reserved == 0


# Ping and go away


def test_pings_are_answered():
    talk = Talk()
    talk.say(PING, SYN, 0, 0xDEADBEEF)
    assert talk.hear() == [(PING, ACK, 0, 0xDEADBEEF)]


def test_a_ping_measures_the_round_trip():
    talk = Talk()
    value = talk.machine.ping(0.0)
    assert talk.hear() == [(PING, SYN, 0, value)]
    talk.now = 0.25
    assert talk.say(PING, ACK, 0, value).pongs == [(value, 0.25)]
    assert talk.machine.rtt == 0.25
    assert talk.say(PING, ACK, 0, value).pongs == []
    assert talk.say(PING, ACK, 0, 12345).pongs == []


def test_silence_brings_a_ping_and_a_ping_without_answer_the_end():
    talk = Talk()
    assert talk.machine.next_deadline() == 30.0
    assert talk.machine.on_timeout(30.0) is None
    assert talk.hear() == [(PING, SYN, 0, 0)]
    assert talk.machine.next_deadline() == 40.0
    reason = talk.machine.on_timeout(40.0)
    assert reason is not None
    assert "unanswered for 10 s" in reason


def test_who_is_heard_is_alive():
    talk = Talk()
    talk.machine.ping(0.0)
    talk.now = 9.0
    talk.say(PING, SYN, 0, 1)
    assert talk.machine.on_timeout(10.0) is None
    assert talk.machine.next_deadline() == 19.0
    assert talk.machine.on_timeout(19.0) is not None


def test_go_away_stops_new_streams_and_no_old_ones():
    talk = Talk(initiator=True)
    stream = talk.open()
    talk.say(GO_AWAY, 0, 0, 0)
    assert talk.machine.go_away_received == 0
    with pytest.raises(LocalProtocolError, match="closing"):
        talk.machine.open(0.0)
    talk.machine.write(stream, b"still")
    assert talk.hear() == [(DATA, 0, 1, b"still")]


def test_codes_of_go_away_may_be_large():
    talk = Talk()
    talk.say(GO_AWAY, 0, 0, 0x1002)
    assert talk.machine.go_away_received == 0x1002


def test_our_go_away():
    talk = Talk()
    talk.machine.go_away()
    talk.machine.go_away()
    assert talk.hear() == [(GO_AWAY, 0, 0, 0)]
    assert talk.say(UPDATE, SYN, 1, 0).refused == ["closing"]
    with pytest.raises(LocalProtocolError):
        talk.machine.open(0.0)


# Broken frames and floods


@pytest.mark.parametrize("args", [(4, 0, 0, 0), (255, 0, 0, 0)])
def test_an_unknown_frame_type(args):
    Talk().breaks_a_rule("frame type", *args)


def test_another_version():
    talk = Talk()
    with pytest.raises(RemoteProtocolError, match="version 1"):
        talk.say_bytes(b"\x01" + bytes(11))


def test_what_came_before_a_broken_frame_counts():
    talk = Talk()
    stream = talk.opened()
    with pytest.raises(RemoteProtocolError):
        talk.say_bytes(frame(DATA, 0, 1, b"fine") + frame(9, 0, 0, 0))
    assert talk.read(stream) == b"fine"


def flood(talk, say):
    """How many times the peer may do something within no time."""
    for count in range(1, 100_000):
        try:
            say(count)
            talk.machine.take(1)
        except RemoteProtocolError as error:
            return count - 1, str(error)
    return None


def test_a_flood_of_pings():
    talk = Talk()
    assert flood(talk, lambda n: talk.say(PING, SYN, 0, n)) == (yamux.PING_BURST, "yamux: a flood of pings")


def test_pings_now_and_then_are_no_flood():
    talk = Talk()
    for number in range(1000):
        talk.now += 0.1
        talk.say(PING, SYN, 0, number)
        talk.hear()


def test_a_flood_of_streams_that_are_reset():
    talk = Talk()

    def say(number):
        talk.say_bytes(frame(UPDATE, SYN, 2 * number - 1, 0) + frame(UPDATE, RST, 2 * number - 1, 0))

    assert flood(talk, say) == (yamux.RESET_BURST, "yamux: a flood of streams that are opened and reset")


def test_a_flood_of_streams_beyond_the_limit():
    talk = Talk(max_inbound_streams=1)
    count, error = flood(talk, lambda n: talk.say(UPDATE, SYN, 2 * n - 1, 0))
    assert count == yamux.REFUSED_BURST + 1
    assert error == "yamux: a flood of streams beyond the limit"


def test_answers_that_nobody_fetches():
    talk = Talk(max_inbound_streams=1 << 20, max_memory=1 << 40)

    def open_streams():
        for number in range(1 << 16):
            talk.say(UPDATE, SYN, 2 * number + 1, 0)

    with pytest.raises(RemoteProtocolError, match="does not fetch"):
        open_streams()
    assert len(talk.machine._control) <= yamux.CONTROL_LIMIT + 24


@given(st.binary(max_size=400), st.integers(1, 50))
def test_garbage_is_an_error_and_nothing_else(data, size):
    talk = Talk()
    try:
        for start in range(0, len(data), size):
            talk.say_bytes(data[start : start + size])
    except RemoteProtocolError:
        pass


KINDS = st.sampled_from([0, 0, 0, 1, 1, 2, 3])
FRAMES = st.lists(
    st.tuples(KINDS, st.integers(0, 15), st.integers(0, 9), st.sampled_from([0, 1, 100, 70_000, 262_144, 1 << 32 - 1])),
    max_size=40,
)


@given(FRAMES, st.integers(1, 5000))
@settings(max_examples=200)
def test_any_frames_keep_memory_bounded(said, step):
    """Every kind of frame with every flag, on a few ids, with streams that nobody reads."""
    talk = Talk(max_memory=4 * INITIAL_WINDOW, max_inbound_streams=3)
    streams = {}
    try:
        for kind, flags, id, length in said:
            if kind != DATA:
                batch = talk.say(kind, flags, id, length)
            else:
                batch = talk.say(kind, flags, id, bytes(min(length, step)))
            streams |= {stream.id: stream for stream in batch.opened}
            assert len(talk.machine.streams) <= 3
    except RemoteProtocolError:
        pass
    held = sum(len(chunk) for stream in streams.values() for chunk in stream.chunks)
    assert held == sum(stream.unread for stream in streams.values())
    assert held <= talk.machine.reserved <= 4 * INITIAL_WINDOW


# Two machines on an adversarial link


class Link(RuleBasedStateMachine):
    """Whatever is written, read, ended and reset in whatever order, and however the link cuts it: what arrives is
    exactly what was written, windows and memory are kept, and nobody breaks a rule."""

    CONFIG = YamuxConfig(max_memory=2 * MIB, max_window=MIB, max_inbound_streams=4, max_outbound_streams=4)

    def __init__(self):
        super().__init__()
        self.now = 0.0
        self.sides = [Machine(self.CONFIG, initiator=i == 0, now=0.0, rtt=0.05) for i in range(2)]
        self.wires = [b"", b""]  # towards side 0 and 1
        self.streams = [{}, {}]  # by id, for each side; kept after their end
        self.written = [{}, {}]
        self.read = [{}, {}]
        self.counter = 0

    def noticed(self, side, batch):
        for stream in batch.opened:
            self.streams[side][stream.id] = stream
            self.written[side][stream.id] = bytearray()
            self.read[side][stream.id] = bytearray()

    def pick(self, data, side):
        return data.draw(st.sampled_from(sorted(self.streams[side].values(), key=lambda s: s.id)))

    @rule(side=st.integers(0, 1), seconds=st.sampled_from([0.0, 0.0001, 0.01, 1.0]))
    def open(self, side, seconds):
        self.now += seconds
        try:
            stream = self.sides[side].open(self.now)
        except Refused:
            return
        self.streams[side][stream.id] = stream
        self.written[side][stream.id] = bytearray()
        self.read[side][stream.id] = bytearray()

    @precondition(lambda self: self.streams[0] or self.streams[1])
    @rule(data=st.data(), side=st.integers(0, 1), size=st.sampled_from([1, 13, 1000, 70_000, 300_000]))
    def write(self, data, side, size):
        if not self.streams[side]:
            return
        stream = self.pick(data, side)
        if stream.fin_wanted or stream.reset or stream.queued > MIB:
            return
        self.counter += 1
        piece = self.counter.to_bytes(4, "big") * (size // 4 + 1)
        self.sides[side].write(stream, piece[:size])
        self.written[side][stream.id] += piece[:size]

    @precondition(lambda self: self.sides[0].pending or self.sides[1].pending)
    @rule(side=st.integers(0, 1), limit=st.sampled_from([1, 20, 5000, MAX_FRAME]))
    def send(self, side, limit):
        pieces, size = self.sides[side].take(limit)
        assert sum(map(len, pieces)) == size
        self.wires[1 - side] += b"".join(pieces)

    @precondition(lambda self: self.wires[0] or self.wires[1])
    @rule(side=st.integers(0, 1), size=st.sampled_from([1, 7, 12, 100, 4096, 100_000, 1 << 20]))
    def deliver(self, side, size):
        self.now += 0.001
        head, self.wires[side] = self.wires[side][:size], self.wires[side][size:]
        buffer = bytearray(head)
        self.noticed(side, self.sides[side].receive(memoryview(buffer), self.now))
        buffer[:] = b"\xee" * len(buffer)  # as a pooled buffer is reused

    @precondition(lambda self: self.streams[0] or self.streams[1])
    @rule(data=st.data(), side=st.integers(0, 1), most=st.sampled_from([1, 1000, 1 << 30]))
    def receive(self, data, side, most):
        if self.streams[side]:
            self.take_unread(side, self.pick(data, side), most)

    def take_unread(self, side, stream, most):
        while stream.chunks and most:
            chunk = stream.chunks[0]
            part = chunk[stream.offset : stream.offset + most]
            stream.offset += len(part)
            if stream.offset == len(chunk):
                stream.chunks.popleft()
                stream.offset = 0
            most -= len(part)
            self.read[side][stream.id] += part
            stream.unread -= len(part)
            if stream.unread + stream.allowed <= stream.grant_at:
                self.sides[side].consumed(stream, self.now)

    @precondition(lambda self: self.streams[0] or self.streams[1])
    @rule(data=st.data(), side=st.integers(0, 1), how=st.sampled_from(["finish", "finish", "finish", "close", "reset"]))
    def end(self, data, side, how):
        if not self.streams[side]:
            return
        stream = self.pick(data, side)
        if how == "finish":
            self.sides[side].finish(stream)
        elif how == "close":
            self.sides[side].close(stream, self.now)
        else:
            self.sides[side].reset(stream)

    @invariant()
    def what_arrives_is_what_was_written(self):
        for side in range(2):
            for id, got in self.read[side].items():
                assert not got or bytes(self.written[1 - side][id][: len(got)]) == bytes(got)

    @invariant()
    def memory_is_kept(self):
        for side in range(2):
            machine = self.sides[side]
            held = sum(stream.unread for stream in self.streams[side].values())
            for stream in self.streams[side].values():
                assert stream.unread == sum(map(len, stream.chunks)) - stream.offset
                assert stream.unread + stream.allowed <= max(stream.window, INITIAL_WINDOW)
            exposed = sum(s.unread + s.allowed for s in self.streams[side].values())
            assert held <= exposed <= machine.reserved <= self.CONFIG.max_memory
            assert machine.reserved == sum(s.window for s in self.streams[side].values())
            assert 0 <= machine._grown <= self.CONFIG.max_memory // 2

    def teardown(self):
        """Let everything through; what both sides left open then arrives in full."""
        for _ in range(1000):
            busy = False
            for side in range(2):
                while self.sides[side].pending:
                    busy = True
                    self.send(side, MAX_FRAME)
                while self.wires[side]:
                    busy = True
                    self.deliver(side, 1 << 20)
                for stream in self.streams[side].values():
                    self.take_unread(side, stream, 1 << 30)
            if not busy:
                break
        for side in range(2):
            for id, stream in self.streams[side].items():
                other = self.streams[1 - side].get(id)
                if other is not None and not stream.closed and stream.reset is None and other.reset is None:
                    assert self.read[side][id] == self.written[1 - side][id]
                    assert stream.eof == other.fin_wanted
            assert self.sides[side].reserved == sum(s.window for s in self.sides[side].streams.values())


Link.TestCase.settings = settings(max_examples=60, stateful_step_count=60)
test_two_machines_on_an_adversarial_link = Link.TestCase
