"""Punches over the streams of a node: invites peers, and answers those that invite. What is said when, is decided in
`_machine`, what is dialed in `_candidates`; dialing itself is a function that the node gives.

With one peer there is one punch at a time. A peer may invite again on a new stream, as go does for each attempt: the
newer takes the place of the older. Where both sides invite each other at once, `comes_first` tells which goes on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import trio

from kas_libp2p._rates import Rates
from kas_libp2p.dcutr._candidates import Budget, Known, Own, ours, theirs
from kas_libp2p.dcutr._machine import (
    AwaitIdentify,
    Command,
    End,
    Invited,
    Inviter,
    Open,
    Punch,
    Reason,
    Send,
    StopPunch,
    comes_first,
)
from kas_libp2p.dcutr._messages import MAX_MESSAGE, PROTOCOL, Connect, Message, decode, encode
from kas_libp2p.errors import (
    ConnectionLost,
    KasError,
    LocalProtocolError,
    NegotiationError,
    PunchFailed,
    Refused,
    RemoteProtocolError,
    StreamCode,
    StreamReset,
    in_words,
)
from kas_libp2p.events import (
    Event,
    EventBus,
    PeerMisbehaved,
    PunchAttemptFailed,
    PunchConnect,
    PunchEnded,
    PunchStarted,
    PunchSync,
)
from kas_libp2p.framing import FrameDecoder
from kas_libp2p.metadata import PathKind, PeerId
from kas_libp2p.transport._punch import Target
from kas_libp2p.transport.connection import Connection
from kas_libp2p.transport.yamux.stream import YamuxStream

MAX_STREAMS, MAX_STREAMS_PER_PEER = 128, 4
"""Streams that are served at once, and of them from one peer: go opens one for each attempt, as the last one ends."""
PEER_BURST, PEER_INTERVAL = 6, 20.0
"""Attempts with one peer at once, whoever asks, and seconds for each one more: two punches of three, and then the pace
of a peer that tries again in earnest."""


class Dial(Protocol):
    """How a punch is made: `kas_libp2p.swarm.Swarm.punch`. Raises a `KasError` if no connection comes of it."""

    async def __call__(
        self, peer: PeerId, targets: Sequence[Target], *, initiator: bool, relay: PeerId, at: float, window: float
    ) -> Connection: ...


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a punch ended.

    Attributes:
        peer: with whom.
        inviter: whether we invited it.
        reason: how it ended.
        text: more words; empty for a success.
        attempts: how many were begun.
        seconds: how long it took.
        rtt: round trip of the circuit in seconds, as last measured by us; ``None`` if it was not.
        connection: the direct connection, if there is one.
        failure: what the last attempt to dial raised, if it did.
    """

    peer: PeerId
    inviter: bool
    reason: Reason
    text: str
    attempts: int
    seconds: float
    rtt: float | None
    connection: Connection | None
    failure: KasError | None


