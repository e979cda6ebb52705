"""What people see: the same facts that ``--json`` gives, in words, with units.

Everything here takes plain values as the control socket gives them, so that ``kas-bridge events`` shows what
``kas-bridge run`` prints, and a test needs no bridge.
"""

from __future__ import annotations

import re
import textwrap
import time
from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from kas_bridge import reach
from kas_libp2p.kaspa._join import End, Side  # not by way of join, which imports ten times as much
from kas_libp2p.metadata import PathKind
from kas_libp2p.units import milliseconds as milliseconds
from kas_libp2p.units import plural as plural
from kas_libp2p.units import rate as rate
from kas_libp2p.units import seconds as seconds
from kas_libp2p.units import short as short
from kas_libp2p.units import size as size

Values = Mapping[str, Any]


def console(*, error: bool = False) -> Console:
    """A terminal, or a file that gets no colours and no line breaks of ours."""
    made = Console(stderr=error, highlight=False, soft_wrap=False)
    if not made.is_terminal:
        made.width = 240
    return made


_LABEL = re.compile(r"  (?:\S+ +|\s+)(?<=^.{12})|\d\d:\d\d:\d\d  |  ")
"""What stands before the text of a line: a label of `labelled`, the time of an event, or an indent."""


def wrapped(text: str, out: Console) -> str:
    """Text as it fits into a terminal, each line continued under the beginning of its text.

    What others copy, such as an address, is never cut; what goes into a file or a pipe stays one line.
    """
    if not out.is_terminal:
        return text
    return "\n".join(_wrapped(line, out.width) for line in text.split("\n"))


def _wrapped(line: str, width: int) -> str:
    if len(line) <= width:
        return line
    label = _LABEL.match(line)
    kept = label.end() if label is not None else 0
    parts = textwrap.wrap(
        line[kept:],
        width,
        initial_indent=" " * kept,
        subsequent_indent=" " * kept,
        break_long_words=False,
        break_on_hyphens=False,
    )
    return line[:kept] + "\n".join(parts)[kept:]


MAX_NAME = 24
"""Characters of a node's name in a table."""


# -- Names ------------------------------------------------------------------------------------------------------------


def node_name(node: Values | None) -> str:
    """``kaspad 2.1.0`` from a node's user agent. The agent is the node's own words: it may be long, and no agent."""
    if node is None:
        return "-"
    agent = str(node["agent"])
    name = agent.strip("/").partition(":")[0]
    text = f"{name} {node['version']}" if name and node["version"] != agent else agent
    return f"{text[: MAX_NAME - 1]}…" if len(text) > MAX_NAME else text or "-"


def path_name(row: Values) -> str:
    """``direct``, or ``relayed (…p7yG)``, or ``no path for 3.0 s``."""
    if waits := reach.waits(row.get("session")):
        return waits
    relay = row.get("relay_id")
    return f"{row['path']} (…{relay[-4:]})" if relay else str(row["path"])


# -- Start -------------------------------------------------------------------------------------------------------------


def ordinal(number: int) -> str:
    """A small number in words: ``first``, ``second``, ``third``, ``4th``."""
    return {1: "first", 2: "second", 3: "third"}.get(number, f"{number}th")


def kaspad_line(kaspad: Values, *, first: bool = True) -> list[str]:
    """How it stands with kaspad: one line, and a second one with what helps if something is wrong."""
    if kaspad["condition"] == "up":
        line = f"{kaspad['version']} on {kaspad['network']} at {kaspad['address']}"
        rpc = kaspad.get("rpc")
        if rpc and rpc["synced"] is not None:
            line += ", synced" if rpc["synced"] else ", not synced yet"
        if first and not kaspad["problem"]:
            line += "; its flags are fine"
        lines = [line]
        if kaspad["problem"]:
            lines += [f"but {kaspad['problem']}", f"what helps: {kaspad['help']}"]
        return lines
    if kaspad["condition"] == "searching":
        return ["looking for it"]
    lines = [kaspad["problem"], f"what helps: {kaspad['help']}"]
    if kaspad["retry_in_s"] is not None:
        when = "all the time" if first else f"in {seconds(kaspad['retry_in_s'])}" if kaspad["retry_in_s"] else "now"
        lines.append(f"looked for again {when}; peers join as soon as it is there")
    return lines


