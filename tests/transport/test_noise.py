import os
import random

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import given
from hypothesis import strategies as st
from noise.connection import Keypair, NoiseConnection

from kas_libp2p.errors import LocalProtocolError, PeerIdMismatch, SecurityError
from kas_libp2p.identity import Identity
from kas_libp2p.pb import identity_pb2, noise_pb2
from kas_libp2p.transport._noise import (
    FULL_FRAME,
    MAX_MESSAGE,
    MAX_PLAINTEXT,
    OVERHEAD,
    Handshake,
    Opener,
    Sealer,
    Static,
    sealed_size,
)

ALICE = Identity.from_seed(bytes(32))
BOB = Identity.from_seed(bytes(range(32)))
NAME = b"Noise_XX_25519_ChaChaPoly_SHA256"


def pair(**bob):
    alice = Handshake(ALICE, initiator=True, expected=BOB.peer_id, muxers=("/yamux/1.0.0",))
    return alice, Handshake(**{"identity": BOB, "initiator": False, "muxers": ("/yamux/1.0.0", "/mplex/6.7.0")} | bob)


def pass_message(sender, receiver, change=lambda message: message):
    message = sender.write()
    assert int.from_bytes(message[:2], "big") == len(message) - 2
    receiver.read(change(message[2:]))


def shake(alice, bob):
    pass_message(alice, bob)
    pass_message(bob, alice)
    pass_message(alice, bob)
    return alice.secured(), bob.secured()


def seal(sealer, plain):
    wire = bytearray(sealed_size(len(plain)))
    assert sealer.seal_into(plain, memoryview(wire)) == len(wire)
    return bytes(wire)


def open_all(opener, wire):
    plain = bytearray(len(wire))
    used, made = opener.open_into(memoryview(wire), memoryview(plain))
    return used, bytes(plain[:made])


def test_two_sides_prove_who_they_are_and_tell_their_multiplexers():
    alice, bob = pair()
    assert alice.next_write
    assert not bob.next_write
    at_alice, at_bob = shake(alice, bob)
    assert alice.finished
    assert bob.finished
    assert at_alice.peer == BOB.peer_id
    assert at_alice.public_key == BOB.public_key
    assert at_alice.muxers == ("/yamux/1.0.0", "/mplex/6.7.0")
    assert at_bob.peer == ALICE.peer_id
    assert at_bob.muxers == ("/yamux/1.0.0",)


def test_after_the_handshake_each_direction_has_its_key():
    at_alice, at_bob = shake(*pair())
    assert open_all(at_bob.opener, seal(at_alice.sealer, b"to bob"))[1] == b"to bob"
    assert open_all(at_alice.opener, seal(at_bob.sealer, b"to alice"))[1] == b"to alice"
    with pytest.raises(SecurityError):
        open_all(at_alice.opener, seal(at_alice.sealer, b"reflected"))


def test_a_peer_without_extensions_names_no_multiplexer():
    at_alice, _ = shake(*pair(muxers=()))
    assert at_alice.muxers is None


def payload(identity, static, **changes):
    fields = {
        "identity_key": identity.public_key,
        "identity_sig": identity.sign(b"noise-libp2p-static-key:" + static.public_key().public_bytes_raw()),
    }
    return noise_pb2.HandshakePayload(**{**fields, **changes}).SerializeToString()


def other_implementation(initiator, static):
    noise = NoiseConnection.from_name(NAME)
    noise.set_as_initiator() if initiator else noise.set_as_responder()
    noise.set_keypair_from_private_bytes(Keypair.STATIC, static.private_bytes_raw())
    noise.start_handshake()
    return noise


