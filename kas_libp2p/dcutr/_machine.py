"""One punch as either side of DCUtR sees it. No I/O: messages and ``now`` in, commands out.

::

    inviter                                   invited
    (the circuit came to it)                  (made the circuit)
      |  CONNECT: where it may be met     ->  |
      |  <-     CONNECT: where it may be met  |
      |  SYNC                             ->  |
      |  ... half the round trip ...          |  dials at once
      |  dials                                |

Who was the initiator of the circuit's connection, the invited, is the initiator of Noise and Yamux on the punched one.

The rules

* The round trip is what passes between our CONNECT and the answer to it, measured anew in each attempt, as one lost
  packet would spoil all that follow. A CONNECT that was not asked for breaks the protocol, so nobody can forge it.
* What is told and what is dialed is found out anew in each attempt.
* An attempt that fails is followed by another, `ATTEMPTS` in all, on the same stream as the specification says; or on a
  new one if the peer has ended it, as go and rust do. The invited takes what follows on the same stream; a new stream
  is a new punch to it, which takes the place of this one.
* Up to SYNC the end of the stream is a no. After it nothing is said that matters, and go and rust end it then.
* A CONNECT while the invited dials says that the inviter has given that attempt up.
* A peer that tells no usable address is sent SYNC all the same: it may get through to us.

Source: libp2p specs ``relay/DCUtR.md``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum, StrEnum
from typing import TypeAlias

from kas_libp2p.dcutr._messages import Connect, Message, Sync
from kas_libp2p.metadata import PeerId
from kas_libp2p.transport._punch import WINDOW, Target

ATTEMPTS = 3
"""Attempts of one punch (specification)."""
CONNECT_TIMEOUT = 10.0
"""Seconds for the CONNECT of a stream, or for the answer to ours: a bad mobile link's round trip, several times."""
SYNC_TIMEOUT = 10.0
"""Seconds from our answer to SYNC; an honest one takes a round trip."""
IDENTIFY_TIMEOUT = 1.0
"""Seconds that we wait for identify of a peer whose CONNECT tells nothing. It was asked when the circuit came up, so it
is here with CONNECT, or nearly so."""
NEXT_TIMEOUT = 15.0
"""Seconds that the invited waits for another attempt after one failed: go dials for up to 10 s before it makes one."""


class Reason(StrEnum):
    """How a punch ended."""

    PUNCHED = "punched"
    """There is a verified direct connection."""
    UNSUPPORTED = "unsupported"
    """The peer does not speak DCUtR."""
    REFUSED = "refused"
    """The peer ended the stream instead of going on."""
    NO_CANDIDATES = "no_candidates"
    """The peer told nothing that may be dialed."""
    TIMEOUT = "timeout"
    """The peer did not go on in time."""
    PROTOCOL = "protocol"
    """The peer broke the protocol."""
    PUNCH_FAILED = "punch_failed"
    """Messages were exchanged, and no attempt made a connection."""
    BUSY = "busy"
    """There is another punch with the peer, which comes first or has taken the place of this one."""
    RATE = "rate"
    """There were too many attempts with the peer lately."""
    ABANDONED = "abandoned"
    """It was stopped on this side."""
    LOST = "lost"
    """The circuit ended."""


@dataclass(frozen=True, slots=True)
class Open:
    """Open a stream to the peer; `Inviter.opened` follows."""


@dataclass(frozen=True, slots=True)
class Send:
    """Send this, now."""

    message: Message


@dataclass(frozen=True, slots=True)
class AwaitIdentify:
    """Say when the peer has told about itself: `Inviter.identified`."""


@dataclass(frozen=True, slots=True)
class Punch:
    """Dial; `Side.punched` or `Side.failed` follows.

    Attributes:
        targets: what to dial.
        at: when.
        window: seconds for which it may be tried.
    """

    targets: tuple[Target, ...]
    at: float
    window: float = WINDOW


@dataclass(frozen=True, slots=True)
class StopPunch:
    """Stop dialing; nothing follows."""


