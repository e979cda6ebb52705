"""Who we are and who others are: keys, peer ids, signatures, signed envelopes.

A peer id is the hash of a public key, so proving possession of the key proves the id. Our own keys are always ed25519.
Keys of others may be of any type that libp2p knows; a key that is larger than any honest one is refused before anything
is computed with it.

Sources: libp2p specs ``peer-ids/peer-ids.md`` and RFC 0002 (signed envelopes).
"""

from __future__ import annotations

import hashlib
import os
import stat
from functools import lru_cache
from pathlib import Path
from typing import Self

import base58
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from cryptography.hazmat.primitives.serialization import load_der_public_key
from google.protobuf.message import DecodeError

from kas_libp2p.errors import IdentityError, SecurityError
from kas_libp2p.framing import frame
from kas_libp2p.metadata import PeerId
from kas_libp2p.pb import identity_pb2 as pb

MAX_RSA_BITS = 8192
"""Larger RSA keys cost seconds to verify (CVE-2023-39533)."""
MAX_PUBLIC_KEY_BYTES = 2048
"""An RSA key of 8192 bits takes 1062 bytes in its protobuf."""
MAX_INLINED_KEY_BYTES = 42
"""Keys up to this size are their own hash in a peer id (peer-ids.md)."""
ED25519_SEED_BYTES = 32

_IDENTITY_HASH, _SHA2_256 = 0x00, 0x12