@pytest.mark.parametrize("initiator", [True, False])
def test_another_implementation_of_noise_understands_us(initiator):
    ours = Handshake(ALICE, initiator=initiator, expected=BOB.peer_id)
    static = X25519PrivateKey.generate()
    theirs = other_implementation(not initiator, static)
    if initiator:
        assert theirs.read_message(ours.write()[2:]) == b""
        ours.read(bytes(theirs.write_message(payload(BOB, static))))
        heard = theirs.read_message(ours.write()[2:])
    else:
        ours.read(bytes(theirs.write_message()))
        heard = theirs.read_message(ours.write()[2:])
        ours.read(bytes(theirs.write_message(payload(BOB, static))))
    assert noise_pb2.HandshakePayload.FromString(bytes(heard)).identity_key == ALICE.public_key
    secured = ours.secured()
    for number in range(3):
        assert theirs.decrypt(seal(secured.sealer, b"ours %d" % number)[2:]) == b"ours %d" % number
        sealed = theirs.encrypt(b"theirs %d" % number)
        assert open_all(secured.opener, len(sealed).to_bytes(2, "big") + sealed)[1] == b"theirs %d" % number


def test_a_message_may_carry_up_to_65535_bytes():
    static = X25519PrivateKey.generate()
    theirs = other_implementation(False, static)
    ours = Handshake(ALICE, initiator=True)
    theirs.read_message(ours.write()[2:])
    room = MAX_MESSAGE - 32 - 48 - 16
    big = payload(BOB, static)
    # An unknown field fills it up: later versions may add what they want.
    filler = room - len(big) - 4
    big += b"\x7a" + bytes((filler & 0x7F | 0x80, filler >> 7 & 0x7F | 0x80, filler >> 14)) + bytes(filler)
    message = bytes(theirs.write_message(big))
    assert len(message) == MAX_MESSAGE
    ours.read(message)
    ours.write()
    assert ours.secured().peer == BOB.peer_id


def test_the_wrong_peer_learns_nothing_about_us():
    alice, mallory = pair(identity=Identity.generate())
    pass_message(alice, mallory)
    with pytest.raises(PeerIdMismatch, match=BOB.peer_id):
        pass_message(mallory, alice)
    assert not alice.next_write
    with pytest.raises(LocalProtocolError):
        alice.secured()


def test_a_responder_may_expect_a_peer_too():
    alice, bob = pair(expected=BOB.peer_id)
    pass_message(alice, bob)
    pass_message(bob, alice)
    with pytest.raises(PeerIdMismatch, match=ALICE.peer_id):
        pass_message(alice, bob)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"identity_key": b""}, "no identity key"),
        ({"identity_sig": b""}, "not signed"),
        ({"identity_sig": bytes(64)}, "not signed"),
        ({"identity_key": ALICE.public_key}, "not signed"),
        ({"identity_key": b"\x08\x01\x12\x20" + bytes(31)}, "malformed"),
    ],
)
def test_a_payload_that_proves_nothing_is_refused(changes, message):
    static = X25519PrivateKey.generate()
    theirs = other_implementation(False, static)
    ours = Handshake(ALICE, initiator=True)
    theirs.read_message(ours.write()[2:])
    with pytest.raises(SecurityError, match=message):
        ours.read(bytes(theirs.write_message(payload(BOB, static, **changes))))


def test_an_oversized_key_costs_nothing():
    key = rsa.generate_private_key(65537, 1024).public_key()
    der = key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo) + bytes(4096)
    oversized = identity_pb2.PublicKey(type=identity_pb2.RSA, data=der).SerializeToString()
    static = X25519PrivateKey.generate()
    theirs = other_implementation(False, static)
    ours = Handshake(ALICE, initiator=True)
    theirs.read_message(ours.write()[2:])
    with pytest.raises(SecurityError, match="refused"):
        ours.read(bytes(theirs.write_message(payload(BOB, static, identity_key=oversized))))


def test_a_payload_that_is_no_protobuf_is_refused():
    static = X25519PrivateKey.generate()
    theirs = other_implementation(False, static)
    ours = Handshake(ALICE, initiator=True)
    theirs.read_message(ours.write()[2:])
    with pytest.raises(SecurityError, match="malformed"):
        ours.read(bytes(theirs.write_message(b"\xff" * 40)))


def test_a_key_that_gives_no_secret_is_refused():
    bob = Handshake(BOB, initiator=False)
    bob.read(bytes(32))
    with pytest.raises(SecurityError, match="no secret"):
        bob.write()


