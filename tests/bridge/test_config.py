"""Settings, and the three places where they come from."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from kas_bridge import cli
from kas_bridge.config import (
    CONFIG_FILE,
    PATH_PROBE,
    SYNC_WINDOW,
    Network,
    RelayLimitChanges,
    RelayPreset,
    RelaySettings,
    Settings,
    check_environment,
    default_data_dir,
    environment_name,
    format_endpoint,
    parse_endpoint,
    parse_entry,
    parse_rate,
    parse_sources,
    read_file,
    setting_names,
)
from kas_libp2p.config import MIB, PunchConfig, Purpose, RelayConfig, RelayLimits, Role
from kas_libp2p.errors import ConfigError

PEER = "12D3KooWKWQMLKnDg9BizoExsXWiuebcitxtJa3LCHdcWT2jP7yG"


def main(*argv: str) -> None:
    """The command; raises if it fails."""
    try:
        cli.main(argv)
    except SystemExit as left:
        if left.code:
            raise


@pytest.fixture
def ran(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs ``kas-bridge run`` as far as its settings are known, and gives them."""
    for name in setting_names():
        monkeypatch.delenv(environment_name(name), raising=False)
    found: list[Settings] = []

    async def serve(settings: Settings, **_: Any) -> None:
        found.append(settings)

    monkeypatch.setattr("kas_bridge.run.serve", serve)

    def run(*flags: str, file: str = "", **environment: str) -> Settings:
        (tmp_path / CONFIG_FILE).write_text(file)
        with monkeypatch.context() as patched:
            for name, value in environment.items():
                patched.setenv(name, value)
            main("run", f"--data-dir={tmp_path}", *flags)
        return found.pop()

    return run


def test_defaults(ran: Any, tmp_path: Path) -> None:
    assert ran() == Settings(data_dir=tmp_path)
    assert ran().yamux.max_window == SYNC_WINDOW
    assert ran().yamux.keepalive == PATH_PROBE


def test_flags_win_over_the_environment_and_that_over_the_file(ran: Any) -> None:
    file = 'max-joined = 3\nmax_pending = 5\nupload-limit = "1MB"\n[limits]\nmax-per-ip = 7\nidle-timeout = 30\n'
    environment = {"KAS_BRIDGE_MAX_JOINED": "2", "KAS_BRIDGE_UPLOAD_LIMIT": "2MB", "KAS_BRIDGE_LIMITS_MAX_PER_IP": "8"}
    settings = ran("--max-joined=1", file=file, **environment)
    assert (settings.max_joined, settings.max_pending, settings.upload_rate) == (1, 5, 2e6)
    assert (settings.limits.max_per_ip, settings.limits.idle_timeout) == (8, 30.0)
    settings = ran("--limits.max-per-ip=9", file=file, **environment)
    assert (settings.max_joined, settings.limits.max_per_ip) == (2, 9)


def test_one_setting_of_a_table_leaves_the_others(ran: Any) -> None:
    settings = ran(file="[yamux]\nmax-inbound-streams = 5\n")
    assert settings.yamux.max_inbound_streams == 5
    assert settings.yamux.max_window == SYNC_WINDOW