def startup(status: Values) -> list[str]:
    """What ``kas-bridge run`` and ``kas-bridge relay`` say first."""
    name = "kas-bridge relay" if status["mode"] == "relay" else "kas-bridge"
    lines = [f"{name} {status['version']} · {status['peer_id'][:12]}…{status['peer_id'][-4:]}"]
    if "kaspad" in status:
        lines += labelled("kaspad", kaspad_line(status["kaspad"]))
        for note in status["notes"]:
            lines += labelled("note", [note["note"], f"what helps: {note['help']}"])
    lines += _reach_lines(status)
    if "kaspad" in status:
        peers = status["peers"]
        kept = plural(peers["kept"], "peer") + " to keep connected" if peers["kept"] else "nobody to connect to yet"
        if not peers["kept"]:
            kept += ": kas-bridge connect MULTIADDR" + (", or wait for others" if status["addresses"] else "")
        lines += labelled("peers", [f"{kept}; at most {status['limits']['max_joined']['limit']} joined at once"])
    lines += labelled("control", [f"{status['control']} (kas-bridge status, peers, events, stop)"])
    return lines


def _reach_lines(status: Values) -> list[str]:
    """Role, router, relays and addresses, as far as there is something to say."""
    lines = labelled("role", [reach.role_line(status)])
    private = status["reachability"]["role"] == "private"
    mapping = status["port_mapping"]
    if mapping["mappings"] or (private and mapping["problem"]):
        lines += labelled("router", [reach.mapping_line(status)])
    if status["relay"] is not None:
        lines += labelled("carries", [reach.serving_line(status["relay"])])
    elif status["serve_relay"]:
        lines += labelled("carries", ["nothing: only who is public can be a relay"])
    if private:
        lines += labelled("relays", reach.relays_line(status))
    reachable = status["reachability"]["reachable"]
    if reachable:
        lines += labelled("reachable", listed(reachable))
    rest = [each for each in status["addresses"] if each not in reachable]
    if rest or not reachable:
        lines += labelled("listens", listed(rest))
    return lines


def labelled(label: str, lines: Iterable[str]) -> list[str]:
    """Lines under a label."""
    return [f"  {label if index == 0 else '':<9} {line}" for index, line in enumerate(lines)]


def listed(addresses: list[str]) -> list[str]:
    """Addresses, those that others can use first."""
    if not addresses:
        return ["nowhere: this bridge only dials"]
    outside = [each for each in addresses if not each.startswith(("/ip4/127.", "/ip6/::1/"))]
    shown = outside or addresses
    more = len(addresses) - min(len(shown), reach.MAX_SHOWN) if outside else 0
    rest = [f"and {more} more (kas-bridge status --json)"] if len(shown) > reach.MAX_SHOWN and more else []
    return [*shown[: reach.MAX_SHOWN], *rest]


# -- Events ------------------------------------------------------------------------------------------------------------


def event_line(event: Values, *, verbose: bool = False) -> str | None:
    """An event as one line, or ``None`` if it is of no interest to an operator."""
    text = _event_text(event, verbose)
    if text is None:
        return None
    return at(event["at"], text)


def at(when: float, text: str) -> str:
    """A line about something that happened, so many seconds after the epoch."""
    return f"{time.strftime('%H:%M:%S', time.localtime(when))}  {text}"


