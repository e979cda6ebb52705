from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kas_libp2p.kaspa._bucket import TokenBucket

requests = st.lists(st.tuples(st.floats(0, 5), st.integers(1, 1000)), min_size=1, max_size=30)


@given(requests=requests, rate=st.floats(10, 10_000), burst=st.integers(1000, 5000))
def test_no_span_of_time_sees_more_than_rate_and_burst(
    requests: list[tuple[float, int]], rate: float, burst: int
) -> None:
    bucket = TokenBucket(rate, burst, 0.0)
    now = 0.0
    left: list[tuple[float, int]] = []
    for pause, count in requests:
        now += pause
        left.append((bucket.reserve(count, now), count))
    times = [at for at, _ in left]
    assert times == sorted(times), "who asks first goes first"
    for start in range(len(left)):
        total = 0
        for at, count in left[start:]:
            total += count
            assert total <= rate * (at - left[start][0]) + burst + 1e-6 * total


@given(requests=requests, rate=st.floats(10, 10_000), burst=st.integers(1000, 5000))
def test_nobody_waits_longer_than_the_bytes_before_need(
    requests: list[tuple[float, int]], rate: float, burst: int
) -> None:
    bucket = TokenBucket(rate, burst, 0.0)
    now = 0.0
    total = 0
    for pause, count in requests:
        now += pause
        total += count
        at = bucket.reserve(count, now)
        assert now <= at <= now + max(0.0, total - burst) / rate + 1e-6


def test_what_could_not_wait_is_paid_later() -> None:
    bucket = TokenBucket(100, 100, 0.0)
    bucket.charge(150, 0.0)
    assert bucket.reserve(50, 0.0) == pytest.approx(1.0)


def test_more_than_the_burst_leaves_when_all_of_it_may() -> None:
    bucket = TokenBucket(100, 100, 0.0)
    assert bucket.reserve(300, 0.0) == pytest.approx(2.0)
    assert bucket.reserve(100, 10.0) == 10.0


def test_a_clock_that_stands_still_or_goes_back_gives_nothing() -> None:
    bucket = TokenBucket(100, 100, 5.0)
    bucket.reserve(100, 5.0)
    assert bucket.reserve(10, 4.0) > 4.0


@pytest.mark.parametrize(("rate", "burst"), [(0, 1), (1, 0), (-1, 1)])
def test_nonsense(rate: float, burst: float) -> None:
    with pytest.raises(ValueError, match="above zero"):
        TokenBucket(rate, burst, 0.0)
