from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from multiaddr import Multiaddr
from trio.testing import MockClock

from kas_libp2p import addresses
from kas_libp2p.errors import (
    AddressFailure,
    DialError,
    PeerIdMismatch,
    Refused,
    ResolveError,
    Stage,
    UpgradeTimeout,
)
from kas_libp2p.events import AddressFailed, EventBus
from kas_libp2p.metadata import PeerId
from kas_libp2p.transport.race import Found, in_order, race

PEER = "12D3KooWHHzSeKaY8xuZVzkLbKFfvNgPPeKhFBGrMbNzbm5akpqu"
DELAY = 0.25
FOREVER = 1e6


class Network:
    """Connects to each address after a set time, or fails then. Connections are the addresses' texts."""

    def __init__(self, **plan: tuple[float, BaseException | None]) -> None:
        self.plan = plan
        self.starts: dict[str, float] = {}
        self.open: set[str] = set()
        self.cancelled: list[str] = []
        self.zero = trio.current_time()

    async def attempt(self, address: Multiaddr) -> str:
        name = name_of(address)
        self.starts[name] = trio.current_time() - self.zero
        seconds, error = self.plan[name]
        try:
            await trio.sleep(seconds)
        except trio.Cancelled:
            self.cancelled.append(name)
            raise
        if error is not None:
            raise error
        self.open.add(name)
        return name

    async def race(self, names: Iterable[str], **more: object) -> str:
        options: dict[str, object] = {"discard": self.open.discard, "target": "somebody", "max_addresses": 16, **more}
        return await race([address_of(name) for name in names], self.attempt, DELAY, **options)  # type: ignore[arg-type]

    @property
    def elapsed(self) -> float:
        return trio.current_time() - self.zero


def address_of(name: str) -> Multiaddr:
    """``a`` to ``z``: IPv4 addresses in this order."""
    return addresses.from_ip_port(f"11.0.0.{ord(name)}", 1)


def name_of(address: Multiaddr) -> str:
    host = addresses.components(address)[0][1]
    assert host is not None
    return chr(int(host.rpartition(".")[2]))


def ok(seconds: float) -> tuple[float, None]:
    return seconds, None


def fails(seconds: float, error: BaseException | None = None) -> tuple[float, BaseException]:
    return seconds, error or ConnectionRefusedError(111, "Connection refused")


class TestTimes:
    async def test_the_first_answers(self, autojump_clock: MockClock) -> None:
        network = Network(a=ok(0.2), b=ok(0))
        assert await network.race("ab") == "a"
        assert network.elapsed == pytest.approx(0.2)
        assert network.starts == {"a": 0}

    async def test_a_silent_one_costs_one_delay(self, autojump_clock: MockClock) -> None:
        network = Network(a=ok(FOREVER), b=ok(0.1))
        assert await network.race("ab") == "b"
        assert network.starts == {"a": 0, "b": DELAY}
        assert network.elapsed == pytest.approx(DELAY + 0.1)
        assert network.cancelled == ["a"]
        assert network.open == {"b"}

    async def test_a_slow_first_one_may_still_win(self, autojump_clock: MockClock) -> None:
        network = Network(a=ok(0.4), b=ok(0.3), c=ok(FOREVER))
        assert await network.race("abc") == "a"
        assert network.elapsed == pytest.approx(0.4)
        assert network.cancelled == ["b"]

    async def test_a_failure_starts_the_next_at_once(self, autojump_clock: MockClock) -> None:
        network = Network(a=fails(0.1), b=fails(0.05), c=ok(0.2))
        assert await network.race("abc") == "c"
        assert network.starts == pytest.approx({"a": 0, "b": 0.1, "c": 0.15})
        assert network.elapsed == pytest.approx(0.35)

    async def test_the_failure_of_an_earlier_one_counts_too(self, autojump_clock: MockClock) -> None:
        network = Network(a=fails(0.3), b=ok(FOREVER), c=ok(0.1))
        assert await network.race("abc") == "c"
        assert network.starts == pytest.approx({"a": 0, "b": DELAY, "c": 0.3})

    async def test_two_failures_in_one_instant_start_two(self, autojump_clock: MockClock) -> None:
        network = Network(a=fails(0.3), b=fails(0.05), c=ok(FOREVER), d=ok(0.1))
        assert await network.race("abcd") == "d"
        assert network.starts == pytest.approx({"a": 0, "b": DELAY, "c": 0.3, "d": 0.3})

    async def test_after_a_failure_the_delay_runs_anew(self, autojump_clock: MockClock) -> None:
        network = Network(a=fails(0.1), b=ok(FOREVER), c=ok(0))
        await network.race("abc")
        assert network.starts == pytest.approx({"a": 0, "b": 0.1, "c": 0.1 + DELAY})

    async def test_all_fail(self, autojump_clock: MockClock) -> None:
        network = Network(a=fails(0.1), b=fails(0.7), c=fails(0.2))
        with pytest.raises(DialError) as caught:
            await network.race("abc")
        assert network.elapsed == pytest.approx(0.8)
        assert [failure.address for failure in caught.value.failures] == [str(address_of(name)) for name in "abc"]
        assert [failure.seconds for failure in caught.value.failures] == pytest.approx([0.1, 0.7, 0.2])


