"""docs/kas-bridge.md names everything that there is, with the defaults that hold."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
from trio.testing import MockClock

from kas_bridge import _control, cli, events
from kas_bridge._kaspad import Condition
from kas_bridge.bans import DEFAULT_SECONDS
from kas_bridge.config import TABLES, Settings, read_file, setting_names
from kas_bridge.control import MAX_CONNECTIONS, SILENCE, WRITE_TIMEOUT
from kas_libp2p.events import Event
from kas_libp2p.kaspa.join import End, Side
from kas_libp2p.strategy._nat import Chance
from kas_libp2p.strategy._upgrade import State

from .world import until, world

TEXT = Path(__file__).parents[2].joinpath("docs", "kas-bridge.md").read_text(encoding="utf-8")
ROWS: dict[str, str] = dict(re.findall(r"^\| `([a-z.-]+)` \| (.*?) \|", TEXT, re.MULTILINE))


def default(name: str) -> Any:
    table, dot, rest = name.partition(".")
    holder: Any = getattr(Settings(), table) if dot else Settings()
    return getattr(holder, (rest or table).replace("-", "_"))


@pytest.mark.parametrize("name", setting_names())
def test_every_setting_with_its_default(name: str) -> None:
    shown, value = ROWS[name], default(name)
    if name == "listen":
        assert shown == ", ".join(f"`{each}`" for each in value)
    elif value in (None, ()) or name == "data-dir":
        assert shown  # in words
    else:
        assert shown == f"`{str(value).lower()}`"


def test_no_setting_that_there_is_not() -> None:
    files = {
        "config.toml",
        "key",
        "relays.json",
        "punches.json",
        "sources.json",
        "listeners.json",
        "bans.json",
        "lock",
        "control.sock",
    }
    actions = {"connect", "ban", "unban", "events"}
    assert set(ROWS) - files - actions == set(setting_names())


def test_the_example_of_a_file(tmp_path: Path) -> None:
    found = re.search(r"```toml\n(.*?)```", TEXT, re.DOTALL)
    assert found is not None
    path = tmp_path / "config.toml"
    path.write_text(found[1])
    assert read_file(path)["limits"] == {"max-per-ip": 4}
    assert set(TABLES) == {"relaying", "limits", "dial", "yamux", "autonat", "punch", "session"}


def test_every_command_and_action() -> None:
    for command in cli.app:
        if not command.startswith("-"):
            assert f"\nkas-bridge {command} " in TEXT
    for action, fields in _control.ACTIONS.items():
        for name in (action, *fields):
            assert f"`{name}`" in TEXT
    for number in (_control.MAX_LINE, int(SILENCE), int(WRITE_TIMEOUT), MAX_CONNECTIONS, int(DEFAULT_SECONDS)):
        assert re.search(rf"\b{number}\b", TEXT), number


@pytest.mark.parametrize("words", [Condition, End, Side, State, Chance])
def test_every_word(words: Any) -> None:
    assert [each for each in words if f"`{each}`" not in TEXT] == []


def test_every_event() -> None:
    kinds = [each for each in vars(events).values() if isinstance(each, type) and issubclass(each, Event)]
    assert [each.__name__ for each in kinds if f"`{_name(each)}`" not in TEXT and each is not Event] == []
    assert all(dataclasses.is_dataclass(each) for each in kinds)


def _name(kind: type) -> str:
    return re.sub(r"(?<!^)([A-Z])", r"-\1", kind.__name__).lower()


async def test_every_key_of_the_answers(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with world(tmp_path) as w:
        b = await w.machine()
        a = await w.machine(peer=(b.address,))
        await until(lambda: a.bridge.status()["peers"]["joined"])
        status = a.bridge.status()
        answers = [status, status["kaspad"], status["peers"], *a.bridge.peers(), a.bridge.peers()[0]["node"]]
        answers += [a.bridge.connect(b.address), a.bridge.why(b.peer), await a.bridge.ban("10.9.9.9")]
        answers += [a.bridge.status()["bans"][0], await a.bridge.disconnect(b.peer)]
    for answer in answers:
        assert [key for key in answer if f"`{key}`" not in TEXT] == []
