"""Whether others can dial us, what is tested when, and the role that follows. No I/O.

**An address is verified** when two things are so:

1. Servers get in: at least two groups (/16, /48) of servers have dialed it, each proven by a dial-back that came in
   (`kas_libp2p.autonat._client`), and no majority of groups says otherwise.
2. A stranger gets in: a connection came from an IP that we have never sent anything to from our listen port. Servers
   are connected to us, so a NAT that filters by address lets them in and nobody else; without a stranger it would look
   public. Who provides one: a server that asks another one to dial us (`kas_libp2p.autonat.server`), a server with
   several IPs, or any peer that simply comes, once old entries of a NAT have run out.

It is verified no longer when a majority of at least two groups says so, and says so for `HOLD`. Silence changes
nothing: verdicts lapse after `WINDOW` refreshes, so one that is missed does no harm, and what lapsed is neither for
nor against. So one server that lies, whatever it says, has no effect; and two that lie "reachable" lack the stranger.

**The role** is public while an address of the main family is verified: IPv4 if this machine has any, for most others
have nothing else. An address that the network took away (an interface went, two groups see another one) leaves
`GRACE` to verify its successor. One that was found unreachable has to be good for `CALM` before it counts again. So
on a network that does not change the role changes once, and on one that can't make up its mind at most every few
minutes, towards private.

**Tests.** A new address is tested soon, by one server of each of `SERVERS` groups: whom we dialed before who came by
itself, v2 before v1, who was not asked for the longest time first. Until it is decided it is tested again after
`RETRY`, twice as much, and so on up to the refresh; then once per refresh; and at once if there is reason to doubt.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from kas_libp2p import addresses as addr
from kas_libp2p._rates import Rates
from kas_libp2p.autonat._client import Verdict
from kas_libp2p.autonat._observed import CONFIRMED
from kas_libp2p.config import Role
from kas_libp2p.metadata import PeerId

WINDOW = 2.5
"""Refreshes for which a verdict counts: two may be missed, as when servers come and go."""
SERVERS = 3
"""Groups that are asked at a time: two have to agree, and one may be silent."""
STRANGERS = 2
"""Servers that are asked for a stranger at a time: one that gets in is enough."""
MAX_TESTED = 3
"""Addresses of one family that are tested: an interface's, the one where others see us, a mapped port."""
MAX_ASKED = 256
"""Servers of which it is remembered when they were asked."""
SETTLE = 1.0
"""Seconds before a new address or server leads to a test: they come in swarms."""
RETRY = 30.0
"""Seconds until an address that is not decided is tested again, the first time."""
HOLD = 60.0
"""Seconds that the evidence has to be against a verified address: two rounds of tests."""
CALM = 600.0
"""Seconds that the evidence has to be for an address that was dropped before."""
GRACE = 60.0
"""Seconds that a public node has to verify another address when its last one was taken away."""
V2_BURST, V2_INTERVAL = 6, 15.0
"""Requests to one server at once, and seconds for each one beyond: a little less than what ours grant one peer."""
V1_INTERVAL = 90.0
"""Seconds between two requests to one server of v1: the reference grants one in 60 s."""
OLD_ENTRIES = 300.0
"""Seconds after the start from which on any stranger counts: until then a NAT may still let in whom an earlier process
of ours had dialed (Linux: 120 s after the end of a connection)."""
MAX_CONTACTS = 4096
"""IPs that are remembered as dialed; the least recently dialed is forgotten first."""


class Kind(StrEnum):
    """How a server is asked."""

    V2 = "v2"
    V1 = "v1"
    STRANGER = "stranger"