class TestLater:
    """Addresses that are found while others are tried."""

    @staticmethod
    def found(names: str, after: float, *failures: AddressFailure) -> Callable[[], Awaitable[Found]]:
        async def find() -> Found:
            await trio.sleep(after)
            return [address_of(name) for name in names], failures

        return find

    async def test_what_is_known_does_not_wait(self, autojump_clock: MockClock) -> None:
        network = Network(a=ok(0.2))
        assert await network.race("a", later=self.found("b", FOREVER)) == "a"
        assert network.elapsed == pytest.approx(0.2)

    async def test_they_take_their_turn(self, autojump_clock: MockClock) -> None:
        network = Network(a=ok(FOREVER), b=ok(FOREVER), c=ok(FOREVER), d=ok(0.1))
        assert await network.race("ab", later=self.found("cd", 0.1)) == "d"
        assert network.starts == pytest.approx({"a": 0, "b": DELAY, "c": 2 * DELAY, "d": 3 * DELAY})

    async def test_they_are_tried_at_once_where_nothing_else_is(self, autojump_clock: MockClock) -> None:
        network = Network(a=ok(FOREVER), b=ok(0.1), c=fails(0))
        assert await network.race("", later=self.found("b", 1)) == "b"
        assert await network.race("c", later=self.found("ab", 1)) == "b"
        assert network.starts == pytest.approx({"b": 2.35, "c": 1.1, "a": 2.1})

    async def test_their_failures_count(self, autojump_clock: MockClock) -> None:
        network = Network(a=fails(0.1), b=fails(0.1))
        failure = AddressFailure("/dns4/x.example.org/tcp/1", Stage.RESOLVE, ResolveError("no such name"), 2.0)
        with pytest.raises(DialError) as caught:
            await network.race("a", later=self.found("b", 2, failure))
        assert caught.value.failures[0] is failure
        assert [each.address for each in caught.value.failures[1:]] == [str(address_of(name)) for name in "ab"]
        assert network.elapsed == pytest.approx(2.1)

    async def test_nobody_is_tried_twice_nor_beyond_the_cap(self, autojump_clock: MockClock) -> None:
        network = Network(**{name: fails(0.1) for name in "abcdef"})
        with pytest.raises(DialError):
            await network.race("ab", later=self.found("abcdef", 0.15), max_addresses=4)
        assert sorted(network.starts) == ["a", "b", "c", "d"]

    async def test_a_mistake_in_finding_them_ends_the_race(self, autojump_clock: MockClock) -> None:
        network = Network(a=ok(FOREVER))

        async def find() -> Found:
            raise ZeroDivisionError

        with pytest.raises(ExceptionGroup) as caught:
            await network.race("a", later=find)
        assert caught.group_contains(ZeroDivisionError)
        assert network.cancelled == ["a"] or network.starts == {}