def _event_text(event: Values, verbose: bool) -> str | None:
    peer = f"peer {short(event['peer'])}" if isinstance(event.get("peer"), str) else ""
    match event["event"]:
        case "kaspad-changed":
            return "kaspad " + _kaspad_text(event)
        case "kaspa-peer-joined" if event["moved"]:
            took = f"(handshake {seconds(event['seconds'])})"
            return f"{peer}  carried on without a relay: {_path_of(event['path'])} {took}" if verbose else None
        case "kaspa-peer-joined":
            node = {"agent": event["user_agent"], "version": _version_of(event["user_agent"])}
            who = "we dialed" if event["direction"] == "outbound" else "it dialed"
            source = f", seen by kaspad as {event['source']}" if event["source"] else ""
            return (
                f"{peer}  joined: {node_name(node)}, {_path_of(event['path'])}, {who}{source}"
                f" (handshake {seconds(event['seconds'])})"
            )
        case "kaspa-peer-ended" if event["joined"] and event["reason"] in (End.SUPERSEDED, End.DUPLICATE):
            carried = f"in {size(event['received'])}, out {size(event['sent'])}"
            return (
                f"{peer}  a newer stream takes over after {seconds(event['seconds'])} ({carried})" if verbose else None
            )
        case "kaspa-peer-ended":
            reason = ended_words(event["reason"], event["by"], event["text"])
            if not event["joined"]:
                return f"{peer}  not joined: {reason}" if verbose else None
            return (
                f"{peer}  left after {seconds(event['seconds'])}: {reason}"
                f" (in {size(event['received'])}, out {size(event['sent'])})"
            )
        case "peer-failed" if event["left"]:
            return f"{peer}  dialed again in {seconds(event['retry_in'])}" if verbose else None
        case "peer-failed":
            return f"{peer}  not joined: {event['problem']}; next try in {seconds(event['retry_in'])}"
        case "peer-kept":
            return f"{peer}  kept connected from now on: {event['address']}"
        case "peer-forgotten":
            return f"{peer}  kept connected no longer"
        case "banned":
            until = "for good" if event["seconds"] is None else f"for {seconds(event['seconds'])}"
            return f"banned {event['target']} {until}"
        case "ban-lifted":
            return f"lifted the ban of {event['target']}"
        case "listener-opened":
            return f"{peer}  kaspad can dial it now: --addpeer={event['address']}"
        case "listener-closed":
            return f"{peer}  local address {event['address']} closed"
        case "role-changed":
            return f"role  {event['role']}: {event['reason']}"
        case "reservation-made" if not event["renewed"]:
            allowed = reach.allowance(event["max_bytes"], event["max_seconds"])
            return (
                f"relay {reach.relay_name(event['relay'])}  keeps a place for us, good for"
                f" {seconds(event['lifetime'])}, {allowed} (asked in {seconds(event['seconds'])})"
            )
        case "reservation-failed":
            return f"relay {reach.relay_name(event['relay'])}  has no place for us: {event['reason']}"
        case "reservation-lost":
            return f"relay {reach.relay_name(event['relay'])}  our place there is gone: {event['reason']}"
        case "upgrade-decided" if event["decision"] == "leave" or verbose:
            stays = "stays relayed" if event["decision"] == "leave" else f"{event['decision']} ({event['chance']})"
            return f"{peer}  {stays}: {event['text'] or event['reason']}"
        case "upgrade-abandoned" if event["reason"] not in _PASSING or event["wait"] >= SOON or verbose:
            again = f"; not tried again for {seconds(event['wait'])}" if event["wait"] else ""
            what = "its direct way did not last" if event["stage"] in ("proving", "stable") else "stays relayed for now"
            return f"{peer}  {what}: {event['text'].rstrip('.') or event['reason']}{again}"
        case "intent-told" if verbose:
            side = "we told it" if event["by_us"] else "it told us"
            because = f" ({event['reason']})" if event["reason"] else ""
            nats = "".join(f"; {'our' if event['by_us'] else 'its'} NAT {words}" for words in event["nat"].values())
            return f"{peer}  upgrade: {side} {event['answer']}{because}{nats}"
        case "punch-connect" if verbose:
            side = "told it" if event["by_us"] else "it told us"
            rtt = f" ({milliseconds(event['rtt'] * 1000)} round trip)" if event["rtt"] is not None else ""
            return f"{peer}  CONNECT: {side} {_endpoints(event['addresses'])}{rtt}"
        case "punch-sync" if verbose:
            return f"{peer}  SYNC {'sent' if event['by_us'] else 'came'}"
        case "punch-started" if verbose:
            wait = f", in {milliseconds(event['wait'] * 1000)}" if event["wait"] > 0 else ""
            return f"{peer}  dials {_endpoints(event['targets'])}{wait}"
        case "punch-dialed" if verbose:
            return (
                f"{peer}  dial {event['attempt']} of {reach.endpoint(event['address'])}: {event['reason']}"
                f" after {milliseconds(event['seconds'] * 1000)}"
            )
        case "punch-adopted" if verbose:
            return f"{peer}  its own dial came in from {reach.endpoint(event['address'])}"
        case "punch-attempt-failed" if verbose:
            return f"{peer}  attempt {event['attempt']} came to nothing: {event['text']}"
        case "punch-ended" if event["reason"] == "punched" and verbose:
            return f"{peer}  punched: direct ({ordinal(event['attempts'])} attempt, {seconds(event['seconds'])})"
        case "punch-ended" if verbose:
            tries = f"{plural(event['attempts'], 'attempt')}, {seconds(event['seconds'])}"
            return f"{peer}  not punched: {event['text'].rstrip('.') or event['reason']} ({tries})"
        case "session-moved":
            return _moved_text(peer, event, verbose)
        case "session-not-moved" if verbose:
            return f"{peer}  not moved to {_path_of(event['path'])}: {event['reason'].rstrip('.') or event['code']}"
        case "session-waiting":
            lost = f"lost its path, {_path_of(event['path'])}: {event['reason'].rstrip('.')}"
            return f"{peer}  {lost}; looks for another one, and kaspad keeps the peer"
        case "small-circuits":
            return f"{peer}  goes from one small circuit to the next: {event['text']}"
        case "session-opened" if verbose:
            side = "ours" if event["by_us"] else "its"
            return f"{peer}  session ({side}) begins: {_path_of(event['path'])}"
        case "session-ended" if verbose:
            moves = plural(event["moves"], "move")
            reason = event["reason"] or event["code"]
            return f"{peer}  session over after {seconds(event['seconds'])} and {moves}: {reason}"
        case "path-proven":
            by_relay = event["relayed_rtt"]
            instead = f", instead of {milliseconds(by_relay * 1000)} by the relay" if by_relay is not None else ""
            how = "punched: direct" if event["path"]["kind"] == PathKind.PUNCHED else "direct"
            return f"{peer}  {how}, {milliseconds(event['rtt'] * 1000)}{instead}"
        case "circuit-replaced" if verbose:
            return f"{peer}  its circuit is closed: the direct way has taken its place"
        case "port-mapped":
            lasts = "" if event["lifetime"] is None else f" for {seconds(event['lifetime'])}"
            return f"router  gave us {event['external']} by {reach.protocol_name(event['by'])}{lasts}"
        case "port-mapping-failed":
            return f"router  gave us no port: {event['reason']}"
        case "relay-request-served" if (event["request"], event["status"]) == ("reserve", "OK"):
            return f"{peer}  has a place here"
        case "circuit-opened":
            return f"circuit {event['circuit']}  {short(event['source'])} → {short(event['destination'])}"
        case "circuit-closed":
            return (
                f"circuit {event['circuit']}  {short(event['source'])} → {short(event['destination'])} ended after"
                f" {seconds(event['seconds'])}: {_CIRCUIT_ENDS[event['reason']]} ({size(event['forth'])} there,"
                f" {size(event['back'])} back)"
            )
        case "file-damaged":
            return f"{event['path']}  {event['reason']}"
        case "peer-misbehaved":
            who = peer or event["address"]
            return f"{who}  broke {event['layer']}: {event['reason']}"
        case "handler-failed":
            return f"{peer}  a fault of ours ended its stream: {event['reason']}"
        case "trouble":
            return f"a fault of ours in {event['where']}: {event['reason']}"
        case "limit-hit":
            return f"{peer or event['address']}  refused: {_refusal(event['reason'])}"
        case "inbound-refused":
            return f"{event['address']}  refused: {_refusal(event['reason'])}"
        case "bridge-stopping":
            return f"stopping {event['reason']}".rstrip()
        case "events-lost":
            return f"{event['count']} events were not shown: they came too fast"
        case "bridge-started":
            return None
        case _ if verbose:
            rest = ", ".join(f"{key} {value}" for key, value in event.items() if key not in ("event", "at"))
            return f"{event['event']}: {rest}"
        case _:
            return None


