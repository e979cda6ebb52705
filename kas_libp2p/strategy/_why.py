"""Why the path to a peer is what it is, in words, told from the events alone. No I/O.

The lines say what the path is; if no punch made it direct, which stage failed, what both sides said of where they are,
what their NATs do, when it is tried again, and what would help.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from kas_libp2p import addresses as addr
from kas_libp2p.events import (
    CircuitReplaced,
    ConnectionClosed,
    ConnectionOpened,
    Event,
    IntentTold,
    PathProven,
    PunchAdopted,
    PunchAttemptFailed,
    PunchConnect,
    PunchDialed,
    PunchEnded,
    PunchStarted,
    PunchSync,
    PunchTargetRefused,
    SessionEnded,
    SessionMoved,
    SessionOpened,
    SessionWaiting,
    UpgradeAbandoned,
    UpgradeDecided,
)
from kas_libp2p.metadata import Path, PathKind, PeerId
from kas_libp2p.strategy._memory import Cause
from kas_libp2p.strategy._nat import NatFacts, possible
from kas_libp2p.units import milliseconds, plural, seconds, short, size

MAX_PEERS, MAX_EVENTS = 256, 64
"""Peers whose events are kept, and events of each: some three punches with all of their dials."""
MAX_SHOWN = 3
"""Addresses in one line."""

Of = (
    ConnectionOpened
    | ConnectionClosed
    | UpgradeDecided
    | IntentTold
    | PunchConnect
    | PunchSync
    | PunchStarted
    | PunchDialed
    | PunchAdopted
    | PunchTargetRefused
    | PunchAttemptFailed
    | PunchEnded
    | UpgradeAbandoned
    | PathProven
    | CircuitReplaced
    | SessionOpened
    | SessionMoved
    | SessionWaiting
    | SessionEnded
)
_STAGES = (UpgradeDecided, UpgradeAbandoned, PunchStarted, PunchEnded)
E_ = TypeVar("E_", bound=Event)


class History:
    """The latest events about each peer, the ones that tell of paths."""

    def __init__(self) -> None:
        self._peers: OrderedDict[PeerId, deque[Event]] = OrderedDict()  # the longest silent first

    def __len__(self) -> int:
        return len(self._peers)

    def add(self, event: Event) -> None:
        """Something happened; most of it means nothing here."""
        if not isinstance(event, Of):
            return
        if event.peer not in self._peers and len(self._peers) >= MAX_PEERS:
            self._peers.popitem(last=False)
        self._peers.setdefault(event.peer, deque(maxlen=MAX_EVENTS)).append(event)
        self._peers.move_to_end(event.peer)

    def of(self, peer: PeerId) -> tuple[Event, ...]:
        """What is known of a peer, the oldest first."""
        return tuple(self._peers.get(peer, ()))


@dataclass(frozen=True, slots=True)
class Facts:
    """What the events don't hold.

    Attributes:
        ours, theirs: what is known of the NATs; ``None``: they have not told.
        path: of the best connection that there is; ``None``: there is none.
        rtt: its round trip in seconds.
        relay: what the relay is called; empty: by its id.
        mapping: how it stands with a port of our router, in words, as ``UPnP is off on the router``.
        stays: why the Kaspa session with it stays where it is, or what it waits for, in words; empty: there is none.
    """

    ours: NatFacts = field(default_factory=NatFacts)
    theirs: NatFacts | None = None
    path: Path | None = None
    rtt: float | None = None
    relay: str = ""
    mapping: str = ""
    stays: str = ""


def explain(peer: PeerId, history: Sequence[Event], facts: Facts, now: float) -> list[str]:
    """Lines about the path to a peer; all but the first are indented.

    Args:
        history: events about the peer, the oldest first; of others are passed over.
        now: seconds since the epoch, as the events are stamped.
    """
    mine = [each for each in history if isinstance(each, Of) and each.peer == peer]
    lines = [_path_line(peer, facts)]
    if facts.path is not None and facts.path.kind is PathKind.RELAYED:
        more = [*_stage_lines(mine, now), *_candidate_lines(mine), *_nat_lines(facts, mine)]
    elif facts.path is not None:
        more = _direct_lines(mine, facts.path, now)
    else:
        more = _stage_lines(mine, now)
    return [*lines, *(f"  {each}" for each in [*more, *_session_lines(mine, facts, now)])]


def _last(history: Sequence[Event], kind: type[E_]) -> E_ | None:
    return next((each for each in reversed(history) if isinstance(each, kind)), None)


def _ago(event: Event, now: float) -> str:
    return f"{seconds(max(0.0, now - event.at))} ago"


def _path_line(peer: PeerId, facts: Facts) -> str:
    rtt = f", {milliseconds(facts.rtt * 1000)}" if facts.rtt is not None else ""
    if facts.path is None:
        return f"{short(peer)} is not connected."
    if facts.path.kind is PathKind.RELAYED:
        return f"{short(peer)} is relayed by {facts.relay or short(facts.path.relay or '')}{rtt}."
    how = "direct: a hole was punched" if facts.path.kind is PathKind.PUNCHED else "direct"
    return f"{short(peer)} is {how}{rtt}."


def _direct_lines(history: Sequence[Event], path: Path, now: float) -> list[str]:
    lines = []
    ended, proven = _last(history, PunchEnded), _last(history, PathProven)
    if path.kind is PathKind.PUNCHED and ended is not None and ended.reason == "punched":
        attempt = "the first attempt" if ended.attempts == 1 else f"attempt {ended.attempts}"
        lines.append(f"It took {attempt} and {seconds(ended.seconds)}, {_ago(ended, now)}.")
    if proven is not None and proven.path == path:
        before = "" if proven.relayed_rtt is None else f"; through the relay it was {_ms(proven.relayed_rtt)}"
        lines.append(f"It was proven in {seconds(proven.seconds)}, with {_ms(proven.rtt)}{before}.")
    elif not lines:
        lines.append("Nothing stands between: there is no better way.")
    return lines


def _ms(value: float) -> str:
    return milliseconds(value * 1000)


def _session_lines(history: Sequence[Event], facts: Facts, now: float) -> list[str]:
    """How the Kaspa stream came to the path on which it is, and why it stays."""
    told = [each for each in history if isinstance(each, SessionOpened | SessionMoved | SessionWaiting | SessionEnded)]
    over = {each.session for each in told if isinstance(each, SessionEnded)}
    latest = next((each for each in reversed(told) if each.session not in over), told[-1] if told else None)
    if latest is None:
        return []
    stays = f" It stays: {facts.stays}." if facts.stays else ""
    if isinstance(latest, SessionEnded):
        return [f"Its Kaspa session ended {_ago(latest, now)}: {latest.reason}."]
    if isinstance(latest, SessionOpened):
        return [f"Its Kaspa session has been on {_way(latest.path, facts)} since it began {_ago(latest, now)}.{stays}"]
    if isinstance(latest, SessionWaiting):
        waits = f" ({facts.stays})" if facts.stays else ""
        return [
            f"Its Kaspa session lost {_way(latest.path, facts)} {_ago(latest, now)}: {latest.reason}.",
            f"It waits for another path{waits}, and kaspad sees nothing of it.",
        ]
    why = latest.reason or "the other side moved it"
    where = _way(latest.path, facts)
    if latest.path == latest.previous:
        where = f"another {where.removeprefix('the ')}"
    lines = [f"Its Kaspa session moved to {where} {_ago(latest, now)}: {why}.{stays}"]
    again = f"{size(latest.resent)} were sent again" if latest.resent else "nothing had to be sent again"
    gap = f", without any path for {seconds(latest.seconds_without)} between" if latest.seconds_without else ""
    return [*lines, f"Before that it was on {_way(latest.previous, facts)}{gap}; {again}."]


def _way(path: Path, facts: Facts) -> str:
    if path.kind is PathKind.RELAYED:
        mine = facts.path is not None and facts.path.relay == path.relay and facts.relay
        return f"the circuit of {facts.relay if mine else short(path.relay or '')}"
    return f"the {path.kind} path"


def _stage_lines(history: Sequence[Event], now: float) -> list[str]:
    """What is, or was last, tried, and how far it came."""
    failed, ended = _last(history, UpgradeAbandoned), _last(history, PunchEnded)
    latest = next((each for each in reversed(history) if isinstance(each, _STAGES)), None)
    match latest:
        case None:
            return ["No punch was tried yet."]
        case PunchStarted():
            return [f"A punch is under way, attempt {latest.attempt}."]
        case PunchEnded() if failed is None:
            return [f"A punch ended {_ago(latest, now)}: {latest.text or latest.reason}."]
        case UpgradeDecided(decision="punch"):
            return ["A punch is being agreed on."]
        case UpgradeDecided(decision="queue"):
            return [f"It waits for its turn: {latest.text}."]
        case UpgradeDecided(reason="invited"):
            return ["No punch was tried: that is for the other side to begin, and it has not."]
        case UpgradeDecided(reason="quiet"):
            return [f"No punch is tried, as quiet is preferred: {latest.text}."]
        case UpgradeDecided(reason="disabled"):
            return ["No punch is tried: it is switched off here (punch.enabled)."]
    if failed is None:  # before the events that are kept
        assert isinstance(latest, UpgradeDecided)
        return [f"It is left alone: {latest.text.rstrip('.')}."]
    lines = []
    if failed.reason == Cause.HOPELESS:
        lines.append("No punch was tried: none can work.")
    elif failed.stage == "punch" and failed.reason == Cause.UNREACHED:
        attempts = plural(ended.attempts, "attempt") if ended is not None else "some attempts"
        lines.append(f"A punch was tried {_ago(failed, now)}, and nothing came through in {attempts}.")
        lines += _dial_lines(history)
    elif failed.stage == "punch":
        lines.append(f"A punch was begun {_ago(failed, now)}, and came to nothing: {failed.text}.")
    elif failed.stage == "intent":
        lines.append(f"No punch was made {_ago(failed, now)}: {failed.text}.")
    else:
        what = "did not answer for long enough" if failed.stage == "proving" else "did not last"
        lines.append(f"A direct connection came up, and {what} ({_ago(failed, now)}): {failed.text}.")
    left = failed.at + failed.wait - now
    if left > 0:
        lines.append(f"It is tried again in {seconds(left)}, or when either side's address or NAT changes.")
    return lines


def _dial_lines(history: Sequence[Event]) -> list[str]:
    """What came of the addresses that were dialed last."""
    outcomes: dict[str, list[PunchDialed]] = {}
    for each in history:
        if isinstance(each, PunchStarted):
            outcomes = {}
        elif isinstance(each, PunchDialed):
            outcomes.setdefault(each.address, []).append(each)
    lines = []
    for address, dials in list(outcomes.items())[:MAX_SHOWN]:
        reasons = dict.fromkeys(each.reason for each in dials)
        times = "" if len(dials) == 1 else f" {len(dials)} times"
        lines.append(f"Dialed {_place(address)}{times}: {', '.join(map(_outcome, reasons))}.")
    return lines


def _outcome(reason: str) -> str:
    return {
        "unanswered": "no answer",
        "ECONNREFUSED": "refused (RST)",
        "EHOSTUNREACH": "refused (unreachable)",
        "EADDRNOTAVAIL": "the other side's connection was first",
        "impossible": "nothing can be sent there",
    }.get(reason, reason)


def _place(address: str) -> str:
    where = addr.ip_port(address)
    if where is None:
        return address
    return f"[{where[0]}]:{where[1]}" if ":" in where[0] else f"{where[0]}:{where[1]}"


def _candidate_lines(history: Sequence[Event]) -> list[str]:
    """Where each side said that it is."""
    lines = []
    for by_us, who in ((False, "They say they are"), (True, "We said that we are")):
        told = next(
            (each for each in reversed(history) if isinstance(each, PunchConnect) and each.by_us is by_us), None
        )
        if told is not None:
            shown = [_place(each) for each in told.addresses[:MAX_SHOWN]]
            more = len(told.addresses) - len(shown)
            places = ", ".join(shown) + (f" and {more} more" if more > 0 else "")
            lines.append(f"{who} at {places}." if shown else f"{who} nowhere that can be dialed.")
    return lines


def _nat_lines(facts: Facts, history: Sequence[Event]) -> list[str]:
    verdict = possible(facts.ours, facts.theirs)
    lines = [verdict.reason]
    if facts.theirs is None:
        told = next((each for each in reversed(history) if isinstance(each, IntentTold) and not each.by_us), None)
        if told is not None and told.nat:
            lines = [f"Their NAT {words}." for words in told.nat.values()]
    fixes = list(verdict.fixes)
    if fixes and facts.mapping:
        fixes[0] += f" (ours: {facts.mapping})"
    if fixes:
        lines.append(f"What would help: {', or '.join(fixes)}.")
    return lines