@dataclass(frozen=True, slots=True)
class End:
    """This punch is over, and so is whatever of it is under way.

    Attributes:
        reason: how it ended.
        text: more words.
    """

    reason: Reason
    text: str = ""


NOTHING_TO_DIAL = End(Reason.NO_CANDIDATES, "the peer told no address that may be dialed")

Command: TypeAlias = Open | Send | AwaitIdentify | Punch | StopPunch | End


class _Step(Enum):
    BEGIN = "waiting for the stream, or for the next CONNECT"
    CONNECTING = "CONNECT is sent"
    IDENTIFYING = "CONNECT told nothing"
    PUNCHING = "SYNC is sent, or has come"
    OVER = "over"


class Side:
    """What both sides have in common.

    Args:
        ours: the addresses to tell, asked for at each attempt.
        theirs: what to dial of what the peer told, asked for at each attempt.
        admit: asked before each attempt; says how the punch ends if there must be none.

    Attributes:
        attempt: how many were begun.
        rtt: seconds of the circuit's round trip, as last measured.
        deadline: when to call `on_timeout`.
    """

    def __init__(
        self,
        ours: Callable[[], tuple[str, ...]],
        theirs: Callable[[Sequence[str]], tuple[Target, ...]],
        admit: Callable[[], End | None],
    ) -> None:
        self.attempt = 0
        self.rtt: float | None = None
        self.deadline = math.inf
        self._ours = ours
        self._theirs = theirs
        self._admit = admit
        self._told: tuple[str, ...] = ()
        self._step = _Step.BEGIN
        self._open = False
        self._failure: End | None = None

    @property
    def synced(self) -> bool:
        """Whether both sides dial now."""
        return self._step is _Step.PUNCHING

    @property
    def over(self) -> bool:
        """Whether it has ended."""
        return self._step is _Step.OVER

    def punched(self) -> list[Command]:
        """There is a verified connection."""
        return self._end(Reason.PUNCHED)

    def stop(self, reason: Reason, text: str) -> list[Command]:
        """End it, for a reason of ours or because the peer broke the protocol."""
        return self._end(reason, text)

    def closed(self, reason: Reason, text: str) -> list[Command]:
        """The stream has ended.

        Args:
            reason: what that means before SYNC: unsupported, refused or lost.
            text: more words.
        """
        self._open = False
        return [] if self._step is _Step.PUNCHING else self._give_up(reason, text)

    def _move(self, step: _Step, deadline: float = math.inf) -> None:
        self._step = step
        self.deadline = deadline

    def _end(self, reason: Reason, text: str = "") -> list[Command]:
        if self.over:
            return []
        self._move(_Step.OVER)
        return [End(reason, text)]

    def _give_up(self, reason: Reason, text: str) -> list[Command]:
        """End it; what an earlier attempt came to says more than why there is no other one."""
        failure = self._failure or End(reason, text)
        return self._end(failure.reason, failure.text)

    def _broken(self, message: Message) -> list[Command]:
        name = "CONNECT" if isinstance(message, Connect) else "SYNC"
        return self._end(Reason.PROTOCOL, f"{name} came out of turn")


