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

from kas_libp2p.kaspa._join import End, Side  # not by way of join, which imports ten times as much
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


def wrapped(line: str, out: Console) -> str:
    """A line as it fits into a terminal, continued under the beginning of its text.

    What others copy, such as an address, is never cut; what goes into a file or a pipe stays one line.
    """
    if not out.is_terminal or len(line) <= out.width:
        return line
    label = _LABEL.match(line)
    kept = label.end() if label is not None else 0
    parts = textwrap.wrap(
        line[kept:],
        out.width,
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
    """``direct``, or ``relayed (…p7yG)``."""
    relay = row.get("relay_id")
    return f"{row['path']} (…{relay[-4:]})" if relay else str(row["path"])


# -- Start -------------------------------------------------------------------------------------------------------------


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
    if kaspad.get("retry_in_s") is not None:
        lines.append("looked for again all the time; peers join as soon as it is there")
    return lines


def startup(status: Values) -> list[str]:
    """What ``kas-bridge run`` says first."""
    lines = [f"kas-bridge {status['version']} · {status['peer_id'][:12]}…{status['peer_id'][-4:]}"]
    lines += labelled("kaspad", kaspad_line(status["kaspad"]))
    for note in status["notes"]:
        lines += labelled("note", [note["note"], f"what helps: {note['help']}"])
    lines += labelled("listens", listed(status["addresses"]))
    peers = status["peers"]
    kept = plural(peers["kept"], "peer") + " to keep connected" if peers["kept"] else "nobody to connect to yet"
    if not peers["kept"]:
        kept += ": kas-bridge connect MULTIADDR, or wait for others"
    lines += labelled("peers", [f"{kept}; at most {status['limits']['max_joined']['limit']} joined at once"])
    lines += labelled("control", [f"{status['control']} (kas-bridge status, peers, events, stop)"])
    return lines


def labelled(label: str, lines: Iterable[str]) -> list[str]:
    """Lines under a label."""
    return [f"  {label if index == 0 else '':<9} {line}" for index, line in enumerate(lines)]


MAX_SHOWN = 6
"""Addresses that a listing shows; ``--json`` has all of them."""


def listed(addresses: list[str]) -> list[str]:
    """Addresses, those that others can use first."""
    if not addresses:
        return ["nowhere: this bridge only dials"]
    outside = [each for each in addresses if not each.startswith(("/ip4/127.", "/ip6/::1/"))]
    shown = outside or addresses
    more = len(addresses) - min(len(shown), MAX_SHOWN) if outside else 0
    rest = [f"and {more} more (kas-bridge status --json)"] if len(shown) > MAX_SHOWN and more else []
    return [*shown[:MAX_SHOWN], *rest]


# -- Events ------------------------------------------------------------------------------------------------------------


def event_line(event: Values, *, verbose: bool = False) -> str | None:
    """An event as one line, or ``None`` if it is of no interest to an operator."""
    text = _event_text(event, verbose)
    if text is None:
        return None
    return f"{time.strftime('%H:%M:%S', time.localtime(event['at']))}  {text}"


def _event_text(event: Values, verbose: bool) -> str | None:
    peer = f"peer {short(event['peer'])}" if isinstance(event.get("peer"), str) else ""
    match event["event"]:
        case "kaspad-changed":
            return "kaspad " + _kaspad_text(event)
        case "kaspa-peer-joined":
            node = {"agent": event["user_agent"], "version": _version_of(event["user_agent"])}
            who = "we dialed" if event["direction"] == "outbound" else "it dialed"
            source = f", seen by kaspad as {event['source']}" if event["source"] else ""
            return (
                f"{peer}  joined: {node_name(node)}, {_path_of(event['path'])}, {who}{source}"
                f" (handshake {seconds(event['seconds'])})"
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


def _kaspad_text(event: Values) -> str:
    if event["condition"] == "up":
        but = f", but {event['problem']} ({event['help']})" if event["problem"] else ""
        return f"{event['version']} on {event['network']} at {event['address']}{but}"
    return f"{event['condition']}: {event['problem']}; what helps: {event['help']}"


_NOISE = frozenset({"the peer closed the connection", "closed by this side", "kaspad ended the connection"})
"""Texts of the layers below that say nothing which the reason does not."""

_ENDS = {
    End.PEER_KASPAD: "its kaspad is not running or can't be joined",
    End.PEER_BUSY: "its bridge is busy: too many handshakes, or as many peers as it allows",
    End.PEER_SILENT: "it said nothing in time",
    End.PEER_CLOSED: "it closed the connection",
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


def peers(rows: list[dict[str, Any]], out: Console) -> RenderableType:
    """The table of ``kas-bridge peers``, as wide as where it goes allows."""
    if not rows:
        return Text("nobody is joined, and nobody is kept connected; begin with: kas-bridge connect MULTIADDR")
    parts: list[RenderableType] = []
    joined = [row for row in rows if row["state"] in ("joined", "handshaking")]
    if joined:
        table = _joined_table(joined)
        if out.measure(table, options=out.options.update(width=10 * out.width)).maximum > out.width:
            table = _joined_table(joined, seen_as=False)
        parts.append(table)
        for row in joined:
            if row["also_direct"]:
                parts.append(
                    Text(f"{short(row['peer_id'])} is also connected to kaspad directly, from {row['also_direct']}")
                )
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


def _joined_table(rows: list[dict[str, Any]], *, seen_as: bool = True) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for name in ("PEER", "NODE", "PATH", "RTT", "SINCE", "IN", "OUT", *(["SEEN AS"] if seen_as else [])):
        table.add_column(name, no_wrap=True, justify="right" if name in ("RTT", "SINCE", "IN", "OUT") else "left")
    for row in sorted(rows, key=lambda row: -row["since_ms"]):
        cells = (
            short(row["peer_id"]),
            "shaking hands" if row["state"] == "handshaking" else node_name(row["node"]),
            path_name(row),
            milliseconds(row["rtt_ms"]),
            seconds(row["since_ms"] / 1000),
            size(row["received"]),
            size(row["sent"]),
            row["listener"] or row["source"] or "this host",
        )
        table.add_row(*cells[: len(table.columns)])
    return table


def status(values: Values) -> list[str]:
    """The lines of ``kas-bridge status``."""
    lines = [
        f"kas-bridge {values['version']} · {values['peer_id']}",
        *labelled("up", [f"{seconds(values['uptime_s'])}, process {values['pid']}"]),
        *labelled("kaspad", kaspad_line(values["kaspad"], first=False)),
    ]
    if values["kaspad"]["node_id"]:
        lines += labelled("node", [f"{values['kaspad']['node_id']} (new at each start of kaspad)"])
    rpc = values["kaspad"]["rpc"]
    if rpc is not None:
        told = f"read at {rpc['address']}: {plural(rpc['peers'], 'peer')}" if not rpc["problem"] else ""
        lines += labelled("rpc", [told or f"not read ({rpc['address']}: {rpc['problem']}); nothing depends on it"])
    for note in values["notes"]:
        lines += labelled("note", [note["note"], f"what helps: {note['help']}"])
    lines += labelled("listens", listed(values["addresses"]))
    count = values["peers"]
    limits = values["limits"]
    line = f"{count['joined']} joined of at most {limits['max_joined']['limit']}, {count['kept']} kept connected"
    if count["handshaking"]:
        line += f", {count['handshaking']} shaking hands"
    lines += labelled("peers", [line])
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
    if values["ends"]:
        ends = sorted(values["ends"].items(), key=lambda item: -item[1])
        lines += labelled("ended", [", ".join(f"{reason} {plural(count, 'time')}" for reason, count in ends)])
    lines += labelled("data", [values["data_dir"]])
    lines += labelled("control", [values["control"]])
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
        if row["path"] == "direct":
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
