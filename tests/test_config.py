from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest

from kas_libp2p.config import Config, Mode
from kas_libp2p.errors import ConfigError


def test_plain_data_becomes_typed_settings() -> None:
    config = Config.from_mapping(
        {
            "listen": ["/ip4/127.0.0.1/tcp/0"],
            "key-file": "/keys/node.key",
            "mode": "full",
            "tcp_cooldown": 5,
            "limits": {"max-per-ip": 3, "idle_timeout": 1},
        }
    )
    assert config.listen == ("/ip4/127.0.0.1/tcp/0",)
    assert config.key_file == Path("/keys/node.key")
    assert config.mode is Mode.FULL
    assert config.tcp_cooldown == 5.0
    assert config.limits.max_per_ip == 3
    assert config.limits.max_connections == Config().limits.max_connections


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"colour": 1}, "unknown setting colour; allowed here: .*key_file"),
        ({"limits": {"max_per_galaxy": 1}}, r"unknown setting limits\.max_per_galaxy; allowed here: .*max_per_ip"),
        ({"limits": 3}, "limits must be a table"),
        ({"limits": {"max_per_ip": "many"}}, r"limits\.max_per_ip must be a whole number, not 'many'"),
        ({"limits": {"max_per_ip": True}}, "must be a whole number, not True"),
        ({"limits": {"idle_timeout": False}}, "must be a number, not False"),
        ({"listen": "/ip4/127.0.0.1/tcp/0"}, "listen must be a list"),
        ({"listen": [7]}, r"listen\[0\] must be a text, not 7"),
        ({"mode": "sideways"}, "mode must be one of off, bridge, full, not 'sideways'"),
        ({"key_file": 7}, "key_file must be a path"),
    ],
)
def test_a_wrong_setting_is_refused_by_name_with_what_is_allowed(values: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Config.from_mapping(values)


def test_none_is_allowed_only_where_it_means_something() -> None:
    assert Config.from_mapping({"key_file": None}).key_file is None
    with pytest.raises(ConfigError):
        Config.from_mapping({"mode": None})


def test_settings_are_values() -> None:
    assert Config() == Config()
    with pytest.raises(FrozenInstanceError):
        Config().mode = Mode.OFF  # type: ignore[misc]
