"""Every setting of the bridge, with its unit and default, and where it may come from.

A setting has one name. ``max_joined`` is the flag ``--max-joined``, the environment variable ``KAS_BRIDGE_MAX_JOINED``
and the key ``max-joined`` of ``config.toml`` in the data directory; the first of these that is given wins, before the
default. A name that is unknown in any of the three is refused, with the allowed ones.
"""

from __future__ import annotations

import dataclasses
import difflib
import ipaddress
import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from kas_libp2p.addresses import is_relayed, parse, parse_peer_id, peer_of
from kas_libp2p.config import (
    MAX_OPERATOR,
    MIB,
    AutoNatConfig,
    Config,
    DialConfig,
    Limits,
    PunchConfig,
    Purpose,
    RelayConfig,
    RelayLimits,
    Role,
    SessionConfig,
    YamuxConfig,
    checked,
    from_mapping,
)
from kas_libp2p.errors import AddressError, ConfigError
from kas_libp2p.units import parse_size

ENVIRONMENT_PREFIX = "KAS_BRIDGE_"
CONFIG_FILE = "config.toml"
RELAYS_FILE = "relays.json"
PUNCHES_FILE = "punches.json"
DEFAULT_PORT = 16117
"""Overlay port: free beside kaspad's own (16110 RPC, 16111 P2P) and their websocket neighbours."""
DEFAULT_LISTENER_PORT = 16118
SYNC_WINDOW = 32 * MIB
"""Bytes to which a stream's window may grow. A syncing kaspad asks for 99 blocks and waits for them: 25 MB if they are
full. With a window below that, every such batch costs another round trip (at 200 ms: 40 instead of 52 MB/s)."""
MAX_RELAY_TARGET = 16
"""Relays on which a place is kept at most: each costs it one of a few hundred, and three are enough to lose two."""
RELAY_CONNECTIONS = Limits(max_connections=1024, max_inbound=960)
"""Of a relay: four times the places that it has; who neither holds one nor calls anybody leaves when idle."""
PATH_PROBE = 5.0
"""Seconds of silence after which a connection is pinged, whatever is on it. A Kaspa stream itself finds a path that
hangs sooner, see `kas_libp2p.kaspa._liveness`."""


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
class RelayLimitChanges:
    """Limits of a relay in place of those of its preset; what each means stands in `kas_libp2p.config.RelayLimits`."""

    max_reservations: int | None = None
    max_reservations_per_ip: int | None = None
    max_reservations_per_network: int | None = None
    reservation_seconds: float | None = None
    max_circuits: int | None = None
    max_circuits_per_peer: int | None = None
    max_circuit_bytes: int | None = None
    max_circuit_seconds: float | None = None
    max_circuit_rate: int | None = None
    max_circuit_memory: int | None = None
    requests_per_peer: int | None = None
    requests_per_ip: int | None = None
    request_interval: float | None = None

    def given(self) -> dict[str, Any]:
        """Those that there are, by name."""
        return {name: value for name, value in dataclasses.asdict(self).items() if value is not None}


