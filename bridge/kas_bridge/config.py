"""Every setting of the bridge, with its unit and default, and where it may come from.

A setting has one name. ``max_joined`` is the flag ``--max-joined``, the environment variable ``KAS_BRIDGE_MAX_JOINED``
and the key ``max-joined`` of ``config.toml`` in the data directory; the first of these that is given wins, before the
default. A name that is unknown in any of the three is refused, with the allowed ones.
"""

from __future__ import annotations

import dataclasses
import difflib
import ipaddress
import math
import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from kas_libp2p.addresses import parse, parse_peer_id, peer_of
from kas_libp2p.config import MIB, Config, DialConfig, Limits, YamuxConfig, from_mapping
from kas_libp2p.errors import AddressError, ConfigError
from kas_libp2p.units import parse_size

ENVIRONMENT_PREFIX = "KAS_BRIDGE_"
CONFIG_FILE = "config.toml"
DEFAULT_PORT = 16117
"""Overlay port: free beside kaspad's own (16110 RPC, 16111 P2P) and their websocket neighbours."""
DEFAULT_LISTENER_PORT = 16118
SYNC_WINDOW = 32 * MIB
"""Bytes to which a stream's window may grow. A syncing kaspad asks for 99 blocks and waits for them: 25 MB if they are
full. With a window below that, every such batch costs another round trip (at 200 ms: 40 instead of 52 MB/s)."""
PATH_PROBE = 5.0
"""Seconds of silence after which a connection is pinged. A path that hangs is found within these and
`YamuxConfig.ping_timeout`, whatever a stream on it speaks; between bridges the message dialect finds it in five."""
KASPAD_INBOUND_SLOTS = 128
"""kaspad's own default of ``--maxinpeers``. Above it kaspad evicts peers at random, and not only ours."""


class Network(StrEnum):
    """The Kaspa networks, with the ports that kaspad opens for each by default."""

    MAINNET = "mainnet"
    TESTNET_10 = "testnet-10"
    SIMNET = "simnet"
    DEVNET = "devnet"

    @property
    def p2p_port(self) -> int:
        """TCP port of kaspad's P2P server."""
        return self.rpc_port + 1

    @property
    def rpc_port(self) -> int:
        """TCP port of kaspad's gRPC server."""
        return {"mainnet": 16110, "testnet-10": 16210, "simnet": 16510, "devnet": 16610}[self.value]

    @property
    def kaspa_name(self) -> str:
        """The name that stands in a Version message."""
        return f"kaspa-{self.value}"


Several = Annotated[tuple[str, ...], Parameter(negative=(), show_default=False)]
"""A setting that may be given more than once; by default not at all."""


def default_data_dir(environ: Mapping[str, str] = os.environ) -> Path:
    """``$XDG_DATA_HOME/kas-bridge``, or ``~/.local/share/kas-bridge``."""
    base = environ.get("XDG_DATA_HOME", "")
    return (Path(base) if base.startswith("/") else Path("~/.local/share").expanduser()) / "kas-bridge"