class TestOneWinner:
    async def test_a_connection_of_the_same_instant_is_discarded(self, autojump_clock: MockClock) -> None:
        network = Network(a=ok(0.5), b=ok(0.25))
        assert await network.race("ab") in "ab"
        assert set(network.starts) == {"a", "b"}
        assert len(network.open) == 1

    async def test_one_that_shields_itself_is_discarded(self, autojump_clock: MockClock) -> None:
        network = Network(a=ok(0.5), b=ok(0.05))

        async def stubborn(address: Multiaddr) -> str:
            with trio.CancelScope(shield=name_of(address) == "a"):
                return await network.attempt(address)

        winner = await race(
            map(address_of, "ab"), stubborn, DELAY, discard=network.open.discard, target="x", max_addresses=9
        )
        assert winner == "b"
        assert network.open == {"b"}

    async def test_a_winner_that_comes_with_the_cancellation_reaches_the_caller(
        self, autojump_clock: MockClock
    ) -> None:
        network = Network(a=ok(0.35))

        async def stubborn(address: Multiaddr) -> str:
            with trio.CancelScope(shield=True):
                return await network.attempt(address)

        winner = None
        with trio.move_on_after(0.3):
            winner = await race(
                [address_of("a")], stubborn, DELAY, discard=network.open.discard, target="x", max_addresses=9
            )
        assert network.open == {"a"} == {winner}

    async def test_a_mistake_ends_the_race_and_discards_the_winner(self, autojump_clock: MockClock) -> None:
        network = Network(a=ok(0.5), b=fails(0.35, ZeroDivisionError()))

        async def stubborn(address: Multiaddr) -> str:
            with trio.CancelScope(shield=name_of(address) == "b"):
                return await network.attempt(address)

        with pytest.raises(ExceptionGroup) as caught:
            await race(
                map(address_of, "ab"), stubborn, DELAY, discard=network.open.discard, target="x", max_addresses=9
            )
        assert caught.group_contains(ZeroDivisionError)
        assert network.elapsed == pytest.approx(0.6)
        assert network.open == set()

    async def test_cancelling_ends_all(self, autojump_clock: MockClock) -> None:
        network = Network(a=ok(FOREVER), b=ok(FOREVER), c=ok(FOREVER))
        with trio.move_on_after(0.3):
            await network.race("abc")
        assert sorted(network.cancelled) == ["a", "b"]
        assert network.elapsed == pytest.approx(0.3)

    @given(
        st.lists(st.tuples(st.sampled_from([0, 0.1, DELAY, 0.5, 2 * DELAY, 1]), st.booleans()), min_size=1, max_size=6),
        st.none() | st.sampled_from([0.1, DELAY, 0.5, 1]),
    )
    def test_nothing_is_ever_left_open(self, plan: list[tuple[float, bool]], cancel_after: float | None) -> None:
        async def scenario() -> None:
            names = "abcdef"[: len(plan)]
            network = Network(
                **{
                    name: ok(seconds) if works else fails(seconds)
                    for name, (seconds, works) in zip(names, plan, strict=True)
                }
            )
            winner = None
            with trio.move_on_after(FOREVER if cancel_after is None else cancel_after):
                with suppress(DialError):
                    winner = await network.race(names)
            assert network.open == ({winner} if winner else set())
            if cancel_after is None:
                assert (winner is not None) == any(works for _, works in plan)

        trio.run(scenario, clock=MockClock(autojump_threshold=0))