class Filtering(StrEnum):
    """Whom a NAT or firewall lets in (RFC 4787 section 5)."""

    UNKNOWN = "unknown"
    OPEN = "open"
    """Everybody."""
    ADDRESS = "address-restricted"
    """Whose address was dialed before, from any port."""
    PORT = "port-restricted"
    """Whose address and port were dialed before; or nobody."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """An address of ours that may be reachable.

    Attributes:
        address: ``/ip4|ip6/…/tcp/…``.
        confirmed: whether it may be told to others once it is verified: it is on an interface of ours, a router gave
            it to us, or enough groups see us there.
    """

    address: str
    confirmed: bool


@dataclass(frozen=True, slots=True)
class Server:
    """A connected peer that can be asked.

    Attributes:
        peer: who.
        group: its group.
        family: of the address at which it is connected.
        v1, v2, stranger: what it serves.
        chosen: whether we dialed it. Who came by itself is asked if there are too few others: whoever wants to outvote
            them has to wait for that.
    """

    peer: PeerId
    group: str
    family: int
    v1: bool
    v2: bool
    stranger: bool
    chosen: bool = True


@dataclass(frozen=True, slots=True)
class Ask:
    """A test that is due; ``begun``: when it was given."""

    address: str
    server: Server
    kind: Kind
    begun: float


class Contacts:
    """Whom we have ever sent something to from our listen port, by IP (IPv6: /64)."""

    def __init__(self) -> None:
        self._known: OrderedDict[str, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._known)

    def add(self, ip: str) -> None:
        """We are about to dial this IP."""
        key = addr.subnet_key(ip)
        self._known[key] = None
        self._known.move_to_end(key)
        if len(self._known) > MAX_CONTACTS:
            self._known.popitem(last=False)

    def is_stranger(self, ip: str) -> bool:
        """Whether we never did."""
        return addr.subnet_key(ip) not in self._known


class _Ledger:
    """What each group last said of one question."""

    __slots__ = ("_said", "_window")

    def __init__(self, window: float) -> None:
        self._window = window
        self._said: dict[str, tuple[bool, float]] = {}

    def say(self, group: str, yes: bool, now: float) -> None:
        self._said = {key: each for key, each in self._said.items() if now - each[1] < self._window}
        self._said[group] = yes, now

    def counts(self, now: float) -> tuple[int, int]:
        fresh = [yes for yes, at in self._said.values() if now - at < self._window]
        return sum(fresh), len(fresh) - sum(fresh)

    def judge(self, now: float, need: int) -> bool | None:
        """Yes is proven each time, no is an opinion: the one wins a tie, and the other needs two groups."""
        yes, no = self.counts(now)
        if no >= CONFIRMED and no > yes:
            return False
        return True if yes >= need else None

    def latest_yes(self) -> float:
        return max((at for yes, at in self._said.values() if yes), default=float("-inf"))


class _Timer:
    """When an address is tested next, in one way."""

    __slots__ = ("_wait", "at", "under_way")

    def __init__(self, at: float) -> None:
        self.at = at
        self.under_way = 0
        self._wait = RETRY

    def begin(self, tests: int) -> None:
        self.under_way += tests
        self.at = float("inf")

    def hurry(self, at: float) -> None:
        self.at = min(self.at, at)

    def again(self, now: float, settled: bool, refresh: float) -> None:
        wait = refresh if settled else min(refresh, self._wait)
        self._wait = RETRY if settled else 2.0 * wait
        self.at = min(self.at, now + wait)  # sooner if there was reason to hurry while the tests were under way


class _Address:
    """What is known of one address."""

    __slots__ = (
        "changing",
        "confirmed",
        "dial",
        "dialed",
        "dropped",
        "family",
        "since",
        "stranger",
        "strangers",
        "verified",
    )

    def __init__(self, text: str, now: float, window: float) -> None:
        self.family = addr.family(text) or 4
        self.since = now
        """From when on tests have to have begun to say something of it as it is."""
        self.confirmed = False
        self.dialed = _Ledger(window)
        self.strangers = _Ledger(window)
        self.dial = _Timer(now + SETTLE)
        self.stranger = _Timer(now)
        self.verified = False
        self.changing: float | None = None
        """Since when the evidence speaks for the other state."""
        self.dropped = False
        """Whether it was verified before, and found unreachable."""

    def update(self, now: float, evidence: bool | None) -> None:
        if evidence is None or evidence is self.verified:
            self.changing = None
            return
        if self.changing is None:
            self.changing = now
        if now >= self.changing + self.wait:
            self.changing = None
            self.dropped = self.verified
            self.verified = evidence

    @property
    def wait(self) -> float:
        if self.verified:
            return HOLD
        return CALM if self.dropped else 0.0


class Roles:
    """The addresses, their evidence, and the role.

    Args:
        setting: the role as configured.
        refresh: seconds after which a verdict is checked again.
        now: seconds on a monotonic clock, as everywhere here.

    Attributes:
        role: private or public. Starts as private, unless it is configured.
    """

    def __init__(self, setting: Role, refresh: float, now: float) -> None:
        self._setting = setting
        self._refresh = refresh
        self._window = WINDOW * refresh
        self._started = now
        self._addresses: dict[str, _Address] = {}  # the most promising first
        self._families: frozenset[int] = frozenset()
        self._asked: dict[tuple[PeerId, bool], float] = {}
        self._v2_rate = Rates(V2_BURST, V2_INTERVAL)
        self._v1_rate = Rates(1, V1_INTERVAL)
        self._came: dict[int, float] = {}
        self._grace: float | None = None
        self.role = Role.PUBLIC if setting is Role.PUBLIC else Role.PRIVATE

    # What comes in

    def offer(self, candidates: Iterable[Candidate], families: Collection[int], now: float) -> None:
        """These are the addresses that we may have now, the most promising first.

        A verified one that is not among them stays, until a confirmed one of its family is there instead: that nobody
        has told for a while where he sees us does not mean that we are not there any more.

        Args:
            families: of the addresses that this machine has.
        """
        self._families = frozenset(families)
        known, self._addresses = self._addresses, {}
        offered = {each.address: each.confirmed for each in candidates}
        replaced = {addr.family(text) for text, confirmed in offered.items() if confirmed}
        room = Counter({4: MAX_TESTED, 6: MAX_TESTED})
        for text in sorted(offered, key=lambda text: not (text in known and known[text].verified)):
            address = known.pop(text, None) or _Address(text, now, self._window)
            if room[address.family]:
                room[address.family] -= 1
                address.confirmed = address.verified or offered[text]
                self._addresses[text] = address
        for text, address in known.items():
            if address.verified and address.family not in replaced and address.family in self._families:
                self._addresses[text] = address
            elif address.verified:
                self._came.pop(address.family, None)
        self.update(now)

    def heard(self, ask: Ask, verdict: Verdict, now: float, *, stranger: bool = False) -> None:
        """A test is over.

        Args:
            stranger: whether the dial-back came from somebody that we never sent anything to.
        """
        address = self._addresses.get(ask.address)
        if address is None or verdict is Verdict.REFUSED or ask.begun < address.since:
            return
        yes = verdict is Verdict.REACHABLE
        if ask.kind is not Kind.STRANGER:
            address.dialed.say(ask.server.group, yes, now)
        if stranger or (ask.kind is Kind.STRANGER and not yes):
            address.strangers.say(ask.server.group, yes, now)
        self.update(now)

    def done(self, ask: Ask, now: float) -> None:
        """A test that `plan` gave has been made; `heard` was told before, if there was an answer."""
        address = self._addresses.get(ask.address)
        if address is None:
            return
        stranger = ask.kind is Kind.STRANGER
        timer = address.stranger if stranger else address.dial
        timer.under_way = max(0, timer.under_way - 1)  # none, if the address has gone and come again meanwhile
        if not timer.under_way:
            self._again(address, stranger, now)

    def stranger_came(self, family: int, now: float) -> None:
        """Somebody that we never sent anything to has connected to us."""
        if now - self._started >= OLD_ENTRIES:
            self._came[family] = now
            self.update(now)

    def doubt(self, now: float) -> None:
        """The network has changed, or may have: test everything. Who came before came by another NAT, perhaps, and a
        test that is under way will say how it was.
        """
        self._came.clear()
        for address in self._addresses.values():
            address.since = now
            address.dial.hurry(now + SETTLE)
            address.stranger.hurry(now + SETTLE)

    def server_came(self, now: float) -> None:
        """Somebody who can be asked is connected: what is not decided yet may be now."""
        for address in self._addresses.values():
            if self._evidence(address, now) is None:
                address.dial.hurry(now + SETTLE)
                address.stranger.hurry(now + SETTLE)

    def update(self, now: float) -> None:
        """Draw the conclusions. Also to be called at `next_deadline`."""
        for address in self._addresses.values():
            address.update(now, self._evidence(address, now))
        if self._setting is not Role.AUTO:
            return
        main = [address for address in self._addresses.values() if address.family == self.main_family]
        if any(address.verified for address in main):
            self.role, self._grace = Role.PUBLIC, None
        elif self.role is Role.PUBLIC:
            if self._grace is None:
                self._grace = now + GRACE
            if now >= self._grace or any(address.dropped for address in main):
                self.role, self._grace = Role.PRIVATE, None

    # What is to be done

    def next_deadline(self, now: float) -> float:
        """When to call `update` and `plan`."""
        times = [self._grace] if self._grace is not None else []
        for address in self._addresses.values():
            times.append(address.dial.at)
            if self._wants_stranger(address, now):
                times.append(address.stranger.at)
            if address.changing is not None:
                times.append(address.changing + address.wait)
        return min(times, default=float("inf"))

    def plan(self, servers: Sequence[Server], now: float) -> list[Ask]:
        """The tests that are due, to be made at the same time; `done` tells of each that was."""
        asks: list[Ask] = []
        for text, address in self._addresses.items():
            for stranger, timer in ((False, address.dial), (True, address.stranger)):
                if timer.at > now or (stranger and not self._wants_stranger(address, now)):
                    continue
                chosen = self._choose(servers, address, now, stranger)
                for server in chosen:
                    kind = Kind.STRANGER if stranger else Kind.V2 if server.v2 else Kind.V1
                    asks.append(Ask(text, server, kind, now))
                    self._rate(server).take(server.peer, now)
                    self._asked[server.peer, stranger] = now
                timer.begin(len(chosen))
                if not chosen:
                    self._again(address, stranger, now)
        while len(self._asked) > MAX_ASKED:
            del self._asked[min(self._asked, key=self._asked.__getitem__)]
        return asks

    def _choose(self, servers: Sequence[Server], address: _Address, now: float, stranger: bool) -> list[Server]:
        """One of each group: of the address's own family if there are such, as others cost dial data."""

        def asked(server: Server) -> float:
            return self._asked.get((server.peer, stranger), float("-inf"))

        def fits(server: Server) -> bool:
            own = server.family == address.family
            serves = (own and server.stranger) if stranger else server.v2 or (own and server.v1)
            return serves and self._rate(server).allows(server.peer, now)

        def rank(server: Server) -> tuple[bool, bool, bool, float]:
            return server.family != address.family, not server.chosen, not server.v2, asked(server)

        found: dict[str, Server] = {}
        for server in sorted(filter(fits, servers), key=rank):
            found.setdefault(server.group, server)
        return list(found.values())[: STRANGERS if stranger else SERVERS]

    def _rate(self, server: Server) -> Rates:
        return self._v2_rate if server.v2 else self._v1_rate

    def _again(self, address: _Address, stranger: bool, now: float) -> None:
        answer = address.strangers.judge(now, 1) if stranger else address.dialed.judge(now, CONFIRMED)
        timer = address.stranger if stranger else address.dial
        timer.again(now, answer is not None and address.changing is None, self._refresh)

    def _wants_stranger(self, address: _Address, now: float) -> bool:
        """Whether servers get in, and it is time to see whether others do."""
        if not (address.verified or address.dialed.judge(now, CONFIRMED)):
            return False
        return now - address.strangers.latest_yes() >= 0.9 * self._refresh

    # What is known

    @property
    def main_family(self) -> int:
        """The family whose addresses make the role."""
        return 6 if self._families == {6} else 4

    def public(self, now: float) -> tuple[str, ...]:
        """Addresses that may be told to others."""
        if self._setting is Role.PRIVATE:
            return ()
        return tuple(
            text
            for text, address in self._addresses.items()
            if address.verified
            or (self._setting is Role.PUBLIC and address.confirmed and self._evidence(address, now) is not False)
        )

    def is_refuted(self, text: str, now: float) -> bool:
        """Whether tests have shown that others can't dial this address of ours. Where the role is public by
        configuration, they are not believed.
        """
        address = self._addresses.get(text)
        if address is None or address.verified or self._setting is Role.PUBLIC:
            return False
        return self._evidence(address, now) is False

    def filtering(self, family: int, now: float) -> Filtering:
        """Whom the NAT or firewall of a family lets in, as far as the tests have shown."""
        found = [each for each in self._addresses.values() if each.family == family]
        if any(each.verified for each in found):
            return Filtering.OPEN
        entered = [each for each in found if each.dialed.judge(now, CONFIRMED)]
        if entered:
            kept_out = any(each.strangers.judge(now, 1) is False for each in entered)
            return Filtering.ADDRESS if kept_out else Filtering.UNKNOWN
        if any(each.dialed.judge(now, CONFIRMED) is False for each in found):
            return Filtering.PORT
        return Filtering.UNKNOWN

    def reason(self, now: float) -> str:
        """What the role rests on, in words."""
        if self._setting is not Role.AUTO:
            return "it is configured"
        main = [(text, each) for text, each in self._addresses.items() if each.family == self.main_family]
        if self._grace is not None:
            return "its address is gone, the next one is being tested"
        if not main:
            return "no peer has told yet where it sees us" if self._families else "it listens nowhere but on loopback"
        text, address = min(main, key=lambda pair: (not pair[1].verified, -sum(pair[1].dialed.counts(now))))
        where = ":".join(text.split("/")[2::2])
        yes, no = address.dialed.counts(now)
        if not yes + no:
            return f"{where} was reached a while ago" if address.verified else f"no server has tested {where} yet"
        seen = f"{yes} of {yes + no} servers reached {where}"
        if address.verified:
            return f"{seen}, and so did strangers"
        if address.dialed.judge(now, CONFIRMED):
            no_stranger = address.strangers.judge(now, 1) is False
            return f"{seen}, " + ("strangers did not" if no_stranger else "no stranger has tried yet")
        return seen

    def _evidence(self, address: _Address, now: float) -> bool | None:
        dialed = address.dialed.judge(now, CONFIRMED)
        stranger = address.strangers.judge(now, 1)
        if stranger is None and self._is_the_one(address, now):
            came = self._came.get(address.family)
            stranger = True if came is not None and now - came < self._window else None
        if dialed is False or stranger is False:
            return False
        return True if dialed and stranger and address.confirmed else None

    def _is_the_one(self, address: _Address, now: float) -> bool:
        """Whether a stranger who came, without a word on how, can only have come by this address."""
        return not any(
            other is not address and other.family == address.family and other.dialed.judge(now, CONFIRMED)
            for other in self._addresses.values()
        )