@dataclass(frozen=True, slots=True, kw_only=True)
class BridgeYamux(YamuxConfig):
    """Stream multiplexing with the bridge's own defaults.

    Attributes:
        max_window: see `SYNC_WINDOW`.
        keepalive: see `PATH_PROBE`.
    """

    max_window: int = SYNC_WINDOW
    keepalive: float = PATH_PROBE


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The bridge's settings. Each is a flag, a ``KAS_BRIDGE_*`` variable and a key of ``config.toml``.

    Attributes:
        data_dir: directory with the key, the bans, the source addresses and config.toml; made if missing.
        kaspad: kaspad's P2P address, as host:port. Without it the default port of each network is tried on 127.0.0.1.
        network: the Kaspa network. Without it, the one of the kaspad that was found.
        rpc: kaspad's gRPC address, as host:port, or "off". It is only read: version, sync state and peers, for status.
            Without it the network's default port is tried.
        source: addresses from which kaspad is dialed, one per peer: an IP or a network such as 127.1.0.0/16
            (the default for a kaspad on this host), or "one" for a single address. May be repeated.
        listen: multiaddr to listen on for other bridges. May be repeated; --no-listen only dials.
        announce: multiaddr to tell others instead of those that are found. May be repeated.
        peer: multiaddr of a peer to keep connected, ending in /p2p/PEER_ID. May be repeated.
        allow: if given, only these peer ids and IP networks may connect. May be repeated.
        deny: peer id or IP network that may not connect. May be repeated.
        max_joined: how many overlay peers may be joined to kaspad at once. kaspad has 128 inbound slots by default and
            evicts at random when they are full, so stay well below its --maxinpeers.
        max_pending: Kaspa handshakes that may be pending at once; kaspad itself stops at 32.
        max_pending_per_source: the same per source address; kaspad itself stops at 2.
        upload_limit: bytes per second sent to all overlay peers together, such as 500kB or 2MB; 0 for no limit.
        compress: whether messages between bridges are compressed with zstd where that pays.
        kaspad_dials: leave it to kaspad to dial the kept peers, each at a local address of its own, open while
            the peer is up (kaspad's --addpeer=127.0.k.1:PORT). kas-bridge peers shows them.
        listener_port: TCP port of those local addresses.
        limits: limits on connections of the overlay.
        dial: timeouts of dialing.
        yamux: stream multiplexing.
    """

    data_dir: Path = field(default_factory=default_data_dir)
    kaspad: str | None = None
    network: Network | None = None
    rpc: str | None = None
    source: Several = ()
    listen: Annotated[tuple[str, ...], Parameter(negative="--no-listen", show_default=", ".join)] = (
        f"/ip4/0.0.0.0/tcp/{DEFAULT_PORT}",
        f"/ip6/::/tcp/{DEFAULT_PORT}",
    )
    announce: Several = ()
    peer: Several = ()
    allow: Several = ()
    deny: Several = ()
    max_joined: int = 64
    max_pending: int = 16
    max_pending_per_source: int = 2
    upload_limit: str = "0"
    compress: bool = True
    kaspad_dials: bool = False
    listener_port: int = DEFAULT_LISTENER_PORT
    limits: Annotated[Limits, Parameter(show=False)] = field(default_factory=Limits)
    dial: Annotated[DialConfig, Parameter(show=False)] = field(default_factory=DialConfig)
    yamux: Annotated[BridgeYamux, Parameter(show=False)] = field(default_factory=BridgeYamux)

    def __post_init__(self) -> None:
        object.__setattr__(self, "data_dir", self.data_dir.expanduser().absolute())
        for name in ("kaspad", "rpc"):
            value = getattr(self, name)
            if value is not None and not (name == "rpc" and value == "off"):
                parse_endpoint(value, f"--{name}")
        for address in (*self.listen, *self.announce):
            _check(parse, address, "--listen or --announce")
        for target in self.peer:
            parse_peer(target, "--peer")
        for entry in self.allow:
            parse_entry(entry, "--allow")
        for entry in self.deny:
            parse_entry(entry, "--deny")
        parse_sources(self.source)
        parse_rate(self.upload_limit)
        for name, low, high in (
            ("max_joined", 1, 4096),
            ("max_pending", 1, 32),
            ("max_pending_per_source", 1, 2),
            ("listener_port", 1, 65535),
        ):
            if not low <= getattr(self, name) <= high:
                raise ConfigError(f"--{name.replace('_', '-')} must be {low} to {high}, not {getattr(self, name)}")
        for table, smallest in _SMALLEST.items():
            _check_numbers(table, getattr(self, table), smallest)

    @property
    def key_file(self) -> Path:
        """The bridge's ed25519 key, mode 0600."""
        return self.data_dir / "key"

    @property
    def upload_rate(self) -> float:
        """`upload_limit` in bytes per second, 0 for none."""
        return parse_rate(self.upload_limit)

    def overlay_config(self) -> Config:
        """The settings of the node below."""
        return Config(
            listen=self.listen,
            key_file=self.key_file,
            announce=self.announce,
            allow=self.allow,
            deny=self.deny,
            limits=self.limits,
            dial=self.dial,
            yamux=self.yamux,
        )


_SMALLEST: dict[str, dict[str, float]] = {
    "limits": {"max_inbound": 0},
    "dial": {},
    # The protocol grants every stream 256 KiB from the start.
    "yamux": {"max_window": 256 * 1024, "max_memory": 256 * 1024, "send_high_water": 64 * 1024},
}
"""Least values in the tables of ``config.toml``, where they are not 1 for whole numbers and above 0 for seconds."""


def _check_numbers(table: str, values: Limits | DialConfig | YamuxConfig, smallest: Mapping[str, float]) -> None:
    for each in dataclasses.fields(values):
        value = getattr(values, each.name)
        name = f"{table}.{each.name.replace('_', '-')}"
        if isinstance(value, int):
            low = smallest.get(each.name, 1)
            if value < low:
                raise ConfigError(f"{name} must be {low} or more, not {value}")
        elif not 0 < value < math.inf:
            raise ConfigError(f"{name} must be a number of seconds above 0, not {value:g}")


def _check(parser: Any, value: str, name: str) -> Any:
    try:
        return parser(value)
    except AddressError as error:
        raise ConfigError(f"{name}: {error}") from None


def parse_endpoint(text: str, name: str = "address") -> tuple[str, int]:
    """Read ``host:port`` or ``[v6]:port``.

    Raises:
        ConfigError: it is neither; the text names the setting.
    """
    host, colon, port = text.rpartition(":")
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    if not colon or not bare or (":" in bare and bare == host) or not port.isascii() or not port.isdigit():
        raise ConfigError(f"{name} must be host:port, such as 127.0.0.1:16111, not {text!r}")
    if not 1 <= int(port) <= 65535:
        raise ConfigError(f"{name}: port {port} is not in 1 to 65535")
    return bare, int(port)


def format_endpoint(host: str, port: int) -> str:
    """The inverse of `parse_endpoint`."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def parse_peer(text: str, name: str = "peer") -> str:
    """Check a peer to be kept connected and return its peer id.

    Raises:
        ConfigError: it is no multiaddr that ends in ``/p2p/<peer id>``.
    """
    address = _check(parse, text, name)
    peer = peer_of(address)
    if peer is None:
        raise ConfigError(
            f"{name}: {text} does not end in /p2p/<peer id>, so nobody could prove to be that peer; "
            "the other operator sees the whole address in kas-bridge status"
        )
    return peer


def parse_entry(text: str, name: str = "entry") -> str:
    """Normalise an entry of an allow, deny or ban list: a peer id, an IP or a network.

    Raises:
        ConfigError: it is none of these.
    """
    try:
        network = ipaddress.ip_network(text, strict=False)
    except ValueError:
        pass
    else:
        return str(network.network_address) if network.num_addresses == 1 else str(network)
    try:
        return parse_peer_id(text)
    except AddressError:
        raise ConfigError(
            f"{name} must be a peer id, an IP address or a network such as 203.0.113.0/24, not {text!r}"
        ) from None


def parse_sources(entries: tuple[str, ...]) -> tuple[ipaddress.IPv4Network | ipaddress.IPv6Network, ...] | None:
    """Read `Settings.source`.

    Returns:
        The networks; ``()`` if none is given; ``None`` for "one".

    Raises:
        ConfigError: an entry is no address or network, or "one" stands beside others.
    """
    if "one" in entries:
        if len(entries) > 1:
            raise ConfigError('--source: "one" can\'t stand beside other sources')
        return None
    found = []
    for entry in entries:
        try:
            found.append(ipaddress.ip_network(entry, strict=False))
        except ValueError:
            raise ConfigError(
                f'--source must be an IP address, a network such as 127.1.0.0/16, or "one", not {entry!r}'
            ) from None
    return tuple(found)


def parse_rate(text: str) -> float:
    """Bytes per second from ``500kB``, ``2 MB/s`` or a plain number.

    Raises:
        ConfigError: it can't be read.
    """
    try:
        return float(parse_size(text.strip().removesuffix("/s")))
    except ValueError:
        raise ConfigError(
            f"--upload-limit must be bytes per second, such as 500kB or 2MB, or 0 for none, not {text!r}"
        ) from None


TABLES: dict[str, type] = {"limits": Limits, "dial": DialConfig, "yamux": BridgeYamux}
"""Settings of the floors below, each group a table of ``config.toml``."""


def setting_names(kind: type = Settings, prefix: str = "") -> list[str]:
    """Names of all settings as they stand in ``config.toml``; those of nested tables with a dot."""
    names = []
    for each in dataclasses.fields(kind):
        name = prefix + each.name.replace("_", "-")
        nested = TABLES.get(each.name) if kind is Settings else None
        names += setting_names(nested, f"{name}.") if nested else [name]
    return names


def read_file(path: Path) -> dict[str, Any]:
    """Read ``config.toml`` strictly; a missing file is an empty one.

    Raises:
        ConfigError: it can't be read, is no TOML, or holds an unknown name or a wrong value; the text names the file,
            the setting and what is allowed.
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise ConfigError(f"can't read {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is no valid TOML: {error}") from error
    names = [name for name in setting_names() if name != "data-dir"]
    for name in _flat(values):
        known = name.replace("_", "-")
        if known not in names and known not in TABLES:
            raise ConfigError(f"{path}: unknown setting {name}{_guess(name, names)}; allowed: {_allowed(name, names)}")
    if isinstance(values.get("upload-limit"), int):
        values["upload-limit"] = str(values["upload-limit"])
    try:
        from_mapping(Settings, values)
    except ConfigError as error:
        raise ConfigError(f"{path}: {str(error).removeprefix('--')}") from None
    return values


def check_environment(environ: Mapping[str, str]) -> None:
    """Refuse a ``KAS_BRIDGE_*`` variable that means nothing.

    Raises:
        ConfigError: it is unknown; the text names it and the allowed ones.
    """
    names = {environment_name(name): name for name in setting_names()}
    for name in environ:
        if name.startswith(ENVIRONMENT_PREFIX) and name not in names:
            allowed = ", ".join(variable for variable, setting in names.items() if "." not in setting)
            raise ConfigError(
                f"unknown environment variable {name}{_guess(name, list(names))}; allowed: {allowed}, and one for each"
                " setting of a table, such as KAS_BRIDGE_LIMITS_MAX_CONNECTIONS"
            )


def environment_name(setting: str) -> str:
    """The environment variable of a setting: ``KAS_BRIDGE_MAX_JOINED`` for ``max-joined``."""
    return ENVIRONMENT_PREFIX + re.sub(r"[-.]", "_", setting).upper()


def _allowed(name: str, names: list[str]) -> str:
    """The names that may stand where an unknown one stands."""
    table, dot, _ = name.partition(".")
    if dot and table in TABLES:
        return ", ".join(each for each in names if each.startswith(table + "."))
    return ", ".join([*(each for each in names if "." not in each), *(f"the table {table}" for table in TABLES)])


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[str]:
    names = []
    for key, value in values.items():
        names += _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else [prefix + key]
    return names


def _guess(name: str, allowed: list[str]) -> str:
    close = difflib.get_close_matches(name, allowed, n=1)
    return f" (did you mean {close[0]}?)" if close else ""
