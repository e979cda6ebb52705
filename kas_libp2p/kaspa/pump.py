"""Two message channels joined both ways: what one receives the other sends, whole, in order, as fast as it takes it.

Left is the peer, right the node. A Kaspa peer has no use for half a connection: a node that ended its side has left,
and what is said to it has no reader. So when the right side ends, in order or not, both are over at once; whoever
called closes the left one and says why, behind everything that was carried. When the left side ends in order, the right
one is told so, and may finish what it has to say about it (`LINGER`, for a Reject that crosses the end).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import trio

from kas_libp2p.errors import KasError, KaspaError, LocalProtocolError, ProtocolError
from kas_libp2p.kaspa._join import REJECT, parse_reject, payload_number
from kas_libp2p.kaspa._pacing import Pacing
from kas_libp2p.kaspa.channel import MessageChannel, Piece

LINGER = 0.5
"""Seconds that the right side goes on after the left one ended, and that a failed send waits for the reason."""

WATCH_EVERY = 5.0
"""Seconds between two looks at whether a side still takes data."""

_REJECT_START = b"\xb2\x01"  # the key of field 22 with a length: how a Reject begins
"""What kaspad's encoder puts first; `payload_number` is asked only then, or in the handshake."""


class Stuck(KaspaError):
    """One side takes no data although it is alive."""


@dataclass(slots=True)
class Flow:
    """What one direction carried.

    Attributes:
        messages: messages begun.
        bytes: of their contents.
        last_progress: when something was last passed on, on trio's clock; when the pump began, if nothing was.
        waiting_since: since when the receiving side has not taken the batch under way; ``None`` while it does.
    """

    last_progress: float
    messages: int = 0
    bytes: int = 0
    waiting_since: float | None = None


@dataclass(frozen=True, slots=True)
class PumpEnd:
    """How it ended.

    Attributes:
        by_left: whether the left channel ended it, else the right one.
        error: what its channel said; ``None`` if it ended its side in order.
        reject: the reason of a Reject message that passed before, and whether it came from the left.
    """

    by_left: bool
    error: Exception | None
    reject: tuple[str, bool] | None = None


Watch = Callable[[bool, int | None], bool]
"""Told of each message's number and whether it came from the left, until it returns False."""


class Pump:
    """Joins two channels. They have to be running, and are not closed here.

    Args:
        left, right: the channel to the peer, and the one to the node.
        watch: told of each message until it says that it has seen enough.
        right_stuck_after: seconds for which the right side may take nothing before it counts as stuck.

    Attributes:
        from_left, from_right: counters.
        reject: the first Reject that passed: its reason, and whether it came from the left. A node answers a reject
            with one of its own, which says less.
    """

    def __init__(
        self,
        left: MessageChannel,
        right: MessageChannel,
        *,
        watch: Watch | None = None,
        right_stuck_after: float | None = None,
    ) -> None:
        now = trio.current_time()
        self.from_left = Flow(now)
        self.from_right = Flow(now)
        self.reject: tuple[str, bool] | None = None
        self._left = left
        self._right = right
        left.gives_packed, right.gives_packed = right.takes_packed, left.takes_packed
        self._watch = watch
        self._stuck_after = right_stuck_after
        self._gaps = left.gaps
        self._pacing: Pacing | None = None
        self._end: PumpEnd | None = None

    @property
    def ending(self) -> bool:
        """Whether one side has ended."""
        return self._end is not None

    async def run(self) -> PumpEnd:
        """Pass on messages until one side ends. Never raises for what the channels' peers do."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._carry, self._left, self._right, self.from_left, True, nursery.cancel_scope)
            nursery.start_soon(self._carry, self._right, self._left, self.from_right, False, nursery.cancel_scope)
            if self._stuck_after is not None:
                nursery.start_soon(self._look_after, self._stuck_after, nursery.cancel_scope)
        assert self._end is not None
        return PumpEnd(self._end.by_left, self._end.error, self.reject)

    def _over(self, by_left: bool, error: Exception | None) -> None:
        if self._end is None:
            self._end = PumpEnd(by_left, error)

    async def _carry(
        self, source: MessageChannel, sink: MessageChannel, flow: Flow, from_left: bool, scope: trio.CancelScope
    ) -> None:
        current_time = trio.current_time
        while True:
            asked = current_time()
            try:
                pieces = await source.receive_pieces()
            except (KasError, trio.BrokenResourceError, trio.ClosedResourceError) as error:
                self._over(from_left, error)
                scope.cancel()
                return
            try:
                if not pieces:
                    self._over(from_left, None)
                    if from_left:
                        await sink.send_eof()
                        break
                    scope.cancel()
                    return
                self._look_at(pieces, flow, from_left)
                if from_left and (self._pacing is not None or source.gaps != self._gaps):
                    pieces = await self._paced(pieces, source, sink, flow, current_time() - asked)
                await self._pass_on(pieces, sink, flow)
            except (KasError, trio.BrokenResourceError, trio.ClosedResourceError) as error:
                if isinstance(error, ProtocolError):
                    # Not the sink's end, but what the source sends can't be sent on: a message above its limit.
                    self._over(from_left if isinstance(error, LocalProtocolError) else not from_left, error)
                    scope.cancel()
                    return
                # Why the sink ended is told to whoever receives from it, which is the other direction.
                await trio.sleep(LINGER)
                self._over(not from_left, error)
                scope.cancel()
                return
        await trio.sleep(LINGER)
        scope.cancel()

    @staticmethod
    async def _pass_on(pieces: list[Piece], sink: MessageChannel, flow: Flow) -> None:
        flow.waiting_since = trio.current_time()
        await sink.send_pieces(pieces)
        flow.waiting_since = None
        flow.last_progress = trio.current_time()

    async def _paced(
        self, pieces: list[Piece], source: MessageChannel, sink: MessageChannel, flow: Flow, waited: float
    ) -> list[Piece]:
        """Pass on a backlog no faster than `Pacing` says, and give what may follow at once."""
        now = trio.current_time()
        if source.gaps != self._gaps:
            self._gaps, self._pacing = source.gaps, Pacing(now)
        elif self._pacing is not None and self._pacing.over(now, waited):
            self._pacing = None
        if self._pacing is None:
            return pieces
        begin = 0
        for index, piece in enumerate(pieces):
            if not piece.first:
                continue
            number = payload_number(piece.data)
            while (pause := self._pacing.admit(number, trio.current_time())) > 0:
                if index > begin:
                    await self._pass_on(pieces[begin:index], sink, flow)
                    begin = index
                await trio.sleep(pause)
        return pieces[begin:]

    def _look_at(self, pieces: list[Piece], flow: Flow, from_left: bool) -> None:
        for data, remaining, first, _ in pieces:
            flow.bytes += len(data)
            if not first:
                continue
            flow.messages += 1
            if self._watch is not None:
                number = payload_number(data)
                if not self._watch(from_left, number):
                    self._watch = None
            elif data[:2] == _REJECT_START:
                number = REJECT
            else:
                continue
            if number == REJECT and not remaining and self.reject is None:
                text = parse_reject(data)
                if text is not None:
                    self.reject = (text, from_left)

    async def _look_after(self, limit: float, scope: trio.CancelScope) -> None:
        while True:
            await trio.sleep(min(WATCH_EVERY, limit / 2))
            since = self.from_left.waiting_since
            if since is not None and trio.current_time() - since >= limit:
                self._over(False, Stuck(f"no data taken for {trio.current_time() - since:.0f} s"))
                scope.cancel()
                return
