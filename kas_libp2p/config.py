"""Every setting, with its unit, its default and the reason for it, as frozen values.

A wrong setting is refused by name, with what is allowed, however a `Config` is made: in Python, or from plain data (a
TOML file) by ``Config.from_mapping``. A time may be infinite.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, Self

from kas_libp2p.errors import ConfigError

KIB = 1024
MIB = 1024 * KIB
MAX_OPERATOR = 64
"""Characters of a relay operator's name."""
STEADY = 600.0
"""Default of `PunchConfig.steady`, in seconds: a NAT or a line that ends connections after a while does so in less."""


class Mode(StrEnum):
    """How the outbound connector reaches a Kaspa node."""

    OFF = "off"
    """Plain TCP only."""
    BRIDGE = "bridge"
    """The overlay first; on failure plain TCP, and a cooldown for that address."""
    FULL = "full"
    """The overlay only."""


@dataclass(frozen=True, slots=True, kw_only=True)
class YamuxConfig:
    """Stream multiplexing.

    Attributes:
        max_memory: bytes of received, unread data that one connection may hold. Bounds streams x window: the protocol
            grants every stream 256 KiB, growth of windows and new streams are refused beyond it.
        max_window: bytes to which one stream's receive window may grow; 16 MiB carries 1.3 Gbit/s at 100 ms.
        max_inbound_streams: streams opened by the peer that may be open at once.
        max_outbound_streams: streams opened by us that may be open at once.
        send_high_water: bytes that one stream may hold unsent before its writer waits.
        keepalive: seconds of silence after which a ping is sent.
        ping_timeout: seconds after which an unanswered ping ends the connection.
    """

    max_memory: int = 64 * MIB
    max_window: int = 16 * MIB
    max_inbound_streams: int = 128
    max_outbound_streams: int = 256
    send_high_water: int = 256 * KIB
    keepalive: float = 30.0
    ping_timeout: float = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class DialConfig:
    """Dialing.

    Attributes:
        tcp_timeout: seconds for one TCP connect: room for two SYN retransmissions (after 1 s and 3 s).
        upgrade_timeout: seconds for security and muxer negotiation, per connection, in both directions.
        negotiation_timeout: seconds for the protocol of one stream.
        attempt_delay: seconds between the starts of two addresses of one peer (RFC 8305 section 5: 250 ms).
        max_addresses: addresses of one peer that are tried; a peer may list thousands.
        resolve_timeout: seconds for one name.
    """

    tcp_timeout: float = 5.0
    upgrade_timeout: float = 10.0
    negotiation_timeout: float = 10.0
    attempt_delay: float = 0.25
    max_addresses: int = 16
    resolve_timeout: float = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How many connections there may be. Each limit counts how often it said no (``LimitHit``, ``InboundRefused``).

    Attributes:
        max_connections: in all.
        max_inbound: of them inbound; the rest is kept for our own dials.
        max_outbound: of them outbound, those that are being dialed included; the rest is kept for who dials us.
        max_pending_inbound: inbound connections in their handshakes.
        max_per_peer: connections to one peer; three: a circuit, the one that follows it or that the other side made,
            and the direct one that takes their place.
        max_per_ip: inbound connections from one IPv4 address or one IPv6 /64. Loopback is exempt.
        idle_timeout: seconds after which a connection without streams is closed.
    """

    max_connections: int = 256
    max_inbound: int = 192
    max_outbound: int = 192
    max_pending_inbound: int = 64
    max_per_peer: int = 3
    max_per_ip: int = 16
    idle_timeout: float = 60.0


class Role(StrEnum):
    """How a node counts itself, see `kas_libp2p.autonat.roles`."""

    AUTO = "auto"
    """Found out, and found out again when the network changes."""
    PRIVATE = "private"
    """Nobody can dial in: it keeps reservations on relays."""
    PUBLIC = "public"
    """Everybody can dial in: it needs no relay, and may be one."""


class Purpose(StrEnum):
    """For whom a relay carries circuits."""

    OVERLAY = "overlay"
    """Between peers whose identify offers the Kaspa stream."""
    ANY = "any"
    """Between any two peers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RelayLimits:
    """What a relay gives away. The defaults carry Kaspa traffic: blocks for hours, not 128 KiB.

    Attributes:
        max_reservations: in all.
        max_reservations_per_ip: from one IPv4 address or IPv6 /64; a peer has one at most.
        max_reservations_per_network: from one IPv4 /16 or IPv6 /48.
        reservation_seconds: after which one has to be renewed.
        max_circuits: open at once; half of them from one IPv4 /16 or IPv6 /48.
        max_circuits_per_peer: of them from one peer, and as many to it; half of the latter from one IPv4 /16 or IPv6
            /48.
        max_circuit_bytes: both directions of one circuit together; 0: no limit.
        max_circuit_seconds: after which a circuit ends; 0: never.
        max_circuit_rate: bytes per second in each direction of one circuit; 0: no limit. Circuits share the relay's
            line fairly whatever it is; it bounds what one takes of an idle one. 16 MiB/s is more than the uplink of
            most homes, and about what a node's first sync takes; it costs the relay some 4 % of a core and an eighth
            of a Gbit/s line each way. A first sync took 1.6 times as long as a direct one, and 4.9 times with 4 MiB/s.
        max_circuit_memory: bytes that all circuits together may hold for sides that do not read. Beyond it those end
            for which most has waited for longest. Circuits that flow hold next to nothing; this is what 128 hold of
            which one side has stopped.
        requests_per_peer, requests_per_ip: requests at once; one more comes back every ``request_interval`` seconds.
        request_interval: see there.
    """

    max_reservations: int = 256
    max_reservations_per_ip: int = 8
    max_reservations_per_network: int = 32
    reservation_seconds: float = 3600.0
    max_circuits: int = 512
    max_circuits_per_peer: int = 16
    max_circuit_bytes: int = 0
    max_circuit_seconds: float = 7200.0
    max_circuit_rate: int = 16 * MIB
    max_circuit_memory: int = 128 * MIB
    requests_per_peer: int = 30
    requests_per_ip: int = 60
    request_interval: float = 10.0

    @classmethod
    def reference(cls) -> Self:
        """The limits of rust-libp2p and of kaspad's own overlay: 2 minutes and 128 KiB per circuit."""
        return cls(
            max_reservations=128,
            max_circuits=16,
            max_circuits_per_peer=4,
            max_circuit_bytes=128 * KIB,
            max_circuit_seconds=120.0,
            max_circuit_rate=0,
            request_interval=60.0,
        )

    @classmethod
    def open(cls) -> Self:
        """No limits on a circuit, for a relay among friends."""
        return cls(max_circuit_seconds=0.0, max_circuit_rate=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class RelayConfig:
    """Relays: being one, and using some.

    Attributes:
        relays: multiaddrs of relays to use, with their peer ids. Others are found among the connected peers.
        target: reservations that a private node holds.
        serve: whether this node is a relay for others while it is public.
        purpose: for whom.
        limits: what a relay gives away.
        max_inbound_per_relay: connections that may come in through one relay at a time.
        operator: who runs this relay, a domain or a name, at most `MAX_OPERATOR` characters. Others keep no two places
            with one operator, so that they lose one of several at a time when it fails: whoever runs more than one
            relay sets the same in each. Empty: not told.
        state_file: where known relays are remembered over a restart; ``None``: nowhere.
    """

    relays: tuple[str, ...] = ()
    target: int = 3
    serve: bool = False
    purpose: Purpose = Purpose.OVERLAY
    limits: RelayLimits = field(default_factory=RelayLimits)
    max_inbound_per_relay: int = 32
    operator: str = ""
    state_file: Path | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class AutoNatConfig:
    """Finding out who can dial in, and telling others whether they can be dialed.

    Attributes:
        serve: whether this node dials others back for them.
        allow_private: for laboratories: private addresses may be dialed back, and count as reachable; and what counts
            as one network is a /24, not a /16.
        refresh: seconds after which a verdict is checked again.
    """

    serve: bool = True
    allow_private: bool = False
    refresh: float = 900.0


@dataclass(frozen=True, slots=True, kw_only=True)
class PunchConfig:
    """Relayed connections that become direct.

    Attributes:
        enabled: whether that is tried, and peers that invite us to it are answered.
        quiet: whether a relayed connection is left alone whose round trip is short (`kas_libp2p.strategy`).
        max_concurrent: punches at once; more wait in turn. Each takes a socket per address, for a second at most: 64
            let the crowd through that comes back after an outage.
        allow_private: for laboratories: private addresses may be told and dialed.
        share_local: whether a node of this project behind the same router is told our local addresses.
        predict: whether the next ports of a NAT that counts them up are guessed, which costs 16 SYNs.
        birthday: whether many ports are tried at once where nothing else can work, or a guess has failed, and the peer
            agreed. Up to 768 sockets and SYNs on both sides together, so it looks like a port scan.
        keepalive: seconds of silence after which a punched connection is pinged: below what home routers remember.
        steady: seconds after which a direct connection has lasted. One that broke before is a failure, as one that
            comes and goes is worse than none. The waits after failures are counted in it: with 6 instead of 600
            they are a hundredth, for laboratories.
        state_file: where it is remembered which peers can be punched; ``None``: nowhere.
    """

    enabled: bool = True
    quiet: bool = False
    max_concurrent: int = 64
    allow_private: bool = False
    share_local: bool = True
    predict: bool = True
    birthday: bool = False
    keepalive: float = 20.0
    steady: float = STEADY
    state_file: Path | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionConfig:
    """Kaspa streams that move between paths (`kas_libp2p.session`).

    Attributes:
        enabled: whether sessions are offered and taken. A peer that knows none gets a plain stream either way.
        window: bytes that one session may hold in each direction: of ours that the peer has not acknowledged, and of
            the peer's that are not read. 8 MiB carry 64 Mbit/s at a second of round trip, or a block of any size.
        patience: seconds for which a session may be without any path before it ends. What waits in kaspad's routes
            meanwhile is some hundred messages.
        max_sessions: sessions in all; as many as connections.
        max_per_peer: of them with one peer; one carries the Kaspa stream, the others are about to end.
        max_memory: bytes that all sessions together may hold. Beyond it those end that have held most for longest
            without getting on. Sessions that flow hold little; this is what 32 hold whose peers acknowledge nothing.
        small_circuits: whether circuits of relays that are not of this project are renewed as fast as their limits
            allow, so that a live node can go through them. Each relay's operator has to agree to that.
    """

    enabled: bool = True
    window: int = 8 * MIB
    patience: float = 30.0
    max_sessions: int = 256
    max_per_peer: int = 4
    max_memory: int = 256 * MIB
    small_circuits: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """A node's settings.

    Raises:
        ConfigError: one is wrong, here or in a table below; the text names it and what is allowed.

    Attributes:
        listen: multiaddrs to listen on. Empty: dial only.
        key_file: ed25519 key in libp2p's protobuf form; made if missing. ``None``: a new identity at each start.
        announce: addresses to tell others instead of those found, for nodes behind a known mapping.
        allow: if not empty, only these peer ids or IP networks may connect.
        deny: peer ids or IP networks that may not connect, in either direction.
        mode: how the outbound connector works.
        tcp_cooldown: seconds for which ``bridge`` mode leaves the overlay alone for an ``ip:port`` where it failed.
        role: how the node counts itself.
        port_mapping: whether the router is asked for a port (PCP, NAT-PMP, UPnP), and its IPv6 firewall to let it in.
        limits, dial, yamux, relay, autonat, punch, session: see there.
    """

    listen: tuple[str, ...] = ("/ip4/0.0.0.0/tcp/0", "/ip6/::/tcp/0")
    key_file: Path | None = None
    announce: tuple[str, ...] = ()
    allow: tuple[str, ...] = ()
    deny: tuple[str, ...] = ()
    mode: Mode = Mode.BRIDGE
    tcp_cooldown: float = 600.0
    limits: Limits = field(default_factory=Limits)
    dial: DialConfig = field(default_factory=DialConfig)
    yamux: YamuxConfig = field(default_factory=YamuxConfig)
    role: Role = Role.AUTO
    port_mapping: bool = False
    relay: RelayConfig = field(default_factory=RelayConfig)
    autonat: AutoNatConfig = field(default_factory=AutoNatConfig)
    punch: PunchConfig = field(default_factory=PunchConfig)
    session: SessionConfig = field(default_factory=SessionConfig)

    def __post_init__(self) -> None:
        for name, value in checked(self, "").items():
            object.__setattr__(self, name, value)

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Self:
        """Build a configuration from plain data.

        Raises:
            ConfigError: a setting is unknown or wrong; the text names it and what is allowed.
        """
        return from_mapping(cls, values)


T = typing.TypeVar("T")


def from_mapping(kind: type[T], values: Mapping[str, Any], where: str = "") -> T:
    """Build any frozen dataclass of settings from plain data, strictly.

    Args:
        kind: the dataclass.
        values: its settings; nested dataclasses are nested mappings.
        where: dotted prefix for messages.

    Raises:
        ConfigError: a setting is unknown or wrong; the text names it and what is allowed.
    """
    hints = typing.get_type_hints(kind)
    names = [f.name for f in dataclasses.fields(kind) if f.init]  # type: ignore[arg-type]
    arguments: dict[str, Any] = {}
    for key, value in values.items():
        name = key.replace("-", "_")
        if name not in names:
            raise ConfigError(f"unknown setting {where}{key!s}; allowed here: {', '.join(sorted(names))}")
        arguments[name] = _convert(hints[name], value, f"{where}{key}")
    return kind(**arguments)


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin = typing.get_origin(hint)
    if origin in (types.UnionType, typing.Union):
        options = [option for option in typing.get_args(hint) if option is not types.NoneType]
        if value is None and len(options) < len(typing.get_args(hint)):
            return None
        return _convert(options[0], value, where)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        if isinstance(value, hint):
            checked(value, f"{where}.")
            return value
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where} must be a table of settings, not {value!r}")
        return from_mapping(hint, value, f"{where}.")
    if origin is tuple:
        if isinstance(value, str) or not isinstance(value, list | tuple):
            raise ConfigError(f"{where} must be a list, not {value!r}")
        item = typing.get_args(hint)[0]
        return tuple(_convert(item, each, f"{where}[{index}]") for index, each in enumerate(value))
    if isinstance(hint, type) and issubclass(hint, StrEnum):
        try:
            return hint(value)
        except ValueError:
            raise ConfigError(f"{where} must be one of {', '.join(hint)}, not {value!r}") from None
    if hint is Path and isinstance(value, str | Path):
        return Path(value).expanduser()
    if hint in (int, float) and isinstance(value, hint | int) and not isinstance(value, bool):
        return hint(value)
    if hint in (str, bool) and isinstance(value, hint):
        return value
    raise ConfigError(f"{where} must be {_describe(hint)}, not {value!r}")


