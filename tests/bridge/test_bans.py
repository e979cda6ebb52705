from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest

from kas_bridge import bans as bans_module
from kas_bridge.bans import DEFAULT_SECONDS, LONGEST, Bans, BansError
from kas_libp2p.errors import ConfigError

PEER = "12D3KooWKWQMLKnDg9BizoExsXWiuebcitxtJa3LCHdcWT2jP7yG"


def test_who_is_out() -> None:
    bans = Bans(None)
    bans.add(PEER, 0.0)
    bans.add("203.0.113.0/24", 0.0)
    bans.add("198.51.100.7", 0.0)
    bans.add("2001:db8::/64", 0.0)
    for peer, ip, target in (
        (PEER, None, PEER),
        (PEER, "10.0.0.1", PEER),
        ("other", "203.0.113.255", "203.0.113.0/24"),
        ("other", "::ffff:203.0.113.1", "203.0.113.0/24"),
        ("other", "198.51.100.7", "198.51.100.7"),
        ("other", "2001:db8::5", "2001:db8::/64"),
    ):
        ban = bans.find(peer, ip, 1.0)
        assert ban is not None
        assert ban.target == target
    for peer, ip in (("other", None), ("other", "203.0.114.1"), ("other", "198.51.100.8"), ("other", "2001:db8:1::5")):
        assert bans.find(peer, ip, 1.0) is None


def test_a_ban_ends() -> None:
    bans = Bans(None)
    bans.add(PEER, 100.0)
    assert bans.find(PEER, None, 100.0 + DEFAULT_SECONDS - 1)
    assert bans.find(PEER, None, 100.0 + DEFAULT_SECONDS) is None
    assert bans.current(100.0 + DEFAULT_SECONDS) == []
    assert not bans.remove(PEER, 100.0 + DEFAULT_SECONDS)
    bans.add(PEER, 100.0, seconds=None)
    assert bans.find(PEER, None, 1e12)


@pytest.mark.parametrize("seconds", [0.0, -1.0, LONGEST * 2, float("nan"), float("inf")])
def test_times_that_make_no_sense(seconds: float) -> None:
    with pytest.raises(ConfigError, match="or null for good"):
        Bans(None).add(PEER, 0.0, seconds=seconds)


def test_they_survive_a_restart(tmp_path: Path) -> None:
    path = tmp_path / "bans.json"
    bans = Bans(path)
    bans.add(PEER, 10.0, seconds=5.0, reason="rude")
    bans.add("10.0.0.0/8", 10.0, seconds=None)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert Bans(path).current(11.0) == bans.current(11.0)
    assert bans.remove(PEER, 11.0)
    assert [ban.target for ban in Bans(path).current(11.0)] == ["10.0.0.0/8"]
    assert list(tmp_path.iterdir()) == [path], "nothing half-written stays"


def test_lifting() -> None:
    bans = Bans(None)
    bans.add("10.1.2.3/8", 0.0)
    assert bans.remove("10.0.0.0/8", 0.0)
    assert not bans.remove("10.0.0.0/8", 0.0)
    with pytest.raises(ConfigError, match="a ban must be a peer id, an IP address or a network"):
        bans.remove("nobody", 0.0)
    with pytest.raises(ConfigError, match="a ban must be a peer id"):
        bans.add("nobody", 0.0)


def test_a_full_list_says_so_and_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bans_module, "MAX_BANS", 2)
    bans = Bans(None)
    bans.add("10.0.0.1", 0.0, seconds=1.0)
    bans.add("10.0.0.2", 0.0)
    with pytest.raises(BansError, match="kas-bridge unban, or use --deny"):
        bans.add("10.0.0.3", 0.5)
    assert len(bans.current(0.5)) == 2
    bans.add("10.0.0.3", 2.0)
    assert [ban.target for ban in bans.current(2.0)] == ["10.0.0.2", "10.0.0.3"]


@pytest.mark.parametrize(
    "text",
    [
        "nonsense",
        "[]",
        "{}",
        '{"bans": 5}',
        '{"bans": [{"target": "nobody", "since": 0, "until": null}]}',
        '{"bans": [{"target": "10.0.0.1"}]}',
        '{"bans": [5]}',
    ],
)
def test_a_damaged_file_is_not_overwritten(text: str, tmp_path: Path) -> None:
    path = tmp_path / "bans.json"
    path.write_text(text)
    with pytest.raises(BansError, match="repair it, or remove it to start without bans"):
        Bans(path)
    assert path.read_text() == text


def test_a_file_that_can_not_be_written(tmp_path: Path) -> None:
    bans = Bans(tmp_path / "none" / "bans.json")
    with pytest.raises(BansError, match="can't write"):
        bans.add(PEER, 0.0)
    assert bans.find(PEER, None, 0.0) is None


def test_the_format(tmp_path: Path) -> None:
    path = tmp_path / "bans.json"
    Bans(path).add(PEER, 10.0, seconds=5.0, reason="x" * 1000)
    assert json.loads(path.read_text()) == {
        "version": 1,
        "bans": [{"target": PEER, "since": 10.0, "until": 15.0, "reason": "x" * 256}],
    }
