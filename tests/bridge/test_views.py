"""What people see, from the values that programs get."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console

from kas_bridge import views
from kas_bridge._control import encode, event_values
from kas_bridge.events import (
    BanLifted,
    BridgeStarted,
    BridgeStopping,
    KaspadChanged,
    ListenerClosed,
    ListenerOpened,
    PeerFailed,
    PeerForgotten,
    PeerKept,
    Trouble,
)
from kas_libp2p.events import (
    Banned,
    Dialing,
    Event,
    InboundRefused,
    IntentTold,
    KaspaPeerEnded,
    KaspaPeerJoined,
    LimitHit,
    PathProven,
    PunchAttemptFailed,
    PunchConnect,
    PunchDialed,
    PunchEnded,
    PunchStarted,
    PunchSync,
    SessionEnded,
    SessionMoved,
    SessionNotMoved,
    SessionOpened,
    SessionWaiting,
    SmallCircuits,
    UpgradeAbandoned,
    UpgradeDecided,
)
from kas_libp2p.kaspa.join import End, Side
from kas_libp2p.metadata import DIRECT, Dialect, Direction, Path, PathKind, PeerId
from kas_libp2p.strategy._memory import Cause

ALICE = "12D3KooWKWQMLKnDg9BizoExsXWiuebcitxtJa3LCHdcWT2jP7yG"
BOB = "12D3KooWPqT5LKnDg9BizoExsXWiuebcitxtJa3LCHdcWT2jP7yG"
PEER = PeerId(ALICE)


def console(width: int = 80, *, colour: bool = False) -> Console:
    system: Any = "standard" if colour else None
    return Console(file=io.StringIO(), width=width, force_terminal=colour, color_system=system, highlight=False)


def table(rows: list[dict[str, Any]], width: int = 80, *, colour: bool = False, relay: bool = False) -> str:
    out = console(width, colour=colour)
    out.print(views.peers(rows, [], out, relay=relay))
    assert isinstance(out.file, io.StringIO)
    return out.file.getvalue()


def joined(**changes: Any) -> dict[str, Any]:
    return {
        "peer_id": ALICE,
        "state": "joined",
        "direction": "outbound",
        "path": "direct",
        "relay_id": None,
        "limits": None,
        "session": None,
        "address": "/ip4/203.0.113.7/tcp/16117",
        "dialect": Dialect.MESSAGES,
        "rtt_ms": 23.4,
        "since_ms": 360_000,
        "source": "127.1.0.1",
        "listener": None,
        "node": {
            "id": "23849dad-387a-4954-9be3-8e348f06ffe2",
            "version": "2.1.0",
            "agent": "/kaspad:2.1.0/",
            "network": "kaspa-mainnet",
            "protocol_version": 11,
        },
        "received": 1_900_000,
        "sent": 2_200_000,
        "messages_received": 10,
        "messages_sent": 10,
        "kept": True,
        "also_direct": None,
        "retry_in_s": None,
        "problem": "",
    } | changes


def in_session(**changes: Any) -> dict[str, Any]:
    return {
        "state": "attached",
        "moves": 3,
        "in_flight": 120_000,
        "unread": 0,
        "window": 8 << 20,
        "gaps": 0,
        "waiting_s": None,
        "ends_in_s": None,
        "reason": "the path is direct",
    } | changes


NO_PATH = in_session(state="waiting", waiting_s=3.0, ends_in_s=27.0, reason="there is no other path")


def waiting(**changes: Any) -> dict[str, Any]:
    return joined(peer_id=BOB, state="waiting", node=None, rtt_ms=None, since_ms=None, retry_in_s=12.3) | changes


UP = {
    "condition": "up",
    "address": "127.0.0.1:16111",
    "network": "kaspa-mainnet",
    "version": "2.1.0",
    "node_id": "23849dad-387a-4954-9be3-8e348f06ffe2",
    "problem": "",
    "help": "",
    "retry_in_s": None,
    "rpc": {"address": "127.0.0.1:16110", "problem": "", "synced": True, "peers": 9},
}
DOWN = UP | {
    "condition": "not running",
    "node_id": "",
    "problem": "no kaspad listens on 127.0.0.1:16111",
    "help": "start kaspad",
    "retry_in_s": 1.5,
    "rpc": None,
}


NAT = {"mapping": "endpoint-independent", "keeps_port": True, "filtering": "port-restricted"}
REACHABILITY = {
    "role": "private",
    "setting": "auto",
    "reason": "0 of 3 servers reached 198.51.100.20:16117",
    "reachable": [],
    "nat": NAT,
    "seen_at": {"/ip4/198.51.100.20/tcp/16117": 3},
    "servers": 3,
    "ipv6": False,
}
NO_MAPPING = {"wanted": True, "mappings": [], "problem": "the router 192.168.1.1 gives none: switch UPnP on"}


def status(**changes: Any) -> dict[str, Any]:
    return {
        "mode": "bridge",
        "version": "0.1.0",
        "peer_id": ALICE,
        "pid": 7,
        "uptime_s": 100.0,
        "addresses": [f"/ip4/127.0.0.1/tcp/16117/p2p/{ALICE}", f"/ip4/203.0.113.7/tcp/16117/p2p/{ALICE}"],
        "data_dir": "/d",
        "control": "/d/control.sock",
        "kaspad": UP,
        "notes": [],
        "reachability": REACHABILITY,
        "port_mapping": NO_MAPPING,
        "reservations": [],
        "relay_target": 3,
        "relays": [],
        "upgrades": [],
        "sessions": {
            "enabled": True,
            "in_use": 2,
            "limit": 256,
            "waiting": 0,
            "window": 8 << 20,
            "held": 1_200_000,
            "max_held": 268435456,
            "patience_s": 30.0,
        },
        "serve_relay": False,
        "relay": None,
        "connections": 1,
        "peers": {"joined": 1, "handshaking": 0, "kept": 2},
        "limits": {"max_joined": {"limit": 64, "used": 1}},
        "limit_hits": {},
        "ends": {},
        "bans": [],
        "received": 1000,
        "sent": 2_000_000,
        "upload_limit": 0.0,
    } | changes


# -- Tables ------------------------------------------------------------------------------------------------------------


REFUSED = "/ip4/198.51.100.9/tcp/16117: Connection refused; /dns4/node.example.org/tcp/16117: no such name"


def test_the_table_of_peers() -> None:
    lines = table([waiting(problem=REFUSED), joined()]).splitlines()
    assert lines == [
        "PEER           NODE          PATH      RTT  SINCE      IN     OUT  SEEN AS  ",
        "12D3KooWKWQM…  kaspad 2.1.0  direct  23 ms  6 min  1.9 MB  2.2 MB  127.1.0.1",
        "",
        "NOT JOINED     NEXT TRY  WHY                                                    ",
        "12D3KooWPqT5…   in 12 s  /ip4/198.51.100.9/tcp/16117: Connection refused;       ",
        "                         /dns4/node.example.org/tcp/16117: no such name         ",
    ]


def test_the_table_of_peers_fits_80_columns() -> None:
    relayed = joined(peer_id=BOB, path="relayed", relay_id=ALICE, rtt_ms=133, since_ms=90_000)
    rows = [relayed, joined(peer_id=BOB, node=None, state="handshaking"), joined(), waiting(problem="x" * 300)]
    text = table(rows)
    assert all(len(line) <= 80 for line in text.splitlines())
    assert "relayed (…P7yG)" in text
    assert "shaking hands" in text
    assert text.count("x") >= 300, "what is too long is folded, not cut"
    # What does not fit is left out as a whole; `why` and --json have it.
    assert "SEEN AS" not in text
    assert "SEEN AS" in table(rows, 120)


def test_a_peer_in_a_session() -> None:
    """How often it moved, and what is under way; without a path, for how long and when it ends."""
    rows = [joined(path="punched", relay_id=BOB, session=in_session()), joined(peer_id=BOB)]
    assert table(rows, 120).splitlines()[:2] == [
        "PEER           NODE          PATH               RTT  SINCE      IN     OUT  MOVES  UNDER WAY  SEEN AS  ",
        "12D3KooWKWQM…  kaspad 2.1.0  punched (…P7yG)  23 ms  6 min  1.9 MB  2.2 MB      3     120 kB  127.1.0.1",
    ]
    assert "      -          -  127.1.0.1" in table(rows, 120)
    assert "UNDER WAY" in table(rows, 100)
    assert "SEEN AS" not in table(rows, 100)
    assert "MOVES" not in table(rows, 80)
    lost = table([joined(path="punched", relay_id=BOB, session=NO_PATH)])
    assert "kaspad 2.1.0  no path for 3.0 s" in lost
    said = "12D3KooWKWQM…: no path for 3.0 s, tries again (there is no other path); ends in 27 s"
    assert said in " ".join(lost.split())


def test_a_circuit_that_ends_is_left_before_by_a_session() -> None:
    limits = {"max_bytes": 131072, "max_s": 120.0, "bytes_left": 100_000, "left_s": 40.0}
    row = joined(path="relayed", relay_id=BOB, limits=limits)
    assert "its relay ends the circuit in 40 s" in table([row], 120)
    assert "its relay ends" not in table([row | {"session": in_session()}], 120)


def test_a_node_that_boasts() -> None:
    agent = "/" + "x" * 255
    text = table([joined(node=joined()["node"] | {"agent": agent, "version": agent})], 200)
    assert text.count("x") == views.MAX_NAME - 2


def test_nothing_is_folded_into_a_file() -> None:
    out = views.console()
    assert out.is_terminal or out.width >= 240


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (waiting(), "not tried yet"),
        (waiting(state="dialing"), "now"),
        (waiting(retry_in_s=None, problem="waits for our kaspad"), "waits for our kaspad"),
        (waiting(state="listening", listener="127.0.3.1:16118"), "--addpeer=127.0.3.1:16118"),
        (joined(also_direct="203.0.113.9"), "is also connected to kaspad directly, from 203.0.113.9"),
        (joined(listener="127.0.3.1:16118"), "127.0.3.1:16118"),
        (joined(source=None), "this host"),
    ],
)
def test_rows(row: dict[str, Any], expected: str) -> None:
    assert expected in table([row], 120)


def test_nobody_is_here() -> None:
    assert "kas-bridge connect MULTIADDR" in table([], 120)


def test_colours_only_where_they_are_seen() -> None:
    assert "\x1b[1m" in table([joined()], colour=True)
    assert "\x1b" not in table([joined()])


# -- Lines -------------------------------------------------------------------------------------------------------------


def test_status() -> None:
    text = "\n".join(views.status(status()))
    assert "kas-bridge 0.1.0 · " + ALICE in text
    assert "kaspad    2.1.0 on kaspa-mainnet at 127.0.0.1:16111, synced" in text
    assert "node      23849dad-387a-4954-9be3-8e348f06ffe2" in text
    assert "rpc       read at 127.0.0.1:16110: 9 peers" in text
    assert "203.0.113.7" in text
    assert "/ip4/127.0.0.1" not in text, "what others can't use is not shown where there is better"
    assert "1 joined of at most 64, 2 kept connected" in text
    assert "1.0 kB in, 2.0 MB out" in text


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({}, "sessions  2 of at most 256; up to 8.4 MB each way in each, 1.2 MB of at most 268 MB now"),
        (
            {"waiting": 1},
            "sessions  2 of at most 256, 1 without a path now; up to 8.4 MB each way in each, 1.2 MB of"
            " at most 268 MB now",
        ),
        ({"enabled": False}, "sessions  off; --session.enabled carries peers on when their path changes"),
    ],
)
def test_status_of_sessions(changes: dict[str, Any], line: str) -> None:
    values = status(sessions=status()["sessions"] | changes)
    assert f"  {line}" in views.status(values)


def test_status_tells_what_is_wrong_and_what_helps() -> None:
    text = "\n".join(
        views.status(
            status(
                kaspad=DOWN,
                notes=[{"note": "kaspad sees our peers as 172.17.0.1", "help": "use --network host"}],
                peers={"joined": 0, "handshaking": 2, "kept": 0},
                limit_hits={"max_joined": 3, "policy": 1, "deny": 0},
                ends={"banned": 1, "path hung": 4},
                bans=[
                    {"target": "10.0.0.1", "since": 0, "until": None, "reason": "rude"},
                    {"target": "10.0.0.2", "since": 0, "until": 1e9, "reason": ""},
                ],
                upload_limit=5e5,
                addresses=[],
            )
        )
    )
    for expected in (
        "no kaspad listens on 127.0.0.1:16111",
        "what helps: start kaspad",
        "looked for again in 1.5 s; peers join as soon as it is there",
        "kaspad sees our peers as 172.17.0.1",
        "what helps: use --network host",
        "0 joined of at most 64, 0 kept connected, 2 shaking hands",
        "max-joined 3 times, banned 1 time",
        "path hung 4 times, banned 1 time",
        "10.0.0.1 for good (rude)",
        "10.0.0.2 until 2001-09-0",
        "upload limited to 500 kB/s",
        "nowhere: this bridge only dials",
    ):
        assert expected in text
    assert "node " not in text


def test_rpc_that_is_not_there() -> None:
    kaspad = UP | {
        "rpc": {"address": "127.0.0.1:16110", "problem": "nothing listens there", "synced": None, "peers": None}
    }
    assert "not read (127.0.0.1:16110: nothing listens there); nothing depends on it" in "\n".join(
        views.status(status(kaspad=kaspad))
    )


def test_what_run_says_first() -> None:
    nobody = {"joined": 0, "handshaking": 0, "kept": 0}
    text = "\n".join(views.startup(status(peers=nobody)))
    assert text.startswith("kas-bridge 0.1.0 · 12D3KooWKWQM…P7yG\n")
    assert "synced; its flags are fine" in text
    assert "nobody to connect to yet: kas-bridge connect MULTIADDR, or wait for others" in text
    assert "MULTIADDR;" in "\n".join(views.startup(status(peers=nobody, addresses=[])))
    assert "looked for again all the time" in "\n".join(views.startup(status(kaspad=DOWN)))
    assert "looking for it" in "\n".join(views.startup(status(kaspad=UP | {"condition": "searching"})))


@pytest.mark.parametrize(
    ("row", "kaspad", "expected"),
    [
        (joined(), UP, ["is joined, direct, 23 ms: we dialed it", "kaspad 2.1.0 on kaspa-mainnet", "no better way"]),
        (
            joined(direction="inbound", also_direct="203.0.113.9"),
            UP,
            ["it dialed us", "directly as well, at 203.0.113.9"],
        ),
        (joined(listener="127.0.3.1:16118"), UP, ["may dial it at 127.0.3.1:16118"]),
        (joined(path="punched", relay_id=BOB), UP, ["is joined, punched (…", "It took the first attempt."]),
        (
            joined(path="relayed", relay_id=BOB, limits={"left_s": 240.0, "bytes_left": None}),
            UP,
            ["The relay ends this circuit in 4 min", "It took the first attempt."],
        ),
        (joined(state="handshaking", node=None), UP, ["shaking hands"]),
        (
            joined(path="punched", relay_id=BOB, session=in_session()),
            UP,
            ["is joined, punched (…P7yG), 23 ms", "took the first attempt"],
        ),
        (joined(session=in_session()), UP, ["is joined, direct", "took the first attempt"]),
        (
            joined(path="punched", relay_id=BOB, session=NO_PATH),
            UP,
            ["is joined, and has no path for 3.0 s: without one it ends in 27 s.", "took the first attempt"],
        ),
        (
            joined(
                path="relayed",
                relay_id=BOB,
                session=in_session(),
                limits={"max_bytes": None, "max_s": 120.0, "bytes_left": None, "left_s": 40.0},
            ),
            UP,
            ["The relay ends this circuit in 40 s; it moves to the next one before."],
        ),
        (waiting(problem="refused"), UP, ["is not joined: refused.", "dialed again in 12 s"]),
        (waiting(state="dialing", retry_in_s=None), UP, ["not tried yet", "being dialed now"]),
        (waiting(problem="x", retry_in_s=None), DOWN, ["Our kaspad: no kaspad listens", "What helps: start kaspad."]),
        (waiting(state="listening", listener="127.0.3.1:1"), UP, ["--addpeer=127.0.3.1:1", "without --kaspad-dials"]),
    ],
)
def test_why(row: dict[str, Any], kaspad: dict[str, Any], expected: list[str]) -> None:
    values = {
        "peer": row,
        "kaspad": kaspad,
        "upgrade": None,
        "explained": ["  It took the first attempt."],
    }
    text = "\n".join(views.why(values))
    assert [each for each in expected if each not in text] == []


@pytest.mark.parametrize(("state", "path", "said"), [("proving", "relayed", True), ("proving", "punched", False)])
def test_why_tells_of_a_direct_way_that_is_not_used_yet(state: str, path: str, said: bool) -> None:
    row = joined(path=path, relay_id=BOB)
    text = "\n".join(views.why({"peer": row, "kaspad": UP, "upgrade": {"state": state}, "explained": []}))
    assert ("The bridges have a direct way by now" in text) is said


# -- Events ------------------------------------------------------------------------------------------------------------

ENDED = {"peer": PEER, "node_id": None, "seconds": 61.0, "received": 1000, "sent": 2000}
JOINED = KaspaPeerJoined(
    peer=PEER,
    node_id="1",
    user_agent="/kaspad:2.1.0/",
    network="kaspa-mainnet",
    protocol_version=11,
    source="127.1.0.1",
    direction=Direction.OUTBOUND,
    dialect=Dialect.MESSAGES,
    path=Path(PathKind.RELAYED, PeerId(BOB)),
    moved=False,
    seconds=0.12,
)
PUNCHED = Path(PathKind.PUNCHED, PeerId(BOB))
RELAYED = Path(PathKind.RELAYED, PeerId(BOB))
PUNCH: dict[str, Any] = {"peer": PEER, "connection": 3}
MOVED = SessionMoved(
    peer=PEER,
    session="ab",
    path=PUNCHED,
    previous=RELAYED,
    by_us=True,
    reason="the direct path has proven itself",
    resent=0,
    seconds_without=0.0,
)
AT = ("/ip4/203.0.113.7/tcp/16117",)
NAT_WORDS = {"IPv4": "only lets in what was dialed"}


@pytest.mark.parametrize(
    ("event", "expected"),
    [
        (JOINED, "joined: kaspad 2.1.0, relayed (…P7yG), we dialed, seen by kaspad as 127.1.0.1 (handshake 0.1 s)"),
        (
            KaspaPeerEnded(**ENDED, joined=True, reason=End.PATH_HUNG, by=Side.PATH, text="no answer for 5 s"),  # type: ignore[arg-type]
            "left after 61 s: the connection hung (no answer for 5 s) (in 1.0 kB, out 2.0 kB)",
        ),
        (MOVED, "moved: punched (…P7yG) (before: relayed (…P7yG); the direct path has proven itself)"),
        (
            replace(MOVED, path=RELAYED, previous=PUNCHED, resent=12_000, seconds_without=2.1, reason="", by_us=False),
            "goes on after 2.1 s without a path: relayed (…P7yG) (before: punched (…P7yG); 12.0 kB sent again)",
        ),
        (replace(MOVED, previous=PUNCHED, reason="it hung"), "moved: punched (…P7yG) (another connection; it hung)"),
        (replace(MOVED, path=RELAYED, reason="15 s of the circuit's 2 min are left"), None),
        (
            SessionWaiting(peer=PEER, session="ab", path=PUNCHED, reason="nothing came for 4 s"),
            "lost its path, punched (…P7yG): nothing came for 4 s; looks for another one, and kaspad keeps the peer",
        ),
        (SessionNotMoved(peer=PEER, session="ab", path=PUNCHED, code="busy", reason="not now"), None),
        (SessionOpened(peer=PEER, session="ab", by_us=True, path=RELAYED), None),
        (
            SmallCircuits(
                peer=PEER,
                relay=PeerId(BOB),
                max_bytes=131072,
                max_seconds=120.0,
                sustained=1900.0,
                text="1 relay with …",
            ),
            "goes from one small circuit to the next: 1 relay with …",
        ),
        (
            SessionEnded(
                peer=PEER, session="ab", code="lost", reason="no path for 30 s", by_peer=False, seconds=300.0, moves=1
            ),
            None,
        ),
        (
            KaspaPeerEnded(**ENDED, joined=True, reason=End.PATH_LOST, by=Side.PATH, text="no path for 30 s"),  # type: ignore[arg-type]
            "left after 61 s: the connection was lost (no path for 30 s)",
        ),
        (
            KaspaPeerEnded(**ENDED, joined=True, reason=End.PEER_RESTARTED, by=Side.PEER, text=""),  # type: ignore[arg-type]
            "left after 61 s: its bridge has started anew",
        ),
        (KaspaPeerEnded(**ENDED, joined=False, reason=End.BUSY, by=Side.US, text=""), None),  # type: ignore[arg-type]
        (replace(JOINED, moved=True, path=PUNCHED), None),
        (KaspaPeerEnded(**ENDED, joined=True, reason=End.SUPERSEDED, by=Side.US, text="without a relay"), None),  # type: ignore[arg-type]
        (PeerFailed(peer=PEER, problem="refused", left=False, retry_in=4.0), "not joined: refused; next try in 4.0 s"),
        (PeerFailed(peer=PEER, problem="refused", left=True, retry_in=4.0), None),
        (PeerKept(peer=PEER, address="/ip4/1"), "kept connected from now on: /ip4/1"),
        (PeerForgotten(peer=PEER), "kept connected no longer"),
        (Banned(target="10.0.0.1", seconds=3600.0), "banned 10.0.0.1 for 60 min"),
        (Banned(target="10.0.0.1", seconds=float("inf")), "banned 10.0.0.1 for good"),
        (BanLifted(target="10.0.0.1"), "lifted the ban of 10.0.0.1"),
        (ListenerOpened(peer=PEER, address="127.0.3.1:1"), "kaspad can dial it now: --addpeer=127.0.3.1:1"),
        (ListenerClosed(peer=PEER, address="127.0.3.1:1"), "local address 127.0.3.1:1 closed"),
        (Trouble(where="control", reason="OSError: x"), "a fault of ours in control: OSError: x"),
        (LimitHit(reason="max_joined", peer=PEER, address="/ip4/1"), "refused: the limit max-joined is reached"),
        (InboundRefused(address="/ip4/1", reason="policy"), "/ip4/1  refused: banned"),
        (InboundRefused(address="/ip4/1", reason="deny"), "/ip4/1  refused: on the deny list"),
        (BridgeStopping(reason="by SIGTERM"), "stopping by SIGTERM"),
        (BridgeStarted(version="1", peer_id=PEER, addresses=(), control="", kept=0), None),
        (Dialing(target="x", addresses=()), None),
        (
            KaspadChanged(
                condition="up", address="h:1", network="kaspa-simnet", version="2.1.0", node_id="1", problem="", help=""
            ),
            "kaspad 2.1.0 on kaspa-simnet at h:1",
        ),
        (
            KaspadChanged(
                condition="silent", address="h:1", network="", version="", node_id="", problem="it hangs", help="look"
            ),
            "kaspad silent: it hangs; what helps: look",
        ),
    ],
)
def test_events(event: Event, expected: str | None) -> None:
    values = as_told(event)
    line = views.event_line(values)
    if expected is None:
        assert line is None
    else:
        assert line is not None
        assert expected.lower() in line.lower()
    assert views.event_line(values, verbose=True) is not None or event.name == "bridge-started"


def as_told(event: Event) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(encode(event_values(event)))
    return found


OF_A_PUNCH: list[tuple[Event, str]] = [
    (
        UpgradeDecided(
            peer=PEER, connection=3, decision="punch", reason="try", chance="unknown", text="all is new", wait=0.0
        ),
        "punch (unknown): all is new",
    ),
    (
        IntentTold(peer=PEER, connection=3, by_us=False, answer="yes", reason="", wait=0.0, nat=NAT_WORDS),
        "upgrade: it told us yes; its NAT only lets in what was dialed",
    ),
    (
        IntentTold(peer=PEER, connection=3, by_us=True, answer="no", reason="disabled", wait=0.0, nat={}),
        "upgrade: we told it no (disabled)",
    ),
    (
        PunchConnect(**PUNCH, by_us=True, attempt=1, addresses=AT, rtt=0.146, seconds=0.2),
        "CONNECT: told it 203.0.113.7:16117 (146 ms round trip)",
    ),
    (PunchSync(**PUNCH, by_us=False, attempt=1, seconds=0.2), "SYNC came"),
    (
        PunchStarted(**PUNCH, inviter=True, attempt=1, targets=AT, untrusted=(), refused={}, wait=0.072, seconds=0.2),
        "dials 203.0.113.7:16117, in 72 ms",
    ),
    (
        PunchStarted(
            **PUNCH, inviter=True, attempt=1, targets=AT * 48, untrusted=(), refused={}, wait=0.0, seconds=0.2
        ),
        f"dials {', '.join(['203.0.113.7:16117'] * 6)} and 42 more",
    ),
    (
        PunchDialed(peer=PEER, address=AT[0], attempt=1, reason="ECONNREFUSED", after=0.0, seconds=0.05),
        "dial 1 of 203.0.113.7:16117: ECONNREFUSED after 50 ms",
    ),
    (
        PunchAttemptFailed(**PUNCH, inviter=True, attempt=1, text="no answer", seconds=2.7),
        "attempt 1 came to nothing: no answer",
    ),
    (
        PunchEnded(**PUNCH, inviter=True, reason="punch_failed", text="no answer", attempts=3, rtt=0.1, seconds=8.2),
        "not punched: no answer (3 attempts, 8.2 s)",
    ),
    (
        PunchEnded(**PUNCH, inviter=True, reason="punched", text="", attempts=1, rtt=0.1, seconds=0.21),
        "punched: direct (first attempt, 0.2 s)",
    ),
    (replace(JOINED, moved=True, path=PUNCHED), "carried on without a relay: punched (…P7yG) (handshake 0.1 s)"),
]


@pytest.mark.parametrize(("event", "expected"), OF_A_PUNCH)
def test_a_punch_is_told_in_detail_to_who_wants_it(event: Event, expected: str) -> None:
    values = as_told(event)
    assert views.event_line(values) is None
    line = views.event_line(values, verbose=True)
    assert line is not None
    assert line[10:] == f"peer {PEER[:12]}…  {expected}"


def test_a_peer_that_becomes_direct_is_worth_two_lines() -> None:
    proven = PathProven(peer=PEER, connection=4, path=PUNCHED, replaces=(3,), rtt=0.023, relayed_rtt=0.041, seconds=3.0)
    happened = [JOINED, *(event for event, _ in OF_A_PUNCH), proven, replace(JOINED, moved=True)]
    lines = [line for event in happened if (line := views.event_line(as_told(event)))]
    assert [line[26:].split("  ")[1].split(",")[0] for line in lines] == ["joined: kaspad 2.1.0", "punched: direct"]
    assert lines[1].endswith("punched: direct, 23 ms, instead of 41 ms by the relay")


@pytest.mark.parametrize(
    ("stage", "reason", "wait", "says"),
    [
        ("intent", Cause.HOPELESS, 3600.0, "stays relayed for now: because; not tried again for 60 min"),
        ("punch", Cause.UNREACHED, 120.0, "stays relayed for now: because; not tried again for 2 min"),
        ("proving", Cause.UNSTABLE, 61.0, "its direct way did not last: because; not tried again for 61 s"),
        ("stable", Cause.INTERRUPTED, 1.0, None),
        ("intent", Cause.BUSY, 2.0, None),
        ("intent", Cause.BUSY, 600.0, "stays relayed for now: because; not tried again for 10 min"),
    ],
)
def test_what_stays_relayed_is_told_unless_it_is_soon_another(
    stage: str, reason: Cause, wait: float, says: str | None
) -> None:
    event = UpgradeAbandoned(
        peer=PEER, connection=3, stage=stage, reason=reason, text="because.", wait=wait, seconds=0.1
    )
    line = views.event_line(as_told(event))
    assert (line and line[10:]) == (says and f"peer {PEER[:12]}…  {says}")
    assert views.event_line(as_told(event), verbose=True)


@pytest.mark.parametrize("reason", list(End))
@pytest.mark.parametrize("by", list(Side))
def test_every_end_has_words(reason: End, by: Side) -> None:
    assert views.ended_words(reason, by, "")
    assert "their words" in views.ended_words(reason, by, "their words")


# -- Width -------------------------------------------------------------------------------------------------------------


def test_text_is_wrapped_under_its_beginning() -> None:
    out = Console(force_terminal=True, width=40)
    address = "/ip4/127.0.0.1/tcp/17002/p2p/" + ALICE
    assert views.wrapped("  kaspad    one two three four five six seven", out) == (
        "  kaspad    one two three four five six\n            seven"
    )
    assert views.wrapped("14:02:11  peer 12D3  left after 1 s: it said nothing", out) == (
        "14:02:11  peer 12D3  left after 1 s: it\n          said nothing"
    )
    assert views.wrapped(f"  listens   {address}", out) == f"  listens   {address}"
    assert views.wrapped("short", out) == "short"
    assert views.wrapped("it ended:\n  File a\n  File b", out) == "it ended:\n  File a\n  File b"


def test_nothing_is_wrapped_into_a_file() -> None:
    line = "word " * 100
    assert views.wrapped(line, Console(file=io.StringIO(), width=40)) == line


def test_paths() -> None:
    assert views.path_name({"path": str(DIRECT.kind), "relay_id": None}) == "direct"
