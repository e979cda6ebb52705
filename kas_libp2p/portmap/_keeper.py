"""Ports that a router is asked for, and kept: what NAT-PMP (RFC 6886) and PCP (RFC 6887) have in common. No I/O.

Both are a few datagrams to the default gateway: a request for each port, repeated with growing pauses until it is
answered; the same again at half of the granted lifetime, which the router takes for a renewal. Each answer tells how
long the router has been up. If that is less than it must be, the router has forgotten everything, and is asked anew at
once; so that this shows before half of an hour has gone, it is asked for a sign of life every `CHECK`.

What is no answer to a request of ours (another nonce, another port, no answer at all) is passed over. That it comes
from the gateway is the kernel's business, since the socket is connected to it.
"""

from __future__ import annotations

import ipaddress
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Protocol

LIFETIME = 7200
"""Seconds that are asked for (RFC 6886 section 3.3 recommends two hours). What is left after a crash ends by itself."""
LONGEST = 86400
"""Seconds of a lifetime that is believed."""
SHORTEST_PAUSE = 4.0
"""Seconds between renewals at the least (RFC 6887 section 11.2.1), however short a lifetime the router grants."""
CHECK = 60.0
"""Seconds between signs of life: how long a rebooted router may go unnoticed."""
REFUSED_PAUSE, LONGEST_REFUSED_PAUSE = 30.0, 1800.0
"""Seconds until a port is asked for again that was refused; a router that says how long is believed between the two
(RFC 6887 section 7.4)."""
LONGEST_PAUSE = 64.0
"""Seconds between repetitions at the most."""
REMOVE_PAUSE = 0.25
"""Seconds until a removal is repeated: we are leaving and have a second."""
NONCE_BYTES = 12


class Dice(Protocol):
    """A source of chance, such as ``random.Random``."""

    def uniform(self, low: float, high: float, /) -> float: ...


@dataclass(frozen=True, slots=True)
class Answer:
    """A datagram of the router, read.

    Attributes:
        epoch: seconds that it has been up.
        refused: why not, as a sentence's end; empty if it is granted.
        unsupported: it does not speak this protocol.
        port: the inside port that it is about; 0: it is a sign of life.
        nonce: of the request, where the protocol has one.
        address: the outside IP; ``None`` if this answer does not tell.
        external: the outside port.
        lifetime: seconds: of the mapping, or until a refused request is worth repeating.
    """

    epoch: int
    refused: str = ""
    unsupported: bool = False
    port: int = 0
    nonce: bytes = b""
    address: str | None = None
    external: int = 0
    lifetime: int = 0


class Codec(Protocol):
    """One of the two protocols."""

    @property
    def name(self) -> str:
        """As in events."""

    @property
    def first_pause(self) -> float:
        """Seconds until a request is repeated for the first time; twice as long each time."""

    @property
    def tries(self) -> int:
        """Requests without any answer after which the router does not speak it. Fewer than the RFCs have: there is
        another protocol to try."""

    @property
    def tells_address(self) -> bool:
        """Whether a sign of life tells the outside address, and a mapping does not."""

    def map_request(self, port: int, nonce: bytes, external: int, address: str | None, lifetime: int) -> bytes:
        """Ask for an inside port to be mapped, if possible to this outside port and IP; lifetime 0: not any more."""

    def check_request(self) -> bytes:
        """Ask for a sign of life."""

    def read(self, data: bytes) -> Answer | None:
        """The answer in a datagram; ``None`` if it holds none."""


@dataclass(frozen=True, slots=True)
class Mapped:
    """A port that we have.

    Attributes:
        port: inside.
        address, external: IP and port outside.
        lifetime: seconds that it was granted for last.
        renewals: how often it was granted again.
    """

    port: int
    address: str
    external: int
    lifetime: int
    renewals: int


@dataclass(slots=True)
class _Question:
    """Something to ask, and ask again.

    Attributes:
        at: when it is sent next.
        tries: how often it was sent without an answer.
    """

    at: float
    tries: int = 0

    def sent(self, now: float, pause: float) -> None:
        self.tries += 1
        self.at = now + min(pause * 2.0 ** (self.tries - 1), LONGEST_PAUSE)

    def again(self, at: float) -> None:
        self.at, self.tries = at, 0


@dataclass(slots=True)
class _Port:
    """A port that we want."""

    port: int
    nonce: bytes
    question: _Question
    external: int = 0
    address: str | None = None
    lifetime: int = 0
    expires: float = -math.inf
    renewals: int = -1
    refused: str = ""


