"""What is known of our kaspad, and the one sentence that says what is wrong with it. Pure."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from kas_bridge.config import Network
from kas_libp2p.kaspa.join import End, Ended, KaspadAddress, VersionInfo
from kas_libp2p.metadata import PeerId

OLDEST_PROTOCOL = 9
"""Kaspa P2P protocol version below which we can't follow a handshake."""

CURRENT_PROTOCOL = 10
"""The oldest that kaspad 2.x accepts from its peers."""


class Condition(StrEnum):
    """How it stands with our kaspad."""

    SEARCHING = "searching"
    UP = "up"
    NOT_RUNNING = "not running"
    NOT_KASPAD = "not a kaspad"
    SILENT = "silent"
    BUSY = "busy"
    BANNED = "banned us"
    UNREACHABLE = "unreachable"
    WRONG_NETWORK = "wrong network"
    TOO_OLD = "too old"
    SEVERAL = "several"


_CONDITIONS = {
    End.NOT_RUNNING: Condition.NOT_RUNNING,
    End.NOT_KASPAD: Condition.NOT_KASPAD,
    End.KASPAD_SILENT: Condition.SILENT,
    End.KASPAD_BUSY: Condition.BUSY,
    End.BANNED: Condition.BANNED,
    End.UNREACHABLE: Condition.UNREACHABLE,
    End.NO_SOURCE: Condition.UNREACHABLE,
}

QUICK = frozenset({Condition.SEARCHING, Condition.NOT_RUNNING, Condition.BUSY, Condition.UNREACHABLE})
"""Conditions that are looked at again often: asking costs nobody anything, or they pass by themselves."""


@dataclass(frozen=True, slots=True)
class KaspadState:
    """Our kaspad at one moment.

    Attributes:
        condition: see there.
        address: where it listens for peers, as host:port; empty while none was found.
        network: ``kaspa-mainnet`` and so on.
        version: kaspad's own, such as ``2.1.0``.
        agent: the user agent that it came from.
        protocol_version: of the Kaspa P2P protocol.
        node_id: its id, new at every start.
        problem: what is wrong, in one sentence; empty if nothing is.
        help: what helps; empty if nothing is wrong.
    """

    condition: Condition = Condition.SEARCHING
    address: str = ""
    network: str = ""
    version: str = ""
    agent: str = ""
    protocol_version: int = 0
    node_id: str = ""
    problem: str = ""
    help: str = ""

    @property
    def up(self) -> bool:
        """Whether peers can be joined."""
        return self.condition is Condition.UP


@dataclass(frozen=True, slots=True)
class RpcPeer:
    """A peer as kaspad's RPC shows it."""

    node_id: str
    ip: str
    outbound: bool


@dataclass(frozen=True, slots=True)
class RpcFacts:
    """What kaspad's RPC told last.

    Attributes:
        address: of the RPC, as host:port.
        problem: why it can't be asked; empty if it can. Then the rest is empty, and nothing is missing but these facts.
        synced: whether kaspad is synced, or ``None``.
        peers: everybody it is connected to.
        at: when it was asked, on trio's clock.
    """

    address: str
    problem: str = ""
    version: str = ""
    network: str = ""
    node_id: str = ""
    synced: bool | None = None
    peers: tuple[RpcPeer, ...] = ()
    at: float = 0.0


def candidates(kaspad: tuple[str, int] | None, network: Network | None) -> list[KaspadAddress]:
    """Where a kaspad may listen: where it was said to, or at the default port of the network, or of each network."""
    if kaspad is not None:
        return [KaspadAddress(*kaspad)]
    networks = [network] if network is not None else list(Network)
    return [KaspadAddress(port=each.p2p_port) for each in networks]


def rpc_address(settings_rpc: tuple[str, int] | None, kaspad: KaspadAddress, network: str) -> tuple[str, int]:
    """Where the RPC may be: as set, or at the network's default port on kaspad's host."""
    if settings_rpc is not None:
        return settings_rpc
    known = next((each for each in Network if each.kaspa_name == network), None)
    if known is None:
        known = next((each for each in Network if each.p2p_port == kaspad.port), Network.MAINNET)
    return kaspad.host, known.rpc_port