def test_a_relay_takes_what_is_not_of_kaspad(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found: list[RelaySettings] = []

    async def serve(settings: RelaySettings, **_: Any) -> None:
        found.append(settings)

    monkeypatch.setattr("kas_bridge.run.serve", serve)
    monkeypatch.setenv("KAS_BRIDGE_MAX_JOINED", "5")
    monkeypatch.setenv("KAS_BRIDGE_RELAY_PURPOSE", "any")
    (tmp_path / CONFIG_FILE).write_text('max-joined = 3\nserve-relay = false\nrelay-limits = "open"\n')
    main("relay", f"--data-dir={tmp_path}", "--role=auto")
    (settings,) = found
    assert (settings.role, settings.relay_purpose, settings.relay_limits) == (Role.AUTO, Purpose.ANY, RelayPreset.OPEN)
    config = settings.overlay_config()
    assert config.relay.serve
    assert (config.relay.purpose, config.relay.limits) == (Purpose.ANY, RelayLimits.open())
    assert config.limits.max_inbound > config.relay.limits.max_reservations
    for flag in ("--kaspad=127.0.0.1:1", "--no-serve-relay"):
        with pytest.raises(SystemExit) as left:
            main("relay", f"--data-dir={tmp_path}", flag)
        assert left.value.code == 2
        assert "unknown option" in capsys.readouterr().err.lower()
    assert RelaySettings().role is Role.PUBLIC


def test_single_limits_of_a_relay_count_in_place_of_the_presets(ran: Any) -> None:
    file = 'relay-limits = "open"\n[relaying]\nmax-circuits = 5\nmax-circuit-rate = 4194304\nrequest-interval = 3\n'
    settings = ran("--relaying.max-circuits=6", file=file, KAS_BRIDGE_RELAYING_REQUESTS_PER_PEER="9")
    expected = dataclasses.replace(
        RelayLimits.open(), max_circuits=6, max_circuit_rate=4 * MIB, request_interval=3.0, requests_per_peer=9
    )
    assert settings.overlay_config().relay.limits == settings.given_away() == expected
    assert ran(file="[relaying]\nmax-circuit-rate = 0\n").given_away() == RelayLimits(max_circuit_rate=0)


def test_each_limit_of_a_relay_can_be_set() -> None:
    def fields(kind: type) -> list[str]:
        return [each.name for each in dataclasses.fields(kind)]

    assert fields(RelayLimitChanges) == fields(RelayLimits)


def test_settings_that_may_be_repeated(ran: Any) -> None:
    one, two = f"/ip4/192.0.2.1/tcp/1/p2p/{PEER}", f"/dns4/example.org/tcp/2/p2p/{PEER}"
    assert ran(f"--peer={one}", f"--peer={two}").peer == (one, two)
    assert ran(file=f'peer = ["{one}", "{two}"]').peer == (one, two)
    assert ran(KAS_BRIDGE_PEER=f"{one} {two}").peer == (one, two)
    assert ran(KAS_BRIDGE_DENY="10.0.0.0/8 1.2.3.4").deny == ("10.0.0.0/8", "1.2.3.4")
    assert ran("--no-listen").listen == ()
    assert ran(file="listen = []").listen == ()


def test_a_data_directory_from_the_environment_names_the_file(
    ran: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / CONFIG_FILE).write_text("max-joined = 9")
    assert ran().max_joined == 64
    monkeypatch.setenv("KAS_BRIDGE_DATA_DIR", str(other))
    found: list[Settings] = []

    async def serve(settings: Settings, **_: Any) -> None:
        found.append(settings)

    monkeypatch.setattr("kas_bridge.run.serve", serve)
    main("run")
    assert (found[0].data_dir, found[0].max_joined) == (other, 9)


WRONG = [
    ("max-joined", '"abc"', "max-joined must be a whole number, not 'abc'"),
    ("max-joined", "1.5", "max-joined must be a whole number, not 1.5"),
    ("max-joined", "true", "max-joined must be a whole number, not True"),
    ("max-joined", "5000", "max-joined must be 1 to 4096, not 5000"),
    ("max-pending", "33", "max-pending must be 1 to 32, not 33"),
    ("max-pending-per-source", "3", "max-pending-per-source must be 1 to 2, not 3"),
    ("max-pending-per-host", "0", "max-pending-per-host must be 1 to 32, not 0"),
    ("listener-port", "0", "listener-port must be 1 to 65535, not 0"),
    ("network", '"foonet"', "network must be one of mainnet, testnet-10, simnet, devnet, not 'foonet'"),
    ("kaspad", '"localhost"', "kaspad must be host:port, such as 127.0.0.1:16111, not 'localhost'"),
    ("kaspad", '"localhost:99999"', "kaspad: port 99999 is not in 1 to 65535"),
    ("rpc", '"no"', "rpc must be host:port"),
    ("source", '["here"]', "source must be an IP address, a network such as 127.1.0.0/16, or \"one\", not 'here'"),
    ("source", '["one", "127.1.0.0/16"]', '"one" can\'t stand beside other sources'),
    ("listen", '"/ip4/0.0.0.0/tcp/1"', "listen must be a list, not '/ip4/0.0.0.0/tcp/1'"),
    ("listen", '["nowhere"]', "listen or --announce: nowhere is no multiaddr"),
    ("peer", '["/ip4/192.0.2.1/tcp/1"]', "does not end in /p2p/<peer id>"),
    ("allow", '["everybody"]', "allow must be a peer id, an IP address or a network such as 203.0.113.0/24"),
    ("deny", '["10.0.0.0/99"]', "deny must be a peer id"),
    ("compress", '"perhaps"', "compress must be true or false, not 'perhaps'"),
    ("upload-limit", '"5 apples"', "upload-limit must be bytes per second, such as 500kB or 2MB, or 0 for none"),
    ("role", '"home"', "role must be one of auto, private, public, not 'home'"),
    ("relay", '["/ip4/192.0.2.1/tcp/1"]', "leads to no relay: it looks like /ip4/192.0.2.1/tcp/16117/p2p/12D3KooW…"),
    ("relay", f'["/ip4/192.0.2.1/tcp/1/p2p/{PEER}/p2p-circuit/p2p/{PEER}"]', "leads to no relay"),
    ("relay-target", "17", "relay-target must be 0 to 16, not 17"),
    ("relay-operator", '"' + "x" * 65 + '"', "relay-operator must be a domain or a name of at most 64 characters"),
    (
        "relay-operator",
        '"a\\u0007"',
        "relay-operator must be a domain or a name of at most 64 characters, not 'a\\x07'",
    ),
    ("relay-purpose", '"mine"', "relay-purpose must be one of overlay, any, not 'mine'"),
    ("relay-limits", '"none"', "relay-limits must be one of default, reference, open, not 'none'"),
    ("relaying", "5", "relaying must be a table of settings, not 5"),
    ("relaying.max-circuits", "-1", "relaying.max-circuits must be 0 or more, not -1"),
    ("relaying.max-circuits", "1.5", "relaying.max-circuits must be a whole number, not 1.5"),
    ("relaying.requests-per-ip", "0", "relaying.requests-per-ip must be 1 or more, not 0"),
    ("relaying.reservation-seconds", "0", "relaying.reservation-seconds must be a number of seconds above 0, not 0"),
    ("autonat.refresh", "0", "autonat.refresh must be a number of seconds above 0, not 0"),
    ("upload-limit", "-5", "upload-limit must be bytes per second"),
    ("limits", "5", "limits must be a table of settings, not 5"),
    ("limits.max-connections", "0", "limits.max-connections must be 1 or more, not 0"),
    ("limits.idle-timeout", "nan", "limits.idle-timeout must be a number of seconds above 0, not nan"),
    ("yamux.max-window", "1000", "yamux.max-window must be 262144 or more, not 1000"),
    ("dial.tcp-timeout", "-1", "dial.tcp-timeout must be a number of seconds above 0, not -1"),
]


@pytest.mark.parametrize(("name", "value", "problem"), WRONG)
def test_a_wrong_value_is_refused_by_name(name: str, value: str, problem: str, tmp_path: Path) -> None:
    path = tmp_path / CONFIG_FILE
    path.write_text(f"{name} = {value}\n")
    with pytest.raises(ConfigError) as refused:
        read_file(path)
    assert str(refused.value).startswith(f"{path}: ")
    assert problem in str(refused.value)


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("max-joined", "must be a whole number, not 'wrong'"),
        ("network", 'Choose from: "mainnet", "testnet-10", "simnet", "devnet"'),
        ("limits.max-per-ip", "must be a whole number, not 'wrong'"),
        ("relaying.max-circuits", "must be a whole number, not 'wrong'"),
        ("dial.tcp-timeout", 'unable to convert "wrong" into float'),
        ("compress", 'unable to convert "wrong" into bool'),
        ("role", 'Choose from: "auto", "private", "public"'),
        ("relay", "--relay: wrong is no multiaddr"),
        ("rpc", "--rpc must be host:port"),
        ("peer", "--peer: wrong is no multiaddr"),
    ],
)
def test_a_wrong_value_elsewhere(name: str, problem: str, ran: Any, capsys: pytest.CaptureFixture[str]) -> None:
    flag, variable = f"--{name}", environment_name(name)
    for flags, environment, where in (([f"{flag}=wrong"], {}, flag), ([], {variable: "wrong"}, variable)):
        with pytest.raises(SystemExit) as left:
            ran(*flags, **environment)
        told = capsys.readouterr().err
        assert left.value.code == 2
        assert problem in told
        assert where in told or flag in told


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("max-joyned = 5", "unknown setting max-joyned (did you mean max-joined?); allowed: listen, announce"),
        (
            "[limits]\nmax-conections = 5",
            "limits.max-conections (did you mean limits.max-connections?); allowed: limits.",
        ),
        (
            "[relaying]\nmax-circuit-rat = 5",
            "relaying.max-circuit-rat (did you mean relaying.max-circuit-rate?); allowed: relaying.max-reservations",
        ),
        ("[frob]\nx = 5", "unknown setting frob.x; allowed: listen"),
        ('data-dir = "/tmp"', "unknown setting data-dir"),
        ("json = true", "unknown setting json"),
        ("no toml", "is no valid TOML"),
        ("a = '\udcff'", "is no valid TOML"),
    ],
)
def test_an_unknown_name_in_the_file(text: str, problem: str, tmp_path: Path) -> None:
    path = tmp_path / CONFIG_FILE
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ConfigError) as refused:
        read_file(path)
    assert problem in str(refused.value)
    assert str(path) in str(refused.value)