_LEAST = {
    "max_circuit_bytes": 0,
    "max_circuit_memory": 256 * KIB,  # the protocol grants every stream that much from the start
    "max_circuit_rate": 0,
    "max_circuit_seconds": 0,
    "max_circuits": 0,
    "max_inbound": 0,
    "max_inbound_per_relay": 0,
    "max_outbound": 0,
    "max_memory": 256 * KIB,  # the protocol grants every stream that much from the start
    "max_reservations": 0,
    "max_window": 256 * KIB,
    "target": 0,
    "window": 256 * KIB,  # everybody may send that much of a session before more is granted
}
"""Smallest values, where they are not 1 for whole numbers and above 0 for seconds."""


def checked(settings: Any, where: str) -> dict[str, Any]:
    """The values of settings that were made in Python, as `from_mapping` would have them.

    Args:
        settings: any dataclass of settings.
        where: dotted prefix for messages.

    Raises:
        ConfigError: one has a wrong type, or a number is out of its range.
    """
    hints = typing.get_type_hints(type(settings))
    values = {name: _convert(hint, getattr(settings, name), f"{where}{name}") for name, hint in hints.items()}
    for name, value in values.items():
        if hints[name] is int and value < (least := _LEAST.get(name, 1)):
            raise ConfigError(f"{where}{name} must be {least} or more, not {value}")
        if hints[name] is float and not (value > 0 or value == _LEAST.get(name)):  # as nan is neither
            raise ConfigError(f"{where}{name} must be a number of seconds above 0, not {value:g}")
        if hints[name] is str and (len(value) > MAX_OPERATOR or not value.isprintable()):
            raise ConfigError(
                f"{where}{name} must be at most {MAX_OPERATOR} characters that can be shown, not {value!r}"
            )
    return values


def _describe(hint: Any) -> str:
    names = {int: "a whole number", float: "a number", str: "a text", bool: "true or false", Path: "a path"}
    return names.get(hint, str(hint))