def judge(
    outcomes: Sequence[tuple[KaspadAddress, VersionInfo | Ended]], network: Network | None, *, given: bool
) -> tuple[KaspadAddress | None, KaspadState]:
    """What the answers at all candidate addresses come to.

    Args:
        outcomes: what each address answered.
        network: the one that was asked for, or ``None``.
        given: whether the address was given by the operator, and not tried by us.

    Returns:
        the kaspad to use, if there is one, and the state.
    """
    nodes = [(address, answer) for address, answer in outcomes if isinstance(answer, VersionInfo)]
    if len(nodes) > 1:
        found = " and ".join(f"{_plain(version.network)} at {address}" for address, version in nodes)
        return None, KaspadState(
            Condition.SEVERAL,
            problem=f"{len(nodes)} kaspads run here: {found}",
            help="say which one with --network or --kaspad, and run one bridge for each, with a --data-dir of its own",
        )
    if nodes:
        address, version = nodes[0]
        return address, of_version(address, version, network)
    failures = [(address, answer) for address, answer in outcomes if isinstance(answer, Ended)]
    telling = [each for each in failures if each[1].reason is not End.NOT_RUNNING] or failures[:1]
    address, ended = telling[0]
    if ended.reason is End.NOT_RUNNING and len(outcomes) > 1:
        tried = ", ".join(f"{each.value} {each.p2p_port}" for each in Network)
        return None, KaspadState(
            Condition.NOT_RUNNING,
            problem=f"no kaspad listens on this machine (tried {tried})",
            help=_START + " or say where it is with --kaspad HOST:PORT",
        )
    return None, _of_failure(address, ended, given=given)


_START = "start kaspad (its default flags are fine, but not --connect or --maxinpeers=0, which close its P2P port),"


def of_version(address: KaspadAddress, version: VersionInfo, network: Network | None) -> KaspadState:
    """The state after kaspad said Version."""
    condition, problem, what_helps = Condition.UP, "", ""
    if network is not None and version.network != network.kaspa_name:
        condition = Condition.WRONG_NETWORK
        problem = f"kaspad at {address} is on {version.network}, but the bridge was told {network.kaspa_name}"
        what_helps = f"start the bridge with --network {_plain(version.network)}, or give another --kaspad"
    elif version.protocol_version < OLDEST_PROTOCOL:
        condition = Condition.TOO_OLD
        problem = (
            f"kaspad {version.version} at {address} speaks P2P protocol {version.protocol_version}, too old to join"
        )
        what_helps = "update it to kaspad 2.x, which speaks 10 and 11"
    elif version.protocol_version < CURRENT_PROTOCOL:
        problem = (
            f"kaspad {version.version} speaks P2P protocol {version.protocol_version}: kaspad 2.x accepts peers from"
            f" {CURRENT_PROTOCOL} on, so it can only be joined with nodes of its own age"
        )
        what_helps = "update it to kaspad 2.x"
    return KaspadState(
        condition=condition,
        address=str(address),
        network=version.network,
        version=version.version,
        agent=version.user_agent,
        protocol_version=version.protocol_version,
        node_id=version.node_id,
        problem=problem,
        help=what_helps,
    )


def _of_failure(address: KaspadAddress, ended: Ended, *, given: bool) -> KaspadState:
    condition = _CONDITIONS.get(ended.reason, Condition.NOT_KASPAD)
    who_has_it = f"see who has the port with: ss -ltnp 'sport = :{address.port}'"
    where = "give another address with --kaspad HOST:PORT"
    problem, what_helps = "", ""
    if condition is Condition.NOT_RUNNING:
        problem = f"no kaspad listens on {address}"
        what_helps = f"{_START} or {where}"
    elif condition is Condition.NOT_KASPAD and (network := _with_rpc_port(address.port)) is not None:
        problem = f"what listens on {address} does not speak kaspad's P2P protocol, and {address.port} is its RPC port"
        what_helps = f"give its P2P address: --kaspad {KaspadAddress(address.host, network.p2p_port)}"
    elif condition is Condition.NOT_KASPAD:
        problem = f"what listens on {address} is no kaspad ({ended.text or ended.reason})"
        what_helps = f"{who_has_it}; {where}"
    elif condition is Condition.SILENT:
        problem = f"{address} takes connections and says nothing"
        what_helps = f"either kaspad hangs (look at its log), or it is another program: {who_has_it}"
    elif condition is Condition.BUSY:
        problem = f"kaspad at {address} has too many handshakes pending and takes no more"
        what_helps = "this passes within seconds; if it stays, somebody floods its P2P port"
    elif condition is Condition.BANNED:
        problem = f"kaspad at {address} has banned the address from which the bridge dials it"
        what_helps = "lift the ban with kaspad's Unban RPC (--unsaferpc), or dial from other addresses with --source"
    elif ended.reason is End.NO_SOURCE:
        problem = ended.text
        what_helps = "give --source an address of this machine, or one for a single address"
    else:
        problem = ended.text
        if not ipaddress_is_loopback(address.host):
            what_helps = (
                f"check the address and the firewall, and that kaspad there listens on more than loopback"
                f" (--listen=0.0.0.0:{address.port}); {where}"
            )
        else:
            what_helps = where if given else f"{_START} or {where}"
    return KaspadState(condition=condition, address=str(address), problem=problem, help=what_helps)