def _moved_text(peer: str, event: Values, verbose: bool) -> str | None:
    path, previous, gap = event["path"], event["previous"], event["seconds_without"]
    if path["kind"] == previous["kind"] == PathKind.RELAYED and not gap and not verbose:
        return None  # a circuit that was about to end, and the next one: every two minutes with some relays
    how = f"goes on after {seconds(gap)} without a path" if gap else "moved"
    before = "another connection" if path == previous else f"before: {_path_of(previous)}"
    facts = [before] + ([f"{size(event['resent'])} sent again"] if event["resent"] else [])
    facts += [event["reason"]] if event["reason"] else []
    return f"{peer}  {how}: {_path_of(path)} ({'; '.join(facts)})"


_PASSING = frozenset({"busy", "interrupted", "no_address"})
"""Of `kas_libp2p.strategy._memory.Cause`: what is over soon by itself, as when a peer just left."""
SOON = 60.0
"""Seconds after which it is worth a line all the same."""


def _endpoints(addresses: list[str]) -> str:
    more = len(addresses) - reach.MAX_SHOWN
    shown = ", ".join(map(reach.endpoint, addresses[: reach.MAX_SHOWN])) or "nothing"
    return shown + (f" and {more} more" if more > 0 else "")


def _kaspad_text(event: Values) -> str:
    if event["condition"] == "up":
        but = f", but {event['problem']} ({event['help']})" if event["problem"] else ""
        return f"{event['version']} on {event['network']} at {event['address']}{but}"
    return f"{event['condition']}: {event['problem']}; what helps: {event['help']}"


