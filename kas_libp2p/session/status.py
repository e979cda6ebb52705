"""How a session stands, as values."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from kas_libp2p.metadata import Path, PeerId


class SessionState(StrEnum):
    """How a session stands."""

    ATTACHED = "attached"
    """It has a path."""
    MOVING = "moving"
    """It goes on by a new path, and the old one is not over yet."""
    WAITING = "waiting"
    """It has no path, and waits for one."""
    CLOSING = "closing"
    """It was closed here, and what was written is still on its way."""


@dataclass(frozen=True, slots=True)
class SessionStatus:
    """A session at one moment.

    Attributes:
        id: in hex.
        peer: with whom.
        by_us: whether this side opened it.
        path: by which way it goes; the last one while it waits.
        state: how it stands.
        moves: how often it has changed its path.
        in_flight: bytes written here that the peer has not acknowledged.
        unread: bytes of the peer that are not read here.
        window: bytes that each of these two may grow to.
        gaps: how often it was without any path.
        seconds: how long it has lived.
        waiting: seconds without any path; 0 while it has one.
        reason: why it stays where it is, or what it waits for, in words; may be empty.
    """

    id: str
    peer: PeerId
    by_us: bool
    path: Path
    state: SessionState
    moves: int
    in_flight: int
    unread: int
    window: int
    gaps: int
    seconds: float
    waiting: float = 0.0
    reason: str = ""
