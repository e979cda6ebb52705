"""Which peers are kept connected, and when each is tried again. Pure: values in, values out, ``now`` passed in.

A kept peer is *waiting* until its time comes, *trying* while one attempt is under way, and *here* while it is joined,
whichever side opened the stream. A peer that was joined for a while is tried again at once; failures double the pause,
up to a minute; a no that only a changed setting can turn into a yes is asked for again every ten minutes. While our own
kaspad is away nobody is tried; when it is back everybody is, at once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from kas_libp2p.errors import KasError
from kas_libp2p.metadata import PeerId

FIRST_DELAY = 1.0
"""Seconds before the second attempt: a peer's restart takes about as long."""

FACTOR = 2.0

LONGEST_DELAY = 60.0
"""Seconds between attempts at most. A dial costs either side next to nothing, and a peer that was away for hours is
back within a minute of its return."""

STANDING_NO_DELAY = 600.0
"""Seconds before a peer is asked again that said no for a reason which time alone does not change."""

JITTER = 0.25
"""Each delay is stretched or shortened by up to this part, so that peers of one restarted node do not come at once."""

STABLE_AFTER = 30.0
"""Seconds joined after which the next failure counts as the first."""

MAX_KEPT = 256
"""Peers that may be kept connected: twice kaspad's default inbound slots, and an end to a runaway script."""

MAX_ADDRESSES = 16
"""Addresses of one peer."""


class KeptState(StrEnum):
    """What is being done about a kept peer."""

    WAITING = "waiting"
    TRYING = "trying"
    HERE = "here"


@dataclass(slots=True)
class Kept:
    """A peer that is kept connected.

    Attributes:
        peer: who.
        addresses: multiaddrs at which it was said to be.
        origin: who asked for it: ``settings`` or ``control``.
        state: see `KeptState`.
        failures: attempts that failed in a row.
        next_at: when it is tried next, if it is waiting.
        problem: why the last attempt failed; empty if none did since it was last here.
    """

    peer: PeerId
    addresses: tuple[str, ...]
    origin: str
    state: KeptState = KeptState.WAITING
    failures: int = 0
    next_at: float = 0.0
    problem: str = ""


class Full(KasError):
    """`MAX_KEPT` peers are kept already."""


class Keeper:
    """The kept peers.

    Args:
        random: gives a number from 0 up to, but without, 1.

    Attributes:
        open: whether peers are tried at all: our kaspad can be joined.
    """

    def __init__(self, random: Callable[[], float]) -> None:
        self._random = random
        self._kept: dict[PeerId, Kept] = {}
        self.open = False

    def all(self) -> tuple[Kept, ...]:
        """Every kept peer, in the order in which they were added."""
        return tuple(self._kept.values())

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, peer: PeerId) -> Kept | None:
        """The kept peer, or ``None``."""
        return self._kept.get(peer)

    def add(self, peer: PeerId, address: str, origin: str, now: float) -> Kept:
        """Keep a peer, or learn another address of one; it is tried at once if it is not here.

        Raises:
            Full: too many are kept.
        """
        kept = self._kept.get(peer)
        if kept is None:
            if len(self._kept) >= MAX_KEPT:
                raise Full(f"{MAX_KEPT} peers are kept already; remove one with kas-bridge disconnect")
            kept = self._kept[peer] = Kept(peer, (), origin)
        if address and address not in kept.addresses:
            kept.addresses = (address, *kept.addresses)[:MAX_ADDRESSES]
        if kept.state is KeptState.WAITING:
            kept.failures, kept.next_at = 0, now
        return kept

    def remove(self, peer: PeerId) -> bool:
        """Keep it no longer."""
        return self._kept.pop(peer, None) is not None

    def take_due(self, now: float) -> list[Kept]:
        """The peers whose time has come; each is trying from now on."""
        if not self.open:
            return []
        due = [kept for kept in self._kept.values() if kept.state is KeptState.WAITING and kept.next_at <= now]
        for kept in due:
            kept.state = KeptState.TRYING
        return due

    def next_deadline(self) -> float | None:
        """When `take_due` has something next; ``None``: not before something else happens."""
        if not self.open:
            return None
        return min((kept.next_at for kept in self._kept.values() if kept.state is KeptState.WAITING), default=None)

    def is_here(self, peer: PeerId) -> None:
        """It is joined, by whichever stream."""
        kept = self._kept.get(peer)
        if kept is not None:
            kept.state, kept.problem = KeptState.HERE, ""

    def ended(
        self,
        peer: PeerId,
        now: float,
        *,
        joined_for: float | None = None,
        standing: bool = False,
        problem: str = "",
        longest: float | None = None,
        at_once: bool = False,
    ) -> float | None:
        """A stream of it ended, or an attempt failed, and it is not here by another one.

        Args:
            joined_for: for how many seconds it was joined; ``None`` if it was not.
            standing: whether only a changed setting can help.
            problem: why, in words.
            longest: seconds until the next attempt at most, if not `LONGEST_DELAY`.
            at_once: whether the first attempt is made without a pause.

        Returns:
            in how many seconds it is tried again; ``None`` if it is not kept.
        """
        kept = self._kept.get(peer)
        if kept is None:
            return None
        if joined_for is not None and joined_for >= STABLE_AFTER:
            kept.failures = 0
        if standing:
            delay = STANDING_NO_DELAY
        elif at_once and not kept.failures:
            delay = 0.0
        else:
            delay = min(FIRST_DELAY * FACTOR ** min(kept.failures, 16), longest or LONGEST_DELAY)
        delay *= 1 + JITTER * (2 * self._random() - 1)
        kept.failures += 1
        kept.state, kept.next_at, kept.problem = KeptState.WAITING, now + delay, problem
        return delay

    def set_open(self, open_: bool, now: float) -> None:
        """Our kaspad can be joined now, or no longer. When it can again, every waiting peer is tried at once."""
        if open_ and not self.open:
            for kept in self._kept.values():
                if kept.state is KeptState.WAITING:
                    kept.failures, kept.next_at = 0, now
        self.open = open_
