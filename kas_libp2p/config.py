"""Every setting, with its unit, its default and the reason for it, as frozen values.

``Config.from_mapping`` builds one from plain data (a TOML file, a test) and refuses a wrong setting by name.
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
        max_pending_inbound: inbound connections in their handshakes.
        max_per_peer: connections to one peer; two, so that a new path can come up beside the old.
        max_per_ip: inbound connections from one IPv4 address or one IPv6 /64. Loopback is exempt.
        idle_timeout: seconds after which a connection without streams is closed.
    """

    max_connections: int = 256
    max_inbound: int = 192
    max_pending_inbound: int = 64
    max_per_peer: int = 2
    max_per_ip: int = 16
    idle_timeout: float = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """A node's settings.

    Attributes:
        listen: multiaddrs to listen on. Empty: dial only.
        key_file: ed25519 key in libp2p's protobuf form; made if missing. ``None``: a new identity at each start.
        announce: addresses to tell others instead of those found, for nodes behind a known mapping.
        allow: if not empty, only these peer ids or IP networks may connect.
        deny: peer ids or IP networks that may not connect, in either direction.
        mode: how the outbound connector works.
        tcp_cooldown: seconds for which ``bridge`` mode leaves the overlay alone for an ``ip:port`` where it failed.
        limits, dial, yamux: see there.
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

    def __post_init__(self) -> None:
        object.__setattr__(self, "listen", tuple(self.listen))

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
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if isinstance(hint, type) and isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    raise ConfigError(f"{where} must be {_describe(hint)}, not {value!r}")


def _describe(hint: Any) -> str:
    names = {int: "a whole number", float: "a number", str: "a text", bool: "true or false", Path: "a path"}
    return names.get(hint, str(hint))
