from __future__ import annotations

import uuid

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kas_libp2p.errors import RemoteProtocolError
from kas_libp2p.kaspa import p2p_pb2
from kas_libp2p.kaspa._join import (
    MAX_HANDSHAKE_MESSAGE,
    AwaitPeer,
    Carry,
    End,
    Ended,
    GiveUp,
    JoinKaspad,
    Meeting,
    Patience,
    Pending,
    Rival,
    Side,
    TellPeer,
    VersionInfo,
    backoff,
    choose,
    close_code,
    parse_reject,
    parse_version,
    payload_number,
    reject_reason,
    told_by_peer,
)
from kas_libp2p.kaspa._messages import CloseCode

ID = bytes(range(16))
OURS = VersionInfo(node_id="ours", network="kaspa-simnet", user_agent="/kaspad:2.1.0/", protocol_version=11)
THEIRS = VersionInfo(node_id="theirs", network="kaspa-simnet", user_agent="/kaspad:2.1.0/", protocol_version=11)
ELSEWHERE = VersionInfo(node_id="theirs", network="kaspa-mainnet", user_agent="/kaspad:2.1.0/", protocol_version=11)
PATIENCE = Patience(opener_join=1.2, acceptor_wait=1.5, acceptor_join=1.5, opener_wait=3.5)


def version(**fields: object) -> p2p_pb2.KaspadMessage:
    values: dict[str, object] = {
        "protocolVersion": 11,
        "id": ID,
        "userAgent": "/kaspad:2.1.0/kaspad:2.1.0(comment)/",
        "network": "kaspa-mainnet",
    } | fields
    return p2p_pb2.KaspadMessage(version=p2p_pb2.Version(**values))  # type: ignore[arg-type]


# -- Messages ----------------------------------------------------------------------------------------------------------


def test_a_version_is_read() -> None:
    info = parse_version(version().SerializeToString())
    assert info == VersionInfo(
        node_id=str(uuid.UUID(bytes=ID)),
        network="kaspa-mainnet",
        user_agent="/kaspad:2.1.0/kaspad:2.1.0(comment)/",
        protocol_version=11,
    )
    assert info.version == "2.1.0"


@pytest.mark.parametrize(
    ("agent", "shown"),
    [("/kaspad:2.0.1/", "2.0.1"), ("/kaspad:2.1.0(x)/", "2.1.0"), ("something", "something"), ("", "")],
)
def test_the_version_in_a_user_agent(agent: str, shown: str) -> None:
    info = parse_version(version(userAgent=agent).SerializeToString())
    assert info is not None
    assert info.version == shown


def test_request_ids_before_the_payload_are_looked_past() -> None:
    ids = p2p_pb2.KaspadMessage(request_id=70_000, response_id=3).SerializeToString()
    message = ids + version().SerializeToString()
    assert payload_number(message) == 20
    assert parse_version(message) is not None


def test_long_and_unprintable_texts_are_cut() -> None:
    info = parse_version(version(userAgent="\x1b[31m" + "ü" * 3000).SerializeToString())
    assert info is not None
    assert len(info.user_agent) == 256
    assert info.user_agent.startswith("\N{REPLACEMENT CHARACTER}[31mü")


@pytest.mark.parametrize("node_id", [b"", b"short", bytes(17)])
def test_a_version_needs_a_node_id(node_id: bytes) -> None:
    with pytest.raises(RemoteProtocolError, match="node id"):
        parse_version(version(id=node_id).SerializeToString())


def test_other_messages_are_no_version() -> None:
    assert parse_version(p2p_pb2.KaspadMessage(verack=p2p_pb2.Empty()).SerializeToString()) is None
    assert parse_version(b"") is None
    assert parse_version(b"\xa2\x01" + bytes(MAX_HANDSHAKE_MESSAGE)) is None


def test_a_reject_is_read() -> None:
    message = p2p_pb2.KaspadMessage(reject=p2p_pb2.Reject(reason="peer is banned"), request_id=1)
    assert parse_reject(message.SerializeToString()) == "peer is banned"
    assert parse_reject(version().SerializeToString()) is None
    assert parse_reject(b"\xb2\x01\x7f") is None