class RelayPreset(StrEnum):
    """What a relay gives away, see `kas_libp2p.config.RelayLimits`."""

    DEFAULT = "default"
    """Circuits that carry a node's blocks: 2 h and 16 MiB/s each way."""
    REFERENCE = "reference"
    """Those of rust-libp2p and kaspad's own overlay: 2 min and 128 KiB."""
    OPEN = "open"
    """Circuits without limits, for a relay among friends."""

    @property
    def limits(self) -> RelayLimits:
        """The limits themselves."""
        presets = {"default": RelayLimits, "reference": RelayLimits.reference, "open": RelayLimits.open}
        return presets[self.value]()


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeSettings:
    """Settings of the overlay, which a bridge and a relay have in common.

    Attributes:
        data_dir: directory with the key, the bans, the known relays, the source addresses and config.toml; made if
            missing.
        listen: multiaddr to listen on for others. May be repeated; --no-listen only dials.
        announce: multiaddr to tell others instead of those that are found. May be repeated.
        allow: if given, only these peer ids and IP networks may connect. May be repeated.
        deny: peer id or IP network that may not connect. May be repeated.
        role: whether others can dial us. auto finds out; private keeps places on relays; public needs none.
        relay: multiaddr of a relay to use while we are private, ending in /p2p/RELAY_ID. May be repeated. Others are
            found among the peers.
        relay_target: on how many relays to keep a place while we are private; 0: on none.
        serve_relay: be a relay for others while we are public.
        relay_purpose: as a relay, carry for peers that serve a Kaspa stream (overlay), or for any.
        relay_operator: as a relay, who runs it: a domain or a name, the same for all relays of yours. Nobody keeps two
            places with one operator.
        relay_limits: what a relay gives away. default: 256 places, circuits of 2 h and 16 MiB/s; reference: as
            rust-libp2p, circuits of 2 min and 128 KiB; open: circuits without limits.
        port_mapping: ask the router for a port by PCP, NAT-PMP or UPnP, and its IPv6 firewall to let the port in.
        relaying: single limits of a relay, in place of those that relay_limits names.
        limits: limits on connections of the overlay.
        dial: timeouts of dialing.
        yamux: stream multiplexing.
        autonat: finding out who can dial us, and telling others whether they can be dialed.
        punch: making relayed connections direct.
        session: Kaspa streams that move from path to path, so that kaspad sees one unbroken peer.
    """

    data_dir: Path = field(default_factory=default_data_dir)
    listen: Annotated[tuple[str, ...], Parameter(negative="--no-listen", show_default=", ".join)] = (
        f"/ip4/0.0.0.0/tcp/{DEFAULT_PORT}",
        f"/ip6/::/tcp/{DEFAULT_PORT}",
    )
    announce: Several = ()
    allow: Several = ()
    deny: Several = ()
    role: Role = Role.AUTO
    relay: Several = ()
    relay_target: int = 3
    serve_relay: bool = False
    relay_purpose: Purpose = Purpose.OVERLAY
    relay_operator: str | None = None
    relay_limits: RelayPreset = RelayPreset.DEFAULT
    port_mapping: bool = True
    relaying: Annotated[RelayLimitChanges, Parameter(show=False)] = field(default_factory=RelayLimitChanges)
    limits: Annotated[Limits, Parameter(show=False)] = field(default_factory=Limits)
    dial: Annotated[DialConfig, Parameter(show=False)] = field(default_factory=DialConfig)
    yamux: Annotated[YamuxConfig, Parameter(show=False)] = field(default_factory=YamuxConfig)
    autonat: Annotated[AutoNatConfig, Parameter(show=False)] = field(default_factory=AutoNatConfig)
    punch: Annotated[PunchConfig, Parameter(show=False)] = field(default_factory=PunchConfig)
    session: Annotated[SessionConfig, Parameter(show=False)] = field(default_factory=SessionConfig)

    def __post_init__(self) -> None:
        object.__setattr__(self, "data_dir", self.data_dir.expanduser().absolute())
        for address in (*self.listen, *self.announce):
            _check(parse, address, "--listen or --announce")
        for entry in self.allow:
            parse_entry(entry, "--allow")
        for entry in self.deny:
            parse_entry(entry, "--deny")
        for relay in self.relay:
            parse_relay(relay, "--relay")
        self._check_ranges(("relay_target", 0, MAX_RELAY_TARGET))
        if len(self.relay_operator or "") > MAX_OPERATOR or not (self.relay_operator or "").isprintable():
            raise ConfigError(
                f"--relay-operator must be a domain or a name of at most {MAX_OPERATOR} characters, not"
                f" {self.relay_operator!r}"
            )
        tables = {name: getattr(self, name) for name in TABLES}
        for name, table in (tables | {"relaying": self.given_away()}).items():
            try:
                checked(table, f"{name}.")
            except ConfigError as error:
                raise ConfigError(str(error).replace("_", "-")) from None

    def given_away(self) -> RelayLimits:
        """What a relay gives away: the preset with its changes."""
        return dataclasses.replace(self.relay_limits.limits, **self.relaying.given())

    def _check_ranges(self, *ranges: tuple[str, int, int]) -> None:
        for name, low, high in ranges:
            if not low <= getattr(self, name) <= high:
                raise ConfigError(f"--{name.replace('_', '-')} must be {low} to {high}, not {getattr(self, name)}")

    @property
    def key_file(self) -> Path:
        """The ed25519 key, mode 0600."""
        return self.data_dir / "key"

    def overlay_config(self) -> Config:
        """The settings of the node below."""
        return Config(
            listen=self.listen,
            key_file=self.key_file,
            announce=self.announce,
            allow=self.allow,
            deny=self.deny,
            role=self.role,
            port_mapping=self.port_mapping,
            relay=RelayConfig(
                relays=self.relay,
                target=self.relay_target,
                serve=self.serve_relay,
                purpose=self.relay_purpose,
                operator=self.relay_operator or "",
                limits=self.given_away(),
                state_file=self.data_dir / RELAYS_FILE,
            ),
            limits=self.limits,
            dial=self.dial,
            yamux=self.yamux,
            autonat=self.autonat,
            punch=dataclasses.replace(self.punch, state_file=self.punch.state_file or self.data_dir / PUNCHES_FILE),
            session=self.session,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class RelaySettings(NodeSettings):
    """A relay's settings: what a bridge has below kaspad, with defaults of its own.

    Attributes:
        role: whether others can dial us: public unless told otherwise, for only such a one can be a relay. auto finds
            out, and is no relay until it has.
        limits: room for everybody who may hold a place, and for their callers.
    """

    role: Role = Role.PUBLIC
    serve_relay: Annotated[bool, Parameter(parse=False)] = True
    limits: Annotated[Limits, Parameter(show=False)] = field(default_factory=lambda: RELAY_CONNECTIONS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings(NodeSettings):
    """The bridge's settings. Each is a flag, a ``KAS_BRIDGE_*`` variable and a key of ``config.toml``.

    Attributes:
        kaspad: kaspad's P2P address, as host:port. Without it the default port of each network is tried on 127.0.0.1.
        network: the Kaspa network. Without it, the one of the kaspad that was found.
        rpc: kaspad's gRPC address, as host:port, or "off". It is only read: version, sync state and peers, for status.
            Without it the network's default port is tried.
        source: addresses from which kaspad is dialed, one per peer: an IP or a network such as 127.1.0.0/16
            (the default for a kaspad on this host), or "one" for a single address. May be repeated.
        peer: multiaddr of a peer to keep connected, ending in /p2p/PEER_ID. May be repeated.
        max_joined: how many overlay peers may be joined to kaspad at once. kaspad has 128 inbound slots by default and
            evicts at random when they are full, so stay well below its --maxinpeers.
        max_pending: Kaspa handshakes that may be pending at once; kaspad itself stops at 32.
        max_pending_per_source: the same per source address; kaspad itself stops at 2.
        max_pending_per_host: the same for the peers of one remote host, an IPv4 address or an IPv6 /64.
        upload_limit: bytes per second sent to all overlay peers together, such as 500kB or 2MB; 0 for no limit.
        compress: whether messages between bridges are compressed with zstd where that pays.
        kaspad_dials: leave it to kaspad to dial the kept peers, each at a local address of its own, open while
            the peer is up (kaspad's --addpeer=127.0.k.1:PORT). kas-bridge peers shows them.
        listener_port: TCP port of those local addresses.
    """

    kaspad: str | None = None
    network: Network | None = None
    rpc: str | None = None
    source: Several = ()
    peer: Several = ()
    max_joined: int = 64
    max_pending: int = 16
    max_pending_per_source: int = 2
    max_pending_per_host: int = 4
    upload_limit: str = "0"
    compress: bool = True
    kaspad_dials: bool = False
    listener_port: int = DEFAULT_LISTENER_PORT
    yamux: Annotated[BridgeYamux, Parameter(show=False)] = field(default_factory=BridgeYamux)

    def __post_init__(self) -> None:
        for name in ("kaspad", "rpc"):
            value = getattr(self, name)
            if value is not None and not (name == "rpc" and value == "off"):
                parse_endpoint(value, f"--{name}")
        for target in self.peer:
            parse_peer(target, "--peer")
        parse_sources(self.source)
        parse_rate(self.upload_limit)
        self._check_ranges(
            ("max_joined", 1, 4096),
            ("max_pending", 1, 32),
            ("max_pending_per_source", 1, 2),
            ("max_pending_per_host", 1, 32),
            ("listener_port", 1, 65535),
        )
        NodeSettings.__post_init__(self)  # super() knows another class: dataclasses make slots by copying it

    @property
    def upload_rate(self) -> float:
        """`upload_limit` in bytes per second, 0 for none."""
        return parse_rate(self.upload_limit)


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


def parse_relay(text: str, name: str = "relay") -> str:
    """Check a relay to be used and return its peer id.

    Raises:
        ConfigError: it is no multiaddr of a host that ends in ``/p2p/<relay id>``.
    """
    address = _check(parse, text, name)
    relay = peer_of(address)
    if relay is None or is_relayed(address):
        raise ConfigError(
            f"{name}: {text} leads to no relay: it looks like /ip4/192.0.2.1/tcp/16117/p2p/12D3KooW…, as"
            " kas-bridge relay shows its own"
        )
    return relay


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


TABLES: dict[str, type] = {
    "relaying": RelayLimitChanges,
    "limits": Limits,
    "dial": DialConfig,
    "yamux": BridgeYamux,
    "autonat": AutoNatConfig,
    "punch": PunchConfig,
    "session": SessionConfig,
}
"""Settings of the floors below, each group a table of ``config.toml``."""


def setting_names(kind: type = Settings, prefix: str = "") -> list[str]:
    """Names of all settings as they stand in ``config.toml``; those of nested tables with a dot."""
    names = []
    for each in dataclasses.fields(kind):
        name = prefix + each.name.replace("_", "-")
        nested = TABLES.get(each.name) if issubclass(kind, NodeSettings) else None
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
