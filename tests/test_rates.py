"""Rates hold over any span of time, and cost nothing once they are not used."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kas_libp2p._rates import MAX_KEYS, Rates

STEPS = st.lists(st.tuples(st.integers(0, 3), st.floats(0, 30), st.integers(1, 2)), max_size=80)


@given(st.integers(1, 6), st.floats(0.5, 20), STEPS)
def test_no_span_has_more_than_its_share(burst: int, interval: float, steps: list[tuple[int, float, int]]) -> None:
    rates = Rates(burst, interval)
    now = 1000.0
    taken: dict[int, list[tuple[float, int]]] = {}
    for key, pause, count in steps:
        now += pause
        allowed = rates.allows(key, now, count)
        assert rates.take(key, now, count) == allowed
        if allowed:
            taken.setdefault(key, []).append((now, count))
        assert len(rates) <= len({each for each, times in taken.items() if now - times[-1][0] <= burst * interval})
    for times in taken.values():
        for index, (start, _) in enumerate(times):
            total = 0
            for at, count in times[index:]:
                total += count
                assert total <= burst + (at - start) / interval + 1e-3


@given(st.integers(1, 6), st.floats(0.5, 20))
def test_whoever_waits_is_served_again(burst: int, interval: float) -> None:
    rates = Rates(burst, interval)
    assert all(rates.take("a", 0.0) for _ in range(burst))
    assert not rates.take("a", 0.0)
    assert rates.take("b", 0.0)
    assert not rates.take("a", interval * 0.99)
    assert rates.take("a", interval * 1.001)
    assert not rates.take("a", interval * 1.001)
    assert all(rates.take("a", 1000 * interval) for _ in range(burst))


def test_a_crowd_that_has_gone_is_forgotten() -> None:
    rates = Rates(2, 10.0)
    for key in range(10_000):
        rates.take(key, key / 100)
    assert len(rates) <= 2001
    rates.take("last", 1000.0)
    assert len(rates) == 1


def test_a_crowd_that_stays_is_bounded() -> None:
    rates = Rates(100, 1000.0)
    for key in range(3 * MAX_KEYS):
        assert rates.take(key, 0.0)
    assert len(rates) == MAX_KEYS


def test_asking_takes_none() -> None:
    rates = Rates(1, 10.0)
    assert rates.allows("a", 0.0)
    assert not len(rates)
    assert rates.take("a", 0.0)
    assert not rates.allows("a", 0.0)


def test_several_at_once_or_none() -> None:
    rates = Rates(10, 1.0)
    assert rates.take("a", 0.0, 7)
    assert not rates.take("a", 0.0, 4)
    assert rates.take("a", 0.0, 3)


def test_what_never_comes_back() -> None:
    rates = Rates(2, float("inf"))
    assert rates.take("a", 0.0)
    assert rates.take("a", 1.0)
    assert not rates.take("a", 1e7)
    assert rates.take("b", 1e7)
