"""What is known of a connection and of a stream, as values: who, which way, since when.

Code asks for the path, never for the text of an address.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from enum import StrEnum
from typing import NewType

import trio

PeerId = NewType("PeerId", str)
"""A peer id in its base58btc text form (``12D3KooW…`` or ``Qm…``)."""


class Direction(StrEnum):
    """Who opened the connection or the stream, seen from here."""

    INBOUND = "inbound"
    OUTBOUND = "outbound"


class PathKind(StrEnum):
    """The three ways in which bytes reach a peer."""

    DIRECT = "direct"
    RELAYED = "relayed"
    PUNCHED = "punched"


@dataclass(frozen=True, slots=True)
class Path:
    """The way a connection takes.

    Attributes:
        kind: direct, relayed or punched.
        relay: the relay that carries it (relayed), or that it was punched through (punched); ``None`` for direct.
    """

    kind: PathKind
    relay: PeerId | None = None

    def __post_init__(self) -> None:
        if (self.kind is PathKind.DIRECT) != (self.relay is None):
            raise ValueError("a direct path has no relay, and every other path has one")

    def __str__(self) -> str:
        return str(self.kind) if self.relay is None else f"{self.kind} ({self.relay[-6:]})"


DIRECT = Path(PathKind.DIRECT)


class Dialect(StrEnum):
    """Which protocol a Kaspa stream speaks."""

    HTTP2 = "/kaspad/transport/1.0.0"
    """HTTP/2 with gRPC, as kaspad's own overlay speaks it. The connection's initiator is the HTTP/2 client."""
    MESSAGES = "/kas-libp2p/messages/1.0.0"
    """Whole Kaspa messages, length-framed. Spoken between nodes of this project."""


@dataclass(frozen=True, slots=True)
class TransportMetadata:
    """What the Kaspa core is told about a stream.

    Attributes:
        peer: the proven identity of the other side; ``None`` for plain TCP, which proves none.
        path: the way of the connection under the stream.
        direction: who opened the *stream*.
        initiator: whether this side is the initiator of the connection (the HTTP/2 client on a Kaspa stream).
        protocol: the negotiated protocol id; empty for plain TCP.
        local_address, remote_address: multiaddrs as text, of the connection.
        connection_opened_at, stream_opened_at: seconds on trio's clock.
        rtt: last measured round trip in seconds, or ``None``.
    """

    peer: PeerId | None
    path: Path
    direction: Direction
    initiator: bool
    protocol: str
    local_address: str
    remote_address: str
    connection_opened_at: float
    stream_opened_at: float
    rtt: float | None = None

    @property
    def dialect(self) -> Dialect | None:
        """The Kaspa dialect of this stream, or ``None`` if it carries something else."""
        return next((dialect for dialect in Dialect if dialect == self.protocol), None)


class OverlayStream(trio.abc.HalfCloseableStream):
    """A byte stream to a peer, whatever the way: what everything above the transport sees.

    Closing with ``aclose`` ends it in order; `reset` ends it at once in both directions.
    """

    __slots__ = ()

    @property
    @abstractmethod
    def metadata(self) -> TransportMetadata:
        """Who is at the other end, and by which way. Taken anew at each read, as round trip and path may change."""

    @abstractmethod
    def reset(self, code: int = 0) -> None:
        """End both directions at once, without waiting.

        Args:
            code: libp2p stream error code that the peer is told, 0 for none.
        """