_CIRCUIT_ENDS = {
    "closed": "closed by both",
    "source_reset": "ended by the caller",
    "destination_reset": "ended by the called",
    "source_lost": "the caller is gone",
    "destination_lost": "the called is gone",
    "max_circuit_bytes": "it carried all that one may",
    "max_circuit_seconds": "its time was over",
    "max_circuit_memory": "too much was waiting for it here",
    "source_stalled": "the caller took nothing any more",
    "destination_stalled": "the called took nothing any more",
    "relay": "ended here",
}
"""Of `kas_libp2p.transport.splice.End`, which would be long to import."""
_NOISE = frozenset(
    {
        "the peer closed the connection",
        "closed by this side",
        "kaspad ended the connection",
        "the peer is stopping",
        "the peer has been started anew",
        "there is no such session",
    }
)
"""Texts of the layers below that say nothing which the reason does not."""

_ENDS = {
    End.PEER_KASPAD: "its kaspad is not running or can't be joined",
    End.PEER_BUSY: "its bridge is busy: too many handshakes, or as many peers as it allows",
    End.PEER_SILENT: "it said nothing in time",
    End.PEER_CLOSED: "it closed the connection",
    End.PEER_STOPPED: "its bridge stopped",
    End.PEER_RESTARTED: "its bridge has started anew",
    End.PATH_LOST: "the connection was lost",
    End.PATH_HUNG: "the connection hung",
    End.KASPAD_CLOSED: "our kaspad closed the connection",
    End.KASPAD_STUCK: "our kaspad takes no data",
    End.NOT_RUNNING: "our kaspad is not running",
    End.DUPLICATE: "it is joined already by another way",
    End.LOOPBACK: "its node is our own",
    End.DISCONNECTED: "disconnected by the operator",
    End.SUPERSEDED: "replaced by a newer stream of the same peer",
    End.STOPPED: "this bridge stops",
}


def ended_words(reason: str, by: str, text: str) -> str:
    """Why a peer is not, or no longer, joined.

    Args:
        reason: one of `kas_libp2p.kaspa.join.End`.
        by: one of `kas_libp2p.kaspa.join.Side`.
        text: kaspad's or the peer's own words; may be empty.
    """
    whose = {Side.PEER: "its kaspad", Side.KASPAD: "our kaspad"}.get(Side(by), "the bridge")
    match End(reason):
        case End.REFUSED:
            head = "its operator's lists refuse us" if by == Side.PEER else "refused by our lists"
        case End.BANNED:
            head = "its kaspad has banned us" if by == Side.PEER else "our kaspad has banned it"
        case End.NETWORK | End.VERSION | End.USER_AGENT | End.REJECTED:
            head = f"{whose} said no: {reason}"
        case End.DUPLICATE if text:
            return text
        case known:
            head = _ENDS.get(known, str(reason))
    return head if not text or text in _NOISE or text == reason else f"{head} ({text})"


