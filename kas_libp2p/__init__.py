"""kas-libp2p: a libp2p overlay transport that makes Kaspa nodes behind home routers reachable.

The public names. They are imported when they are first used, since libp2p alone takes a second.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kas_libp2p.config import Config as Config
    from kas_libp2p.config import DialConfig as DialConfig
    from kas_libp2p.config import Limits as Limits
    from kas_libp2p.config import Mode as Mode
    from kas_libp2p.config import SessionConfig as SessionConfig
    from kas_libp2p.config import YamuxConfig as YamuxConfig
    from kas_libp2p.errors import AddressError as AddressError
    from kas_libp2p.errors import ConfigError as ConfigError
    from kas_libp2p.errors import ConnectionLost as ConnectionLost
    from kas_libp2p.errors import DialError as DialError
    from kas_libp2p.errors import KasError as KasError
    from kas_libp2p.errors import NegotiationError as NegotiationError
    from kas_libp2p.errors import Refused as Refused
    from kas_libp2p.errors import SessionLost as SessionLost
    from kas_libp2p.errors import StreamReset as StreamReset
    from kas_libp2p.identity import Identity as Identity
    from kas_libp2p.metadata import Dialect as Dialect
    from kas_libp2p.metadata import Direction as Direction
    from kas_libp2p.metadata import OverlayStream as OverlayStream
    from kas_libp2p.metadata import Path as Path
    from kas_libp2p.metadata import PathKind as PathKind
    from kas_libp2p.metadata import PeerId as PeerId
    from kas_libp2p.metadata import TransportMetadata as TransportMetadata
    from kas_libp2p.node import Candidate as Candidate
    from kas_libp2p.node import Node as Node
    from kas_libp2p.node import Policy as Policy
    from kas_libp2p.node import open_node as open_node
    from kas_libp2p.seams import OutboundConnector as OutboundConnector
    from kas_libp2p.seams import serve_with_incoming as serve_with_incoming
    from kas_libp2p.status import ConnectionStatus as ConnectionStatus
    from kas_libp2p.status import Status as Status

_HOMES = {
    "config": ("Config", "DialConfig", "Limits", "Mode", "SessionConfig", "YamuxConfig"),
    "errors": (
        "AddressError",
        "ConfigError",
        "ConnectionLost",
        "DialError",
        "KasError",
        "NegotiationError",
        "Refused",
        "SessionLost",
        "StreamReset",
    ),
    "identity": ("Identity",),
    "metadata": ("Dialect", "Direction", "OverlayStream", "Path", "PathKind", "PeerId", "TransportMetadata"),
    "node": ("Candidate", "Node", "Policy", "open_node"),
    "seams": ("OutboundConnector", "serve_with_incoming"),
    "status": ("ConnectionStatus", "Status"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [*_HOME_OF, "__version__"]


def __getattr__(name: str) -> Any:
    from importlib import import_module, metadata

    if name == "__version__":
        value: Any = metadata.version("kas-libp2p")
    elif name in _HOME_OF:
        value = getattr(import_module(f"kas_libp2p.{_HOME_OF[name]}"), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