class Identity:
    """An ed25519 key pair and the peer id that follows from it.

    Attributes:
        peer_id: the peer id.
        public_key: the public key as libp2p protobuf.
    """

    __slots__ = ("_key", "peer_id", "public_key")

    def __init__(self, key: ed25519.Ed25519PrivateKey) -> None:
        self._key = key
        self.public_key: bytes = pb.PublicKey(
            type=pb.ED25519, data=key.public_key().public_bytes_raw()
        ).SerializeToString()
        self.peer_id: PeerId = peer_id_of(self.public_key)

    def __repr__(self) -> str:
        return f"<Identity {self.peer_id}>"

    @classmethod
    def generate(cls) -> Self:
        """Make a new identity."""
        return cls(ed25519.Ed25519PrivateKey.generate())

    @classmethod
    def from_seed(cls, seed: bytes) -> Self:
        """The identity that belongs to a 32-byte ed25519 seed."""
        return cls(ed25519.Ed25519PrivateKey.from_private_bytes(seed))

    @classmethod
    def from_protobuf(cls, data: bytes) -> Self:
        """Read a private key in libp2p's protobuf form, as rust, go and js write it.

        Raises:
            IdentityError: it is damaged, or not an ed25519 key.
        """
        try:
            key = pb.PrivateKey.FromString(data)
        except DecodeError as error:
            raise IdentityError("this is no libp2p private key (protobuf)") from error
        if key.type != pb.ED25519:
            raise IdentityError(f"only ed25519 keys can be used, this is {pb.KeyType.Name(key.type)}")
        seed, public = key.data[:ED25519_SEED_BYTES], key.data[ED25519_SEED_BYTES:]
        if len(seed) != ED25519_SEED_BYTES:
            raise IdentityError("the ed25519 key is too short")
        identity = cls.from_seed(seed)
        own = identity._key.public_key().public_bytes_raw()
        if public not in (b"", own, own + own):  # the oldest form repeats the public half
            raise IdentityError("the two halves of the ed25519 key do not belong together")
        return identity

    def to_protobuf(self) -> bytes:
        """The private key in libp2p's protobuf form. Keep it secret."""
        data = self._key.private_bytes_raw() + self._key.public_key().public_bytes_raw()
        return pb.PrivateKey(type=pb.ED25519, data=data).SerializeToString()

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a key file.

        Raises:
            IdentityError: the file can't be read, is damaged, or can be read or written by others than its owner.
        """
        try:
            with path.open("rb") as file:
                mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
                if mode & 0o077:
                    raise IdentityError(
                        f"{path} can be read or written by others (mode {mode:04o}): "
                        f"whoever has it can pose as this node. Type: chmod 600 {path}"
                    )
                data = file.read(4096)
        except OSError as error:
            raise IdentityError(f"can't read the key file {path}: {error.strerror}") from error
        try:
            return cls.from_protobuf(data)
        except IdentityError as error:
            raise IdentityError(f"{path}: {error}") from error

    def save(self, path: Path) -> None:
        """Write the key to a new file with mode 0600, atomically: it never exists half-written or readable by others.

        Raises:
            IdentityError: the file exists, or can't be written.
        """
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            try:
                with os.fdopen(descriptor, "wb") as file:
                    file.write(self.to_protobuf())
                    file.flush()
                    os.fsync(file.fileno())
                try:
                    os.link(temporary, path)  # unlike rename, refuses to replace a key
                except FileExistsError as error:
                    raise IdentityError(f"{path} exists already; a key is never overwritten") from error
            finally:
                temporary.unlink()
        except OSError as error:
            raise IdentityError(f"can't write the key file {path}: {error.strerror}") from error

    @classmethod
    def load_or_create(cls, path: Path) -> Self:
        """Read a key file, or make it with a new key if it does not exist.

        Raises:
            IdentityError: as `load` and `save`.
        """
        if path.exists():
            return cls.load(path)
        identity = cls.generate()
        identity.save(path)
        return identity

    def sign(self, data: bytes) -> bytes:
        """The signature of some bytes."""
        return self._key.sign(data)


def peer_id_of(public_key: bytes) -> PeerId:
    """The peer id of a public key in protobuf form (peer-ids.md, "Peer Ids").

    The hash is of the bytes as given, as every implementation does it.
    """
    if len(public_key) <= MAX_INLINED_KEY_BYTES:
        multihash = bytes((_IDENTITY_HASH, len(public_key))) + public_key
    else:
        digest = hashlib.sha256(public_key).digest()
        multihash = bytes((_SHA2_256, len(digest))) + digest
    return PeerId(base58.b58encode(multihash).decode())


def verify(public_key: bytes, data: bytes, signature: bytes) -> bool:
    """Whether a signature of some bytes was made with the private half of a public key.

    Args:
        public_key: libp2p protobuf: ed25519, secp256k1, ECDSA, or RSA up to 8192 bits.

    Raises:
        SecurityError: the key is malformed, too large, or of an unknown type.
    """
    key = _load_public_key(public_key)
    try:
        match key:
            case ed25519.Ed25519PublicKey():
                key.verify(signature, data)
            case ec.EllipticCurvePublicKey():
                key.verify(signature, data, ec.ECDSA(hashes.SHA256()))
            case rsa.RSAPublicKey():
                key.verify(signature, data, padding.PKCS1v15(), hashes.SHA256())
    except InvalidSignature:
        return False
    return True


_PublicKey = ed25519.Ed25519PublicKey | ec.EllipticCurvePublicKey | rsa.RSAPublicKey


@lru_cache(maxsize=256)  # the same peers reconnect, and identify signs with the key that Noise has just verified
def _load_public_key(public_key: bytes) -> _PublicKey:
    if len(public_key) > MAX_PUBLIC_KEY_BYTES:
        raise SecurityError(f"a public key of {len(public_key)} bytes is refused, {MAX_PUBLIC_KEY_BYTES} are enough")
    try:
        message = pb.PublicKey.FromString(public_key)
        if message.type == pb.ED25519:
            return ed25519.Ed25519PublicKey.from_public_bytes(message.data)
        if message.type == pb.SECP256K1:
            return ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP256K1(), message.data)
        key = load_der_public_key(message.data)
    except (DecodeError, ValueError, UnsupportedAlgorithm) as error:
        raise SecurityError(f"the public key is malformed: {error}") from error
    if message.type == pb.ECDSA and isinstance(key, ec.EllipticCurvePublicKey):
        return key
    if message.type == pb.RSA and isinstance(key, rsa.RSAPublicKey):
        if key.key_size > MAX_RSA_BITS:
            raise SecurityError(f"an RSA key of {key.key_size} bits is refused, at most {MAX_RSA_BITS} are allowed")
        return key
    raise SecurityError("the public key is not of the type that it claims")


def seal_envelope(identity: Identity, domain: str, payload_type: bytes, payload: bytes) -> bytes:
    """Sign a payload for one purpose (RFC 0002).

    Args:
        domain: the purpose; a signature for one domain is worth nothing in another.
        payload_type: multicodec that tells how to read the payload.
    """
    envelope = pb.Envelope(payload_type=payload_type, payload=payload)
    envelope.public_key.ParseFromString(identity.public_key)
    envelope.signature = identity.sign(_signed_bytes(domain, payload_type, payload))
    return envelope.SerializeToString()


def open_envelope(data: bytes, domain: str, payload_type: bytes) -> tuple[bytes, bytes]:
    """Verify a signed envelope.

    Returns:
        The signer's public key (protobuf) and the payload.

    Raises:
        SecurityError: it is malformed, of another type, or the signature is wrong.
    """
    try:
        envelope = pb.Envelope.FromString(data)
    except DecodeError as error:
        raise SecurityError("the signed envelope is malformed") from error
    if envelope.payload_type != payload_type:
        raise SecurityError(f"the signed envelope holds {envelope.payload_type.hex()}, not {payload_type.hex()}")
    public_key = envelope.public_key.SerializeToString()
    if not verify(public_key, _signed_bytes(domain, payload_type, envelope.payload), envelope.signature):
        raise SecurityError("the signature of the envelope is wrong")
    return public_key, envelope.payload


def _signed_bytes(domain: str, payload_type: bytes, payload: bytes) -> bytes:
    return b"".join(map(frame, (domain.encode(), payload_type, payload)))
