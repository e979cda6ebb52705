import pytest
import trio
import trio.testing

from kas_libp2p.events import (
    SUBSCRIBER_QUEUE,
    EventBus,
    EventsLost,
    InboundRefused,
    Listening,
    PeerMisbehaved,
    to_dict,
)


def bus() -> EventBus:
    return EventBus(lambda: 1700000000.0)


async def test_every_subscriber_gets_every_event_stamped() -> None:
    events = bus()
    with events.subscribe() as one, events.subscribe() as two:
        events.emit(Listening(address="/ip4/127.0.0.1/tcp/1"))
        for subscription in (one, two):
            event = await anext(subscription)
            assert event == Listening(address="/ip4/127.0.0.1/tcp/1", at=1700000000.0)


async def test_who_does_not_keep_up_loses_the_oldest_and_is_told_how_many() -> None:
    events = bus()
    with events.subscribe() as slow:
        for port in range(SUBSCRIBER_QUEUE + 3):
            events.emit(Listening(address=str(port)))
        assert await anext(slow) == EventsLost(count=3)
        assert await anext(slow) == Listening(address="3", at=1700000000.0)


async def test_a_waiting_subscriber_wakes_and_ends_with_the_bus(autojump_clock: trio.abc.Clock) -> None:
    events = bus()
    seen = []

    async def listen(task_status: trio.TaskStatus[None]) -> None:
        with events.subscribe() as subscription:
            task_status.started()
            async for event in subscription:
                seen.append(event.name)

    async with trio.open_nursery() as nursery:
        await nursery.start(listen)
        await trio.testing.wait_all_tasks_blocked()
        events.emit(Listening(address="a"))
        await trio.testing.wait_all_tasks_blocked()
        assert seen == ["listening"]
        events.close()


async def test_waiting_can_be_cancelled_and_loses_nothing() -> None:
    events = bus()
    with events.subscribe() as subscription:
        with trio.move_on_after(0):
            await anext(subscription)
        events.emit(Listening(address="a"))
        assert [each.name for each in subscription.pending()] == ["listening"]
        assert (await anext(subscription)).name == "listening"
        assert not subscription.pending()


def test_events_are_counted_with_nobody_listening() -> None:
    events = bus()
    events.emit(InboundRefused(address="a", reason="max_per_ip"))
    events.emit(InboundRefused(address="b", reason="max_per_ip"))
    events.emit(PeerMisbehaved(peer=None, address="a", layer="yamux", reason="window"))
    assert events.counts["inbound-refused", "max_per_ip"] == 2
    assert events.counts["peer-misbehaved", "yamux"] == 1


def test_an_event_is_plain_data_for_a_program() -> None:
    data = to_dict(InboundRefused(address="a", reason="deny", at=1.5))
    assert data == {"event": "inbound-refused", "at": 1.5, "address": "a", "reason": "deny"}


async def test_a_subscription_outside_its_block_is_over() -> None:
    events = bus()
    with events.subscribe() as subscription:
        pass
    events.emit(Listening(address="a"))
    with pytest.raises(StopAsyncIteration):
        await anext(subscription)
