"""Renewing circuits before they end. What is renewed and when is decided in `kas_libp2p.relay._renewal`; of those that
carry a session in `kas_libp2p.relay._succession`.

One task, which sleeps until a circuit comes near its end.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any

import trio

from kas_libp2p.errors import DialError, KasError, RelayRefused, in_words
from kas_libp2p.events import CircuitNotRenewed, CircuitRenewed, EventBus, SmallCircuits
from kas_libp2p.metadata import PathKind, PeerId
from kas_libp2p.relay._allowance import Ceiling
from kas_libp2p.relay._messages import Status
from kas_libp2p.relay._renewal import Due, Line, Renewals, follows
from kas_libp2p.relay._succession import Succession, Way, is_small
from kas_libp2p.transport.connection import Connection
from kas_libp2p.units import seconds

__all__ = ["Ceiling", "CircuitRenewal", "Way"]

LIVES = 30.0
"""Seconds that a session has to be on a small circuit to live on such: most become direct within one."""
FORGET = 600.0
"""Seconds without a session after which it is told anew that a peer's next one lives on small circuits."""


class CircuitRenewal:
    """Makes the next circuit beside one that is about to end, for as long as `run` runs.

    Args:
        events: where it is told.
        connections: those that are up.
        dial: makes another connection with the peer of this one, through this relay, or any if none is named; raises a
            `KasError`.
        carries_session: whether a session goes by a connection now.
        ways: the relays through which circuits with a peer can be made.
        small_circuits: as ``session.small_circuits``.
        spread: a number from 0 to 1, at random.
    """

    def __init__(
        self,
        events: EventBus,
        *,
        connections: Callable[[], Iterable[Connection]],
        dial: Callable[[Connection, PeerId | None], Awaitable[Connection]],
        carries_session: Callable[[Connection], bool] = lambda _: False,
        ways: Callable[[PeerId], Sequence[Way]] = lambda _: (),
        small_circuits: bool = False,
        spread: Callable[[], float] = random.random,
    ) -> None:
        self._events = events
        self._connections = connections
        self._dial = dial
        self._carries_session = carries_session
        self._ways = ways
        self._machine = Renewals(spread)
        self._small_circuits = small_circuits
        self._succession = Succession(small_circuits=small_circuits)
        self._told: dict[PeerId, float] = {}
        self._wake = trio.Event()

    async def run(self, *, task_status: Any = trio.TASK_STATUS_IGNORED) -> None:
        """Renew until cancelled."""
        async with trio.open_nursery() as nursery:
            task_status.started()
            while True:
                self._wake = trio.Event()
                now = trio.current_time()
                by_number = {each.number: each for each in self._connections() if not each.closing}
                lines = [self._line(each, now) for each in by_number.values()]
                for due in (*self._machine.due(lines, now), *self._succession.due(lines, now, self._ways)):
                    nursery.start_soon(self._renew, by_number[due.line.number], due)
                for number in self._succession.over:
                    nursery.start_soon(by_number[number].aclose, "its session goes by the next circuit")
                self._tell(lines, now)
                with trio.move_on_at(min(self._machine.look_at, self._succession.look_at)):
                    await self._wake.wait()

    def _tell(self, lines: Sequence[Line], now: float) -> None:
        """Tell of sessions that live on small circuits, of each once."""
        self._told = {peer: at for peer, at in self._told.items() if now - at < FORGET}
        for line in lines:
            if not line.session:
                continue
            if line.peer in self._told:
                self._told[line.peer] = now
            elif line.relay is not None and line.limits is not None and line.age >= LIVES and is_small(line.limits):
                self._told[line.peer] = now
                found = self.ceiling(line.peer)
                self._events.emit(
                    SmallCircuits(
                        peer=line.peer,
                        relay=line.relay,
                        max_bytes=line.limits.max_bytes,
                        max_seconds=line.limits.max_seconds,
                        sustained=found.sustained,
                        text=found.text,
                    )
                )

    def ceiling(self, peer: PeerId) -> Ceiling:
        """What a session with a peer can carry over circuits, as far as is known of the relays."""
        return self._succession.ceiling(self._ways(peer))

    def outlook(self, peer: PeerId) -> str:
        """What the small circuits carry that a session with a peer lives on, in words; empty if it lives on none."""
        now = trio.current_time()
        lines = [self._line(each, now) for each in self._connections() if each.peer == peer]
        if not any(each.session and each.limits is not None and is_small(each.limits) for each in lines):
            return ""
        text = f"Its session goes from one small circuit to the next: {self.ceiling(peer).text}."
        if wait := self.shortage(peer):
            text += f" The next one can be had in {seconds(wait)}."
            if not self._small_circuits:
                text += " It would be sooner with session.small_circuits, if the relays' operators agree."
        return text

    def shortage(self, peer: PeerId) -> float:
        """Seconds until the session with a peer can have another circuit; 0 if it is not short of them."""
        return self._succession.shortage(peer, trio.current_time())

    def asked(self, relay: PeerId) -> None:
        """We ask a relay for a circuit, for whatever reason."""
        self._succession.asked(relay, trio.current_time())

    def changed(self, connection: Connection) -> None:
        """A connection came, or went."""
        if connection.path.kind is PathKind.RELAYED:
            self._wake.set()

    def keeps(self, connection: Connection) -> bool:
        """Whether a connection has to stay although no stream is open on it: it follows one that is about to end."""
        if connection.circuit is None:
            return False
        now = trio.current_time()
        others = [self._line(each, now) for each in self._connections() if each.peer == connection.peer]
        return follows(self._line(connection, now), others)

    async def _renew(self, connection: Connection, due: Due) -> None:
        began = trio.current_time()
        peer, relay = connection.peer, due.line.relay
        assert relay is not None
        try:
            following = await self._dial(connection, due.relay)
        except KasError as error:
            if due.relay is not None:
                self._succession.failed(due.relay, trio.current_time(), used_up=_used_up(error))
            took = trio.current_time() - began
            self._events.emit(CircuitNotRenewed(peer=peer, relay=relay, reason=in_words(error), seconds=took))
        else:
            if due.relay is None:
                self._machine.made(peer)
            self._events.emit(
                CircuitRenewed(
                    peer=peer,
                    relay=relay,
                    connection=connection.number,
                    following=following.number,
                    path=following.path,
                    reason=due.reason,
                    seconds=trio.current_time() - began,
                )
            )

    def _line(self, connection: Connection, now: float) -> Line:
        circuit = connection.circuit
        return Line(
            number=connection.number,
            peer=connection.peer,
            relay=circuit.relay if circuit is not None else None,
            ours=connection.initiator,
            age=now - connection.opened_at,
            busy=bool(connection.streams),
            limits=circuit.limits if circuit is not None else None,
            session=self._carries_session(connection),
        )


def _used_up(error: KasError) -> bool:
    """Whether a relay says that it has no more circuits for us now."""
    failures = error.failures if isinstance(error, DialError) else ()
    refusals = [each.error for each in failures if isinstance(each.error, RelayRefused)]
    return any(each.status == Status.RESOURCE_LIMIT_EXCEEDED.name for each in refusals)
