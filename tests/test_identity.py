import errno
import os
from pathlib import Path
from unittest.mock import patch

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import given
from hypothesis import strategies as st

from kas_libp2p.errors import IdentityError, SecurityError
from kas_libp2p.identity import Identity, open_envelope, peer_id_of, seal_envelope, verify
from kas_libp2p.pb import identity_pb2 as pb

# From libp2p specs, peer-ids/peer-ids.md, "Test vectors".
SPEC_PUBLIC = bytes.fromhex("080112201ed1e8fae2c4a144b8be8fd4b47bf3d3b34b871c3cacf6010f0e42d474fce27e")
SPEC_PRIVATE = bytes.fromhex(
    "080112407e0830617c4a7de83925dfb2694556b12936c477a0e1feb2e148ec9da60fee7d"
    "1ed1e8fae2c4a144b8be8fd4b47bf3d3b34b871c3cacf6010f0e42d474fce27e"
)
DOMAIN, PAYLOAD_TYPE = "libp2p-peer-record", b"\x03\x01"


def test_the_specification_s_key_reads_and_writes_as_it_says() -> None:
    identity = Identity.from_protobuf(SPEC_PRIVATE)
    assert identity.public_key == SPEC_PUBLIC
    assert identity.to_protobuf() == SPEC_PRIVATE


def test_the_peer_id_is_the_one_that_py_libp2p_gives() -> None:
    from libp2p.crypto.ed25519 import Ed25519PublicKey
    from libp2p.peer.id import ID

    identity = Identity.from_seed(bytes(range(32)))
    raw = pb.PublicKey.FromString(identity.public_key).data
    assert identity.peer_id == str(ID.from_pubkey(Ed25519PublicKey.from_bytes(raw)))
    assert identity.peer_id.startswith("12D3KooW")


def foreign_keys() -> list[object]:
    def proto(kind: pb.KeyType, data: bytes) -> bytes:
        return pb.PublicKey(type=kind, data=data).SerializeToString()

    def der(key: object) -> bytes:
        return key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)  # type: ignore[attr-defined]

    sha = hashes.SHA256()
    secp, ecdsa = ec.generate_private_key(ec.SECP256K1()), ec.generate_private_key(ec.SECP256R1())
    rsa_key, ed = rsa.generate_private_key(65537, 2048), ed25519.Ed25519PrivateKey.generate()
    point = secp.public_key().public_bytes(Encoding.X962, PublicFormat.CompressedPoint)
    return [
        pytest.param(proto(pb.ED25519, ed.public_key().public_bytes_raw()), ed.sign(b"words"), id="ed25519"),
        pytest.param(proto(pb.SECP256K1, point), secp.sign(b"words", ec.ECDSA(sha)), id="secp256k1"),
        pytest.param(proto(pb.ECDSA, der(ecdsa)), ecdsa.sign(b"words", ec.ECDSA(sha)), id="ecdsa"),
        pytest.param(proto(pb.RSA, der(rsa_key)), rsa_key.sign(b"words", padding.PKCS1v15(), sha), id="rsa"),
    ]


@pytest.mark.parametrize(("public_key", "signature"), foreign_keys())
def test_every_key_type_of_libp2p_verifies(public_key: bytes, signature: bytes) -> None:
    assert verify(public_key, b"words", signature)
    assert not verify(public_key, b"other words", signature)
    assert not verify(public_key, b"words", signature[:-1])
    assert peer_id_of(public_key).startswith(("Qm", "12D3KooW", "16Uiu2HA"))


@pytest.mark.parametrize(
    ("public_key", "words"),
    [
        pytest.param(b"", "malformed", id="empty"),
        pytest.param(b"\xff" * 40, "malformed", id="garbage"),
        pytest.param(pb.PublicKey(type=pb.ED25519, data=b"short").SerializeToString(), "malformed", id="short"),
        pytest.param(pb.PublicKey(type=pb.RSA, data=bytes(4000)).SerializeToString(), "4005 bytes", id="oversized"),
    ],
)
def test_a_bad_key_is_refused_before_anything_is_computed(public_key: bytes, words: str) -> None:
    with pytest.raises(SecurityError, match=words):
        verify(public_key, b"", b"")


