"""multistream-select on a stream: see `kas_libp2p.transport._multistream` for the protocol."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

import trio

from kas_libp2p.errors import NegotiationError, Stage, UpgradeTimeout
from kas_libp2p.transport._multistream import Proposer, Responder
from kas_libp2p.transport.yamux._machine import StreamCode

if TYPE_CHECKING:
    from kas_libp2p.transport.yamux.stream import YamuxStream


async def accept(stream: YamuxStream, protocols: Collection[str], timeout: float) -> str:
    """Agree on the protocol of a stream that the peer opened.

    Args:
        protocols: what is spoken here.
        timeout: seconds.

    Raises:
        NegotiationError, UpgradeTimeout: they did not agree; the stream is reset.
        ConnectionLost, StreamReset: the stream ended.
    """
    responder = Responder(protocols)
    await _negotiate(stream, responder, timeout)
    assert responder.selected is not None
    return responder.selected


async def propose(stream: YamuxStream, proposer: Proposer, timeout: float) -> str:
    """Propose several protocols on a stream that we opened, one after the other.

    Args:
        timeout: seconds.

    Raises:
        NegotiationError, UpgradeTimeout: they did not agree; the stream is reset.
        ConnectionLost, StreamReset: the stream ended.
    """
    stream.connection.write(stream._state, proposer.start(), now=False)
    await _negotiate(stream, proposer, timeout)
    assert proposer.selected is not None
    return proposer.selected


async def _negotiate(stream: YamuxStream, side: Proposer | Responder, timeout: float) -> None:
    agreed = False
    try:
        with trio.fail_after(timeout):
            while side.selected is None:
                await stream.wait_unread()
                state = stream._state
                if not state.chunks:
                    if state.eof and state.reset is None:
                        raise NegotiationError("the peer ended the stream before they agreed on a protocol")
                    raise stream._read_error()
                answer = side.receive(stream._take_unread())
                if answer:
                    # An agreement may wait for the data that follows it, a refusal for nothing.
                    stream.connection.write(state, answer, now=side.selected is None)
        stream.protocol = side.selected
        stream._put_back(side.rest())
        agreed = True
    except trio.TooSlowError:
        raise UpgradeTimeout(Stage.STREAM, timeout) from None
    finally:
        if not agreed:
            stream.reset(StreamCode.NEGOTIATION)