@given(st.binary(max_size=200))
def test_garbage_is_survived(data: bytes) -> None:
    payload_number(data)
    parse_reject(b"\xb2\x01" + data)
    for message in (data, b"\xa2\x01" + data, version().SerializeToString()[: len(data)]):
        try:
            parse_version(message)
        except RemoteProtocolError:
            continue


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("DUPLICATE_CONNECTION", End.DUPLICATE),
        ("LOOPBACK_CONNECTION", End.LOOPBACK),
        ("peer is banned", End.BANNED),
        ("P2P protocol version mismatch - local: 11, remote: 9", End.VERSION),
        ("Network mismatch - local: kaspa-mainnet, remote: kaspa-simnet", End.NETWORK),
        ("peer user agent rejected: /x/", End.USER_AGENT),
        ("got reject message: peer is banned", End.BANNED),
        ("misbehaving peer: x", End.REJECTED),
    ],
)
def test_reject_texts_have_names(text: str, reason: End) -> None:
    assert reject_reason(text) is reason


def test_every_close_code_means_something_and_every_end_has_one() -> None:
    for code in [*CloseCode, 77]:
        assert told_by_peer(code, "x").by is Side.PEER
    assert told_by_peer(77, "x") == Ended(End.PEER_CLOSED, Side.PEER, "x")
    assert told_by_peer(CloseCode.BUSY, "x") == Ended(End.PEER_BUSY, Side.PEER, "x")
    assert told_by_peer(CloseCode.GOING_AWAY, "stopped") == Ended(End.PEER_STOPPED, Side.PEER)
    assert told_by_peer(CloseCode.GOING_AWAY, "by the operator") == Ended(End.PEER_CLOSED, Side.PEER, "by the operator")
    assert told_by_peer(CloseCode.STALLED, "no data taken for 30 s").reason is End.PEER_KASPAD
    assert told_by_peer(CloseCode.REJECTED, "peer is banned").reason is End.BANNED
    for end in End:
        assert close_code(end) in CloseCode
    assert close_code(End.BUSY) is close_code(End.KASPAD_BUSY) is CloseCode.BUSY
    assert Ended(End.PEER_BUSY, Side.PEER).transient
    assert not Ended(End.NETWORK, Side.US).transient


# -- The order of a handshake ------------------------------------------------------------------------------------------


def test_the_opener_joins_first_and_waits_then() -> None:
    meeting = Meeting(opener=True, patience=PATIENCE)
    assert meeting.start(10.0) == JoinKaspad(11.2)
    assert meeting.on_kaspad_version(OURS, 10.1) == TellPeer()
    assert meeting.on_told() == AwaitPeer(13.6)
    assert meeting.on_peer_version(THEIRS, 12.0) == Carry(tell_peer=False)


def test_the_acceptor_touches_kaspad_when_the_version_came() -> None:
    meeting = Meeting(opener=False, patience=PATIENCE)
    assert meeting.start(10.0) == AwaitPeer(11.5)
    assert meeting.on_peer_version(THEIRS, 10.5) == JoinKaspad(12.0)
    assert meeting.on_kaspad_version(OURS, 10.6) == Carry(tell_peer=True)


@pytest.mark.parametrize(("opener", "seconds"), [(True, "3.5"), (False, "1.5")])
def test_nobody_waits_for_ever(opener: bool, seconds: str) -> None:
    meeting = Meeting(opener=opener, patience=PATIENCE)
    assert meeting.on_timeout() == GiveUp(Ended(End.PEER_SILENT, Side.PEER, f"no Version within {seconds} s"))


def test_the_waits_fit_into_one_another() -> None:
    patience = Patience()
    assert patience.opener_join < patience.acceptor_wait < patience.opener_wait < 4.0
    assert patience.acceptor_join < patience.opener_wait


def test_another_network_is_noticed_before_kaspad_is_touched() -> None:
    meeting = Meeting(opener=False, patience=PATIENCE, network="kaspa-simnet")
    refusal = meeting.on_hello("kaspa-mainnet")
    assert isinstance(refusal, GiveUp)
    assert refusal.ended.reason is End.NETWORK
    assert meeting.on_hello("") is None
    assert meeting.on_hello("kaspa-simnet") is None
    step = meeting.on_peer_version(ELSEWHERE, 0.0)
    assert step == GiveUp(Ended(End.NETWORK, Side.US, "we are on kaspa-simnet, the peer is on kaspa-mainnet"))


def test_or_at_the_latest_when_ours_is_known() -> None:
    meeting = Meeting(opener=False, patience=PATIENCE)
    assert isinstance(meeting.on_peer_version(ELSEWHERE, 0.0), JoinKaspad)
    step = meeting.on_kaspad_version(OURS, 0.0)
    assert isinstance(step, GiveUp)
    assert step.ended.reason is End.NETWORK


