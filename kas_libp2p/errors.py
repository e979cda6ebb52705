"""Every error that leaves this library, as one tree.

::

    KasError
    ├─ ConfigError            a setting is unknown or wrong; names it and what is allowed        (also ValueError)
    ├─ AddressError           a text is no usable multiaddr, peer id or ip:port                  (also ValueError)
    ├─ IdentityError          a key file is unreadable, damaged, or readable by others
    ├─ ListenError            no listener could be opened; says what holds the port
    ├─ ResolveError           a name in an address leads nowhere; says which and why
    ├─ DialError              no address of a peer led to a verified connection; one reason per address
    ├─ PunchFailed            no hole could be punched to a peer; says what came of each address
    ├─ UpgradeError           one connection failed between TCP accept and the first stream
    │  ├─ NegotiationError    multistream-select: no common protocol, or malformed
    │  ├─ SecurityError       Noise: bad message, bad signature
    │  │  └─ PeerIdMismatch   the peer proved another identity than the one asked for
    │  └─ UpgradeTimeout      the peer stalled; says at which stage
    ├─ Refused                we said no before it cost anything: gate, limit, ban; names which
    ├─ RelayRefused           a relay said no; carries its status
    ├─ ConnectionLost         a connection ended under its streams; carries why     (also trio.BrokenResourceError)
    │  ├─ CircuitEnded        the relay under it ended it: which limit, and what was left
    │  └─ SessionLost         a session that moves between paths is over: by whom, and why in a word
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

import re
from dataclasses import dataclass
from enum import IntEnum, StrEnum

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
    RELAY = "relay"
    SECURITY_NEGOTIATION = "security negotiation"
    NOISE = "noise"
    MUXER_NEGOTIATION = "muxer negotiation"
    LIMITS = "limits"
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


def in_words(error: BaseException) -> str:
    """An error in one line for people: without the system's numbers, and of a dial why each address failed."""
    if isinstance(error, DialError):
        reasons = [error.hint] if error.hint else []
        for each in error.failures:
            why = in_words(each.error)
            if each.stage is not Stage.RELAY:  # there the error names the relay, and the address would name it twice
                why = f"{re.sub('/p2p/[^/]+$', '', each.address)}: {why}"
                why += "" if each.stage is Stage.TCP else f" (at {each.stage})"
            reasons.append(why)
        if reasons:
            return "; ".join(reasons)
    lines = re.sub(r"^\[Errno -?\d+\] ", "", str(error)).splitlines()
    return lines[0] if lines else type(error).__name__


@dataclass(frozen=True, slots=True)
class PunchOutcome:
    """What came of one address of a punch.

    Attributes:
        address: the address as text.
        dials: how often it was dialed.
        reason: the last outcome: the system's name of the error, as ``ECONNREFUSED``; ``unanswered``; the stage of the
            handshake that failed; or in one word why it was not dialed.
        seconds: from the start of the punch to that.
    """

    address: str
    dials: int
    reason: str
    seconds: float

    def __str__(self) -> str:
        if not self.dials:
            return f"{self.address}: {self.reason}"
        times = "once" if self.dials == 1 else f"{self.dials} times"
        return f"{self.address}: dialed {times}, {self.reason} after {self.seconds:.2f} s"


MAX_OUTCOMES = 4
"""Addresses of a punch of which is told in words."""


class PunchFailed(KasError):
    """No hole could be punched to a peer. The connection through the relay is not touched by that.

    Attributes:
        peer: its peer id.
        outcomes: what came of each address.
        seconds: how long it was tried.
    """

    def __init__(self, peer: str, outcomes: tuple[PunchOutcome, ...], seconds: float) -> None:
        self.peer = peer
        self.outcomes = outcomes
        self.seconds = seconds
        lines = [f"no way to {peer} without a relay was found in {seconds:.2f} s; what there is through one stays"]
        lines += [f"  {each}" for each in self.told] or ["  no address of it can be dialed"]
        super().__init__("\n".join(lines))

    @property
    def told(self) -> list[str]:
        """In words what came of the first few addresses, and how many more there were: guessed ports are dozens."""
        more = len(self.outcomes) - MAX_OUTCOMES
        return [*map(str, self.outcomes[:MAX_OUTCOMES]), *([f"and {more} more"] * (more > 0))]


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


class RelayRefused(KasError):
    """A relay refused a reservation or a circuit.

    Attributes:
        relay: its peer id.
        status: the status of circuit relay v2, as ``NO_RESERVATION``; empty if it gave none.
    """

    def __init__(self, relay: str, status: str, message: str) -> None:
        super().__init__(message)
        self.relay = relay
        self.status = status


class ConnectionLost(KasError, trio.BrokenResourceError):
    """The connection under a stream ended; the text says why."""


class CircuitEnded(ConnectionLost):
    """The connection was on a circuit, which its relay ended. Another one may be had at once.

    Attributes:
        relay: its peer id.
        limit: which of its limits was used up, as `kas_libp2p.metadata.CircuitLimits` names it: ``max_bytes`` or
            ``max_seconds``; empty if neither was, and the relay gave no reason.
        bytes_left, seconds_left: what was left of them, as counted here; ``None``: no limit.
    """

    def __init__(
        self, message: str, *, relay: str, limit: str, bytes_left: int | None, seconds_left: float | None
    ) -> None:
        super().__init__(message)
        self.relay = relay
        self.limit = limit
        self.bytes_left = bytes_left
        self.seconds_left = seconds_left

    def again(self, message: str) -> CircuitEnded:
        """The same end, for one more of those who were on it."""
        return CircuitEnded(
            message,
            relay=self.relay,
            limit=self.limit,
            bytes_left=self.bytes_left,
            seconds_left=self.seconds_left,
        )


class SessionLost(ConnectionLost):
    """The session that a stream lived in is over, other than by an end in order.

    Attributes:
        code: why, in the word of `kas_libp2p.events.SessionEnded`: ``lost``, ``restarted``, ``stopped``, ...
        by_peer: whether the other side ended it.
    """

    def __init__(self, message: str, *, code: str, by_peer: bool) -> None:
        super().__init__(message)
        self.code = code
        self.by_peer = by_peer


class StreamCode(IntEnum):
    """Why a stream is reset, as its peer is told (libp2p specs ``error-codes``)."""

    NEGOTIATION = 0x1001
    """No protocol was agreed on."""
    RESOURCES = 0x1002
    """A limit was hit."""


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
