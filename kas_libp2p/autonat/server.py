"""Dialing others back for them: AutoNAT v1 and v2, and having a stranger do it. Whom, is decided in `_server`.

A dial-back leaves from a fresh port, never from the one we listen on, as the asker's NAT lets that one in if the
asker dialed it. It carries an identity of its own, made at each start, so that it never counts as a second connection
of ours: a client relies on the number, not on the peer id (specification). Streams that the other side opens on it
are reset.

**Strangers.** A NAT that filters by address lets in whoever has been dialed before, from any port, so a server that the
asker is connected to always gets in, and finds it public, which it is not. Who can tell is somebody to whom the asker
has never sent anything. Two protocols of our own find one, with the messages of v2: ::

    asker                     this server                     another server that we are connected to
      | stranger                | stranger-dial                 |
      |  DialRequest        ->  |  DialRequest              ->  |   the address with the asker's peer id
      |                         |  <-       DialDataRequest     |
      |  <-  DialDataRequest    |                               |
      |  DialData ...       ->  |  DialData ...             ->  |
      |  <--------------------- dial-back, with the asker's number
      |                         |  <-          DialResponse     |
      |  <-     DialResponse    |                               |

A server that the asker has dialed as well is no stranger to it, and refuses; so the next one is asked.

v2 itself can't do this, as a server of it dials nobody but the asker. Nothing gets weaker by it: ``stranger`` has the
observed IP of the asker dialed and no other, within the rates of v2; ``stranger-dial`` is never for nothing, and costs
as much as v2 costs who wants another IP than his own dialed; and that comes from the asker, so nobody can make us send.
The asker believes only what it sees: its number, brought by somebody from an IP that it has never sent to.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, suppress

import trio
from multiaddr import Multiaddr

from kas_libp2p import addresses as addr
from kas_libp2p.autonat._client import expect_answer, pay
from kas_libp2p.autonat._messages import (
    DIAL_BACK,
    MAX_DIAL_BACK,
    MAX_MESSAGE,
    MIN_PIECE,
    STRANGER_DIAL,
    DialData,
    DialDataRequest,
    DialRequest,
    DialResponse,
    DialStatus,
    ResponseStatus,
    V1Dial,
    V1Response,
    V1Status,
    check_dial_back_response,
    decode,
    decode_v1,
    encode,
    encode_dial_back,
    encode_v1,
)
from kas_libp2p.autonat._server import Asker, Dial, Policy, Refusal
from kas_libp2p.config import Config
from kas_libp2p.errors import KasError, RemoteProtocolError, StreamCode, StreamReset
from kas_libp2p.events import DialBackServed, EventBus
from kas_libp2p.identity import Identity
from kas_libp2p.metadata import PathKind, PeerId
from kas_libp2p.transport._noise import Static
from kas_libp2p.transport.connection import Connection
from kas_libp2p.transport.framed import receive_frame
from kas_libp2p.transport.raw import RawConnection
from kas_libp2p.transport.upgrade import upgrade
from kas_libp2p.transport.yamux.stream import YamuxStream

ASK_TIMEOUT = 10.0
"""Seconds for the request to come: it is one small message."""
DATA_TIMEOUT = 30.0
"""Seconds for the dial data to come: 100 kB at 27 kbit/s."""
DIAL_TIMEOUT = 5.0
"""Seconds for TCP, a SYN lost twice included, and the handshakes. A v2 client of rust's waits 10 s for what it pays,
the pause and this together; not answered within them it has learned nothing, and pays and asks again."""
BACK_TIMEOUT = 5.0
"""Seconds for the number to be taken, once connected (go: 5 s)."""
MAX_HELPERS = 3
"""Other servers that are asked for one request, until one agrees to dial."""
STRANGER_TIMEOUT = 30.0
"""Seconds for what the other server does once it is paid: its pause, dial and dial-back."""


class Server:
    """Serves AutoNAT v1 and v2, and strangers.

    Args:
        events: where everything is told.
        config: ``autonat.allow_private``, ``dial`` and ``yamux`` are used.
        dial: connects to an address from a fresh port.
        own: where this machine can be reached, as multiaddr texts.
        dialed_us: whether this peer is connected and dialed us.
        helpers: connections to others that may be asked to dial this peer back in our place, the first to be asked
            first.
    """

    def __init__(
        self,
        events: EventBus,
        config: Config,
        *,
        dial: Callable[[Multiaddr], Awaitable[RawConnection]],
        own: Callable[[], Collection[str]],
        dialed_us: Callable[[PeerId], bool],
        helpers: Callable[[Connection], Iterable[Connection]],
    ) -> None:
        self._events = events
        self._config = config
        self._dial_fresh = dial
        self._helpers = helpers
        self._face = Identity.generate()
        self._static = Static(self._face)
        self._policy = Policy(
            allow_private=config.autonat.allow_private, own=own, dialed_us=dialed_us, draw=random.random
        )

    # v2

    async def handle_v2(self, stream: YamuxStream) -> None:
        """Serve ``/libp2p/autonat/2/dial-request``.

        Raises:
            RemoteProtocolError: the asker broke the rules, or was too slow.
        """
        request = await _request(stream)
        await self._decided(stream, request, self._policy.v2(request, _asker(stream), trio.current_time()))

    async def handle_stranger_dial(self, stream: YamuxStream) -> None:
        """Serve ``/kas-libp2p/autonat/stranger-dial/1.0.0``: dial back another peer than the one that asks.

        Raises:
            RemoteProtocolError: the asker broke the rules, or was too slow.
        """
        request = await _request(stream)
        await self._decided(stream, request, self._policy.stranger_dial(request, _asker(stream), trio.current_time()))

    async def _decided(self, stream: YamuxStream, request: DialRequest, decision: Dial | Refusal) -> None:
        if isinstance(decision, Refusal):
            return await self._refuse(stream, decision)
        if decision.data:
            await stream.send_all(encode(DialDataRequest(decision.index, decision.data)))
            await _receive_data(stream, decision.data)
            await trio.sleep(decision.pause)
        status = await self._dial_back(decision.address, decision.peer, request.nonce)
        await stream.send_all(encode(DialResponse(ResponseStatus.OK, decision.index, status)))
        return self._tell(stream, str(decision.address), status.name, "")

    async def _dial_back(self, address: Multiaddr, peer: PeerId, nonce: int) -> DialStatus:
        connection = await self._connect(address, peer)
        if connection is None:
            return DialStatus.E_DIAL_ERROR
        status = DialStatus.E_DIAL_BACK_ERROR
        async with trio.open_nursery() as nursery:
            await nursery.start(connection.run, lambda stream: stream.reset(StreamCode.NEGOTIATION))
            try:
                with trio.fail_after(BACK_TIMEOUT):
                    back = await connection.open_stream(DIAL_BACK)
                    await back.send_all(encode_dial_back(nonce))
                    with suppress(StreamReset):  # rust resets the stream behind its answer, which is lost then
                        check_dial_back_response(await receive_frame(back, MAX_DIAL_BACK))
                        await back.aclose()
                status = DialStatus.OK
            except (KasError, trio.TooSlowError):
                pass  # the status tells
            await connection.aclose("dialed back")
            nursery.cancel_scope.cancel()
        return status

    async def _connect(self, address: Multiaddr, peer: PeerId) -> Connection | None:
        try:
            with trio.fail_after(DIAL_TIMEOUT):
                return await upgrade(
                    await self._dial_fresh(address),
                    identity=self._face,
                    initiator=True,
                    expected=peer,
                    config=self._config,
                    static=self._static,
                )
        except (OSError, KasError, trio.TooSlowError):
            return None

    # v1

    async def handle_v1(self, stream: YamuxStream) -> None:
        """Serve ``/libp2p/autonat/1.0.0``.

        Raises:
            RemoteProtocolError: the asker broke the rules, or was too slow.
        """
        with _at_most(ASK_TIMEOUT, "its request"):
            request = decode_v1(await receive_frame(stream, MAX_MESSAGE))
        if not isinstance(request, V1Dial):
            raise RemoteProtocolError("an asker of AutoNAT sent what only a server sends")
        decision = self._policy.v1(request, _asker(stream), trio.current_time())
        if isinstance(decision, Refusal):
            await stream.send_all(encode_v1(V1Response(decision.v1, decision.reason)))
            return self._tell(stream, "", decision.v1.name, decision.reason)
        reached = await self._first_reached(decision, stream.connection.peer)
        if reached is None:
            answer = V1Response(V1Status.E_DIAL_ERROR, "no address could be dialed")
        else:
            answer = V1Response(V1Status.OK, address=bytes(reached))
        await stream.send_all(encode_v1(answer))
        self._tell(stream, str(reached or decision[0]), answer.status.name, "")
        return None

    async def _first_reached(self, found: Collection[Multiaddr], peer: PeerId) -> Multiaddr | None:
        reached: list[Multiaddr] = []

        async def one(address: Multiaddr) -> None:
            connection = await self._connect(address, peer)
            if connection is not None:
                reached.append(address)
                await connection.aclose("dialed back")
                nursery.cancel_scope.cancel()

        async with trio.open_nursery() as nursery:
            for address in found:
                nursery.start_soon(one, address)
        return reached[0] if reached else None

    # Strangers

    async def handle_stranger(self, stream: YamuxStream) -> None:
        """Serve ``/kas-libp2p/autonat/stranger/1.0.0``: have another server dial the asker back.

        Raises:
            RemoteProtocolError: the asker broke the rules, or was too slow.
        """
        request = await _request(stream)
        decision = self._policy.stranger(request, _asker(stream), trio.current_time())
        if isinstance(decision, Refusal):
            return await self._refuse(stream, decision)
        wanted = DialRequest((bytes(addr.with_peer(decision.address, decision.peer)),), request.nonce)
        for helper in itertools.islice(self._helpers(stream.connection), MAX_HELPERS):
            try:
                there = await helper.open_stream(STRANGER_DIAL)
            except KasError:
                continue
            try:
                answer = await _ask(there, wanted)
                if isinstance(answer, DialDataRequest):
                    await self._pay_through(stream, there, DialDataRequest(decision.index, answer.size))
                    answer = await _hear(there, STRANGER_TIMEOUT)
                elif answer is None or answer.status is not ResponseStatus.OK:
                    continue  # nobody has paid yet: nothing is lost by asking another
                if isinstance(answer, DialResponse) and answer.status is ResponseStatus.OK:
                    await stream.send_all(encode(DialResponse(answer.status, decision.index, answer.dial)))
                    return self._tell(stream, str(decision.address), answer.dial.name, "stranger")
                break
            finally:
                there.reset()
        return await self._refuse(stream, Refusal(ResponseStatus.E_DIAL_REFUSED, "no_stranger"))

    async def _pay_through(self, stream: YamuxStream, there: YamuxStream, demand: DialDataRequest) -> None:
        await stream.send_all(encode(demand))
        with _at_most(DATA_TIMEOUT, "its dial data"):
            async for piece in _pieces(stream, demand.size):
                with suppress(KasError):  # then its answer does not come either
                    await there.send_all(encode(DialData(piece)))

    # Both

    async def _refuse(self, stream: YamuxStream, refusal: Refusal) -> None:
        await stream.send_all(encode(DialResponse(refusal.status)))
        self._tell(stream, "", refusal.status.name, refusal.reason)

    def _tell(self, stream: YamuxStream, address: str, status: str, reason: str) -> None:
        self._events.emit(DialBackServed(peer=stream.connection.peer, address=address, status=status, reason=reason))


async def _request(stream: YamuxStream) -> DialRequest:
    with _at_most(ASK_TIMEOUT, "its request"):
        message = decode(await receive_frame(stream, MAX_MESSAGE))
    if not isinstance(message, DialRequest):
        raise RemoteProtocolError("an asker of AutoNAT began with something else than its request")
    return message


async def _ask(there: YamuxStream, request: DialRequest) -> DialDataRequest | DialResponse | None:
    try:
        await there.send_all(encode(request))
    except KasError:
        return None
    answer = await _hear(there, DIAL_TIMEOUT + BACK_TIMEOUT)
    if isinstance(answer, DialDataRequest):
        try:
            pay(answer)
        except RemoteProtocolError:
            return None
    return answer


async def _hear(there: YamuxStream, seconds: float) -> DialDataRequest | DialResponse | None:
    try:
        with trio.fail_after(seconds):
            return expect_answer(decode(await receive_frame(there, MAX_MESSAGE)))
    except (KasError, trio.TooSlowError):
        return None


async def _receive_data(stream: YamuxStream, size: int) -> None:
    with _at_most(DATA_TIMEOUT, "its dial data"):
        async for _ in _pieces(stream, size):
            pass


async def _pieces(stream: YamuxStream, size: int) -> AsyncIterator[bytes]:
    while size > 0:
        message = decode(await receive_frame(stream, MAX_MESSAGE))
        if not isinstance(message, DialData):
            raise RemoteProtocolError("an asker of AutoNAT sent something else than its dial data")
        if len(message.data) < min(MIN_PIECE, size):
            raise RemoteProtocolError(f"{len(message.data)} bytes of dial data in one message, at least {MIN_PIECE} go")
        size -= len(message.data)
        yield message.data


def _asker(stream: YamuxStream) -> Asker:
    connection = stream.connection
    return Asker(connection.peer, connection.remote_address, connection.path.kind is PathKind.RELAYED)


@contextmanager
def _at_most(seconds: float, what: str) -> Iterator[None]:
    try:
        with trio.fail_after(seconds):
            yield
    except trio.TooSlowError:
        raise RemoteProtocolError(f"{what} did not come within {seconds:g} s") from None
