from __future__ import annotations

from kas_libp2p.kaspa._packing import KEEP, RETRY, Packing, worth_sending


class Link:
    """A second at a time: the sender waits for a share of it, and so much arrives."""

    def __init__(self, packing: Packing) -> None:
        self.packing = packing
        self.now = 0.0
        self.arrived = 0
        self.busy = 0

    def second(self, rate: float, *, waited: float = 1.0, busy: float = 0.0, ratio: float | None = None) -> bool:
        self.now += 1.0
        self.arrived += int(rate)
        self.busy += int(busy * 1000)
        if self.packing.on and ratio is not None:
            self.packing.on_packed(262144, int(262144 * ratio), 262144 / 200e6, self.now)
        self.packing.on_waited(waited)
        self.packing.on_alive(self.arrived, self.busy % 2**32, self.now)
        return self.packing.on


def test_on_at_a_slow_link_and_off_at_a_fast_one() -> None:
    assert Link(Packing(0.0)).second(1e6)
    assert not Link(Packing(0.0)).second(100e6)


def test_a_busy_reader_is_not_a_slow_link() -> None:
    link = Link(Packing(0.0))
    assert not any(link.second(1e6, busy=0.9) for _ in range(10))


def test_a_link_with_little_to_do_is_not_packed_for() -> None:
    link = Link(Packing(0.0))
    assert not any(link.second(1e6, waited=0.01) for _ in range(10))


def test_it_does_not_flap_in_between() -> None:
    link = Link(Packing(0.0))  # pays up to 40 MB/s as far as is known, turned on below 20
    assert not link.second(30e6)
    assert link.second(10e6)
    assert link.second(30e6)
    assert not link.second(50e6)


def test_it_stays_on_for_a_while_without_a_bottleneck() -> None:
    link = Link(Packing(0.0))
    assert link.second(1e6)
    states = [link.second(1e6, waited=0.0) for _ in range(int(KEEP) + 5)]
    assert states.index(False) == KEEP


def test_bytes_that_do_not_pack_are_left_alone_for_a_while() -> None:
    link = Link(Packing(0.0))
    assert link.second(1e6)
    off = 0
    while link.second(1e6, ratio=1.0):
        off += 1
    assert off < 10
    states = [link.second(1e6) for _ in range(int(RETRY) + 5)]
    assert abs(states.index(True) - RETRY) <= 1


def test_the_measured_ratio_decides() -> None:
    well, poorly = Link(Packing(0.0)), Link(Packing(0.0))
    for link, ratio in ((well, 0.3), (poorly, 0.9)):
        assert link.second(19e6)
        for _ in range(30):
            link.second(19e6, ratio=ratio)
    assert well.packing.on
    assert not poorly.packing.on


def test_the_busy_counter_may_wrap() -> None:
    packing = Packing(0.0)
    packing.on_alive(0, 2**32 - 100, 1.0)
    packing.on_waited(1.0)
    packing.on_alive(1_000_000, 100, 2.0)
    assert packing.on


def test_worth_sending() -> None:
    assert worth_sending(1000, 900)
    assert not worth_sending(1000, 950)


def test_a_gap_says_nothing_about_the_link() -> None:
    packing = Packing(0.0)
    packing.on_waited(30.0)
    packing.on_alive(100_000, 0, 30.0, gap=True)
    assert not packing.on
    packing.on_alive(100_000_000, 0, 31.0)
    assert packing.rate is None
    packing.on_waited(1.0)
    packing.on_alive(101_000_000, 0, 32.0)
    assert packing.rate == 1e6
    assert packing.on