_LISTS = {"policy": "banned", "deny": "on the deny list", "allow": "not on the allow list"}
_LIMITS = {"one_kaspa_stream": "it has a Kaspa stream already", "source addresses": "every source address is in use"}


def _refusal(limit: str) -> str:
    """Why a connection or stream was refused, from the name of the list or limit."""
    return _LISTS.get(limit) or _LIMITS.get(limit) or f"the limit {limit.replace('_', '-')} is reached"


def _path_of(path: Any) -> str:
    if isinstance(path, Mapping):
        relay = path.get("relay")
        return f"{path['kind']} (…{relay[-4:]})" if relay else str(path["kind"])
    return str(path)


def _version_of(agent: str) -> str:
    name, _, rest = agent.strip("/").partition(":")
    return rest.partition("/")[0].partition("(")[0] if name and rest else agent


# -- Tables ------------------------------------------------------------------------------------------------------------


def peers(
    rows: list[dict[str, Any]], upgrades: list[dict[str, Any]], out: Console, *, relay: bool = False
) -> RenderableType:
    """The table of ``kas-bridge peers``, as wide as where it goes allows, and which of them are becoming direct."""
    if relay and not rows:
        return Text("nobody is connected")
    if not rows:
        return Text("nobody is joined, and nobody is kept connected; begin with: kas-bridge connect MULTIADDR")
    parts: list[RenderableType] = []
    if relay:
        return _fitting(out, _connected_table(rows), _connected_table(rows, software=False))
    joined = [row for row in rows if row["state"] in ("joined", "handshaking")]
    if joined:
        moving = any(row["session"] is not None for row in joined)
        tables = [_joined_table(joined, moves=moving), _joined_table(joined, seen_as=False, moves=moving)]
        parts.append(_fitting(out, *tables, _joined_table(joined, seen_as=False)))
        for row in joined:
            if row["also_direct"]:
                parts.append(
                    Text(f"{short(row['peer_id'])} is also connected to kaspad directly, from {row['also_direct']}")
                )
            if reach.waits(row["session"]):
                ends = seconds(row["session"]["ends_in_s"])
                why = f" ({row['session']['reason']})" if row["session"]["reason"] else ""
                parts.append(Text(f"{short(row['peer_id'])}: {path_name(row)}, tries again{why}; ends in {ends}"))
            elif reach.ends_soon(row["limits"]) and row["session"] is None:
                parts.append(
                    Text(f"{short(row['peer_id'])}: its relay ends the circuit {reach.ends(row['limits'])}; then anew")
                )
    parts += map(Text, reach.upgrade_lines(upgrades))
    away = [row for row in rows if row not in joined]
    if away:
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
        table.add_column("NOT JOINED" if joined else "PEER", no_wrap=True)
        table.add_column("NEXT TRY", no_wrap=True, justify="right")
        table.add_column("WHY", overflow="fold")
        for row in away:
            if row["state"] == "dialing":
                when = "now"
            elif row["state"] == "listening":
                when = "-"
                row = row | {"problem": f"waits for kaspad to dial it: --addpeer={row['listener']}"}
            else:
                when = "-" if row["retry_in_s"] is None else f"in {seconds(row['retry_in_s'])}"
            table.add_row(short(row["peer_id"]), when, row["problem"] or "not tried yet")
        if joined:
            parts.append(Text(""))
        parts.append(table)
    return Group(*parts)


def _fitting(out: Console, *tables: Table) -> Table:
    """The first table that fits, else the last, which has the least in it."""
    wide = out.options.update(width=10 * out.width)
    return next((each for each in tables if out.measure(each, options=wide).maximum <= out.width), tables[-1])


def _joined_table(rows: list[dict[str, Any]], *, seen_as: bool = True, moves: bool = False) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    names = ["PEER", "NODE", "PATH", "RTT", "SINCE", "IN", "OUT"]
    names += ["MOVES", "UNDER WAY"] if moves else []
    names += ["SEEN AS"] if seen_as else []
    for name in names:
        table.add_column(name, no_wrap=True, justify="left" if name in ("PEER", "NODE", "PATH", "SEEN AS") else "right")
    for row in sorted(rows, key=lambda row: -row["since_ms"]):
        session = row["session"]
        cells = {
            "PEER": short(row["peer_id"]),
            "NODE": "shaking hands" if row["state"] == "handshaking" else node_name(row["node"]),
            "PATH": path_name(row),
            "RTT": milliseconds(None if reach.waits(session) else row["rtt_ms"]),
            "SINCE": seconds(row["since_ms"] / 1000),
            "IN": size(row["received"]),
            "OUT": size(row["sent"]),
            "MOVES": "-" if session is None else str(session["moves"]),
            "UNDER WAY": "-" if session is None else size(session["in_flight"]),
            "SEEN AS": row["listener"] or row["source"] or "this host",
        }
        table.add_row(*(cells[name] for name in names))
    return table


