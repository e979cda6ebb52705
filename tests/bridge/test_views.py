"""What people see, from the values that programs get."""

from __future__ import annotations

import io
import json
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
from kas_libp2p.events import Banned, Dialing, Event, InboundRefused, KaspaPeerEnded, KaspaPeerJoined, LimitHit
from kas_libp2p.kaspa.join import End, Side
from kas_libp2p.metadata import DIRECT, Dialect, Direction, Path, PathKind, PeerId

ALICE = "12D3KooWKWQMLKnDg9BizoExsXWiuebcitxtJa3LCHdcWT2jP7yG"
BOB = "12D3KooWPqT5LKnDg9BizoExsXWiuebcitxtJa3LCHdcWT2jP7yG"
PEER = PeerId(ALICE)


def console(width: int = 80, *, colour: bool = False) -> Console:
    system: Any = "standard" if colour else None
    return Console(file=io.StringIO(), width=width, force_terminal=colour, color_system=system, highlight=False)


def table(rows: list[dict[str, Any]], width: int = 80, *, colour: bool = False) -> str:
    out = console(width, colour=colour)
    out.print(views.peers(rows, out))
    assert isinstance(out.file, io.StringIO)
    return out.file.getvalue()


def joined(**changes: Any) -> dict[str, Any]:
    return {
        "peer_id": ALICE,
        "state": "joined",
        "direction": "outbound",
        "path": "direct",
        "relay_id": None,
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


def status(**changes: Any) -> dict[str, Any]:
    return {
        "version": "0.1.0",
        "peer_id": ALICE,
        "pid": 7,
        "uptime_s": 100.0,
        "addresses": [f"/ip4/127.0.0.1/tcp/16117/p2p/{ALICE}", f"/ip4/203.0.113.7/tcp/16117/p2p/{ALICE}"],
        "data_dir": "/d",
        "control": "/d/control.sock",
        "kaspad": UP,
        "notes": [],
        "peers": {"joined": 1, "handshaking": 0, "kept": 2, "connections": 1},
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


def test_status_tells_what_is_wrong_and_what_helps() -> None:
    text = "\n".join(
        views.status(
            status(
                kaspad=DOWN,
                notes=[{"note": "kaspad sees our peers as 172.17.0.1", "help": "use --network host"}],
                peers={"joined": 0, "handshaking": 2, "kept": 0, "connections": 0},
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
    text = "\n".join(views.startup(status(peers={"joined": 0, "handshaking": 0, "kept": 0, "connections": 0})))
    assert text.startswith("kas-bridge 0.1.0 · 12D3KooWKWQM…P7yG\n")
    assert "synced; its flags are fine" in text
    assert "nobody to connect to yet: kas-bridge connect MULTIADDR, or wait for others" in text
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
        (joined(state="handshaking", node=None), UP, ["shaking hands"]),
        (waiting(problem="refused"), UP, ["is not joined: refused.", "dialed again in 12 s"]),
        (waiting(state="dialing", retry_in_s=None), UP, ["not tried yet", "being dialed now"]),
        (waiting(problem="x", retry_in_s=None), DOWN, ["Our kaspad: no kaspad listens", "What helps: start kaspad."]),
        (waiting(state="listening", listener="127.0.3.1:1"), UP, ["--addpeer=127.0.3.1:1", "without --kaspad-dials"]),
    ],
)
def test_why(row: dict[str, Any], kaspad: dict[str, Any], expected: list[str]) -> None:
    text = "\n".join(views.why({"peer": row, "kaspad": kaspad}))
    assert [each for each in expected if each not in text] == []


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
    seconds=0.12,
)


@pytest.mark.parametrize(
    ("event", "expected"),
    [
        (JOINED, "joined: kaspad 2.1.0, relayed (…P7yG), we dialed, seen by kaspad as 127.1.0.1 (handshake 0.1 s)"),
        (
            KaspaPeerEnded(**ENDED, joined=True, reason=End.PATH_HUNG, by=Side.PATH, text="no answer for 5 s"),  # type: ignore[arg-type]
            "left after 61 s: the connection hung (no answer for 5 s) (in 1.0 kB, out 2.0 kB)",
        ),
        (KaspaPeerEnded(**ENDED, joined=False, reason=End.BUSY, by=Side.US, text=""), None),  # type: ignore[arg-type]
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
    values = json.loads(encode(event_values(event)))
    line = views.event_line(values)
    if expected is None:
        assert line is None
    else:
        assert line is not None
        assert expected.lower() in line.lower()
    assert views.event_line(values, verbose=True) is not None or event.name == "bridge-started"


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


def test_nothing_is_wrapped_into_a_file() -> None:
    line = "word " * 100
    assert views.wrapped(line, Console(file=io.StringIO(), width=40)) == line


def test_paths() -> None:
    assert views.path_name({"path": str(DIRECT.kind), "relay_id": None}) == "direct"