class TestReasons:
    async def test_each_address_keeps_its_own(self, autojump_clock: MockClock) -> None:
        errors: dict[str, Exception] = {
            "a": ConnectionRefusedError(111, "Connection refused"),
            "b": UpgradeTimeout(Stage.NOISE, 10),
            "c": PeerIdMismatch("x", "y"),
            "d": Refused("deny", "denied"),
            "e": trio.BrokenResourceError("reset"),
        }
        network = Network(**{name: fails(0, error) for name, error in errors.items()})
        earlier = AddressFailure("/dns4/nowhere/tcp/1", Stage.RESOLVE, ResolveError("nowhere: no such name"), 0.5)
        with pytest.raises(DialError) as caught:
            await network.race("abcde", failures=[earlier])
        failures = caught.value.failures
        assert [each.stage for each in failures] == [
            Stage.RESOLVE,
            Stage.TCP,
            Stage.NOISE,
            Stage.NOISE,
            Stage.GATE,
            Stage.TCP,
        ]
        assert [each.error for each in failures[1:]] == list(errors.values())
        assert "Connection refused" in str(caught.value)
        assert "no such name" in str(caught.value)
        assert isinstance(caught.value.__cause__, ExceptionGroup)
        assert list(caught.value.__cause__.exceptions) == [earlier.error, *errors.values()]

    async def test_no_address_at_all(self, autojump_clock: MockClock) -> None:
        with pytest.raises(DialError, match="somebody: no address is known") as caught:
            await Network().race("")
        assert caught.value.failures == ()

    async def test_a_bad_address_does_not_spoil_the_race(self, autojump_clock: MockClock) -> None:
        network = Network(a=ok(0))
        bus = EventBus(lambda: 0.0)
        winner = await race(
            ["nonsense", f"/p2p/{PEER}", str(address_of("a"))],
            network.attempt,
            DELAY,
            discard=network.open.discard,
            target="x",
            max_addresses=3,
            events=bus,
        )
        assert winner == "a"
        with pytest.raises(DialError) as caught:
            await race(["nonsense"], network.attempt, DELAY, discard=print, target="x", max_addresses=3)
        assert [each.stage for each in caught.value.failures] == [Stage.RESOLVE]

    async def test_failures_are_events(self, autojump_clock: MockClock) -> None:
        bus = EventBus(lambda: 7.0)
        network = Network(a=fails(0.1), b=ok(0.1))
        with bus.subscribe() as events:
            await network.race("ab", events=bus, peer=PeerId(PEER))
            event = await anext(events)
        assert isinstance(event, AddressFailed)
        assert (event.peer, event.address, event.stage) == (PEER, str(address_of("a")), "tcp")
        assert "refused" in event.reason
        assert event.seconds == pytest.approx(0.1)

    async def test_no_more_than_the_cap_are_tried(self, autojump_clock: MockClock) -> None:
        network = Network(**{name: fails(0) for name in "abcdefgh"})
        with pytest.raises(DialError) as caught:
            await network.race("abcdefgh", max_addresses=3)
        assert list(network.starts) == ["a", "b", "c"]
        assert len(caught.value.failures) == 3

    async def test_a_peer_with_thousands_of_addresses(self, autojump_clock: MockClock) -> None:
        tried = []

        async def attempt(address: Multiaddr) -> None:
            tried.append(address)
            raise ConnectionRefusedError

        many = (addresses.from_ip_port(f"11.{n >> 8}.{n & 255}.1", 1) for n in range(10_000))
        with pytest.raises(DialError):
            await race(many, attempt, DELAY, discard=print, target="x", max_addresses=16)
        assert len(tried) == 16


