"""TCP simultaneous open: two peers that know where each is seen make one connection through their NATs.

Who dialed and who accepted says nothing about the roles: the initiator of Noise and Yamux was agreed on. It speaks
first on every connection, and the first that it has verified is the one: it closes all others, and until then nobody
closes any. It sends the last message of Noise on one connection only, so where that arrives there is nothing to choose.

What comes in meanwhile from the IP of a target may be the peer, and may be anybody else behind the same NAT. So it is
taken by the swarm as everything else that comes in, and told here once it has proven to be the peer. Only where the
peer is not to speak first is it spoken to, if it says nothing for a moment.

A role that the other side does not play as agreed does not end it: who hears the other speak first answers, and who
waits in vain to be spoken to on a connection that it dialed begins.
"""

from __future__ import annotations

import errno
from collections.abc import Awaitable, Callable, Iterable, Sequence

import trio
from multiaddr import Multiaddr

from kas_libp2p import addresses
from kas_libp2p.errors import AddressError, PeerIdMismatch, PunchFailed, PunchOutcome, UpgradeError
from kas_libp2p.events import EventBus, PunchAdopted, PunchDialed
from kas_libp2p.metadata import Path, PathKind, PeerId
from kas_libp2p.transport._multistream import HEADER
from kas_libp2p.transport._punch import (
    AT_ONCE,
    DEADLOCK,
    GRACE,
    GREETED,
    IMPOSSIBLE,
    OTHER_PEER,
    UNANSWERED,
    Dial,
    Machine,
    Target,
)
from kas_libp2p.transport.connection import Connection
from kas_libp2p.transport.raw import RawConnection
from kas_libp2p.transport.upgrade import READ_SIZE, Opening

CONNECTED = "connected"

DialPunch = Callable[[Multiaddr, bool], Awaitable[RawConnection]]
"""Connects from the listen port and from no other, or, if that is said, from a port that nobody knows. Raises
``OSError`` with what the network answered, or `AddressError` if nothing can be sent there."""
Upgrade = Callable[[RawConnection, bool, Opening], Awaitable[Connection]]
"""Secures and multiplexes a pipe to the peer as its initiator or responder. Raises `UpgradeError`."""


async def hear(raw: RawConnection, patience: float, *, after_greeting: float) -> tuple[bool, Opening]:
    """Find out whether the other side of a new connection waits to be spoken to: it says nothing, or only greets.

    go's responder says multistream's header at once, as its initiator does, which goes on in the same breath. nim's
    initiator greets, and goes on when it is greeted. So who only greets is greeted, and has a while more. The pipe is
    closed if this is cancelled.

    Args:
        patience: seconds for it to say anything.
        after_greeting: seconds for it to go on, from when we have greeted as well; 0: a responder may greet, so no need
            to wait.

    Returns:
        whether it waits; and what was said, for `upgrade`.
    """
    heard, greeted = b"", False
    buffer = memoryview(bytearray(READ_SIZE))
    silence = trio.move_on_after(patience)
    try:
        with silence:
            while HEADER.startswith(heard) and (count := await raw.receive_into(buffer)):
                heard += buffer[:count]
                if heard == HEADER:
                    if not after_greeting:
                        return True, Opening(heard)
                    greeted = raw.send_nowait(HEADER) > 0  # all of it: the pipe is new
                    silence.deadline = trio.current_time() + after_greeting
    except (trio.BrokenResourceError, trio.ClosedResourceError):
        pass  # whoever reads it next is told why
    except BaseException:
        raw.abort()
        raise
    return silence.cancelled_caught, Opening(heard, greeted)


