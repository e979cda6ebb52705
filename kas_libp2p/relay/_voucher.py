"""Vouchers: a relay's signature under a reservation. No I/O.

Nobody asks for them when a circuit is made; a client that gets one checks it, since a relay that signs what is not true
is none to stay with. rust signs none.

Source: libp2p specs ``relay/circuit-v2.md``, "Reservation Vouchers".
"""

from __future__ import annotations

from google.protobuf.message import DecodeError

from kas_libp2p import addresses as addr
from kas_libp2p.errors import SecurityError
from kas_libp2p.identity import Identity, open_envelope, peer_id_of, seal_envelope
from kas_libp2p.metadata import PeerId
from kas_libp2p.pb import relay_pb2 as pb

DOMAIN = "libp2p-relay-rsvp"
TYPE = b"\x03\x02"


def seal_voucher(relay: Identity, peer: PeerId, expire: int) -> bytes:
    """Sign that a peer has a place here.

    Args:
        expire: seconds since the epoch.
    """
    voucher = pb.Voucher(
        relay=addr.peer_id_to_bytes(relay.peer_id), peer=addr.peer_id_to_bytes(peer), expiration=expire
    )
    return seal_envelope(relay, DOMAIN, TYPE, voucher.SerializeToString())


def open_voucher(data: bytes, *, relay: PeerId, peer: PeerId) -> int:
    """Verify a voucher.

    Args:
        relay: who must have signed it, for itself.
        peer: to whom it must have been given.

    Returns:
        when the reservation expires, in seconds since the epoch.

    Raises:
        SecurityError: it is malformed or forged, or of another relay or for another peer.
    """
    key, payload = open_envelope(data, DOMAIN, TYPE)
    if peer_id_of(key) != relay:
        raise SecurityError("the voucher is signed by another peer than the relay")
    try:
        voucher = pb.Voucher.FromString(payload)
    except DecodeError:
        raise SecurityError("the voucher is malformed") from None
    if voucher.relay != addr.peer_id_to_bytes(relay):
        raise SecurityError("the voucher is of another relay")
    if voucher.peer != addr.peer_id_to_bytes(peer):
        raise SecurityError("the voucher is for another peer")
    return voucher.expiration
