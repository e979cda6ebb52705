from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kas_libp2p.kaspa._liveness import (
    ANSWER_WITHIN,
    IDLE_PROBE_AFTER,
    OWED_FOR,
    PROBE_AFTER,
    TELL_AFTER,
    Act,
    Liveness,
)


def run(liveness: Liveness, until: float) -> list[tuple[float, Act]]:
    """Let time pass, punctually."""
    acts = []
    while (deadline := liveness.next_deadline()) is not None and deadline <= until:
        acts += [(deadline, act) for act in liveness.on_timeout(deadline)]
    return acts


def test_silence_is_asked_about_and_then_taken_for_a_hung_path() -> None:
    liveness = Liveness(0.0)
    liveness.on_reading(0.0)
    assert run(liveness, 100.0) == [(PROBE_AFTER, Act.PROBE), (PROBE_AFTER + ANSWER_WITHIN, Act.HUNG)]
    assert liveness.hung
    assert liveness.next_deadline() is None


def test_any_word_of_the_peer_counts_as_an_answer() -> None:
    liveness = Liveness(0.0)
    liveness.on_reading(0.0)
    assert run(liveness, 4.9) == [(2.0, Act.PROBE)]
    liveness.on_received(16, 4.9)
    liveness.on_reading(4.9)
    assert run(liveness, 8.0) == [(6.9, Act.PROBE)]


def test_data_is_acknowledged_once_a_second_and_control_frames_never() -> None:
    liveness = Liveness(0.0)
    liveness.on_reading(0.0)
    for tenth in range(30):
        now = tenth / 10
        liveness.on_received(1000, now)
        liveness.on_data(now)
        liveness.on_reading(now)
        if tenth % 10 == 9:
            assert [act for _, act in run(liveness, now + 0.1)] == [Act.TELL]
    liveness.on_received(16, 3.5)
    liveness.on_reading(3.5)
    assert run(liveness, 5.0) == []


def test_who_does_not_read_says_so_and_judges_nobody() -> None:
    liveness = Liveness(0.0)
    liveness.on_reading(0.0)
    liveness.on_received(1000, 0.5)
    acts = run(liveness, 100.0)
    assert {act for _, act in acts} == {Act.TELL}
    assert len(acts) == 99
    liveness.on_reading(100.0)  # what the peer said meanwhile lies there unread: it gets its time
    assert run(liveness, 101.9) == []
    assert liveness.busy_ms(101.9) == 99_500


def test_an_idle_connection_is_asked_rarely() -> None:
    liveness = Liveness(0.0)
    liveness.on_reading(0.0)
    now, probes = 0.0, []
    while now < 300:
        deadline = liveness.next_deadline()
        assert deadline is not None
        now = deadline
        for act in liveness.on_timeout(now):
            assert act is Act.PROBE
            probes.append(now)
            liveness.on_received(16, now)
            liveness.on_reading(now)
    early = [at for at in probes if at < OWED_FOR]
    assert len(early) == OWED_FOR / PROBE_AFTER - 1
    assert len(probes) - len(early) <= (300 - OWED_FOR) / IDLE_PROBE_AFTER + 2
    # What is sent now has to arrive: the silence before it was long enough to ask at once.
    liveness.on_moved(now + 20)
    assert liveness.next_deadline() == now + PROBE_AFTER


def test_a_process_that_stood_still_asks_again_before_it_judges() -> None:
    liveness = Liveness(0.0)
    liveness.on_reading(0.0)
    assert liveness.on_timeout(2.0) == [Act.PROBE]
    assert liveness.on_timeout(60.0) == [Act.PROBE]
    assert liveness.on_timeout(63.0) == [Act.HUNG]


def test_who_sees_its_bytes_move_waits_for_the_answer() -> None:
    liveness = Liveness(0.0)
    liveness.on_reading(0.0)
    assert liveness.on_timeout(2.0) == [Act.PROBE]
    for second in range(3, 60):
        liveness.on_delivered(1000 * second, second)
        assert run(liveness, second + 0.9) == []
    liveness.on_delivered(59_000, 60)
    assert run(liveness, 100) == [(59 + ANSWER_WITHIN, Act.HUNG)]


def test_impossible_acknowledgements() -> None:
    liveness = Liveness(0.0)
    liveness.on_sent(100)
    assert liveness.on_alive(60)
    assert not liveness.on_alive(59)
    assert not liveness.on_alive(101)
    assert liveness.on_alive(100)
    assert liveness.acknowledged == 100


@given(
    st.lists(st.tuples(st.floats(0.01, 10), st.sampled_from(["received", "data", "reading", "queued"])), max_size=30)
)
def test_two_sides_that_answer_never_give_each_other_up(steps: list[tuple[float, str]]) -> None:
    """Whatever happens, a peer that answers probes in time is not taken for hung, and deadlines lie ahead."""
    liveness = Liveness(0.0)
    now = 0.0
    for pause, what in steps:
        end = now + pause
        while (deadline := liveness.next_deadline()) is not None and deadline <= end:
            now = max(now, deadline)
            acts = liveness.on_timeout(now)
            assert acts, "a deadline at which nothing is due"
            assert Act.HUNG not in acts
            if Act.PROBE in acts:
                liveness.on_received(16, now + 0.5)
                liveness.on_reading(now + 0.5)
                now += 0.5
        now = max(now, end)
        if what == "queued":
            liveness.on_moved(now)
        elif what == "reading":
            liveness.on_reading(now)
        else:
            liveness.on_received(10, now)
            if what == "data":
                liveness.on_data(now)
            assert liveness.next_deadline() is not None
    assert TELL_AFTER < PROBE_AFTER