class Dcutr:
    """Serves and uses ``/libp2p/dcutr``.

    Args:
        peer: our peer id.
        events: where everything is told.
        punch: makes a connection.
        own: where we can be met, asked for at each attempt, given the relayed connection.
        known: what we know of the peer at the other end of a relayed connection.
        identified: returns once the peer has told about itself, or will not. Awaited only if its CONNECT tells nothing.
        welcomes: whether an invitation on a relayed connection is answered at all; if not, its stream is reset.
        allow_private: for laboratories: private addresses may be told and dialed.

    Attributes:
        on_done: called with the outcome when a punch is over, of either side, and no other one with the peer is under
            way; must not block nor raise.
        on_attempt_failed: called with the peer, the number of the attempt (from 1) and words when an attempt of a punch
            of ours made no connection, before the next one begins; may `abandon` it. Must not block nor raise.
    """

    def __init__(
        self,
        peer: PeerId,
        events: EventBus,
        *,
        punch: Dial,
        own: Callable[[Connection], Own],
        known: Callable[[Connection], Known],
        identified: Callable[[Connection], Awaitable[object]],
        welcomes: Callable[[Connection], bool],
        allow_private: bool = False,
    ) -> None:
        self.on_done: list[Callable[[Outcome], None]] = []
        self.on_attempt_failed: list[Callable[[PeerId, int, str], None]] = []
        self._peer = peer
        self._events = events
        self._punch = punch
        self._own = own
        self._known = known
        self._identified = identified
        self._welcomes = welcomes
        self._allow_private = allow_private
        self._runs: dict[PeerId, _Run] = {}
        self._rate = Rates(PEER_BURST, PEER_INTERVAL)
        self._budget = Budget()

    def is_punching(self, peer: PeerId) -> bool:
        """Whether there is a punch with the peer, of either side."""
        return peer in self._runs

    async def invite(self, connection: Connection) -> Outcome:
        """Try to get a direct connection to a peer that came to us through a relay. Makes up to three attempts.

        The peer's faults are in the outcome, and are never raised.

        Raises:
            LocalProtocolError: the connection is direct, or we made the circuit: then the peer has to invite us.
        """
        if connection.path.kind is not PathKind.RELAYED or connection.initiator:
            raise LocalProtocolError("only who was called through a relay invites to a punch")
        run = _Run(self, connection, None)
        return await run.carry()

    async def handle(self, stream: YamuxStream) -> None:
        """Serve ``/libp2p/dcutr``.

        Raises:
            RemoteProtocolError: the peer broke the protocol, or asked on a connection where it must not.
        """
        connection = stream.connection
        if connection.path.kind is not PathKind.RELAYED:
            raise RemoteProtocolError("it invites to a punch on a direct connection")
        if not connection.initiator:
            raise RemoteProtocolError("it invites to a punch from the side that made the circuit")
        if not self._welcomes(connection):
            stream.reset()
            return
        outcome = await _Run(self, connection, stream).carry()
        if outcome.reason is Reason.PROTOCOL:
            raise RemoteProtocolError(outcome.text)

    def abandon(self, peer: PeerId, text: str) -> bool:
        """Stop the punch with a peer at once, whichever side began it.

        Args:
            text: why, in words.

        Returns:
            whether there was one.
        """
        run = self._runs.get(peer)
        if run is not None:
            run.stop(Reason.ABANDONED, text)
        return run is not None