def test_a_key_that_claims_another_type_is_refused() -> None:
    der = (
        ec.generate_private_key(ec.SECP256R1())
        .public_key()
        .public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    )
    with pytest.raises(SecurityError, match="not of the type"):
        verify(pb.PublicKey(type=pb.RSA, data=der).SerializeToString(), b"", b"")


def test_a_key_file_is_made_once_for_its_owner_only(tmp_path: Path) -> None:
    path = tmp_path / "deeper" / "node.key"
    old_mask = os.umask(0)
    try:
        made = Identity.load_or_create(path)
    finally:
        os.umask(old_mask)
    assert path.stat().st_mode & 0o777 == 0o600
    assert Identity.load_or_create(path).peer_id == made.peer_id
    assert [entry.name for entry in path.parent.iterdir()] == ["node.key"]
    with pytest.raises(IdentityError, match="never overwritten"):
        Identity.generate().save(path)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o622])
def test_a_key_file_that_others_can_touch_is_refused_with_the_cure(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "node.key"
    Identity.generate().save(path)
    path.chmod(mode)
    with pytest.raises(IdentityError, match=f"chmod 600 {path}"):
        Identity.load(path)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        pytest.param(b"\xff\xff", "protobuf", id="garbage"),
        pytest.param(pb.PrivateKey(type=pb.RSA, data=b"x").SerializeToString(), "only ed25519.*RSA", id="another type"),
        pytest.param(pb.PrivateKey(type=pb.ED25519, data=b"x").SerializeToString(), "too short", id="short"),
        pytest.param(pb.PrivateKey(type=pb.ED25519, data=bytes(64)).SerializeToString(), "two halves", id="mixed up"),
    ],
)
def test_a_damaged_key_file_is_named(tmp_path: Path, data: bytes, words: str) -> None:
    path = tmp_path / "node.key"
    path.touch(mode=0o600)
    path.write_bytes(data)
    with pytest.raises(IdentityError, match=f"node.key.*{words}"):
        Identity.load(path)


def test_a_key_file_that_can_not_be_written_is_named_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(IdentityError, match=r"can't write the key file .*/file/node\.key: File exists"):
        Identity.generate().save(tmp_path / "file" / "node.key")
    (tmp_path / "shut").mkdir()
    full = patch.object(os, "link", side_effect=OSError(errno.ENOSPC, "No space left on device"))
    with full, pytest.raises(IdentityError, match=r"shut/node\.key: No space left"):
        Identity.generate().save(tmp_path / "shut" / "node.key")
    assert list((tmp_path / "shut").iterdir()) == []


def test_a_missing_key_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(IdentityError, match="No such file"):
        Identity.load(tmp_path / "node.key")


@given(st.binary(max_size=200))
def test_an_envelope_opens_only_for_its_purpose_and_unchanged(payload: bytes) -> None:
    identity = Identity.from_seed(bytes(32))
    sealed = seal_envelope(identity, DOMAIN, PAYLOAD_TYPE, payload)
    assert open_envelope(sealed, DOMAIN, PAYLOAD_TYPE) == (identity.public_key, payload)
    with pytest.raises(SecurityError, match="signature"):
        open_envelope(sealed, "another purpose", PAYLOAD_TYPE)
    with pytest.raises(SecurityError, match="holds 0301"):
        open_envelope(sealed, DOMAIN, b"\x03\x02")
    forged = pb.Envelope.FromString(sealed)
    forged.payload += b"!"
    with pytest.raises(SecurityError, match="signature"):
        open_envelope(forged.SerializeToString(), DOMAIN, PAYLOAD_TYPE)


def test_an_envelope_is_read_by_py_libp2p() -> None:
    from libp2p.peer.envelope import unmarshal_envelope

    identity = Identity.generate()
    envelope = unmarshal_envelope(seal_envelope(identity, DOMAIN, PAYLOAD_TYPE, b"payload"))
    envelope.validate(DOMAIN)
    assert envelope.raw_payload == b"payload"