def test_no_cut_or_changed_message_gets_through():
    alice, bob = pair()
    pass_message(alice, bob)
    message = bob.write()[2:]
    for index in range(len(message)):
        for changed in (message[:index], message[:index] + bytes((message[index] ^ 1,)) + message[index + 1 :]):
            again, _ = pair()
            again._ephemeral, again._hash, again._step = alice._ephemeral, alice._hash, 1
            with pytest.raises(SecurityError):
                again.read(changed)
    alice.read(message)


@pytest.mark.parametrize("size", [0, 31, 32, 95, 96, 1000, MAX_MESSAGE])
def test_junk_is_refused(size):
    junk = random.Random(size).randbytes(size)
    alice, _ = pair()
    alice.write()
    with pytest.raises(SecurityError):
        alice.read(junk)
    bob = Handshake(BOB, initiator=False)
    if size < 32:
        with pytest.raises(SecurityError):
            bob.read(junk)
    else:
        bob.read(junk)  # any 32 bytes are a key; what it proves comes later
        bob.write()
        with pytest.raises(SecurityError):
            bob.read(junk)


def test_nobody_speaks_out_of_turn():
    alice, bob = pair()
    with pytest.raises(LocalProtocolError):
        bob.write()
    with pytest.raises(LocalProtocolError):
        alice.read(bytes(32))
    shake(alice, bob)
    with pytest.raises(LocalProtocolError):
        alice.write()
    with pytest.raises(LocalProtocolError):
        bob.read(bytes(32))


KEY = os.urandom(32)


@pytest.mark.parametrize(
    ("size", "messages"), [(1, 1), (MAX_PLAINTEXT - 1, 1), (MAX_PLAINTEXT, 1), (MAX_PLAINTEXT + 1, 2), (262144, 5)]
)
def test_plaintext_goes_into_full_messages(size, messages):
    plain = random.Random(size).randbytes(size)
    wire = seal(Sealer(KEY), plain)
    assert len(wire) == size + messages * OVERHEAD
    assert int.from_bytes(wire[:2], "big") == min(size, MAX_PLAINTEXT) + 16
    assert open_all(Opener(KEY), wire) == (len(wire), plain)
    assert FULL_FRAME == MAX_PLAINTEXT + OVERHEAD


@given(st.lists(st.binary(min_size=1, max_size=300), max_size=20), st.lists(st.integers(1, 400), min_size=1))
def test_messages_may_be_cut_anywhere(plains, cuts):
    sealer, opener = Sealer(KEY), Opener(KEY)
    wire = b"".join(seal(sealer, plain) for plain in plains)
    held = got = b""
    turn = 0
    while wire or held:
        cut = cuts[turn % len(cuts)]
        turn += 1
        held += wire[:cut]
        wire = wire[cut:]
        used, plain = open_all(opener, held)
        held = held[used:]
        got += plain
        if not wire:
            break
    assert got == b"".join(plains)
    assert held == b""


def test_a_message_opens_only_once_and_only_in_its_place():
    sealer = Sealer(KEY)
    first, second = seal(sealer, b"first"), seal(sealer, b"second")
    for wire in (second, first + first, first[:-1] + bytes((first[-1] ^ 1,))):
        with pytest.raises(SecurityError):
            open_all(Opener(KEY), wire)


def test_a_message_too_short_for_a_tag_is_refused():
    with pytest.raises(SecurityError, match="too few for its tag"):
        open_all(Opener(KEY), b"\x00\x0f" + bytes(15))


def test_an_empty_message_is_nothing():
    sealer, opener = Sealer(KEY), Opener(KEY)
    wire = bytearray(OVERHEAD)
    sealer.seal_into(b"", memoryview(wire))
    assert open_all(opener, bytes(wire)) == (OVERHEAD, b"")


def test_one_static_key_serves_many_handshakes() -> None:
    kept = Static(ALICE)
    seen = set()
    for _ in range(2):
        alice, bob = Handshake(ALICE, initiator=True, static=kept), Handshake(BOB, initiator=False)
        bob.read(alice.write()[2:])
        alice.read(bob.write()[2:])
        bob.read(alice.write()[2:])
        assert bob.secured().peer == ALICE.peer_id
        wire = memoryview(bytearray(64))
        seen.add(bytes(wire[: alice.secured().sealer.seal_into(b"the same", wire)]))
    assert len(seen) == 2  # the session's keys are new all the same