class TestOrder:
    V4 = ("/ip4/11.0.0.1/tcp/1", "/ip4/11.0.0.2/tcp/1", "/ip4/11.0.0.3/tcp/1")
    V6 = ("/ip6/2d00::1/tcp/1", "/ip6/2d00::2/tcp/1")

    def shown(self, given: Iterable[str], limit: int = 99) -> list[str]:
        return [str(each) for each in in_order(given, limit)]

    def test_families_alternate_and_ipv6_is_first(self) -> None:
        assert self.shown([*self.V4, *self.V6]) == [self.V6[0], self.V4[0], self.V6[1], self.V4[1], self.V4[2]]

    def test_one_family_keeps_its_order(self) -> None:
        assert self.shown(self.V4) == list(self.V4)
        assert self.shown(reversed(self.V6)) == list(reversed(self.V6))

    def test_duplicates(self) -> None:
        assert self.shown([self.V4[0], self.V4[0] + f"/p2p/{PEER}", self.V4[0]]) == [self.V4[0]]

    def test_the_cap_leaves_both_families(self) -> None:
        assert self.shown([*self.V4, *self.V6], 2) == [self.V6[0], self.V4[0]]

    def test_relayed_ones_are_last(self) -> None:
        relayed = f"{self.V6[0]}/p2p/{PEER}/p2p-circuit"
        assert self.shown([relayed, *self.V4[:2]]) == [*self.V4[:2], relayed]


# Circuits beside direct addresses


def circuit_of(name: str) -> Multiaddr:
    return addresses.parse(f"/ip4/11.0.0.{ord(name)}/tcp/1/p2p/{PEER}/p2p-circuit")


async def lanes(network: Network, direct: str, circuits: str, after: float | None, **more: object) -> str:
    wanted = [*map(address_of, direct), *map(circuit_of, circuits)]
    options: dict[str, object] = {"discard": network.open.discard, "target": "somebody", "max_addresses": 16, **more}
    return await race(wanted, network.attempt, DELAY, circuits_after=after, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(("after", "start"), [(0.0, 0.0), (0.1, 0.1), (1.0, 1.0)])
async def test_circuits_have_a_lane_of_their_own(autojump_clock: MockClock, after: float, start: float) -> None:
    network = Network(a=ok(FOREVER), b=ok(FOREVER), c=ok(FOREVER), d=ok(10.0), e=ok(FOREVER))
    assert await lanes(network, "abc", "de", after) == "d"
    assert network.starts == pytest.approx({"a": 0.0, "b": DELAY, "c": 2 * DELAY, "d": start, "e": start + DELAY})


async def test_circuits_start_at_once_when_no_direct_address_is_left(autojump_clock: MockClock) -> None:
    network = Network(a=fails(0.1), b=fails(0.1), c=ok(0.0))
    assert await lanes(network, "ab", "c", 5.0) == "c"
    assert network.starts["c"] == pytest.approx(0.2)
    alone = Network(c=ok(0.0))
    assert await lanes(alone, "", "c", 5.0) == "c"
    assert alone.starts["c"] == 0.0


async def test_circuits_wait_for_names_that_are_still_looked_up(autojump_clock: MockClock) -> None:
    network = Network(a=ok(0.1), c=ok(FOREVER))

    async def later() -> Found:
        await trio.sleep(0.5)
        return [address_of("a")], []

    assert await lanes(network, "", "c", 5.0, later=later) == "a"
    assert "c" not in network.starts


async def test_all_lanes_may_fail(autojump_clock: MockClock) -> None:
    network = Network(a=fails(0.1), b=fails(0.1), c=fails(0.1))
    with pytest.raises(DialError) as caught:
        await lanes(network, "ab", "c", 5.0)
    assert len(caught.value.failures) == 3


async def test_many_direct_addresses_leave_room_for_circuits(autojump_clock: MockClock) -> None:
    names = "abcdefghij"
    network = Network(**{name: fails(0.01) for name in names}, x=ok(0.0), y=ok(0.0))
    assert await lanes(network, names, "xy", FOREVER, max_addresses=6) == "x"
    assert len(network.starts) == 5


async def test_without_a_head_start_circuits_come_after_all_direct_addresses(autojump_clock: MockClock) -> None:
    network = Network(a=ok(FOREVER), b=ok(FOREVER), c=ok(0.0))
    assert await lanes(network, "ab", "c", None) == "c"
    assert network.starts["c"] == pytest.approx(2 * DELAY)
