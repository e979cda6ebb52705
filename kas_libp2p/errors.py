"""Every error that leaves this library, as one tree.

::

    KasError
    ├─ ConfigError            a setting is unknown or wrong; names it and what is allowed        (also ValueError)
    ├─ AddressError           a text is no usable multiaddr, peer id or ip:port                  (also ValueError)
    ├─ IdentityError          a key file is unreadable, damaged, or readable by others
    ├─ ListenError            no listener could be opened; says what holds the port
    ├─ ResolveError           a name in an address leads nowhere; says which and why
    ├─ DialError              no address of a peer led to a verified connection; one reason per address
    ├─ UpgradeError           one connection failed between TCP accept and the first stream
    │  ├─ NegotiationError    multistream-select: no common protocol, or malformed
    │  ├─ SecurityError       Noise: bad message, bad signature
    │  │  └─ PeerIdMismatch   the peer proved another identity than the one asked for
    │  └─ UpgradeTimeout      the peer stalled; says at which stage
    ├─ Refused                we said no before it cost anything: gate, limit, ban; names which
    ├─ ConnectionLost         a connection ended under its streams; carries why     (also trio.BrokenResourceError)
    ├─ StreamReset            one stream was reset, by which side and with which code    (also trio.BrokenResourceError)
    ├─ ProtocolError          somebody broke a protocol
    │  ├─ RemoteProtocolError the peer did
    │  └─ LocalProtocolError  the caller did
    └─ KaspaError             the Kaspa side of a stream
       ├─ HandshakeError      no Version, Verack or Ready in time, or a reject with its reason
       ├─ GrpcError           a gRPC status other than OK
       └─ RpcError            kaspad's RPC answered with an error

Errors that end a stream are trio's own kinds as well, so code that is written for any trio stream needs to know nothing
of this tree.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import trio


class KasError(Exception):
    """Base of every error of this library."""


class ConfigError(KasError, ValueError):
    """A setting is unknown or has a value that is not allowed. The text names the setting and the allowed values."""


class AddressError(KasError, ValueError):
    """A text is no usable multiaddr, peer id or ``ip:port``."""


class IdentityError(KasError):
    """A key file can't be used. The text says which file, why, and what to do."""


class ListenError(KasError):
    """A listener could not be opened. The text says who holds the port, as far as the system tells."""


class ResolveError(KasError):
    """A name in an address could not be resolved. The text says which name, and what the resolver answered."""


class Stage(StrEnum):
    """How far an attempt to connect had come. Events, errors and the doctor use the same words."""

    RESOLVE = "resolve"
    GATE = "gate"
    TCP = "tcp"
    SECURITY_NEGOTIATION = "security negotiation"
    NOISE = "noise"
    MUXER_NEGOTIATION = "muxer negotiation"
    LIMITS = "limits"
    IDENTIFY = "identify"
    STREAM = "stream negotiation"


@dataclass(frozen=True, slots=True)
class AddressFailure:
    """Why one address did not work.

    Attributes:
        address: the address as text, resolved.
        stage: how far it came.
        error: the cause.
        seconds: how long it was tried.
    """

    address: str
    stage: Stage
    error: BaseException
    seconds: float

    def __str__(self) -> str:
        return f"{self.address}: {self.stage} failed after {self.seconds:.2f} s: {self.error}"


class DialError(KasError):
    """No address of a peer led to a verified connection.

    ``failures`` holds the reason of each address that was tried; the same errors are chained as an ``ExceptionGroup``
    (``__cause__``), so that a traceback shows them all.
    """

    def __init__(self, target: str, failures: tuple[AddressFailure, ...] = (), hint: str = "") -> None:
        self.target = target
        self.failures = failures
        self.hint = hint
        lines = [f"can't connect to {target}" + (f": {hint}" if hint else "")]
        lines += [f"  {failure}" for failure in failures]
        super().__init__("\n".join(lines))


class UpgradeError(KasError):
    """A raw connection did not become a secured, multiplexed one."""

    stage = Stage.SECURITY_NEGOTIATION


class NegotiationError(UpgradeError):
    """multistream-select found no common protocol, or the peer broke its rules."""

    def __init__(self, message: str, stage: Stage = Stage.STREAM) -> None:
        super().__init__(message)
        self.stage = stage


class SecurityError(UpgradeError):
    """The Noise handshake, or a later Noise message, is not what the specification allows."""

    stage = Stage.NOISE


class PeerIdMismatch(SecurityError):
    """The peer proved to be somebody else than the one that was dialed."""

    def __init__(self, expected: str, actual: str) -> None:
        super().__init__(f"expected peer {expected}, but {actual} answered")
        self.expected = expected
        self.actual = actual


class UpgradeTimeout(UpgradeError):
    """The peer said nothing for too long."""

    def __init__(self, stage: Stage, seconds: float) -> None:
        super().__init__(f"the peer did not finish {stage} within {seconds:g} s")
        self.stage = stage
        self.seconds = seconds


class Refused(KasError):
    """A connection or stream was refused by our own policy.

    Attributes:
        limit: the name of the limit, list or gate that said no, as it stands in the configuration.
    """

    def __init__(self, limit: str, message: str) -> None:
        super().__init__(message)
        self.limit = limit


class ConnectionLost(KasError, trio.BrokenResourceError):
    """The connection under a stream ended; the text says why."""


class StreamReset(KasError, trio.BrokenResourceError):
    """One stream was reset.

    Attributes:
        by_peer: whether the other side did it.
        code: the libp2p stream error code, 0 if none was given.
    """

    def __init__(self, *, by_peer: bool, code: int = 0) -> None:
        who = "the peer" if by_peer else "this side"
        super().__init__(f"stream reset by {who}" + (f" (code {code:#x})" if code else ""))
        self.by_peer = by_peer
        self.code = code


class ProtocolError(KasError):
    """Somebody broke a protocol. See the two subclasses for who."""


class RemoteProtocolError(ProtocolError):
    """The peer broke a protocol."""


class LocalProtocolError(ProtocolError):
    """The caller asked for something that the protocol does not allow."""


class KaspaError(KasError):
    """The Kaspa side of a stream went wrong."""


class HandshakeError(KaspaError):
    """The Kaspa handshake failed.

    Attributes:
        reason: the peer's reject text, or what was missing.
        rejected: whether the peer said no (else it was silent, or broke the order).
    """

    def __init__(self, reason: str, *, rejected: bool = False) -> None:
        super().__init__(reason)
        self.reason = reason
        self.rejected = rejected


class GrpcError(KaspaError):
    """A gRPC call ended with a status other than OK.

    Attributes:
        status: the gRPC status code (8 is RESOURCE_EXHAUSTED: kaspad has too many pending handshakes).
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(f"gRPC status {status}: {message}")
        self.status = status
        self.message = message


class RpcError(KaspaError):
    """kaspad's RPC answered a request with an error; the text is kaspad's."""
