from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from multiaddr import Multiaddr

from kas_libp2p import addresses
from kas_libp2p._identify import (
    LONGEST_WAIT,
    MAX_ADDRESSES,
    MAX_MESSAGE,
    MAX_SENT,
    PUSH_BURST,
    PUSH_INTERVAL,
    QUIET,
    RECORD_DOMAIN,
    RECORD_TYPE,
    RUST_RECORD_DOMAIN,
    RUST_RECORD_TYPE,
    Hearing,
    PeerInfo,
    PushPlan,
    for_remote,
    open_record,
    seal_record,
    statement,
)
from kas_libp2p.errors import RemoteProtocolError, SecurityError
from kas_libp2p.framing import FrameDecoder, encode_varint, frame
from kas_libp2p.identity import Identity, seal_envelope
from kas_libp2p.pb import identify_pb2 as pb

ALICE, MALLORY = (Identity.from_seed(bytes([n]) * 32) for n in (1, 2))
LISTEN = [addresses.parse(text) for text in ("/ip4/11.0.0.1/tcp/16117", "/ip6/2d00::1/tcp/16117")]


def tell(listen: list[Multiaddr] | None = None, **changes: object) -> bytes:
    arguments: dict[str, object] = {
        "agent": "kas-libp2p/9",
        "protocol_version": "/kaspad/libp2p/9",
        "protocols": ["/b", "/a"],
        "listen": LISTEN if listen is None else listen,
        "seq": 7,
        "observed": "/ip4/11.0.0.2/tcp/5000",
        **changes,
    }
    return statement(ALICE, **arguments)  # type: ignore[arg-type]


def hear(*data: bytes, by: Identity = ALICE) -> tuple[PeerInfo, str | None]:
    hearing = Hearing(by.peer_id, by.public_key)
    for each in data:
        hearing.receive(each)
    return hearing.finish()


def message(**fields: object) -> bytes:
    return frame(pb.Identify(**fields).SerializeToString())  # type: ignore[arg-type]


def test_what_we_tell_is_heard() -> None:
    info, fault = hear(tell())
    assert fault is None
    assert info == PeerInfo(
        peer=ALICE.peer_id,
        agent="kas-libp2p/9",
        protocol_version="/kaspad/libp2p/9",
        protocols=("/a", "/b"),
        addresses=tuple(map(str, LISTEN)),
        observed="/ip4/11.0.0.2/tcp/5000",
        signed=True,
        seq=7,
    )


def test_py_libp2p_reads_and_verifies_what_we_tell() -> None:
    from libp2p.identity.identify.pb.identify_pb2 import Identify
    from libp2p.peer.envelope import consume_envelope

    whole = next(iter(_frames(tell())))
    theirs = Identify.FromString(whole)
    assert theirs.agent_version == "kas-libp2p/9"
    _, record = consume_envelope(theirs.signedPeerRecord, RECORD_DOMAIN)
    assert str(record.peer_id) == ALICE.peer_id
    assert [str(each) for each in record.addrs] == list(map(str, LISTEN))
    assert record.seq == 7


def _frames(data: bytes) -> list[bytes]:
    decoder = FrameDecoder(MAX_MESSAGE)
    decoder.feed(data)
    return list(decoder)


def test_a_long_statement_is_two_messages_that_rust_can_read() -> None:
    long = [addresses.parse(f"/dns4/{'x' * 60}.{'y' * 60}.n{n}.example.org/tcp/1") for n in range(40)]
    parts = _frames(tell(long))
    assert len(parts) == 2
    assert all(len(part) <= MAX_SENT for part in parts)
    info, fault = hear(*map(frame, parts))
    assert fault is None
    assert info.signed
    assert len(info.addresses) == 16


@given(st.integers(1, 64))
def test_however_it_is_cut(size: int) -> None:
    data = tell()
    assert hear(*(data[i : i + size] for i in range(0, len(data), size))) == hear(data)


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "before a whole message"),
        (tell()[:-1], "before a whole message"),
        (frame(b"\xff\xff\xff"), "no protobuf"),
        (encode_varint(MAX_MESSAGE + 1), "is refused"),
        (b"\x80" * 10, "longer than 9 bytes"),
        (message(agentVersion="x") * 11, "more than 10 identify messages"),
        (message(protocols=[f"/proto/{n}" for n in range(513)]), "513 protocols"),
        (message(protocols=["/" + "x" * 256]), "protocol id of more than 256"),
        (message(publicKey=MALLORY.public_key), "key of another peer"),
        (message(publicKey=bytes(4096)), "public key of 4096 bytes"),
    ],
)
def test_what_can_not_be_true_is_refused(data: bytes, why: str) -> None:
    with pytest.raises(RemoteProtocolError, match=why):
        hear(data)


def test_1800_protocols_over_several_messages_are_refused() -> None:
    parts = [message(protocols=[f"/proto/{n}/{part}" for n in range(300)]) for part in range(6)]
    with pytest.raises(RemoteProtocolError, match="1800 protocols"):
        hear(*parts)


