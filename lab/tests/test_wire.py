"""The schedule of a wire and the capture format: pure, without a kernel."""

import struct

from natlab import _pcap
from natlab._wire import QUEUE_BYTES, Schedule, is_neighbour


def _schedule(seed="1/a/up", **link):
    made = Schedule(seed)
    made.set(**{"delay": 0.0, "jitter": 0.0, "loss": 0.0, "rate": 0.0, **link})
    return made


def test_a_delay_is_added():
    assert [_schedule(delay=0.025).due(now, 100) for now in (1.0, 2.0)] == [1.025, 2.025]


def test_jitter_stays_within_its_bounds_and_keeps_the_order():
    wire = _schedule(delay=0.02, jitter=0.01)
    times = [wire.due(number * 0.001, 100) for number in range(500)]
    assert times == sorted(times)
    delays = [time - number * 0.001 for number, time in enumerate(times)]
    assert 0.01 <= min(delays) < 0.02 < max(delays) <= 0.03


def test_a_rate_spaces_packets_and_drops_what_does_not_fit_the_queue():
    wire = _schedule(rate=8e6)  # 1 byte per microsecond
    assert [round(wire.due(0.0, 1000), 6) for _ in range(3)] == [0.001, 0.002, 0.003]
    fates = [wire.due(0.0, 1000) for _ in range(1000)]
    assert 3 + sum(fate is not None for fate in fates) == QUEUE_BYTES // 1000 + 1
    assert wire.due(10.0, 1000) == 10.001


def test_the_fate_of_a_packet_depends_on_seed_and_number_alone():
    def fates(seed, loss, **link):
        wire = _schedule(seed, loss=loss, **link)
        return [wire.due(0.0, 100) is None for _ in range(1000)]

    assert fates("a", 0.1) == fates("a", 0.1, delay=1.0, jitter=0.5)
    assert fates("a", 0.1) != fates("b", 0.1)
    assert 60 < sum(fates("a", 0.1)) < 140
    assert all(few <= many for few, many in zip(fates("a", 0.1), fates("a", 0.3), strict=True))
    assert not any(fates("a", 0.0))
    assert all(fates("a", 1.0))


def test_what_neighbours_say_is_not_delayed():
    unicast, multicast = b"\x02" + bytes(11), b"\x33\x33" + bytes(10)
    assert is_neighbour(unicast + b"\x08\x06" + bytes(28))
    assert is_neighbour(multicast + b"\x86\xdd" + bytes(60))
    advertisement = unicast + b"\x86\xdd" + bytes(6) + b"\x3a" + bytes(33) + b"\x88" + bytes(20)
    assert is_neighbour(advertisement)
    echo = unicast + b"\x86\xdd" + bytes(6) + b"\x3a" + bytes(33) + b"\x80" + bytes(20)
    assert not is_neighbour(echo)
    assert not is_neighbour(unicast + b"\x08\x00" + bytes(40))


def test_a_capture_is_a_row_of_blocks_that_say_their_size_twice():
    data = _pcap.section() + _pcap.interface("s1") + _pcap.packet(0, 1_700_000_000_123_456_789, b"frame", 1500, True)
    kinds = []
    while data:
        kind, size = struct.unpack_from("=II", data)
        assert size % 4 == 0
        assert struct.unpack_from("=I", data, size - 4) == (size,)
        kinds.append(kind)
        block, data = data[:size], data[size:]
    assert kinds == [0x0A0D0D0A, 1, 6]
    number, high, low, kept, whole = struct.unpack_from("=IIIII", block, 8)
    assert (number, high << 32 | low, kept, whole) == (0, 1_700_000_000_123_456_789, 5, 1500)
    assert block[28:33] == b"frame"
