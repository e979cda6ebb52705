"""From which address each peer is joined to kaspad: an assigned table, pure.

kaspad knows peers by node id and IP address, bans by IP address, and gives each IP address two pending handshakes. So
every remote peer gets an address of its own under 127.0.0.0/8, which Linux lets anybody use as a source, and keeps it
over restarts. Addresses are assigned one after the other and written down, never computed: two peers share none, and
none can choose its own. 127.0.0.0/16 is left to what people put there by hand.
"""

from __future__ import annotations

import ipaddress
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from kas_libp2p.errors import ConfigError
from kas_libp2p.metadata import PeerId

FORMAT = 1
"""Version of the file."""

DEFAULT_POOL = ("127.1.0.0/16",)
"""65 534 addresses, more than `MAX_ENTRIES`. Outside of 127.0.0.0/16."""

LEFT_OUT = ipaddress.IPv4Network("127.0.0.0/16")
"""What is never assigned by itself: resolvers, development servers and kaspad itself live here."""

MAX_ENTRIES = 4096
"""Peers that the table remembers: some hundred kB. A stranger with many identities pushes out only idle ones."""


class PoolExhausted(Exception):
    """Every address is in use by a joined peer."""


@dataclass(slots=True)
class Entry:
    """One assignment.

    Attributes:
        address: the source address.
        used_at: seconds since the epoch, when it was last taken or given back.
        in_use: how many joins hold it now.
    """

    address: str
    used_at: float
    in_use: int = 0


class SourceTable:
    """Source addresses by remote peer.

    Args:
        pool: IPv4 networks to assign from, in order. A network of one address (``10.0.0.7/32``, or without a mask)
            gives that one. Within 127.0.0.0/16 nothing is assigned unless the network itself lies in it.
        max_entries: peers that are remembered.

    Raises:
        ConfigError: the pool is empty, or one of it is no IPv4 network.
    """

    def __init__(self, pool: Iterable[str] = DEFAULT_POOL, *, max_entries: int = MAX_ENTRIES) -> None:
        self._networks: list[ipaddress.IPv4Network] = []
        for text in pool:
            try:
                network = ipaddress.ip_network(text)
            except ValueError as error:
                raise ConfigError(f"{text!r} in the pool of source addresses is no IPv4 network: {error}") from None
            if not isinstance(network, ipaddress.IPv4Network):
                raise ConfigError(f"{text!r} in the pool of source addresses is not IPv4")
            self._networks.append(network)
        if not self._networks:
            raise ConfigError("the pool of source addresses is empty")
        self._max_entries = max_entries
        self._entries: dict[PeerId, Entry] = {}  # the least recently used first
        self._taken: set[str] = set()
        self._fresh = self._addresses()

    def _addresses(self) -> Iterator[str]:
        for network in self._networks:
            whole = [network]
            if LEFT_OUT.subnet_of(network) and network != LEFT_OUT:
                whole = sorted(network.address_exclude(LEFT_OUT))
            for part in whole:
                for address in part.hosts():
                    if not _is_edge(address, network):
                        yield str(address)

    def _allows(self, address: str) -> bool:
        ip = ipaddress.ip_address(address)
        return any(
            ip in network and (ip not in LEFT_OUT or network.subnet_of(LEFT_OUT)) and not _is_edge(ip, network)
            for network in self._networks
        )

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, peer: PeerId) -> bool:
        return peer in self._entries

    def address_of(self, peer: PeerId) -> str | None:
        """The address assigned to a peer, or ``None``."""
        entry = self._entries.get(peer)
        return None if entry is None else entry.address

    def entries(self) -> dict[PeerId, Entry]:
        """All assignments, the least recently used first. A copy of the table, not of its entries."""
        return dict(self._entries)

    def take(self, peer: PeerId, now: float) -> tuple[str, bool]:
        """The peer's address, in use from here on, and whether it was assigned just now.

        Args:
            now: seconds since the epoch.

        Raises:
            PoolExhausted: all addresses, or all places in the table, are held by peers in use.
        """
        entry = self._entries.pop(peer, None)
        new = entry is None
        if entry is None:
            entry = Entry(self._assign(), now)
            self._taken.add(entry.address)
        entry.in_use += 1
        entry.used_at = now
        self._entries[peer] = entry
        return entry.address, new

    def give_back(self, peer: PeerId, now: float) -> None:
        """The peer's address is not in use any more, and stays assigned."""
        entry = self._entries.pop(peer)
        entry.in_use -= 1
        entry.used_at = now
        self._entries[peer] = entry

    def _assign(self) -> str:
        if len(self._entries) < self._max_entries:
            for address in self._fresh:
                if address not in self._taken:
                    return address
        for peer, entry in self._entries.items():
            if not entry.in_use:
                del self._entries[peer]
                return entry.address
        raise PoolExhausted("every source address of the pool is in use by a joined peer")

    # -- The file ------------------------------------------------------------------------------------------------------

    def dump(self) -> str:
        """The table as JSON, the least recently used first."""
        peers = [[peer, entry.address, round(entry.used_at)] for peer, entry in self._entries.items()]
        return json.dumps({"version": FORMAT, "peers": peers}, separators=(",", ":"))

    def load(self, text: str) -> int:
        """Take over what `dump` wrote, leaving out what does not fit the pool. Only into an empty table.

        Returns:
            how many assignments were left out.

        Raises:
            ValueError: this is not such a file, or one of a later version.
        """
        if self._entries:
            raise ValueError("the table is not empty")
        data = json.loads(text)
        if not isinstance(data, dict) or data.get("version") != FORMAT or not isinstance(data.get("peers"), list):
            raise ValueError(f"no table of source addresses in format {FORMAT}")
        left_out = 0
        for item in data["peers"][-self._max_entries :]:
            try:
                peer, address, used_at = item
                if not isinstance(peer, str) or not isinstance(address, str) or not self._allows(address):
                    raise ValueError
                used_at = float(used_at)
            except (TypeError, ValueError):
                left_out += 1
                continue
            if address in self._taken or peer in self._entries:
                left_out += 1
                continue
            self._taken.add(address)
            self._entries[PeerId(peer)] = Entry(address, used_at)
        return left_out + max(0, len(data["peers"]) - self._max_entries)


def _is_edge(ip: ipaddress.IPv4Address | ipaddress.IPv6Address, network: ipaddress.IPv4Network) -> bool:
    """Whether this is the network's own address or its broadcast address, which ``hosts()`` leaves out."""
    return network.prefixlen < 31 and ip in (network.network_address, network.broadcast_address)
