"""Asking others to dial us: AutoNAT v1, v2, and for a stranger. What an answer means is decided in `_client`."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field

import trio
from multiaddr import Multiaddr

from kas_libp2p import addresses as addr
from kas_libp2p._rates import Rates
from kas_libp2p.autonat._client import Outcome, Proof, Verdict, expect_answer, judge, judge_v1, pay
from kas_libp2p.autonat._messages import (
    DIAL_REQUEST,
    MAX_DIAL_BACK,
    MAX_MESSAGE,
    MAX_PIECE,
    STRANGER,
    V1,
    DialData,
    DialDataRequest,
    DialRequest,
    DialResponse,
    DialStatus,
    V1Dial,
    V1Response,
    V1Status,
    decode,
    decode_dial_back,
    decode_v1,
    encode,
    encode_dial_back_response,
    encode_v1,
)
from kas_libp2p.autonat._roles import Kind
from kas_libp2p.errors import KasError, RemoteProtocolError
from kas_libp2p.events import EventBus, PeerMisbehaved
from kas_libp2p.metadata import Direction, PathKind, PeerId
from kas_libp2p.transport.connection import Connection
from kas_libp2p.transport.framed import receive_frame
from kas_libp2p.transport.yamux.stream import YamuxStream

TIMEOUT = 60.0
"""Seconds for one test: a server takes up to 30 s to receive dial data, and some 20 s to wait, dial and be answered."""
PROOF_TIMEOUT = 2.0
"""Seconds that the dial-back may come later than the answer that claims it, as the two take different connections."""
DIAL_BACK_TIMEOUT = 10.0
"""Seconds for a dial-back to say its number."""
MAX_PAID_PER_HOUR = 2_000_000
"""Bytes of dial data in all. A test of an address that is not where the server sees us costs 30 to 100 kB."""


@dataclass(slots=True)
class _Waiting:
    """A test of an address, under way."""

    server: Connection
    address: str
    started: float
    proof: Proof | None = None
    proven: trio.Event = field(default_factory=trio.Event)

    def prove(self, connection: Connection) -> None:
        self.proof = self.proof or Proof(connection.remote_address)
        self.proven.set()


class Client:
    """Makes tests.

    Args:
        peer: our peer id.
        events: where everything is told.
    """

    def __init__(self, peer: PeerId, events: EventBus) -> None:
        self._peer = peer
        self._events = events
        self._by_nonce: dict[int, _Waiting] = {}
        self._v1: list[_Waiting] = []
        self._paid = Rates(MAX_PAID_PER_HOUR, 3600.0 / MAX_PAID_PER_HOUR)

    async def test(self, server: Connection, address: str, kind: Kind) -> Outcome:
        """Have an address of ours dialed. Never raises for the server's faults; they are told as events.

        Args:
            server: a direct connection to who is asked.
            address: ``/ip4|ip6/…/tcp/…``.
            kind: by which protocol.
        """
        protocol = {Kind.V1: V1, Kind.V2: DIAL_REQUEST, Kind.STRANGER: STRANGER}[kind]
        waiting = _Waiting(server, address, trio.current_time())
        outcome: Outcome
        try:
            with trio.fail_after(TIMEOUT):
                stream = await server.open_stream(protocol)
                try:
                    if kind is Kind.V1:
                        outcome = await self._test_v1(stream, addr.parse(address), waiting)
                    else:
                        outcome = await self._test_v2(stream, addr.parse(address), waiting)
                    await stream.aclose()
                except BaseException:
                    stream.reset()
                    raise
        except RemoteProtocolError as error:
            self._misbehaved(server, protocol, str(error))
            outcome = judge(None, waiting.proof, str(error))
        except trio.TooSlowError:
            outcome = judge(None, waiting.proof, f"no answer within {TIMEOUT:g} s")
        except KasError as error:
            outcome = judge(None, waiting.proof, str(error))
        if outcome.lie:
            self._misbehaved(server, protocol, outcome.reason)
        return outcome

    async def _test_v2(self, stream: YamuxStream, address: Multiaddr, waiting: _Waiting) -> Outcome:
        nonce = secrets.randbits(64)
        self._by_nonce[nonce] = waiting
        try:
            await stream.send_all(encode(DialRequest((bytes(address),), nonce)))
            answer = expect_answer(decode(await receive_frame(stream, MAX_MESSAGE)))
            if isinstance(answer, DialDataRequest):
                size = pay(answer)
                if not self._paid.take(None, trio.current_time(), size):
                    return Outcome(Verdict.REFUSED, f"{MAX_PAID_PER_HOUR} bytes of dial data were sent within an hour")
                await self._send_data(stream, size)
                answer = expect_answer(decode(await receive_frame(stream, MAX_MESSAGE)))
            if not isinstance(answer, DialResponse):
                raise RemoteProtocolError("dial data is demanded twice")
            if answer.dial is DialStatus.OK:
                await _grace(waiting)
            return judge(answer, waiting.proof)
        finally:
            del self._by_nonce[nonce]

    async def _send_data(self, stream: YamuxStream, size: int) -> None:
        piece = encode(DialData(bytes(MAX_PIECE)))
        for _ in range(-(-size // MAX_PIECE)):  # the last one may be longer than what is left (specification)
            await stream.send_all(piece)

    async def _test_v1(self, stream: YamuxStream, address: Multiaddr, waiting: _Waiting) -> Outcome:
        self._v1.append(waiting)
        try:
            await stream.send_all(encode_v1(V1Dial(addr.peer_id_to_bytes(self._peer), (bytes(address),))))
            answer = decode_v1(await receive_frame(stream, MAX_MESSAGE))
            if not isinstance(answer, V1Response):
                raise RemoteProtocolError("a server of AutoNAT sent what only an asker sends")
            if answer.status is V1Status.OK:
                await _grace(waiting)
            return judge_v1(answer, waiting.proof)
        finally:
            self._v1.remove(waiting)

    async def handle_dial_back(self, stream: YamuxStream) -> None:
        """Serve ``/libp2p/autonat/2/dial-back``.

        Raises:
            RemoteProtocolError: nobody asked for it, or it proves nothing.
        """
        connection = stream.connection
        try:
            with trio.fail_after(DIAL_BACK_TIMEOUT):
                nonce = decode_dial_back(await receive_frame(stream, MAX_DIAL_BACK))
        except trio.TooSlowError:
            raise RemoteProtocolError(f"a dial-back said nothing for {DIAL_BACK_TIMEOUT:g} s") from None
        waiting = self._by_nonce.get(nonce)
        if waiting is None:
            raise RemoteProtocolError("a dial-back that nobody waits for")
        if not _is_proof(connection, waiting):
            raise RemoteProtocolError("a dial-back on a connection that proves nothing")
        waiting.prove(connection)
        await stream.send_all(encode_dial_back_response())

    def came(self, connection: Connection) -> None:
        """A connection came in: it may be the dial-back of a v1 server."""
        for waiting in self._v1:
            server = waiting.server
            by_it = connection.peer == server.peer or _same_ip(connection.remote_address, server.remote_address)
            if by_it and _is_proof(connection, waiting):
                waiting.prove(connection)

    def _misbehaved(self, server: Connection, protocol: str, reason: str) -> None:
        self._events.emit(
            PeerMisbehaved(peer=server.peer, address=server.remote_address, layer=protocol, reason=reason)
        )


async def _grace(waiting: _Waiting) -> None:
    with trio.move_on_after(PROOF_TIMEOUT):
        await waiting.proven.wait()


def _is_proof(connection: Connection, waiting: _Waiting) -> bool:
    """Whether the connection is a fresh one that may have come by the tested address, and by no other of ours."""
    here, tested = addr.ip_port(connection.local_address), addr.ip_port(waiting.address)
    return (
        connection.direction is Direction.INBOUND
        and connection.path.kind is PathKind.DIRECT
        and connection is not waiting.server
        and connection.opened_at >= waiting.started
        and addr.family(connection.local_address) == addr.family(waiting.address)
        and (here == tested or not addr.is_public(connection.local_address))
    )


def _same_ip(one: str, other: str) -> bool:
    here, there = addr.ip_port(one), addr.ip_port(other)
    return here is not None and there is not None and here[0] == there[0]