def _with_rpc_port(port: int) -> Network | None:
    return next((each for each in Network if each.rpc_port == port), None)


def ipaddress_is_loopback(host: str) -> bool:
    """Whether a host is this one, as far as its text tells."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _plain(network: str) -> str:
    return network.removeprefix("kaspa-")


# -- What RPC adds -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class JoinedFacts:
    """What `compare` needs to know of a joined peer.

    Attributes:
        node_id: of its kaspad.
        source: the address from which it was joined, or ``None``.
        ready_at: since when, on trio's clock.
    """

    node_id: str
    source: str | None
    ready_at: float


@dataclass(frozen=True, slots=True)
class Comparison:
    """What kaspad's list of peers says of ours.

    Attributes:
        direct: peers that kaspad is connected to directly as well, with the address.
        seen_as: addresses from which kaspad sees our peers, where they are not their source addresses: something
            stands between, such as a container's port forwarding.
    """

    direct: Mapping[PeerId, str] = field(default_factory=dict)
    seen_as: tuple[str, ...] = ()


def compare(joined: Mapping[PeerId, JoinedFacts], sources: Mapping[PeerId, str | None], facts: RpcFacts) -> Comparison:
    """Find our peers in kaspad's list.

    Args:
        joined: peers that are joined.
        sources: the address assigned to every peer we know, joined or not.
        facts: what RPC told.
    """
    by_node: dict[str, list[RpcPeer]] = {}
    for each in facts.peers:
        by_node.setdefault(each.node_id, []).append(each)
    ours = {source for source in sources.values() if source is not None}
    direct: dict[PeerId, str] = {}
    seen_as: list[str] = []
    for peer, known in joined.items():
        if known.ready_at >= facts.at:
            continue
        entries = by_node.get(known.node_id, [])
        via_us = [each for each in entries if known.source is None or each.ip == known.source]
        others = [each for each in entries if each.ip != known.source and each.ip not in ours]
        if known.source is None:
            # All of ours come from one address that the system chose: one entry is ours, a second one is not.
            others, via_us = entries[1:], entries[:1]
        if via_us and others:
            direct[peer] = others[0].ip
        elif others and not via_us:
            if len(others) > 1:
                direct[peer] = others[1].ip
            if others[0].ip not in seen_as:
                seen_as.append(others[0].ip)
    return Comparison(direct, tuple(seen_as))


def notes(
    comparison: Comparison, *, host: str, one_source: bool, sources_given: bool, join_problem: Ended | None
) -> list[tuple[str, str]]:
    """What is worth knowing although kaspad is up: pairs of a sentence and what helps.

    Args:
        comparison: what RPC says of our peers.
        host: kaspad's; empty while none was found.
        one_source: whether all peers come from one address.
        sources_given: whether that is the operator's wish.
        join_problem: why kaspad could not be joined last, or ``None``.
    """
    found: list[tuple[str, str]] = []
    if join_problem is not None and join_problem.reason in (End.NO_SOURCE, End.UNREACHABLE):
        found.append(
            (
                f"no peer can be joined: {join_problem.text}",
                "give --source addresses of this machine from which kaspad can be reached, or --source one",
            )
        )
    if one_source and not sources_given and host and ":" in host and ipaddress_is_loopback(host):
        found.append(
            (
                f"IPv6 has one loopback address, so all peers reach kaspad at {host} from the same one: it takes 2"
                " handshakes at a time, and a ban of one bans all",
                "give kaspad's IPv4 address: --kaspad 127.0.0.1:PORT",
            )
        )
    elif one_source and not sources_given and host and not ipaddress_is_loopback(host):
        found.append(
            (
                f"kaspad at {host} is on another host or in a container, where sources of 127.x can't reach it: all"
                " peers share one source address, kaspad takes 2 handshakes at a time, and a ban of one bans all",
                "give the bridge a pool of this machine's addresses with --source 10.0.0.0/28 (any network that is"
                " routed here), or run it beside kaspad",
            )
        )
    if comparison.seen_as:
        found.append(
            (
                f"kaspad sees our peers as {', '.join(comparison.seen_as[:3])} and not as their source addresses:"
                " something stands between, such as a container's published port; a ban of one is a ban of all",
                "run kaspad with the host's network (--network host), or the bridge in kaspad's container",
            )
        )
    return found
