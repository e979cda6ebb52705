import math
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import pytest

from kas_libp2p.config import Config, Limits, Mode, RelayConfig, RelayLimits
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
        ({"tcp_cooldown": 0}, "tcp_cooldown must be a number of seconds above 0, not 0"),
        ({"limits": {"max-per-ip": 0}}, r"limits\.max_per_ip must be 1 or more, not 0"),
        ({"limits": {"max_inbound": -1}}, r"limits\.max_inbound must be 0 or more, not -1"),
        ({"dial": {"tcp_timeout": float("nan")}}, r"dial\.tcp_timeout must be a number of seconds above 0, not nan"),
        ({"yamux": {"max_window": 1000}}, r"yamux\.max_window must be 262144 or more, not 1000"),
        ({"relay": {"limits": {"max_circuits": -1}}}, r"relay\.limits\.max_circuits must be 0 or more, not -1"),
        ({"relay": {"operator": "x" * 65}}, r"relay\.operator must be at most 64 characters that can be shown"),
        ({"relay": {"operator": "a\nb"}}, r"relay\.operator must be at most 64 characters that can be shown"),
    ],
)
def test_a_wrong_setting_is_refused_by_name_with_what_is_allowed(values: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Config.from_mapping(values)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"listen": "/ip4/127.0.0.1/tcp/0"}, "listen must be a list"),
        ({"mode": "sideways"}, "mode must be one of off, bridge, full"),
        ({"limits": Limits(max_per_ip=0)}, r"limits\.max_per_ip must be 1 or more, not 0"),
        ({"limits": Limits(max_per_ip="3")}, r"limits\.max_per_ip must be a whole number, not '3'"),
        ({"limits": None}, "limits must be a table of settings"),
        ({"relay": RelayConfig(limits=RelayLimits(request_interval=-1.0))}, r"relay\.limits\.request_interval must be"),
    ],
)
def test_what_is_made_in_python_is_checked_as_well(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Config(**values)


def test_lists_and_plain_values_become_what_they_stand_for() -> None:
    config = Config(listen=["/ip4/127.0.0.1/tcp/0"], deny=["192.0.2.1"], key_file="~/key", mode="off")  # type: ignore[arg-type]
    assert (config.listen, config.deny) == (("/ip4/127.0.0.1/tcp/0",), ("192.0.2.1",))
    assert config.key_file == Path.home() / "key"
    assert config.mode is Mode.OFF


def test_a_time_may_be_infinite_and_some_limits_zero() -> None:
    config = Config(
        limits=Limits(idle_timeout=math.inf, max_inbound=0),
        relay=RelayConfig(target=0, limits=RelayLimits(max_circuit_seconds=0.0, max_circuit_bytes=0)),
    )
    assert config.limits.idle_timeout == math.inf


def test_none_is_allowed_only_where_it_means_something() -> None:
    assert Config.from_mapping({"key_file": None}).key_file is None
    with pytest.raises(ConfigError):
        Config.from_mapping({"mode": None})


def test_settings_are_values() -> None:
    assert Config() == Config()
    with pytest.raises(FrozenInstanceError):
        Config().mode = Mode.OFF  # type: ignore[misc]
