"""Small scenarios in every order in which things can happen: each order comes to rest, with every byte delivered.

A state is everything but the clock, which stands still until nothing else can happen. Whoever comes to a state by
another order goes on as before, so each is looked at once.
"""

from __future__ import annotations

import math
import pickle
from collections import deque
from collections.abc import Hashable, Iterator
from typing import Any

import pytest

from kas_libp2p.session._machine import Session
from kas_libp2p.session._wire import Code
from tests.session.world import World, small_numbers

Act = tuple[Any, ...]


@pytest.fixture(scope="module", autouse=True)
def _small() -> Iterator[None]:
    with small_numbers():
        yield


class Scenario(World):
    """A world in which each side has a list of things to do.

    Args:
        scripts: of both sides: ``write``, ``move``, ``finish``, ``close``.
        losses: how many paths are lost, at any time, whichever.
        noticed: by whom: ``both`` at once; or first by ``one``, and by the other one later; or by ``one, never both``.
    """

    def __init__(self, *scripts: str, losses: int = 0, noticed: str = "both") -> None:
        super().__init__()
        self.scripts = [each.split() for each in scripts]
        self.losses = losses
        self.noticed = noticed
        self.pump(0)
        while self.deliver(self.streams[0], 0):
            self.pump(1)
        while self.deliver(self.streams[0], 1):
            self.pump(0)

    def acts(self) -> list[Act]:
        """What can happen next."""
        acts: list[Act] = [("do", side) for side in (0, 1) if self.scripts[side] and self.may_do(side)]
        for stream in self.streams:
            number = stream.number
            if stream.lost:
                if self.noticed == "one":
                    left = [side for side in (0, 1) if not stream.noticed[side] and not stream.over[side]]
                    acts += [("notice", number, side) for side in left]
                continue
            acts += [("deliver", number, side) for side in (0, 1) if stream.queues[side]]
            if self.losses:
                acts += [("lose", number, each) for each in (((0, 1),) if self.noticed == "both" else ((0,), (1,)))]
        return acts

    def may_do(self, side: int) -> bool:
        return self.scripts[side][0] != "move" or self.may_attach(side)

    def pump(self, side: int, room: int = 1 << 20) -> bool:
        """What is written at once comes at once."""
        before = [len(each.queues[side]) for each in self.streams]
        taken = super().pump(side, room)
        for stream, length in zip(self.streams, before, strict=True):
            queue = stream.queues[side]
            new = [queue.pop() for _ in range(len(queue) - length)][::-1]
            written = b"".join(each for each in new if isinstance(each, bytes))
            if written:
                queue.append(written)
            queue.extend(each for each in new if isinstance(each, str))
        return taken

    def act(self, act: Act) -> None:
        if act[0] == "do":
            side = act[1]
            what = self.scripts[side].pop(0)
            if what == "write":
                self.write(side, 3)
            elif what == "move":
                self.attach(side)
            elif what == "finish":
                self.sides[side].finish(self.now)
            else:
                self.sides[side].close(self.now)
        elif act[0] == "deliver":
            self.deliver(self.streams[act[1] - 1], act[2])
        elif act[0] == "notice":
            self.notice(self.streams[act[1] - 1], act[2])
        else:
            self.losses -= 1
            self.lose(self.streams[act[1] - 1], now_noticed=act[2])
        for side in (0, 1):
            while self.read_some(side, None):
                pass
            self.pump(side)
        self.check()

    def key(self) -> Hashable:
        """The state."""
        return (
            tuple(map(key_of, self.sides)),
            tuple(
                (tuple(map(tuple, each.queues)), each.lost, tuple(each.noticed), tuple(each.over), tuple(each.eof))
                for each in self.streams
            ),
            tuple(map(tuple, self.scripts)),
            self.losses,
        )


def key_of(session: Session) -> Hashable:
    """All of a machine but its times."""
    leave_out = {"_commands", "_moved", "_tell_at", "_linger_at", "_lost_at", "_reason", "_paths", "_ahead", "deadline"}
    names = [each for each in Session.__slots__ if each not in leave_out]
    values = [getattr(session, each) for each in names]
    paths = [
        tuple(
            value if not isinstance(value, float) else math.isinf(value)
            for value in (getattr(each, name) for name in type(each).__slots__ if name not in ("parser", "heard"))
        )
        for each in session._paths
    ]
    return (
        tuple(
            tuple(each) if isinstance(each, list) else each.number if hasattr(each, "number") else each
            for each in values
        ),
        tuple(paths),
        tuple((each.start, each.end) for each in session._ahead or ()),
        session._tell_at == math.inf,
    )


def explore(start: Scenario) -> tuple[int, int]:
    """Every state that can be reached, and every end looked at.

    Returns:
        states, and ends.
    """
    seen = {start.key()}
    todo = deque([pickle.dumps(start)])
    ends = 0
    while todo:
        blob = todo.popleft()
        acts = pickle.loads(blob).acts()
        if not acts:
            ends += 1
            look_at_end(pickle.loads(blob))
            continue
        for act in acts:
            world: Scenario = pickle.loads(blob)
            world.act(act)
            key = world.key()
            if key not in seen:
                seen.add(key)
                todo.append(pickle.dumps(world))
    return len(seen), ends


def look_at_end(world: Scenario) -> None:
    lost = any(each.lost for each in world.streams)
    current = world.sides[0].current
    together = current is not None and current == world.sides[1].current and not world.streams[current - 1].lost
    if all(each.ended is None for each in world.sides):
        assert together or lost  # whoever moves, nothing has to be mended
        if together:
            assert world.read == world.written[::-1]  # without any timer
    world.settle()
    assert world.is_done()
    assert world.read == world.written[::-1]
    ends = [each.ended for each in world.sides]
    assert {end.code for end in ends if end is not None} <= {Code.ENDED}
    assert all(ends) == all(each.finished for each in world.sides)
    if not (lost or any(ends)):
        assert [each.resent + each.duplicate for each in world.sides] == [0, 0]


@pytest.mark.parametrize(
    ("scripts", "losses", "noticed", "states"),
    [
        (("move", "move"), 0, "both", 500),
        (("move move", ""), 0, "both", 50),
        (("move", "write write"), 1, "both", 1000),
        (("write move", "write"), 1, "both", 500),
        (("move", "write"), 1, "one", 500),
        (("write move", "write"), 1, "one, never both", 500),
        (("finish", "move finish"), 0, "both", 300),
        (("write finish", "finish"), 1, "one", 100),
    ],
)
def test_every_order(scripts: tuple[str, str], losses: int, noticed: str, states: int) -> None:
    seen, ends = explore(Scenario(*scripts, losses=losses, noticed=noticed))
    assert seen >= states
    assert ends > 1


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("scripts", "losses", "noticed"),
    [
        (("move write", "write move"), 0, "both"),
        (("write finish", "move finish"), 0, "both"),
        (("move move", "move"), 0, "both"),
        (("move", "move"), 1, "both"),
        (("move", "move"), 1, "one"),
        (("write move", "move"), 1, "one, never both"),
        (("write move", "write"), 2, "one"),
        (("write finish", "move finish"), 1, "both"),
    ],
)
def test_every_order_at_length(scripts: tuple[str, str], losses: int, noticed: str) -> None:
    explore(Scenario(*scripts, losses=losses, noticed=noticed))
