"""Two machines and a network that does its worst: every byte arrives, once and in order, and memory is bounded."""

from __future__ import annotations

import random
from collections.abc import Iterator
from operator import xor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kas_libp2p.session._wire import Code
from tests.session.world import Tape, World, play, small_numbers


@pytest.fixture(scope="module", autouse=True)
def _small() -> Iterator[None]:
    with small_numbers():
        yield


def run(window: int, data: bytes) -> World:
    """Play a tape, then let everything come to rest, and look at what came of it."""
    world = World(window=window)
    play(world, Tape(data))
    world.settle()
    assert world.is_done(), "it does not come to rest"
    ends = [side.ended for side in world.sides]
    if ends == [None, None]:
        for side, session in enumerate(world.sides):
            assert world.read[side] == world.written[1 - side]
            assert session.in_flight == 0
            assert session.eof == world.sides[1 - side].finished
            assert session.deadline < float("inf")
    elif not world.disturbed:
        codes = {end.code for end in ends if end is not None}
        assert codes <= {Code.ENDED, Code.UNKNOWN, Code.LOST}
        if Code.ENDED in codes:
            for side in (0, 1):
                assert world.read[side] == world.written[1 - side]
    return world


@settings(max_examples=2000)
@given(st.sampled_from([64, 128, 512]), st.binary(min_size=120, max_size=280))
def test_whatever_happens(window: int, data: bytes) -> None:
    run(window, data)


@pytest.mark.nightly
@pytest.mark.parametrize("number", range(20))
@settings(max_examples=5000)
@given(st.sampled_from([64, 100, 128, 512, 2048]), st.binary(min_size=100, max_size=400))
def test_whatever_happens_a_hundred_thousand_times(number: int, window: int, data: bytes) -> None:
    # Hypothesis draws the same in each round.
    run(window, bytes(map(xor, data, random.Random(number).randbytes(len(data)))))
