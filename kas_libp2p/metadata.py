"""What is known of a connection and of a stream, as values: who, which way, since when.

Code asks for the path, never for the text of an address.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import NewType

import trio

from kas_libp2p.units import seconds, size

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
CHAIN_RATE = 100_000
"""Bytes per second that a Kaspa node takes which follows the chain, in quiet times: ten blocks of some transactions.
What circuits of different kinds are compared by."""


TAIL = 0.0625
"""Part of a circuit's bytes that is left when a session leaves it. Of 128 KiB that is what ten empty blocks per second
take in a second, and what is left is lost."""


@dataclass(frozen=True, slots=True)
class CircuitLimits:
    """What a relay lets one circuit carry, and what of it is left. It ends the circuit when either is used up.

    Attributes:
        max_bytes, bytes_left: both directions together, as rust and js count; who counts each direction for itself
            allows more. ``None``: no limit.
        max_seconds, seconds_left: since the circuit was made; ``None``: no limit.
    """

    max_bytes: int | None
    max_seconds: float | None
    bytes_left: int | None
    seconds_left: float | None

    @property
    def lasts(self) -> float:
        """Seconds that it will last, if it carries `CHAIN_RATE`; infinity without limits."""
        by_time = self.seconds_left if self.seconds_left is not None else math.inf
        return min(by_time, self.bytes_left / CHAIN_RATE) if self.bytes_left is not None else by_time

    def scarce(self, time: Callable[[float], float], data: Callable[[int], float], whose: str = "") -> str:
        """What is left of it, in words, if that is no more than a margin; else empty.

        Args:
            time: the margin in seconds, given ``max_seconds``.
            data: the margin in bytes, given ``max_bytes``.
            whose: words before what it may carry or last, with a space behind them.
        """
        if (
            self.max_seconds is not None
            and self.seconds_left is not None
            and self.seconds_left <= time(self.max_seconds)
        ):
            return f"{seconds(self.seconds_left)} of {whose}{seconds(self.max_seconds)} are left"
        if self.max_bytes is not None and self.bytes_left is not None and self.bytes_left <= data(self.max_bytes):
            return f"{size(self.bytes_left)} of {whose}{size(self.max_bytes)} are left"
        return ""


class Dialect(StrEnum):
    """Which protocol a Kaspa stream speaks."""

    HTTP2 = "/kaspad/transport/1.0.0"
    """HTTP/2 with gRPC, as kaspad's own overlay speaks it. The connection's initiator is the HTTP/2 client."""
    MESSAGES = "/kas-libp2p/messages/1.0.0"
    """Whole Kaspa messages, length-framed. Spoken between nodes of this project."""


SESSION = "/kas-libp2p/session/1.0.0"
"""The protocol of a stream that carries a session (`kas_libp2p.session`), in which a Kaspa stream in
`Dialect.MESSAGES` moves from path to path."""


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
        limits: of the circuit that carries the connection; ``None`` where no relay does.
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
    limits: CircuitLimits | None = None

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

    @property
    def delivered(self) -> int:
        """A number that grows for as long as what was written here moves towards the peer. Tells a slow path from one
        that hangs; always 0 where nobody knows."""
        return 0

    @property
    def watches_paths(self) -> bool:
        """Whether a path that hangs is found and left below this stream: nobody above has to look for it."""
        return False

    @property
    def gaps(self) -> int:
        """How often this stream was without any path and got one again: what was held back comes all at once then."""
        return 0

    @property
    def over(self) -> bool:
        """Whether no two-way talk is possible on it any more, though whoever reads or writes may not have been told."""
        return False

    def send_nowait(self, data: bytes) -> bool:
        """Write as ``send_all`` does, if it would not have to wait and can't fail.

        Returns:
            whether ``data`` was taken, all of it; False without a reason: ``send_all`` will wait, or tell it.
        """
        return False

    @abstractmethod
    def reset(self, code: int = 0) -> None:
        """End both directions at once, without waiting.

        Args:
            code: libp2p stream error code that the peer is told, 0 for none.
        """