def _connected_table(rows: list[dict[str, Any]], *, software: bool = True) -> Table:
    """Who is connected to a relay."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for name in ("PEER", "FROM", "RTT", "SINCE", "PLACE", "CIRCUITS", *(["SOFTWARE"] if software else [])):
        table.add_column(name, no_wrap=True, justify="right" if name in ("RTT", "SINCE", "CIRCUITS") else "left")
    for row in sorted(rows, key=lambda row: -row["since_ms"]):
        agent = row["agent"] or "-"
        cells = (
            short(row["peer_id"]),
            reach.host_of(row["address"]),
            milliseconds(row["rtt_ms"]),
            seconds(row["since_ms"] / 1000),
            "yes" if row["place"] else "no",
            str(row["circuits"]),
            f"{agent[: MAX_NAME - 1]}…" if len(agent) > MAX_NAME else agent,
        )
        table.add_row(*cells[: len(table.columns)])
    return table


def status(values: Values) -> list[str]:
    """The lines of ``kas-bridge status``."""
    relay = values["mode"] == "relay"
    lines = [
        f"{'kas-bridge relay' if relay else 'kas-bridge'} {values['version']} · {values['peer_id']}",
        *labelled("up", [f"{seconds(values['uptime_s'])}, process {values['pid']}"]),
    ]
    if not relay:
        lines += _kaspad_lines(values)
    nat = reach.nat_words(values["reachability"]["nat"])
    seen = " · ".join(values["reachability"]["seen_at"])
    lines += labelled("role", [reach.role_line(values)])
    if nat or values["reachability"]["setting"] == "auto":
        lines += labelled("NAT", [nat or "not known yet", *([f"others see us at {seen}"] if seen else [])])
    mapping, private = values["port_mapping"], values["reachability"]["role"] == "private"
    if private or mapping["mappings"] or mapping["problem"]:
        lines += labelled("router", [reach.mapping_line(values)])
    if private:
        lines += labelled("relays", reach.reservation_lines(values) or reach.relays_line(values))
    known = reach.known_lines(values)
    if known:
        lines += labelled("known", known)
    if values["relay"] is not None:
        lines += labelled("carries", [reach.serving_line(values["relay"]), *reach.circuit_lines(values["relay"])])
    reachable = values["reachability"]["reachable"]
    if reachable:
        lines += labelled("reachable", listed(reachable))
    lines += labelled("listens", listed([each for each in values["addresses"] if each not in reachable]))
    limits = values["limits"]
    if relay:
        most = limits["max_connections"]["limit"]
        lines += labelled("peers", [f"{plural(values['connections'], 'connection')} of at most {most}"])
    else:
        count = values["peers"]
        line = f"{count['joined']} joined of at most {limits['max_joined']['limit']}, {count['kept']} kept connected"
        if count["handshaking"]:
            line += f", {count['handshaking']} shaking hands"
        lines += labelled("peers", [line])
        if values["upgrades"]:
            upgrades = values["upgrades"]
            lines += labelled("punches", [reach.upgrades_line(upgrades), *reach.upgrade_lines(upgrades)])
        lines += labelled("sessions", [reach.sessions_line(values["sessions"])])
        carried = f"{size(values['received'])} in, {size(values['sent'])} out"
        if values["upload_limit"]:
            carried += f"; upload limited to {rate(values['upload_limit'])}"
        lines += labelled("carried", [carried])
    if values["bans"]:
        lines += labelled("bans", [_ban_line(ban) for ban in values["bans"]])
    hits = {name: count for name, count in values["limit_hits"].items() if count}
    if hits:
        refused = [
            f"{_LISTS.get(name, name.replace('_', '-'))} {plural(times, 'time')}" for name, times in hits.items()
        ]
        lines += labelled("refused", [", ".join(refused)])
    if values.get("ends"):
        ends = sorted(values["ends"].items(), key=lambda item: -item[1])
        lines += labelled("ended", [", ".join(f"{reason} {plural(count, 'time')}" for reason, count in ends)])
    lines += labelled("data", [values["data_dir"]])
    lines += labelled("control", [values["control"]])
    return lines


def _kaspad_lines(values: Values) -> list[str]:
    kaspad = values["kaspad"]
    lines = labelled("kaspad", kaspad_line(kaspad, first=False))
    if kaspad["node_id"]:
        lines += labelled("node", [f"{kaspad['node_id']} (new at each start of kaspad)"])
    rpc = kaspad["rpc"]
    if rpc is not None:
        told = f"read at {rpc['address']}: {plural(rpc['peers'], 'peer')}" if not rpc["problem"] else ""
        lines += labelled("rpc", [told or f"not read ({rpc['address']}: {rpc['problem']}); nothing depends on it"])
    for note in values["notes"]:
        lines += labelled("note", [note["note"], f"what helps: {note['help']}"])
    return lines


def _ban_line(ban: Values) -> str:
    until = "for good"
    if ban["until"] is not None:
        until = "until " + time.strftime("%Y-%m-%d %H:%M", time.localtime(ban["until"]))
    return f"{ban['target']} {until}" + (f" ({ban['reason']})" if ban["reason"] else "")


def why(values: Values) -> list[str]:
    """The lines of ``kas-bridge why PEER``."""
    row, kaspad = values["peer"], values["kaspad"]
    name = short(row["peer_id"])
    if row["state"] == "joined":
        rtt = f", {milliseconds(row['rtt_ms'])}" if row["rtt_ms"] is not None else ""
        who = "we dialed it" if row["direction"] == "outbound" else "it dialed us"
        lines = [
            f"{name} is joined, {path_name(row)}{rtt}: {who}, at {row['address']}.",
            f"  Its node is {node_name(row['node'])} on {row['node']['network']}, id {row['node']['id']}.",
        ]
        if row["listener"]:
            lines.append(f"  Our kaspad may dial it at {row['listener']}.")
        elif row["source"]:
            lines.append(f"  Our kaspad sees it as {row['source']}, now and after restarts.")
        if row["also_direct"]:
            lines.append(f"  kaspad is connected to the same node directly as well, at {row['also_direct']}.")
        session = row["session"]
        if waits := reach.waits(session):
            lines[0] = f"{name} is joined, and has {waits}: without one it ends in {seconds(session['ends_in_s'])}."
        elif row["path"] == "relayed" and (ends := reach.ends(row["limits"])):
            then = "then it is made anew" if session is None else "it moves to the next one before"
            lines.append(f"  The relay ends this circuit {ends}; {then}.")
        upgrade = values["upgrade"]
        if row["path"] == "relayed" and upgrade is not None and upgrade["state"] in ("proving", "stable"):
            lines.append("  The bridges have a direct way by now: it proves itself, then the peer moves there.")
        if session is not None or row["path"] != "direct":
            lines += values["explained"]
        else:
            lines.append("  Nothing stands between: there is no better way.")
        return lines
    if row["state"] == "handshaking":
        return [f"{name} is connected at {row['address']}, and the two nodes are shaking hands."]
    if row["state"] == "listening":
        return [
            f"{name} is reachable, and waits for our kaspad to dial it.",
            f"  What helps: start kaspad with --addpeer={row['listener']}, or the bridge without --kaspad-dials.",
        ]
    lines = [f"{name} is not joined: {row['problem'] or 'it was not tried yet'}."]
    if kaspad["condition"] != "up":
        lines.append(f"  Our kaspad: {kaspad['problem'] or kaspad['condition']}.")
        if kaspad["help"]:
            lines.append(f"  What helps: {kaspad['help']}.")
    elif row["state"] == "dialing":
        lines.append(f"  It is being dialed now at {row['address']}.")
    elif row["retry_in_s"] is not None:
        lines.append(f"  It is dialed again in {seconds(row['retry_in_s'])}, at {row['address']}.")
    return lines