class _Run:
    """One punch, of either side.

    Args:
        stream: the peer's invitation; ``None`` to invite it.
    """

    def __init__(self, service: Dcutr, connection: Connection, stream: YamuxStream | None) -> None:
        self.ended = trio.Event()
        self._service = service
        self._connection = connection
        self._stream = stream
        self._began = trio.current_time()
        self._inviter = stream is None
        self._machine = (Inviter if self._inviter else Invited)(self._ours, self._theirs, self._admit)
        self._before: trio.Event | None = None
        self._punching: trio.CancelScope | None = None
        self._dialing = trio.Lock()
        self._refused: Counter[str] = Counter()
        self._end: End | None = None
        self._made: Connection | None = None
        self._failure: KasError | None = None
        self._wake = trio.Event()
        self._nursery: trio.Nursery

    async def carry(self) -> Outcome:
        """Do it all."""
        try:
            async with trio.open_nursery() as self._nursery:
                if self._stream is not None:
                    self._nursery.start_soon(self._read, self._stream)
                self._apply(self._machine.start(self._began))
                while not self._machine.over:
                    self._wake = trio.Event()
                    with trio.move_on_at(self._machine.deadline):
                        await self._wake.wait()
                    self._apply(self._machine.on_timeout(trio.current_time()))
            assert self._end is not None
            await self._leave(self._end.reason)
        finally:
            if self._service._runs.get(self._connection.peer) is self:
                del self._service._runs[self._connection.peer]
            self.ended.set()
            if self._end is None and self._stream is not None:
                self._stream.reset()
        return self._tell_end(self._end)

    def stop(self, reason: Reason, text: str) -> None:
        """End it now."""
        self._apply(self._machine.stop(reason, text))

    async def _leave(self, reason: Reason) -> None:
        stream = self._stream
        if stream is None:
            return
        if reason in (Reason.BUSY, Reason.RATE):
            stream.reset(StreamCode.RESOURCES)
        elif reason in (Reason.PUNCHED, Reason.PUNCH_FAILED, Reason.NO_CANDIDATES):
            await stream.aclose()
        else:
            stream.reset()

    # What the machine asks

    def _ours(self) -> tuple[str, ...]:
        service = self._service
        own = service._own(self._connection)
        return tuple(map(str, ours(own, allow_private=service._allow_private)))

    def _theirs(self, told: Sequence[str]) -> tuple[Target, ...]:
        service, peer, relay = self._service, self._connection.peer, self._connection.path.relay
        assert relay is not None
        known = service._known(self._connection)
        found = theirs(told, known, peer, allow_private=service._allow_private)
        found = service._budget.spend(found, peer, relay, trio.current_time())
        self._refused = Counter(map(str, found.refused.elements()))
        return found.targets

    def _admit(self) -> End | None:
        service, peer = self._service, self._connection.peer
        other = service._runs.get(peer)
        if other not in (None, self):
            ours_first = other._inviter and (other._machine.synced or comes_first(service._peer, peer))
            if self._inviter or ours_first:
                return End(Reason.BUSY, "there is a punch with the peer already")
        if not service._rate.take(peer, trio.current_time()):
            return End(Reason.RATE, f"more than {PEER_BURST} attempts with the peer, and one every {PEER_INTERVAL:g} s")
        if other not in (None, self):
            other.stop(Reason.BUSY, "the peer has begun another punch")
            self._before = other.ended
        service._runs[peer] = self
        return None

    # What the machine wants

    def _apply(self, commands: list[Command]) -> None:
        for command in commands:
            match command:
                case Open():
                    self._nursery.start_soon(self._open)
                case Send(message):
                    assert self._stream is not None
                    self._stream.send_nowait(encode(message))  # if it can't be sent, the reader learns why
                    self._tell_message(message, by_us=True)
                case AwaitIdentify():
                    self._nursery.start_soon(self._await_identify)
                case Punch():
                    self._tell_start(command)
                    self._punching = trio.CancelScope()
                    self._nursery.start_soon(self._punch, command, self._punching)
                case StopPunch():
                    assert self._punching is not None
                    self._punching.cancel()
                case End():
                    self._end = command
                    self._nursery.cancel_scope.cancel()
        self._wake.set()

    async def _open(self) -> None:
        machine = self._machine
        assert isinstance(machine, Inviter)
        try:
            self._stream = await self._connection.open_stream(PROTOCOL)
        except (ConnectionLost, Refused) as error:
            return self._apply(machine.closed(Reason.LOST, str(error)))
        self._apply(machine.opened(trio.current_time()))
        return await self._read(self._stream)

    async def _read(self, stream: YamuxStream) -> None:
        machine = self._machine
        decoder = FrameDecoder(MAX_MESSAGE)
        try:
            while data := await stream.receive_some():
                decoder.feed(data)
                for frame in decoder:
                    message = decode(frame)
                    commands = machine.receive(message, trio.current_time())
                    self._tell_message(message, by_us=False)
                    self._apply(commands)
            if decoder.pending:
                raise RemoteProtocolError("the peer ended the stream in the middle of a message")
            self._apply(machine.closed(Reason.REFUSED, "the peer ended the stream"))
        except RemoteProtocolError as error:
            self.stop(Reason.PROTOCOL, str(error))
        except NegotiationError as error:
            self._apply(machine.closed(Reason.UNSUPPORTED, str(error)))
        except StreamReset as error:
            self._apply(machine.closed(Reason.REFUSED, str(error)))
        except ConnectionLost as error:
            self._apply(machine.closed(Reason.LOST, str(error)))

    async def _await_identify(self) -> None:
        machine = self._machine
        assert isinstance(machine, Inviter)
        await self._service._identified(self._connection)
        self._apply(machine.identified(trio.current_time()))

    async def _punch(self, command: Punch, scope: trio.CancelScope) -> None:
        connection, machine = self._connection, self._machine
        relay = connection.path.relay
        assert relay is not None
        with scope:
            if self._before is not None:
                await self._before.wait()
            async with self._dialing:
                try:
                    self._made = await self._service._punch(
                        connection.peer,
                        command.targets,
                        initiator=connection.initiator,
                        relay=relay,
                        at=command.at,
                        window=command.window,
                    )
                except KasError as error:
                    self._failure = error
                    told = error.told if isinstance(error, PunchFailed) else ()
                    self._attempt_failed("; ".join(told) or in_words(error))
                else:
                    self._apply(machine.punched())

    # What is told

    def _seconds(self) -> float:
        return trio.current_time() - self._began

    def _tell_message(self, message: Message, *, by_us: bool) -> None:
        machine, connection = self._machine, self._connection
        told: Event
        if isinstance(message, Connect):
            told = PunchConnect(
                peer=connection.peer,
                connection=connection.number,
                by_us=by_us,
                attempt=machine.attempt,
                addresses=message.addresses,
                rtt=machine.rtt if self._inviter and not by_us else None,
                seconds=self._seconds(),
            )
        else:
            told = PunchSync(
                peer=connection.peer,
                connection=connection.number,
                by_us=by_us,
                attempt=machine.attempt,
                seconds=self._seconds(),
            )
        self._service._events.emit(told)

    def _tell_start(self, command: Punch) -> None:
        connection = self._connection
        self._service._events.emit(
            PunchStarted(
                peer=connection.peer,
                connection=connection.number,
                inviter=self._inviter,
                attempt=self._machine.attempt,
                targets=tuple(str(each.address) for each in command.targets),
                untrusted=tuple(str(each.address) for each in command.targets if not each.trusted),
                refused=dict(self._refused),
                wait=command.at - trio.current_time(),
                seconds=self._seconds(),
            )
        )

    def _attempt_failed(self, text: str) -> None:
        service, connection, attempt = self._service, self._connection, self._machine.attempt
        service._events.emit(
            PunchAttemptFailed(
                peer=connection.peer,
                connection=connection.number,
                inviter=self._inviter,
                attempt=attempt,
                text=text,
                seconds=self._seconds(),
            )
        )
        if self._inviter:
            for callback in service.on_attempt_failed:
                callback(connection.peer, attempt, text)
        self._apply(self._machine.failed(text, trio.current_time()))

    def _tell_end(self, end: End) -> Outcome:
        machine, connection, service = self._machine, self._connection, self._service
        text = end.text
        if end.reason is Reason.NO_CANDIDATES and self._refused:
            text += ": " + ", ".join(f"{count} {fault}" for fault, count in sorted(self._refused.items()))
        outcome = Outcome(
            peer=connection.peer,
            inviter=self._inviter,
            reason=end.reason,
            text=text,
            attempts=machine.attempt,
            seconds=self._seconds(),
            rtt=machine.rtt,
            connection=self._made,
            failure=self._failure,
        )
        if end.reason is Reason.PROTOCOL and self._inviter:  # as the invited, who serves the stream tells it
            at = connection.remote_address
            service._events.emit(PeerMisbehaved(peer=connection.peer, address=at, layer=PROTOCOL, reason=end.text))
        service._events.emit(
            PunchEnded(
                peer=outcome.peer,
                connection=connection.number,
                inviter=outcome.inviter,
                reason=str(outcome.reason),
                text=outcome.text,
                attempts=outcome.attempts,
                rtt=outcome.rtt,
                seconds=outcome.seconds,
            )
        )
        if not service.is_punching(connection.peer):
            for callback in service.on_done:
                callback(outcome)
        return outcome
