"""From a byte pipe to a secured, multiplexed connection.

::

    initiator                                                   responder
        /multistream/1.0.0, /noise, Noise 1     ->
                                                <-    /multistream/1.0.0, /noise, Noise 2 (identity, muxers)
        Noise 3 (identity, muxers)              ->
        (first streams)                         ->

What the initiator can say without an answer leaves together, so a connection to a peer that names its multiplexers in
the Noise handshake can be used after one round trip, and a responder of ours answers in one piece. A peer that names
none gets one more round of multistream, sealed, whose proposal leaves with Noise message 3.

The responder reads exactly as far as it must, and keeps the rest for the connection: peers pipeline too.

Sources: libp2p specs ``connections/README.md``, ``noise/README.md``, ``connections/inlined-muxer-negotiation.md``.
"""

from __future__ import annotations

from dataclasses import dataclass

import trio

from kas_libp2p.config import KIB, Config
from kas_libp2p.errors import NegotiationError, Stage, UpgradeError, UpgradeTimeout
from kas_libp2p.identity import Identity
from kas_libp2p.metadata import DIRECT, Path, PeerId
from kas_libp2p.transport import _noise
from kas_libp2p.transport._multistream import HEADER, Proposer, Responder
from kas_libp2p.transport._noise import LENGTH, Handshake, Secured, Static, sealed_size
from kas_libp2p.transport.connection import Connection
from kas_libp2p.transport.raw import RawConnection
from kas_libp2p.transport.yamux import _machine as yamux

READ_SIZE = 4 * KIB
"""Bytes read at once during the handshakes: they are a few hundred bytes."""


@dataclass(frozen=True, slots=True)
class Opening:
    """What was said on a pipe before it was known who is the initiator.

    Attributes:
        heard: what was read from it.
        greeted: whether multistream's header has been sent, which is the first that either side says.
    """

    heard: bytes = b""
    greeted: bool = False


NOTHING = Opening()


async def upgrade(
    raw: RawConnection,
    *,
    identity: Identity,
    initiator: bool,
    expected: PeerId | None,
    config: Config,
    path: Path = DIRECT,
    static: Static | None = None,
    opening: Opening = NOTHING,
) -> Connection:
    """Secure and multiplex a byte pipe. If this fails, or is cancelled, the pipe is closed.

    Args:
        raw: the pipe.
        identity: our key.
        initiator: whether we are the initiator of everything on this connection, whoever dialed.
        expected: the peer that must be at the other end, or ``None`` for any.
        path: the way that the pipe takes.
        static: our static Noise key; a new one if not given.
        opening: what was said already.

    Returns:
        The connection. Nothing happens on it before `Connection.run`.

    Raises:
        NegotiationError: the peer speaks no Noise or no Yamux, or breaks multistream.
        SecurityError: its Noise is malformed or forged.
        PeerIdMismatch: it is another peer.
        UpgradeTimeout: it was silent for ``config.dial.upgrade_timeout`` in all; says at which stage.
        UpgradeError: the pipe broke or ended; says at which stage.
    """
    attempt = _Upgrade(raw, identity, initiator, expected, static, opening)
    done = False
    timeout = config.dial.upgrade_timeout
    try:
        with trio.fail_after(timeout):
            secured = await attempt.secure()
            await attempt.multiplex()
        connection = Connection(
            raw,
            secured,
            initiator=initiator,
            path=path,
            config=config.yamux,
            negotiation_timeout=config.dial.negotiation_timeout,
            rtt=attempt.rtt,
            wire=bytes(attempt.wire),
            plain=bytes(attempt.plain),
        )
        done = True
        return connection
    except trio.TooSlowError:
        raise UpgradeTimeout(attempt.stage, timeout) from None
    except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
        raise _broken(attempt.stage, str(error) or "the connection broke") from error
    finally:
        if not done:
            raw.abort()


def _broken(stage: Stage, what: str) -> UpgradeError:
    error = UpgradeError(f"{what} during {stage}")
    error.stage = stage
    return error