class Inviter(Side):
    """The side to which the circuit came. Begins with `start`."""

    def __init__(
        self,
        ours: Callable[[], tuple[str, ...]],
        theirs: Callable[[Sequence[str]], tuple[Target, ...]],
        admit: Callable[[], End | None],
    ) -> None:
        super().__init__(ours, theirs, admit)
        self._sent_at = 0.0

    def start(self, now: float) -> list[Command]:
        """Begin the next attempt."""
        refusal = self._admit()
        if refusal is not None:
            return self._give_up(refusal.reason, refusal.text)
        self.attempt += 1
        if self._open:
            return self.opened(now)
        self._move(_Step.BEGIN)
        return [Open()]

    def opened(self, now: float) -> list[Command]:
        """There is a stream, which nothing was written on: the proposal of its protocol leaves with CONNECT."""
        if self.over:
            return []
        self._open = True
        self._sent_at = now
        self._move(_Step.CONNECTING, now + CONNECT_TIMEOUT)
        return [Send(Connect(self._ours()))]

    def receive(self, message: Message, now: float) -> list[Command]:
        """A message has come."""
        if self.over:
            return []
        if self._step is not _Step.CONNECTING or not isinstance(message, Connect):
            return self._broken(message)
        self.rtt = now - self._sent_at
        self._told = message.addresses
        targets = self._theirs(self._told)
        if targets:
            return self._sync(targets, now)
        self._move(_Step.IDENTIFYING, now + IDENTIFY_TIMEOUT)
        return [AwaitIdentify()]

    def identified(self, now: float) -> list[Command]:
        """The peer has told about itself, or will not."""
        if self._step is not _Step.IDENTIFYING:
            return []
        targets = self._theirs(self._told)
        if targets:
            return self._sync(targets, now)
        return [Send(Sync()), *self._give_up(NOTHING_TO_DIAL.reason, NOTHING_TO_DIAL.text)]

    def _sync(self, targets: tuple[Target, ...], now: float) -> list[Command]:
        assert self.rtt is not None
        self._move(_Step.PUNCHING)
        return [Send(Sync()), Punch(targets, now + self.rtt / 2)]

    def failed(self, text: str, now: float) -> list[Command]:
        """No connection came of the attempt."""
        if self._step is not _Step.PUNCHING:
            return []
        self._failure = End(Reason.PUNCH_FAILED, text)
        return self._give_up(Reason.PUNCH_FAILED, text) if self.attempt == ATTEMPTS else self.start(now)

    def on_timeout(self, now: float) -> list[Command]:
        """Time has passed."""
        if now < self.deadline:
            return []
        if self._step is _Step.IDENTIFYING:
            return self.identified(now)
        return self._give_up(Reason.TIMEOUT, f"the peer did not answer CONNECT within {CONNECT_TIMEOUT:g} s")


class Invited(Side):
    """The side that made the circuit. Begins with `start`, as soon as there is a stream."""

    def start(self, now: float) -> list[Command]:
        """There is a stream."""
        self._open = True
        self._move(_Step.BEGIN, now + CONNECT_TIMEOUT)
        return []

    def receive(self, message: Message, now: float) -> list[Command]:
        """A message has come."""
        match self._step, message:
            case _Step.BEGIN, Connect():
                return self._answer(message, now)
            case _Step.PUNCHING, Connect():
                return [StopPunch(), *self._answer(message, now)]
            case _Step.CONNECTING, Sync():
                targets = self._theirs(self._told)
                self._move(_Step.PUNCHING)
                if targets:
                    return [Punch(targets, now)]
                return self._failed(self._failure or NOTHING_TO_DIAL, now)
            case _Step.OVER, _:
                return []
        return self._broken(message)

    def _answer(self, message: Connect, now: float) -> list[Command]:
        refusal = self._admit()
        if refusal is not None:
            return self._give_up(refusal.reason, refusal.text)
        self.attempt += 1
        self._told = message.addresses
        self._move(_Step.CONNECTING, now + SYNC_TIMEOUT)
        return [Send(Connect(self._ours()))]

    def failed(self, text: str, now: float) -> list[Command]:
        """No connection came of the attempt."""
        return self._failed(End(Reason.PUNCH_FAILED, text), now) if self._step is _Step.PUNCHING else []

    def _failed(self, failure: End, now: float) -> list[Command]:
        self._failure = failure
        if not self._open:
            return self._give_up(failure.reason, failure.text)
        self._move(_Step.BEGIN, now + NEXT_TIMEOUT)
        return []

    def on_timeout(self, now: float) -> list[Command]:
        """Time has passed."""
        if now < self.deadline:
            return []
        what = "SYNC" if self._step is _Step.CONNECTING else "CONNECT"
        return self._give_up(Reason.TIMEOUT, f"no {what} came in time")


def comes_first(ours: PeerId, theirs: PeerId) -> bool:
    """Whether our invitation goes on where both sides have invited each other at once, on two circuits.

    Both find the same answer: that of the smaller peer id, as text, does.
    """
    return ours < theirs
