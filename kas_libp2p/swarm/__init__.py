"""py-libp2p's swarm with our transport in it. See `kas_libp2p.swarm.swarm`."""

from kas_libp2p.swarm._admission import Candidate, Policy
from kas_libp2p.swarm.connection import SwarmConnection, SwarmStream
from kas_libp2p.swarm.network import Listener, Network
from kas_libp2p.swarm.swarm import Swarm

__all__ = ["Candidate", "Listener", "Network", "Policy", "Swarm", "SwarmConnection", "SwarmStream"]