@pytest.mark.parametrize("opener", [True, False])
def test_our_own_node_is_recognised(opener: bool) -> None:
    meeting = Meeting(opener=opener, patience=PATIENCE, own_node="ours")
    if opener:
        meeting.on_kaspad_version(OURS, 0.0)
    step = meeting.on_peer_version(OURS, 0.0)
    assert step == GiveUp(Ended(End.LOOPBACK, Side.US, "the peer's node is our own"))


def test_our_own_node_after_a_restart_is_recognised_too() -> None:
    meeting = Meeting(opener=False, patience=PATIENCE, own_node="an older one")
    assert isinstance(meeting.on_peer_version(OURS, 0.0), JoinKaspad)
    step = meeting.on_kaspad_version(OURS, 0.0)
    assert isinstance(step, GiveUp)
    assert step.ended.reason is End.LOOPBACK


def test_a_known_node_is_a_duplicate() -> None:
    step = Meeting(opener=False, patience=PATIENCE).on_peer_version(THEIRS, 0.0, known=True)
    assert isinstance(step, GiveUp)
    assert step.ended.reason is End.DUPLICATE


# -- Places and rivals -------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.sampled_from(["a", "b", "c", None]), st.booleans()), max_size=60))
def test_places_are_never_exceeded(moves: list[tuple[str | None, bool]]) -> None:
    pending = Pending(in_all=5, per_source=2)
    held: list[str | None] = []
    for source, take in moves:
        if take:
            free = len(held) < 5 and held.count(source) < 2
            assert pending.take(source) is free
            if free:
                held.append(source)
        elif source in held:
            held.remove(source)
            pending.give_back(source)
        assert pending.count == len(held)


def test_one_host_leaves_places_for_others() -> None:
    pending = Pending(in_all=5, per_source=2, per_host=3)
    assert [pending.take(str(n), "192.0.2.1") for n in range(4)] == [True, True, True, False]
    assert pending.take("9", "192.0.2.2")
    assert pending.take("10", None), "a host that nobody knows has no limit"
    for n in range(3):
        pending.give_back(str(n), "192.0.2.1")
    assert pending.take("1", "192.0.2.1")
    assert pending.count == 3


def test_backoff_grows_and_stays_short() -> None:
    assert [backoff(n) for n in range(6)] == [0.02, 0.04, 0.08, 0.16, 0.16, 0.16]
    assert backoff(1000) == 0.16


def test_when_both_open_at_once_both_keep_the_same_stream() -> None:
    for alice, bob in (("A", "B"), ("B", "A")):
        # Each sees its own stream first, then the other's.
        at_alice = choose(ours=alice, theirs=bob, old_opener=True, new_opener=False, old_pending=True, silence=0)
        at_bob = choose(ours=bob, theirs=alice, old_opener=True, new_opener=False, old_pending=True, silence=0)
        assert {at_alice, at_bob} == {Rival.REFUSE, Rival.REPLACE}
        # One sees its own stream first, the other sees that one first as well: the same one stays.
        late = choose(ours=bob, theirs=alice, old_opener=False, new_opener=True, old_pending=True, silence=0)
        kept_by_alice = "alice's" if at_alice is Rival.REFUSE else "bob's"
        kept_by_bob = "alice's" if late is Rival.REFUSE else "bob's"
        assert kept_by_alice == kept_by_bob


def test_a_peer_that_comes_again_replaces_a_stream_that_is_silent() -> None:
    common = {"ours": "A", "theirs": "B", "old_opener": False, "new_opener": False}
    assert choose(**common, old_pending=False, silence=0.5) is Rival.REFUSE  # type: ignore[arg-type]
    assert choose(**common, old_pending=False, silence=3.5) is Rival.REPLACE  # type: ignore[arg-type]
    assert choose(**common, old_pending=True, silence=0.5) is Rival.REFUSE  # type: ignore[arg-type]


@pytest.mark.parametrize("old_opener", [True, False])
@pytest.mark.parametrize("new_opener", [True, False])
@pytest.mark.parametrize("old_pending", [True, False])
def test_a_stream_without_a_relay_replaces_one_through_a_relay(
    old_opener: bool, new_opener: bool, old_pending: bool
) -> None:
    for ours, theirs in (("A", "B"), ("B", "A")):
        rival = choose(
            ours=ours,
            theirs=theirs,
            old_opener=old_opener,
            new_opener=new_opener,
            old_pending=old_pending,
            silence=0,
            from_relay=True,
        )
        assert rival is Rival.REPLACE
