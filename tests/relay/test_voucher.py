from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kas_libp2p import addresses
from kas_libp2p.errors import SecurityError
from kas_libp2p.identity import Identity, seal_envelope
from kas_libp2p.pb import relay_pb2 as pb
from kas_libp2p.relay._voucher import DOMAIN, TYPE, open_voucher, seal_voucher

RELAY, PEER, MALLORY = (Identity.from_seed(bytes([n]) * 32) for n in (1, 2, 3))


def opened(data: bytes) -> int:
    return open_voucher(data, relay=RELAY.peer_id, peer=PEER.peer_id)


def test_there_and_back() -> None:
    assert opened(seal_voucher(RELAY, PEER.peer_id, 1_800_000_000)) == 1_800_000_000
    assert opened(seal_voucher(RELAY, PEER.peer_id, 2**64 - 1)) == 2**64 - 1


def forged(relay: bytes, *, signer: Identity = RELAY, domain: str = DOMAIN, kind: bytes = TYPE) -> bytes:
    payload = pb.Voucher(relay=relay, peer=addresses.peer_id_to_bytes(PEER.peer_id), expiration=1)
    return seal_envelope(signer, domain, kind, payload.SerializeToString())


OURS = addresses.peer_id_to_bytes(RELAY.peer_id)


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "envelope"),
        (b"\xff", "malformed"),
        (seal_voucher(RELAY, PEER.peer_id, 1)[:-1], "malformed"),
        (seal_voucher(MALLORY, PEER.peer_id, 1), "signed by another"),
        (forged(OURS, signer=MALLORY), "signed by another"),
        (forged(addresses.peer_id_to_bytes(MALLORY.peer_id)), "of another relay"),
        (forged(b""), "of another relay"),
        (seal_voucher(RELAY, MALLORY.peer_id, 1), "for another peer"),
        (forged(OURS, domain="libp2p-peer-record"), "signature"),
        (forged(OURS, kind=b"\x03\x01"), "0301"),
        (seal_envelope(RELAY, DOMAIN, TYPE, b"\xff"), "voucher is malformed"),
    ],
)
def test_a_wrong_voucher(data: bytes, why: str) -> None:
    with pytest.raises(SecurityError, match=why):
        opened(data)


@given(st.binary(max_size=200))
def test_opening_is_total(data: bytes) -> None:
    with pytest.raises(SecurityError):
        opened(data)