def test_a_file_that_can_not_be_read(tmp_path: Path) -> None:
    assert read_file(tmp_path / "none") == {}
    with pytest.raises(ConfigError, match="can't read"):
        read_file(tmp_path)


def test_unknown_names_in_the_environment() -> None:
    check_environment({"KAS_BRIDGE_MAX_JOINED": "", "HOME": "", "KAS_BRIDGE_DATA_DIR": ""})
    with pytest.raises(ConfigError, match=r"KAS_BRIDGE_MAX_JOYNED \(did you mean KAS_BRIDGE_MAX_JOINED\?\); allowed"):
        check_environment({"KAS_BRIDGE_MAX_JOYNED": "1"})


@pytest.mark.parametrize("value", ["1.5", "0x10", "1_0", "-1", ""])
def test_whole_numbers_are_not_rounded(value: str, ran: Any, capsys: pytest.CaptureFixture[str]) -> None:
    for flags, environment in (([f"--max-joined={value}"], {}), ([], {"KAS_BRIDGE_MAX_JOINED": value})):
        with pytest.raises(SystemExit) as left:
            ran(*flags, **environment)
        assert left.value.code == 2
        assert f"must be a whole number, not {value!r}" in capsys.readouterr().err


def test_an_unknown_flag(ran: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        ran("--max-joyned=5")
    assert left.value.code == 2
    assert "--max-joyned. Did you mean --max-joined?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "found"),
    [("0", 0), ("500kB", 500e3), ("2 MB/s", 2e6), ("1.5MiB", 1.5 * 2**20), (" 7 ", 7), ("1GB", 1e9)],
)
def test_rates(text: str, found: float) -> None:
    assert parse_rate(text) == found


