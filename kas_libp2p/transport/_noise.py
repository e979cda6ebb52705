"""Noise XX as libp2p uses it: the handshake, and the sealed messages after it. No I/O.

::

    initiator                                responder
        e                             ->
                                      <-     e, ee, s, es, payload
        s, se, payload                ->

The protocol is ``Noise_XX_25519_ChaChaPoly_SHA256`` with an empty prologue. A payload holds the sender's identity key,
its signature over the sender's static Noise key, and the stream multiplexers that the sender speaks; the first one in
the initiator's list that both have is used, and no further round trip is spent on it (early muxer selection).

Rules

* A message is at most 65535 bytes long, behind a length of two bytes.
* The initiator checks the responder's identity before it sends its own.
* A signature that is missing or wrong, a point that gives no secret, a tag that does not fit: `SecurityError`, and the
  handshake is of no further use.
* After the handshake each direction has its own key and counts its messages from 0. A message is opened or the
  connection ends; nothing of a forged message is ever delivered.

Sources: libp2p specs ``noise/README.md`` and ``connections/inlined-muxer-negotiation.md``; Noise Protocol Framework
revision 34, sections 5 and 7.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
from collections.abc import Sequence
from dataclasses import dataclass

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from google.protobuf.message import DecodeError

from kas_libp2p.errors import LocalProtocolError, PeerIdMismatch, SecurityError
from kas_libp2p.identity import Identity, peer_id_of, verify
from kas_libp2p.metadata import PeerId
from kas_libp2p.pb import noise_pb2 as pb

PROTOCOL = "/noise"
"""Its name in multistream-select."""
MAX_MESSAGE = 65535
TAG = 16
LENGTH = 2
MAX_PLAINTEXT = MAX_MESSAGE - TAG
"""Plaintext bytes of a full message: 65519."""
OVERHEAD = LENGTH + TAG
"""Wire bytes of a message beyond its plaintext."""
FULL_FRAME = LENGTH + MAX_MESSAGE
"""Wire bytes of a full message with its length."""

_NAME = b"Noise_XX_25519_ChaChaPoly_SHA256"
_KEY = 32
_SIGNATURE_DOMAIN = b"noise-libp2p-static-key:"
_nonce = struct.Struct("<4xQ").pack


def sealed_size(size: int) -> int:
    """Wire bytes of ``size`` bytes of plaintext in as few messages as possible."""
    return size + -(-size // MAX_PLAINTEXT) * OVERHEAD


class Sealer:
    """Seals one direction: plaintext into full messages."""

    __slots__ = ("_count", "_encrypt_into")

    def __init__(self, key: bytes) -> None:
        self._encrypt_into = ChaCha20Poly1305(key).encrypt_into
        self._count = 0

    def seal_into(self, plain: bytes | memoryview, wire: memoryview) -> int:
        """Seal all of ``plain`` as consecutive messages.

        Args:
            plain: at least one byte.
            wire: room for `sealed_size` bytes.

        Returns:
            the number of wire bytes.
        """
        count = self._count
        size = len(plain)
        if size <= MAX_PLAINTEXT:
            end = size + OVERHEAD
            wire[0] = (size + TAG) >> 8
            wire[1] = (size + TAG) & 0xFF
            self._encrypt_into(_nonce(count), plain, None, wire[LENGTH:end])
            self._count = count + 1
            return end
        plain = memoryview(plain)
        start = 0
        for offset in range(0, size, MAX_PLAINTEXT):
            piece = plain[offset : offset + MAX_PLAINTEXT]
            sealed = len(piece) + TAG
            wire[start] = sealed >> 8
            wire[start + 1] = sealed & 0xFF
            start += LENGTH
            # A counter of 64 bits can't wrap: 2^64 messages take longer than any connection lives.
            self._encrypt_into(_nonce(count), piece, None, wire[start : start + sealed])
            count += 1
            start += sealed
        self._count = count
        return start


class Opener:
    """Opens one direction: whole messages into plaintext."""

    __slots__ = ("_count", "_decrypt_into")

    def __init__(self, key: bytes) -> None:
        self._decrypt_into = ChaCha20Poly1305(key).decrypt_into
        self._count = 0

    def open_into(self, wire: memoryview, plain: memoryview) -> tuple[int, int]:
        """Open every whole message at the front of ``wire``, one behind the other, into ``plain``.

        Args:
            plain: at least as long as ``wire``.

        Returns:
            the number of wire bytes used up and of plaintext bytes made; what is left of ``wire`` is the beginning of a
            message.

        Raises:
            SecurityError: a message is too short to hold a tag, or its tag does not fit.
        """
        count = self._count
        decrypt_into = self._decrypt_into
        size = len(wire)
        start = made = 0
        while size - start >= LENGTH:
            sealed = wire[start] << 8 | wire[start + 1]
            end = start + LENGTH + sealed
            if end > size:
                break
            if sealed < TAG:
                raise SecurityError(f"Noise message {count} has {sealed} bytes, too few for its tag")
            stop = made + sealed - TAG
            try:
                decrypt_into(_nonce(count), wire[start + LENGTH : end], None, plain[made:stop])
            except InvalidTag:
                raise SecurityError(f"Noise message {count} was not sealed with the key of this connection") from None
            count += 1
            start = end
            made = stop
        self._count = count
        return start, made


@dataclass(frozen=True, slots=True)
class Secured:
    """What a finished handshake gives.

    Attributes:
        peer: the proven peer id.
        public_key: the peer's identity key as libp2p protobuf.
        muxers: the stream multiplexers that the peer named in its payload; ``None`` if it named none, and one has to be
            negotiated.
        sealer, opener: our two directions.
    """

    peer: PeerId
    public_key: bytes
    muxers: tuple[str, ...] | None
    sealer: Sealer
    opener: Opener


class Static:
    """A static Noise key, and our identity's signature that it is ours.

    One serves every handshake of a node: secrecy rests on the ephemeral keys, a peer learns who we are anyway, and
    making and signing one anew is a fifth of a handshake's work.
    """

    __slots__ = ("key", "public", "signature")

    def __init__(self, identity: Identity) -> None:
        self.key = X25519PrivateKey.generate()
        self.public = self.key.public_key().public_bytes_raw()
        self.signature = identity.sign(_SIGNATURE_DOMAIN + self.public)


class Handshake:
    """One side of one handshake: `write` and `read` by turns, the initiator writes first, three messages in all.

    Args:
        identity: our key.
        initiator: whether we are the initiator.
        expected: the peer that must be at the other end, or ``None`` for any.
        muxers: stream multiplexers we speak, in order of preference.
        static: our static Noise key; a new one if not given.
    """

    def __init__(
        self,
        identity: Identity,
        *,
        initiator: bool,
        expected: PeerId | None = None,
        muxers: Sequence[str] = (),
        static: Static | None = None,
    ) -> None:
        self._identity = identity
        self._initiator = initiator
        self._expected = expected
        self._muxers = tuple(muxers)
        self._static = static or Static(identity)
        self._ephemeral = X25519PrivateKey.generate()
        self._remote_ephemeral = b""
        self._step = 0
        self._chain = _NAME
        self._hash = hashlib.sha256(_NAME).digest()  # of the name and of the empty prologue
        self._key = b""
        self._count = 0
        self._peer: tuple[PeerId, bytes, tuple[str, ...] | None] | None = None

    @property
    def next_write(self) -> bool:
        """Whether it is our turn to write."""
        return self._step < 3 and (self._step % 2 == 0) == self._initiator

    @property
    def finished(self) -> bool:
        """Whether all three messages were exchanged."""
        return self._step == 3

    def write(self) -> bytes:
        """The next message, behind its length.

        Raises:
            LocalProtocolError: it is not our turn.
        """
        if not self.next_write:
            raise LocalProtocolError("it is not our turn to write in this Noise handshake")
        if self._step < 2:
            public = self._ephemeral.public_key().public_bytes_raw()
            self._mix_hash(public)
            message = public
            if self._step == 0:
                self._mix_hash(b"")
            else:
                self._mix_key(self._exchange(self._ephemeral, self._remote_ephemeral))
                message += self._write_static()
                self._mix_key(self._exchange(self._static.key, self._remote_ephemeral))
                message += self._encrypt(self._payload())
        else:
            message = self._write_static()
            self._mix_key(self._exchange(self._static.key, self._remote_ephemeral))
            message += self._encrypt(self._payload())
        self._step += 1
        return len(message).to_bytes(LENGTH, "big") + message

    def read(self, message: bytes) -> None:
        """Take the peer's next message, without its length.

        Raises:
            SecurityError: it is malformed, forged, or proves nothing.
            PeerIdMismatch: it proves another identity than the expected one.
            LocalProtocolError: it is not the peer's turn.
        """
        if self.next_write or self.finished:
            raise LocalProtocolError("it is not the peer's turn in this Noise handshake")
        rest = message
        if self._step < 2:
            if len(rest) < _KEY:
                raise SecurityError(f"Noise message {self._step + 1} has {len(rest)} bytes, too few for a key")
            self._remote_ephemeral, rest = rest[:_KEY], rest[_KEY:]
            self._mix_hash(self._remote_ephemeral)
        if self._step == 0:
            self._mix_hash(rest)  # a payload here is not encrypted, and nothing is defined to be in it
        else:
            if self._step == 1:
                self._mix_key(self._exchange(self._ephemeral, self._remote_ephemeral))
            if len(rest) < _KEY + TAG:
                raise SecurityError(f"Noise message {self._step + 1} has {len(message)} bytes, too few for its keys")
            static = self._decrypt(rest[: _KEY + TAG])
            self._mix_key(self._exchange(self._ephemeral, static))
            payload = self._decrypt(rest[_KEY + TAG :])
            self._peer = self._verify(payload, static)
        self._step += 1

    def secured(self) -> Secured:
        """What the handshake gives.

        Raises:
            LocalProtocolError: it is not finished.
        """
        if self._peer is None or not self.finished:
            raise LocalProtocolError("the Noise handshake is not finished")
        first, second = self._expand(b"")
        ours, theirs = (first, second) if self._initiator else (second, first)
        return Secured(*self._peer, Sealer(ours), Opener(theirs))

    def peer_muxers(self) -> tuple[str, ...] | None:
        """The multiplexers that the peer named, once its payload was read."""
        return self._peer[2] if self._peer else None

    def _payload(self) -> bytes:
        payload = pb.HandshakePayload(identity_key=self._identity.public_key, identity_sig=self._static.signature)
        payload.extensions.stream_muxers.extend(self._muxers)
        return payload.SerializeToString()

    def _verify(self, data: bytes, static: bytes) -> tuple[PeerId, bytes, tuple[str, ...] | None]:
        try:
            payload = pb.HandshakePayload.FromString(data)
        except DecodeError as error:
            raise SecurityError("the Noise payload is malformed") from error
        if not payload.identity_key:
            raise SecurityError("the Noise payload holds no identity key")
        if not verify(payload.identity_key, _SIGNATURE_DOMAIN + static, payload.identity_sig):
            raise SecurityError("the Noise key is not signed by the identity key beside it")
        peer = peer_id_of(payload.identity_key)
        if self._expected is not None and peer != self._expected:
            raise PeerIdMismatch(self._expected, peer)
        return peer, payload.identity_key, tuple(payload.extensions.stream_muxers) or None

    def _write_static(self) -> bytes:
        return self._encrypt(self._static.public)

    def _exchange(self, private: X25519PrivateKey, public: bytes) -> bytes:
        try:
            return private.exchange(X25519PublicKey.from_public_bytes(public))
        except ValueError as error:  # a point of low order: the shared secret would be all zeros
            raise SecurityError("the peer's Noise key gives no secret") from error

    def _mix_hash(self, data: bytes) -> None:
        self._hash = hashlib.sha256(self._hash + data).digest()

    def _mix_key(self, secret: bytes) -> None:
        self._chain, self._key = self._expand(secret)
        self._count = 0

    def _expand(self, secret: bytes) -> tuple[bytes, bytes]:
        temporary = hmac.digest(self._chain, secret, "sha256")
        first = hmac.digest(temporary, b"\x01", "sha256")
        return first, hmac.digest(temporary, first + b"\x02", "sha256")

    def _encrypt(self, plain: bytes) -> bytes:
        sealed = ChaCha20Poly1305(self._key).encrypt(_nonce(self._count), plain, self._hash)
        self._count += 1
        self._mix_hash(sealed)
        return sealed

    def _decrypt(self, sealed: bytes) -> bytes:
        if len(sealed) < TAG:
            raise SecurityError(f"Noise message {self._step + 1} is too short for its payload")
        try:
            plain = ChaCha20Poly1305(self._key).decrypt(_nonce(self._count), sealed, self._hash)
        except InvalidTag:
            raise SecurityError(f"Noise message {self._step + 1} does not fit this handshake") from None
        self._count += 1
        self._mix_hash(sealed)
        return plain
