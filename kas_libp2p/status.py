"""A node at one moment, as frozen values: what `Node.status` gives.

No logic: rooms make their own parts, `node.py` puts them together.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from kas_libp2p.autonat.roles import ReachabilityStatus
from kas_libp2p.config import Limits
from kas_libp2p.metadata import CircuitLimits, Direction, Path, PeerId
from kas_libp2p.portmap.service import Mapping as PortMapping
from kas_libp2p.relay.client import ReservationStatus
from kas_libp2p.relay.pool import RelayStatus as RelayCandidate
from kas_libp2p.relay.server import RelayStatus
from kas_libp2p.session.status import SessionStatus
from kas_libp2p.strategy._upgrade import UpgradeStatus


@dataclass(frozen=True, slots=True)
class StreamStatus:
    """An open stream.

    Attributes:
        protocol: its id; empty while it is being agreed on.
        direction: who opened it.
        seconds: how long it has been open.
        received, sent: payload bytes.
    """

    protocol: str
    direction: Direction
    seconds: float
    received: int
    sent: int


@dataclass(frozen=True, slots=True)
class ConnectionStatus:
    """A connection.

    Attributes:
        number: counts the connections of this process.
        peer, path, direction: who, which way, who opened it.
        local_address, remote_address: multiaddrs as text.
        seconds: how long it has been up.
        rtt: last measured round trip in seconds.
        received, sent: bytes on the wire.
        agent, protocols: what the peer told; empty if it has not.
        observed: our address as the peer sees it.
        limits: of the circuit that carries it; ``None`` where no relay does.
        streams: what is open on it.
    """

    number: int
    peer: PeerId
    path: Path
    direction: Direction
    local_address: str
    remote_address: str
    seconds: float
    rtt: float | None
    received: int
    sent: int
    agent: str
    protocols: tuple[str, ...]
    observed: str | None
    limits: CircuitLimits | None
    streams: tuple[StreamStatus, ...]


@dataclass(frozen=True, slots=True)
class Status:
    """A node at one moment.

    Attributes:
        peer_id, agent: who we are.
        addresses: where we can be reached, our peer id included.
        protocols: what is served.
        connections: the oldest first.
        reachability: who can dial us, the role that follows, and why.
        mappings: ports of the router that lead to ours.
        mapping_problem: why there are none, if some are wanted; else empty.
        reservations: the relays on which we hold places, or want to.
        relays: the relays that are known: those we hold or ask first, then the best.
        relay: what we carry for others; ``None`` while we are no relay.
        upgrades: how it stands with the peers that were reached through relays: whether they become direct.
        limits: what is allowed.
        in_use: how much of each limit is taken.
        limit_hits: how often each limit, list or gate said no.
        bans: what is banned, and for how many seconds more.
        known_peers: how many peers' addresses are remembered.
        events: how often each event occurred, as ``name`` or ``name/detail``.
        seconds: how long the node has been up.
        sessions: the oldest first.
    """

    peer_id: PeerId
    agent: str
    addresses: tuple[str, ...]
    protocols: tuple[str, ...]
    connections: tuple[ConnectionStatus, ...]
    reachability: ReachabilityStatus
    mappings: tuple[PortMapping, ...]
    mapping_problem: str
    reservations: tuple[ReservationStatus, ...]
    relays: tuple[RelayCandidate, ...]
    relay: RelayStatus | None
    upgrades: tuple[UpgradeStatus, ...]
    limits: Limits
    in_use: Mapping[str, int]
    limit_hits: Mapping[str, int]
    bans: Mapping[str, float]
    known_peers: int
    events: Mapping[str, int]
    seconds: float
    sessions: tuple[SessionStatus, ...] = ()
