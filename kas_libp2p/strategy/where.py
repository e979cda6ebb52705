"""What a punch starts from: where we can be met, where a peer can, and what our NATs do, of all that a node knows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from multiaddr import Multiaddr

from kas_libp2p import addresses as addr
from kas_libp2p.autonat.roles import Reachability
from kas_libp2p.dcutr._candidates import Known, Own
from kas_libp2p.metadata import PathKind, PeerId
from kas_libp2p.strategy._nat import NatFacts, Ports, Sighting, families, seen
from kas_libp2p.transport.connection import Connection


class Whereabouts:
    """Asks the parts of a node, each time anew.

    Args:
        reachability: where others see us, and what our NATs do.
        interfaces: what we listen on, as multiaddr texts, wildcards replaced.
        listen: where we say that we can be dialed.
        mapped: ports that routers gave us, as multiaddr texts.
        connections_to: all connections with a peer.
        identified: where a peer has said that it can be dialed.
        shares_local: whether both sides agreed to try local addresses with each other.
        allow_private: for laboratories: private IPv6 counts as public.
    """

    def __init__(
        self,
        reachability: Reachability,
        *,
        interfaces: Callable[[], Sequence[str]],
        listen: Callable[[], Iterable[Multiaddr]],
        mapped: Callable[[], Iterable[str]],
        connections_to: Callable[[PeerId], Iterable[Connection]],
        identified: Callable[[PeerId], Iterable[Multiaddr]],
        shares_local: Callable[[PeerId], bool],
        allow_private: bool = False,
    ) -> None:
        self._reachability = reachability
        self._interfaces = interfaces
        self._listen = listen
        self._mapped = mapped
        self._connections_to = connections_to
        self._identified = identified
        self._shares_local = shares_local
        self._allow_private = allow_private

    def ours(self, connection: Connection) -> Own:
        """Where the peer of a relayed connection can meet us."""
        listen = [str(each) for each in self._listen()]
        return Own(
            observed=self._reachability.candidates(),
            mapped=[*self._mapped()],
            listen=listen,
            local=[each for each in listen if addr.is_private(each)] if self._shares_site(connection) else (),
        )

    def theirs(self, connection: Connection) -> Known:
        """What we know of where the peer of a relayed connection can be met."""
        seen_at = connection.circuit.observed if connection.circuit is not None else None
        direct = [
            each.remote_address
            for each in self._connections_to(connection.peer)
            if each.path.kind is not PathKind.RELAYED
        ]
        own = self.ours(connection)
        return Known(
            observed=[*([str(seen_at)] if seen_at is not None else ()), *direct],
            identified=[str(each) for each in self._identified(connection.peer)],
            own=[*own.observed, *own.mapped, *own.listen],
            local=[addr.site_of(each) for each in own.local],
        )

    def _shares_site(self, connection: Connection) -> bool:
        """Whether the peer seems to be behind the router that we are behind, and both sides want to try it there."""
        seen_at = connection.circuit.observed if connection.circuit is not None else None
        where = addr.ip_port(seen_at) if seen_at is not None else None
        ours = {addr.ip_port(each) for each in self._reachability.candidates()}
        same = where is not None and where[0] in {each[0] for each in ours if each is not None}
        return same and self._shares_local(connection.peer)

    def nats(self) -> tuple[NatFacts, Sequence[str]]:
        """What is known of our NATs, and where others see us."""
        reachability = self._reachability
        found = {}
        for family in families(self._interfaces(), allow_private=self._allow_private):
            view, filtering = reachability.nat(family)
            sightings = [Sighting(age, port) for age, port in reachability.sightings(family)]
            nat = seen(view, filtering, sightings)
            if nat.ports is Ports.SEQUENTIAL:
                dials = reachability.dials_since(family, min(each.age for each in sightings))
                here = Sighting(0.0, nat.sightings[-1].port + dials)  # it has counted our own dials, too
                nat = replace(nat, sightings=(*nat.sightings[1:], here)) if dials else nat
            found[family] = nat
        return NatFacts(found.get(4), found.get(6)), reachability.candidates()