class _Upgrade:
    """One attempt.

    Attributes:
        stage: how far it came.
        rtt: seconds from our first message to the peer's answer.
        wire: bytes that were read and belong to what follows.
        plain: opened bytes that belong to the multiplexer.
    """

    def __init__(
        self,
        raw: RawConnection,
        identity: Identity,
        initiator: bool,
        expected: PeerId | None,
        static: Static | None,
        opening: Opening,
    ) -> None:
        self.stage = Stage.SECURITY_NEGOTIATION
        self.rtt: float | None = None
        self.wire = bytearray(opening.heard)
        self.plain = bytearray()
        self._raw = raw
        self._said = HEADER if opening.greeted else b""
        self._initiator = initiator
        self._handshake = Handshake(
            identity, initiator=initiator, expected=expected, muxers=(yamux.PROTOCOL,), static=static
        )
        self._secured: Secured | None = None
        self._last = b""
        self._buffer = memoryview(bytearray(READ_SIZE))

    async def secure(self) -> Secured:
        if self._initiator:
            await self._secure_as_initiator()
        else:
            await self._secure_as_responder()
        self._secured = self._handshake.secured()
        return self._secured

    async def _secure_as_initiator(self) -> None:
        proposer = Proposer((_noise.PROTOCOL,), self.stage)
        first = proposer.start() + self._handshake.write()
        sent_at = trio.current_time()
        await self._raw.send_all(first.removeprefix(self._said))
        proposer.receive(self.wire)
        self.wire.clear()
        while proposer.selected is None:
            await self._read_more()
            proposer.receive(self.wire)
            self.wire.clear()
        self.rtt = trio.current_time() - sent_at  # not before: go greets us unasked
        self.wire += proposer.rest()
        self.stage = Stage.NOISE
        self._handshake.read(await self._read_message())
        last = self._handshake.write()
        if self._handshake.peer_muxers() is None:
            self._last = last  # leaves together with the proposal of a multiplexer
        else:
            await self._raw.send_all(last)

    async def _secure_as_responder(self) -> None:
        responder = Responder((_noise.PROTOCOL,), self.stage)
        answer = b""
        while responder.selected is None:
            if not self.wire:
                await self._read_more()
            answer += responder.receive(self.wire).removeprefix(self._said)
            self.wire.clear()
            if responder.selected is None:
                await self._raw.send_all(answer)
                answer = b""
        self.wire += responder.rest()
        self.stage = Stage.NOISE
        if len(self.wire) < LENGTH:  # the peer waits for the agreement before it goes on
            await self._raw.send_all(answer)
            answer = b""
        self._handshake.read(await self._read_message())
        sent_at = trio.current_time()
        await self._raw.send_all(answer + self._handshake.write())
        message = await self._read_message()
        self.rtt = trio.current_time() - sent_at
        self._handshake.read(message)

    async def multiplex(self) -> None:
        muxers = self._handshake.peer_muxers()
        self.stage = Stage.MUXER_NEGOTIATION
        if muxers is not None:
            if yamux.PROTOCOL not in muxers:
                offer = ", ".join(muxer[:64] for muxer in muxers[:8])
                raise NegotiationError(f"the peer multiplexes with {offer}, not with {yamux.PROTOCOL}", self.stage)
            return
        side: Proposer | Responder
        if self._initiator:
            side = Proposer((yamux.PROTOCOL,), self.stage)
            await self._raw.send_all(self._last + self._seal(side.start()))
        else:
            side = Responder((yamux.PROTOCOL,), self.stage)
        while side.selected is None:
            await self._open_more()
            answer = side.receive(self.plain)
            self.plain.clear()
            if answer:
                await self._raw.send_all(self._seal(answer))
        self.plain += side.rest()

    async def _read_more(self) -> None:
        count = await self._raw.receive_into(self._buffer)
        if not count:
            raise _broken(self.stage, "the peer closed the connection")
        self.wire += self._buffer[:count]

    async def _read_message(self) -> bytes:
        while len(self.wire) < LENGTH or len(self.wire) < LENGTH + int.from_bytes(self.wire[:LENGTH], "big"):
            await self._read_more()
        end = LENGTH + int.from_bytes(self.wire[:LENGTH], "big")
        message = bytes(self.wire[LENGTH:end])
        del self.wire[:end]
        return message

    def _seal(self, data: bytes) -> bytes:
        assert self._secured is not None
        sealed = bytearray(sealed_size(len(data)))
        self._secured.sealer.seal_into(data, memoryview(sealed))
        return bytes(sealed)

    async def _open_more(self) -> None:
        assert self._secured is not None
        while True:
            plain = bytearray(len(self.wire))
            used, made = self._secured.opener.open_into(memoryview(bytes(self.wire)), memoryview(plain))
            del self.wire[:used]
            if made:
                self.plain += plain[:made]
                return
            await self._read_more()