@dataclass(slots=True)
class Keeper:
    """Asks one router for some ports, by one protocol.

    Args:
        codec: the protocol.
        ports: inside, TCP.
        nonce_of: `NONCE_BYTES` bytes for a port that nobody can guess: they keep others from moving our mapping.
        dice: chance.
        now: see everywhere.

    Attributes:
        failed: why it is not worth going on, as the end of a sentence about the router, empty if it does not speak the
            protocol; ``None``: it is worth while.
    """

    codec: Codec
    ports: Iterable[int]
    nonce_of: Callable[[int], bytes]
    dice: Dice
    now: float
    failed: str | None = None
    _wanted: dict[int, _Port] = field(default_factory=dict)
    _check: _Question = field(init=False)
    _address: str | None = None
    _epoch: tuple[float, int] | None = None
    _stopping: bool = False

    def __post_init__(self) -> None:
        for port in self.ports:
            # The same port outside if it is free: what others were told before stays true.
            self._wanted[port] = _Port(port, self.nonce_of(port), _Question(self.now), external=port)
        self._check = _Question(self.now if self.codec.tells_address else self.now + CHECK)

    # What there is

    def mappings(self, now: float) -> tuple[Mapped, ...]:
        """The ports that we have now."""
        return tuple(
            Mapped(each.port, address, each.external, each.lifetime, each.renewals)
            for each in self._wanted.values()
            if each.expires > now and (address := each.address or self._address) is not None
        )

    def refusals(self) -> dict[int, str]:
        """Why ports were refused last."""
        return {port: each.refused for port, each in self._wanted.items() if each.refused}

    @property
    def done(self) -> bool:
        """Whether everything is removed, after `stop`."""
        return not self._wanted

    # What to do

    def next_deadline(self, now: float) -> float:
        """When to call `datagrams` again."""
        questions = [self._check, *(each.question for each in self._wanted.values())]
        ends = [each.expires for each in self._wanted.values() if each.expires > now]
        return min([each.at for each in questions] + ends)

    def datagrams(self, now: float) -> list[bytes]:
        """What is to be sent now."""
        found = []
        for each in self._wanted.values():
            if each.question.at > now:
                continue
            if each.question.tries >= self.codec.tries and each.expires <= now:
                self.failed = self.failed or ""
                each.question.again(math.inf)
                continue
            each.question.sent(now, REMOVE_PAUSE if self._stopping else self._pause())
            lifetime, external = (0, 0) if self._stopping else (LIFETIME, each.external)
            found.append(self.codec.map_request(each.port, each.nonce, external, each.address, lifetime))
        if self._check.at <= now and not self._stopping:
            if self._check.tries < self.codec.tries:
                self._check.sent(now, self._pause())
                found.append(self.codec.check_request())
            else:
                self._check.again(now + CHECK)  # the renewals will show whether it is still there
        return found

    def _pause(self) -> float:
        return self.codec.first_pause * self.dice.uniform(0.9, 1.1)

    def receive(self, data: bytes, now: float) -> None:
        """A datagram has come from the router."""
        answer = self.codec.read(data)
        if answer is None:
            return
        if answer.unsupported:
            if self._epoch is None:
                self.failed = ""
            return
        wanted = self._wanted.get(answer.port) if answer.port else None
        if answer.port and (wanted is None or answer.nonce not in (b"", wanted.nonce)):
            return
        rebooted = self._rebooted(answer.epoch, now)
        self._epoch = (now, answer.epoch)
        if wanted is None:
            if not answer.refused:
                rebooted |= self._address is not None and answer.address != self._address
                self._address = answer.address
            self._check.again(now + CHECK)
        elif self._stopping:
            del self._wanted[wanted.port]
        elif answer.refused or not answer.lifetime or not answer.external:
            self._refused(wanted, answer, now)
        else:
            lifetime = min(answer.lifetime, LONGEST)
            wanted.external, wanted.address, wanted.lifetime = answer.external, answer.address, lifetime
            wanted.expires, wanted.refused = now + lifetime, ""
            wanted.renewals += 1
            wanted.question.again(now + max(lifetime * self.dice.uniform(0.5, 0.625), SHORTEST_PAUSE))
        if rebooted:
            for each in self._wanted.values():
                if each is not wanted:
                    each.question.again(now)

    def _refused(self, wanted: _Port, answer: Answer, now: float) -> None:
        wanted.refused = answer.refused or "gave a mapping that is none"
        wanted.expires = -math.inf
        wanted.question.again(now + min(max(answer.lifetime, REFUSED_PAUSE), LONGEST_REFUSED_PAUSE))
        if all(each.refused for each in self._wanted.values()):
            self.failed = wanted.refused

    def _rebooted(self, epoch: int, now: float) -> bool:
        """Whether the router has been up for less, or for more, than since the last answer (RFC 6887 section 8.5)."""
        if self._epoch is None:
            return False
        then, before = self._epoch
        here, there = now - then, epoch - before
        return there < -1 or here + 2 < there - there / 16 or there + 2 < here - here / 16

    def unreachable(self, now: float, reason: str) -> None:
        """The system says that nobody is there. Believed while we have nothing; else the mappings outlive it."""
        if not self.mappings(now):
            self.failed = reason

    def stop(self, now: float) -> None:
        """Remove everything: send `datagrams` and `receive` until `done`."""
        self._stopping = True
        self._check.again(math.inf)
        self._wanted = {port: each for port, each in self._wanted.items() if each.expires > now}
        for each in self._wanted.values():
            each.question.again(now)


def is_useful(address: str) -> bool:
    """Whether an outside address is one on the internet. If not, the router is behind another NAT itself."""
    try:
        ip = ipaddress.IPv4Address(address)
    except ValueError:
        return False
    return ip.is_global and not ip.is_multicast