def test_endpoints() -> None:
    for text, found in {
        "127.0.0.1:1": ("127.0.0.1", 1),
        "[::1]:2": ("::1", 2),
        "host.example:3": ("host.example", 3),
    }.items():
        assert parse_endpoint(text) == found
        assert format_endpoint(*found) == text
    for wrong in ("", "host", ":5", "::1:5", "host:", "host:x", "host:0", "[::1]", "host:-5", "host:٣"):
        with pytest.raises(ConfigError):
            parse_endpoint(wrong)


def test_entries_and_sources_are_normal() -> None:
    assert parse_entry("10.1.2.3/8") == "10.0.0.0/8"
    assert parse_entry("::FFFF") == "::ffff"
    assert parse_entry(PEER) == PEER
    assert parse_sources(()) == ()
    assert parse_sources(("one",)) is None
    assert [str(each) for each in parse_sources(("127.5.0.0/16", "10.0.0.7")) or ()] == ["127.5.0.0/16", "10.0.0.7/32"]


def test_networks() -> None:
    assert [(each.kaspa_name, each.rpc_port, each.p2p_port) for each in Network] == [
        ("kaspa-mainnet", 16110, 16111),
        ("kaspa-testnet-10", 16210, 16211),
        ("kaspa-simnet", 16510, 16511),
        ("kaspa-devnet", 16610, 16611),
    ]


def test_the_default_data_directory() -> None:
    assert default_data_dir({"XDG_DATA_HOME": "/x"}) == Path("/x/kas-bridge")
    assert default_data_dir({"XDG_DATA_HOME": "relative"}) == Path("~/.local/share/kas-bridge").expanduser()
    assert default_data_dir({}) == Path("~/.local/share/kas-bridge").expanduser()


def test_settings_reach_the_node() -> None:
    settings = Settings(data_dir=Path("/x"), allow=("10.0.0.0/8",), announce=("/ip4/192.0.2.1/tcp/1",))
    config = settings.overlay_config()
    for each in (
        "listen",
        "announce",
        "allow",
        "deny",
        "role",
        "port_mapping",
        "limits",
        "dial",
        "yamux",
        "autonat",
        "session",
    ):
        assert getattr(config, each) == getattr(settings, each)
    assert config.relay == RelayConfig(state_file=Path("/x/relays.json"))
    assert config.punch == PunchConfig(state_file=Path("/x/punches.json"))
    elsewhere = PunchConfig(quiet=True, state_file=Path("/y/punches.json"))
    assert dataclasses.replace(settings, punch=elsewhere).overlay_config().punch == elsewhere
    relay = f"/ip4/192.0.2.1/tcp/16117/p2p/{PEER}"
    settings = dataclasses.replace(settings, relay=(relay,), relay_target=2, serve_relay=True)
    settings = dataclasses.replace(settings, relay_operator="relays.example")
    told = settings.overlay_config().relay
    assert (told.relays, told.target, told.serve, told.purpose) == ((relay,), 2, True, Purpose.OVERLAY)
    assert told.operator == "relays.example"
    assert config.key_file == Path("/x/key")
    assert dataclasses.replace(settings, max_joined=5).max_joined == 5