@pytest.mark.parametrize(
    ("record", "why"),
    [
        (seal_record(MALLORY, LISTEN, 1), "signed by another peer"),
        (
            seal_envelope(
                ALICE,
                RECORD_DOMAIN,
                RECORD_TYPE,
                pb.PeerRecord(peer_id=addresses.peer_id_to_bytes(MALLORY.peer_id)).SerializeToString(),
            ),
            "about another peer",
        ),
        (seal_envelope(ALICE, "another-domain", RECORD_TYPE, b""), "signature"),
        (seal_envelope(ALICE, RECORD_DOMAIN, b"\x03\x02", b""), "holds 0302"),
        (seal_envelope(ALICE, RECORD_DOMAIN, RECORD_TYPE, b"\xff"), "malformed"),
        (b"garbage", "malformed"),
    ],
)
def test_a_record_that_does_not_verify_costs_the_addresses(record: bytes, why: str) -> None:
    info, fault = hear(message(listenAddrs=[LISTEN[0].to_bytes()], signedPeerRecord=record, protocols=["/a"]))
    assert fault is not None
    assert why in fault
    assert info.addresses == ()
    assert not info.signed
    assert info.protocols == ("/a",)


def test_addresses_are_cleaned() -> None:
    listed = [
        b"\xff\xff\xff",
        addresses.with_peer(LISTEN[0], ALICE.peer_id).to_bytes(),
        addresses.with_peer("/ip4/11.0.0.9/tcp/1", MALLORY.peer_id).to_bytes(),
        addresses.parse("/ip4/0.0.0.0/tcp/1").to_bytes(),
        *[addresses.parse(f"/ip4/11.1.0.{n}/tcp/1").to_bytes() for n in range(100)],
    ]
    info, _ = hear(message(listenAddrs=listed, observedAddr=b"\xff", agentVersion="a\x1b[31mb" + "x" * 999))
    assert info.addresses[0] == str(LISTEN[0])
    assert len(info.addresses) == MAX_ADDRESSES
    assert "/ip4/11.0.0.9/tcp/1" not in info.addresses
    assert info.observed is None
    named = addresses.with_peer("/ip4/11.0.0.2/tcp/5000", MALLORY.peer_id).to_bytes()  # as js-libp2p writes it
    assert hear(message(observedAddr=named))[0].observed == "/ip4/11.0.0.2/tcp/5000"
    assert info.agent.startswith("a\N{REPLACEMENT CHARACTER}[31mb")
    assert len(info.agent) == 256


def test_a_record_is_opened_only_for_its_peer() -> None:
    seq, listed = open_record(seal_record(ALICE, LISTEN, 5), ALICE.peer_id)
    assert (seq, listed) == (5, [each.to_bytes() for each in LISTEN])
    with pytest.raises(SecurityError):
        open_record(seal_record(ALICE, LISTEN, 5), MALLORY.peer_id)


def test_a_record_that_is_sealed_as_rust_does_it_counts_too() -> None:
    record = pb.PeerRecord(peer_id=addresses.peer_id_to_bytes(ALICE.peer_id), seq=5).SerializeToString()
    sealed = seal_envelope(ALICE, RUST_RECORD_DOMAIN, RUST_RECORD_TYPE, record)
    assert open_record(sealed, ALICE.peer_id) == (5, [])
    with pytest.raises(SecurityError):
        open_record(sealed, MALLORY.peer_id)
    with pytest.raises(SecurityError, match="holds"):
        open_record(seal_envelope(ALICE, RECORD_DOMAIN, RUST_RECORD_TYPE, record), ALICE.peer_id)


@pytest.mark.parametrize(
    ("remote", "told"),
    [
        ("/ip4/127.0.0.1/tcp/9", ["/ip4/127.0.0.1/tcp/1", "/ip4/192.168.1.2/tcp/1", "/ip4/11.0.0.1/tcp/1"]),
        ("/ip4/192.168.1.9/tcp/9", ["/ip4/192.168.1.2/tcp/1", "/ip4/11.0.0.1/tcp/1"]),
        ("/ip4/11.9.9.9/tcp/9", ["/ip4/11.0.0.1/tcp/1"]),
        ("/ip6/2d00::9/tcp/9", ["/ip4/11.0.0.1/tcp/1"]),
    ],
)
def test_addresses_by_where_the_peer_is(remote: str, told: list[str]) -> None:
    listen = ["/ip4/127.0.0.1/tcp/1", "/ip4/192.168.1.2/tcp/1", "/ip4/11.0.0.1/tcp/1"]
    assert [str(each) for each in for_remote(map(addresses.parse, listen), remote)] == told


def test_a_push_waits_for_quiet() -> None:
    plan = PushPlan()
    assert plan.next_deadline(0) == float("inf")
    plan.changed(10)
    plan.changed(10.5)
    assert plan.next_deadline(10.5) == 10.5 + QUIET
    assert not plan.on_timeout(11)
    assert plan.on_timeout(11.5)
    assert plan.next_deadline(12) == float("inf")


def test_a_push_does_not_wait_for_ever() -> None:
    plan = PushPlan()
    for tenth in range(100):
        plan.changed(100 + tenth / 10)
    assert plan.next_deadline(109.9) == 100 + LONGEST_WAIT


def test_pushes_are_limited_as_go_limits_them() -> None:
    plan = PushPlan()
    now, pushed = 0.0, []
    while now < 1000:
        plan.changed(now)
        now = plan.next_deadline(now)
        if plan.on_timeout(now):
            pushed.append(now)
    assert pushed[PUSH_BURST - 1] == pytest.approx(PUSH_BURST * QUIET)
    gaps = [later - earlier for earlier, later in zip(pushed[-20:], pushed[-19:], strict=False)]
    assert min(gaps) >= PUSH_INTERVAL - 1e-6
