"""What happens in the bridge itself, beside the events of the node below. See `kas_libp2p.events` for the bus."""

from __future__ import annotations

from dataclasses import dataclass

from kas_libp2p.events import Event
from kas_libp2p.metadata import PeerId


@dataclass(frozen=True, slots=True, kw_only=True)
class BridgeStarted(Event):
    """The bridge listens and takes commands.

    Attributes:
        control: path of the control socket.
    """

    version: str
    peer_id: PeerId
    addresses: tuple[str, ...]
    control: str
    kept: int


@dataclass(frozen=True, slots=True, kw_only=True)
class BridgeStopping(Event):
    """The bridge ends its peers and then itself."""

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class KaspadChanged(Event):
    """Our kaspad came, went, or is another one.

    Attributes:
        condition: one of the texts of `kas_bridge.kaspad.Condition`.
        problem: what is wrong, in one sentence; empty if nothing is.
        help: what helps; empty if nothing is wrong.
    """

    condition: str
    address: str
    network: str
    version: str
    node_id: str
    problem: str
    help: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerKept(Event):
    """A peer is kept connected from now on."""

    peer: PeerId
    address: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerForgotten(Event):
    """A peer is kept connected no longer, by the operator's wish."""

    peer: PeerId


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerFailed(Event):
    """An attempt to reach a kept peer failed, or it is not here any more.

    Attributes:
        problem: why, in words.
        left: whether it was joined until now.
        retry_in: seconds until the next attempt.
    """

    peer: PeerId
    problem: str
    left: bool
    retry_in: float


@dataclass(frozen=True, slots=True, kw_only=True)
class BanLifted(Event):
    """A ban was lifted before its time."""

    target: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ListenerOpened(Event):
    """kaspad can dial a peer at a local address: ``--addpeer=127.0.k.1:port``."""

    peer: PeerId
    address: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ListenerClosed(Event):
    """The local address of a peer that went away is closed."""

    peer: PeerId
    address: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Trouble(Event):
    """Something of the bridge's own failed, and nothing else was touched: a bug, or the machine.

    Attributes:
        where: which part.
        reason: the error, with its kind.
    """

    where: str
    reason: str