class Punch:
    """One punch. `run` it, and tell it what comes in meanwhile.

    Args:
        peer: who has to be met.
        targets: where; nothing forbidden among them.
        initiator: whether we are to speak first.
        relay: through which both are connected already.
        at: when dialing starts, on trio's clock.
        window: seconds from then on until it ends.
        dial, upgrade: see there.
        events: where each dial is told.
        uniform: returns a random number between two.
        refused: targets that must not be dialed, for the error.

    Attributes:
        peer, initiator: as given.
        path: of the connection that comes of it.
        won: whether a connection was verified.
        over: whether it has ended, in whatever way.
        on_over: called when it has; must not block nor raise.
    """

    def __init__(
        self,
        peer: PeerId,
        targets: Sequence[Target],
        *,
        initiator: bool,
        relay: PeerId,
        at: float,
        window: float,
        dial: DialPunch,
        upgrade: Upgrade,
        events: EventBus,
        uniform: Callable[[float, float], float],
        refused: Iterable[PunchOutcome] = (),
    ) -> None:
        self.peer = peer
        self.initiator = initiator
        self.path = Path(PathKind.PUNCHED, relay)
        self.won = False
        self.over = False
        self.on_over: list[Callable[[], None]] = []
        self._refused = tuple(refused)
        self._machine = Machine(targets, at=at, window=window, uniform=uniform)
        self._dial_one = dial
        self._upgrade = upgrade
        self._events = events
        self._scope = trio.CancelScope()
        self._changed = trio.Event()
        self._answering = 0  # handshakes in which the other side has spoken, or has to
        self._verified: list[Connection] = []  # one at most

    async def run(self) -> Connection | None:
        """Dial at the instant, until there is a connection or the window ends. If cancelled, everything is closed.

        A handshake in which we are the responder, and which the other side has begun, may end `GRACE` later.

        Returns:
            The connection; nothing happens on it before `Connection.run`. ``None`` if `met` was called.

        Raises:
            PunchFailed: there is none.
        """
        machine = self._machine
        started = trio.current_time()
        returned = False
        try:
            with self._scope:
                async with trio.open_nursery() as nursery:
                    while not machine.hopeless and trio.current_time() < machine.until:
                        self._changed = trio.Event()
                        for each in machine.due(trio.current_time()):
                            nursery.start_soon(self._one, each)
                            # In order: a NAT that counts its ports up gives them theirs as they leave.
                            await trio.lowlevel.checkpoint()
                        with trio.move_on_at(machine.wake_at()):
                            await self._changed.wait()
                    with trio.move_on_at(machine.until + GRACE):
                        while self._answering:
                            self._changed = trio.Event()
                            await self._changed.wait()
                    nursery.cancel_scope.cancel()
            if not self.won:
                now = trio.current_time()
                outcomes = (*machine.outcomes(now), *self._refused)
                raise PunchFailed(self.peer, outcomes, max(0.0, now - max(started, machine.at)))
            returned = True
            return self._verified[0] if self._verified else None
        finally:
            self.over = True
            for callback in self.on_over:
                callback()
            if not returned:
                for connection in self._verified:
                    connection.abort("the punch was cancelled")

    # What comes in

    def expects(self, ip: str) -> bool:
        """Whether what comes from this IP may be the peer."""
        return self._machine.expects(ip)

    def foresees(self, ip: str, port: int) -> bool:
        """Whether that is exactly where the peer was said to be."""
        return self._machine.is_target(ip, port)

    def came(self, ip: str, port: int) -> None:
        """Something came in from an IP that is expected. `adopted` or `dropped` must follow."""
        self._machine.accepted(ip, port)
        self._answering += not self.initiator

    def dropped(self, ip: str, port: int, reason: str) -> None:
        """It failed in its handshake, or was somebody else."""
        self._machine.released(ip, port, reason, trio.current_time())
        self._answering -= not self.initiator
        self._changed.set()

    def adopted(self, ip: str, port: int, seconds: float) -> None:
        """It was the peer.

        Args:
            seconds: since it came.
        """
        self._events.emit(
            PunchAdopted(
                peer=self.peer,
                address=addresses.ip_port_text(ip, port),
                foreseen=self.foresees(ip, port),
                after=trio.current_time() - seconds - self._machine.at,
                seconds=seconds,
            )
        )

    def met(self) -> None:
        """There is a verified connection with the peer that is not ours: it came in, or was dialed otherwise."""
        self.won = True
        self._scope.cancel()

    # What goes out

    async def _one(self, dial: Dial) -> None:
        machine = self._machine
        began = trio.current_time()
        reason = UNANSWERED
        raw: RawConnection | None = None
        news = True
        try:
            with trio.move_on_after(dial.patience):
                raw = await self._dial_one(dial.address, dial.elsewhere)
                reason = CONNECTED
        except AddressError:
            reason = IMPOSSIBLE
        except OSError as error:
            reason = errno.errorcode.get(error.errno or 0, "OSError")
        finally:  # also when the window ends
            now = trio.current_time()
            if reason == IMPOSSIBLE:
                machine.impossible(dial, now)
            elif raw is None:
                news = machine.failed(dial, reason, now)
            if news:
                self._events.emit(
                    PunchDialed(
                        peer=self.peer,
                        address=str(dial.address),
                        attempt=dial.attempt,
                        reason=reason,
                        after=began - machine.at,
                        seconds=now - began,
                    )
                )
        if raw is not None and (reason := await self._shake_hands(raw)):
            machine.failed(dial, reason, trio.current_time())
        self._changed.set()

    async def _shake_hands(self, raw: RawConnection) -> str:
        """Returns why it failed; empty if it did not."""
        patience = (AT_ONCE, 0.0) if self.initiator else (DEADLOCK, GREETED)
        first, opening = await hear(raw, patience[0], after_greeting=patience[1])
        self._answering += not first
        try:
            connection = await self._upgrade(raw, first, opening)
        except PeerIdMismatch:
            return OTHER_PEER
        except UpgradeError as error:
            return str(error.stage)
        finally:
            self._answering -= not first
        if self.won:
            connection.abort("another one was faster")
        else:
            self.won = True
            self._verified.append(connection)
            self._scope.cancel()
        return ""
