"""Kaspa's handshake, as either side: Version, Verack, Ready.

Both sides send Version at once and answer the other's with Verack; when both have checked what they got, Ready goes
both ways. Nothing else may be sent before the peer's Ready, and nothing twice. A node that does not want the peer says
so in a Reject, whose text is the only thing that tells a duplicate from a ban.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib.metadata import version

import trio
from google.protobuf.message import DecodeError

from kas_libp2p.errors import ConnectionLost, GrpcError, HandshakeError, RemoteProtocolError
from kas_libp2p.kaspa import p2p_pb2 as pb
from kas_libp2p.kaspa._join import VersionInfo, parse_reject, parse_version
from kas_libp2p.kaspa.channel import MessageChannel

USER_AGENT = f"/kas-libp2p:{version('kas-libp2p')}/"
PROTOCOL_VERSION = 11
"""What kaspad 2.1.0 speaks."""
LOWEST_PROTOCOL_VERSION = 9
"""The overlay inside kaspad speaks 9; kaspad 2.0.1 speaks 10."""
VERSION_TIMEOUT = 4.0
"""Seconds for Version, and again for Verack, as kaspad gives them."""
READY_TIMEOUT = 8.0
"""Seconds for Ready, as kaspad gives them."""
REJECT_TIMEOUT = 0.5
"""Seconds to look for a Reject of a peer that takes nothing any more."""
OVERLAY_VERSION_TIMEOUT, OVERLAY_READY_TIMEOUT = 8.0, 12.0
"""The same through an overlay, where a round trip may go through a relay."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Hello:
    """What we say of ourselves.

    Attributes:
        network: for instance ``kaspa-mainnet``.
        node_id: 16 bytes; new at every start of a node.
        user_agent: at most 256 characters.
        protocol_version: the highest that we speak.
        version_timeout, ready_timeout: seconds for the peer's Version and Verack, and for its Ready.
    """

    network: str
    node_id: bytes = field(default_factory=lambda: uuid.uuid4().bytes)
    user_agent: str = USER_AGENT
    protocol_version: int = PROTOCOL_VERSION
    version_timeout: float = VERSION_TIMEOUT
    ready_timeout: float = READY_TIMEOUT


async def handshake(channel: MessageChannel, hello: Hello) -> VersionInfo:
    """Shake hands on a fresh channel that runs.

    Returns:
        What the peer says of itself.

    Raises:
        HandshakeError: the peer said no (``rejected``), or kept silent, or broke the order.
        ConnectionLost, GrpcError, RemoteProtocolError: the channel ended.
    """
    await _say(channel, _version(hello))
    with _within(hello.version_timeout, "Version"):
        message, raw = await _next(channel, "version")
        info = parse_version(raw)
    assert info is not None
    if (why := _objection(hello, info, message.version.id)) is not None:
        await _reject(channel, why)
        raise HandshakeError(why)
    await _say(channel, pb.KaspadMessage(verack=pb.Empty()))
    with _within(hello.version_timeout, "Verack"):
        await _next(channel, "verack")
    await _say(channel, pb.KaspadMessage(ready=pb.Empty()))
    with _within(hello.ready_timeout, "Ready"):
        await _next(channel, "ready")
    return info


def _version(hello: Hello) -> pb.KaspadMessage:
    body = pb.Version(
        protocolVersion=hello.protocol_version,
        timestamp=int(time.time() * 1000),
        id=hello.node_id,
        userAgent=hello.user_agent,
        network=hello.network,
    )
    return pb.KaspadMessage(version=body)


async def _say(channel: MessageChannel, message: pb.KaspadMessage) -> None:
    try:
        await channel.send(message.SerializeToString())
    except (ConnectionLost, GrpcError):
        # The peer has left, and its reason may lie there unread.
        with suppress(ConnectionLost, GrpcError, RemoteProtocolError), trio.move_on_after(REJECT_TIMEOUT):
            async for raw in channel:
                if (reason := parse_reject(raw)) is not None:
                    raise HandshakeError(reason, rejected=True) from None
        raise


def _objection(hello: Hello, info: VersionInfo, node_id: bytes) -> str | None:
    if info.network != hello.network:
        return f"wrong network: expected {hello.network}, got {info.network}"
    if node_id == hello.node_id:
        return "loopback connection"
    if info.protocol_version < LOWEST_PROTOCOL_VERSION:
        return (
            f"P2P protocol version mismatch: we speak {LOWEST_PROTOCOL_VERSION} to {PROTOCOL_VERSION}, "
            f"the peer {info.protocol_version}"
        )
    return None


async def _reject(channel: MessageChannel, reason: str) -> None:
    try:
        await channel.send(pb.KaspadMessage(reject=pb.Reject(reason=reason)).SerializeToString())
        await channel.aclose()
    except (ConnectionLost, GrpcError, RemoteProtocolError):
        pass  # it is gone; why we said no is raised anyway


@contextmanager
def _within(seconds: float, what: str) -> Iterator[None]:
    """A time limit that names what was awaited."""
    with trio.move_on_after(seconds) as scope:
        yield
    if scope.cancelled_caught:
        raise HandshakeError(f"no {what} within {seconds:g} s")


async def _next(channel: MessageChannel, expected: str) -> tuple[pb.KaspadMessage, bytes]:
    raw = await channel.receive()
    if raw is None:
        raise HandshakeError(f"the peer ended the connection before its {expected.capitalize()}")
    try:
        message = pb.KaspadMessage.FromString(raw)
    except DecodeError as error:
        raise RemoteProtocolError("a Kaspa message is no valid protobuf") from error
    kind = message.WhichOneof("payload")
    if kind == "reject":
        raise HandshakeError(message.reject.reason[:256], rejected=True)
    if kind != expected:
        raise HandshakeError(f"expected {expected.capitalize()}, got {kind}")
    return message, raw
