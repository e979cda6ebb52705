"""From an overlay stream to a channel of Kaspa messages, in the dialect that was agreed on."""

from __future__ import annotations

from kas_libp2p.errors import LocalProtocolError
from kas_libp2p.kaspa.channel import MAX_MESSAGE, MessageChannel
from kas_libp2p.kaspa.grpc import GrpcChannel, GrpcSettings
from kas_libp2p.kaspa.messages import MessagesChannel
from kas_libp2p.metadata import Dialect, OverlayStream

MIB = 1024 * 1024

REFERENCE = GrpcSettings(
    authority="kaspa.libp2p",
    gzip=True,
    stream_window=8 * MIB,
    connection_window=16 * MIB,
    max_frame=MIB,
    max_header_list=64 * 1024,
    keepalive=30.0,
    keepalive_timeout=10.0,
    liveness=True,
)
"""How the overlay inside kaspad sets HTTP/2 up on a stream; but a path that hangs is found sooner."""


def channel_of(stream: OverlayStream, *, max_message: int = MAX_MESSAGE) -> MessageChannel:
    """A channel, not running yet, on a fresh stream.

    On ``/kaspad/transport/1.0.0`` the connection's initiator is the HTTP/2 client, whoever opened the stream.

    Raises:
        LocalProtocolError: the stream speaks no Kaspa dialect.
    """
    metadata = stream.metadata
    match metadata.dialect:
        case Dialect.MESSAGES:
            return MessagesChannel(stream, max_message=max_message)
        case Dialect.HTTP2:
            make = GrpcChannel.client if metadata.initiator else GrpcChannel.server
            return make(stream, settings=REFERENCE)
    raise LocalProtocolError(f"a stream of {metadata.protocol or 'no protocol'} carries no Kaspa messages")
