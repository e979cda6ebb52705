"""A Kaspa connection between two homes whose paths come and go: what happens to it, and what both kaspads notice.

::

    kaspad ── bridge ── alice's router ══╗                 ╔══ one, two, …: relays
                                         ╠═══ the core ════╣
    kaspad ── bridge ── bob's router ════╝                 ╚══

Only what alice and bob have with each other is cut here, so relays stay reachable, unless a test does more.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import trio

from kas_bridge.control import ControlError
from kas_bridge.simnet.bridges import BridgeLink, BridgeProcess, Bridges, RelayProcess
from kas_bridge.simnet.lab import inside, pair_at, relay_at
from kas_bridge.simnet.measure import Pair
from kas_bridge.simnet.mine import Chain
from kas_bridge.simnet.watch import AROUND, LOOK, Blocks, EventLog, PeerWatch, peers_in
from natlab import RunningLab

HOMES = ("alice", "bob")
STEADY = 3.0
"""Seconds after which a direct connection counts as lasting here (``punch.steady``), or ten breaks would take hours."""
PATH_TIMEOUT = 90.0
"""Seconds until a session is on the path that it should be on. A punch that failed thrice takes 8, and a peer that was
punched often lately is left alone for up to 20 (`kas_libp2p.dcutr.service`)."""
ON_RELAY = 0.5
"""Seconds on the relay before the direct way is healed: within the first attempt of the punch that follows at once."""
EVEN_TIMEOUT = 10.0
"""Seconds for what is under way when a kaspad has all blocks: a ping, an inventory."""
POLL = 0.05

FLAGS = (f"--punch.steady={STEADY:g}",)


@dataclass(slots=True)
class Scene:
    """Two kaspads, two bridges and some relays in a lab, and what is seen of them.

    Attributes:
        lab: with the homes `HOMES`, alice's being the source's.
        pair, link: the kaspads and the bridges.
        relays: those of ours, by multiaddr.
        blocks: of both kaspads, listened to.
        watches: what each kaspad says of its peers.
        logs: what each bridge tells.
        nursery: for what is to run until the end.
    """

    lab: RunningLab
    pair: Pair
    link: BridgeLink
    relays: Mapping[str, RelayProcess]
    blocks: Blocks
    nursery: trio.Nursery
    watches: list[PeerWatch] = field(default_factory=list)
    logs: list[EventLog] = field(default_factory=list)

    @property
    def bridges(self) -> tuple[BridgeProcess, BridgeProcess]:
        """The source's and the target's."""
        return self.link.source, self.link.target

    async def rows(self) -> list[dict[str, Any]]:
        """What each bridge says of the other one; an empty row if it knows none, or does not answer now."""
        found: list[dict[str, Any]] = []
        for bridge in self.bridges:
            try:
                rows = (await bridge.ask("peers"))["peers"]
            except ControlError:
                rows = []
            found.append(rows[0] if rows else {})
        return found

    async def wait_path(self, *kinds: str) -> float:
        """Wait until both bridges carry their peer by a path of one of these kinds; returns when that was.

        Raises:
            trio.TooSlowError: they did not in `PATH_TIMEOUT` seconds; what they say is added.
        """
        rows: list[dict[str, Any]] = []
        try:
            with trio.fail_after(PATH_TIMEOUT):
                while True:
                    rows = await self.rows()
                    if all(each.get("state") == "joined" and each["path"] in kinds for each in rows):
                        return time.monotonic()
                    await trio.sleep(POLL)
        except trio.TooSlowError as error:
            error.add_note(f"it is not {' or '.join(kinds)}: {rows}")
            raise

    def broken(self) -> list[str]:
        """What either kaspad noticed of all that happened, in words; empty if nothing."""
        found = []
        for name, watch in zip(("source", "target"), self.watches, strict=True):
            if watch.missed or len(watch.peers) != 1:
                found.append(f"the {name} had {len(watch.peers)} peers, and {watch.missed} of {watch.looks} times none")
            came, went = peers_in(watch.node.log)
            if len(came) != 1 or went:
                found.append(f"the {name}'s log has {len(came)} peers that came, and {len(went)} that went")
        return found

    async def uneven(self) -> list[str]:
        """What one bridge has handed to the other one and did not come, or came twice, in words; empty if there is
        nothing. Call it when nothing is mined any more."""
        sent, received = ("sent", "messages_sent"), ("received", "messages_received")
        found: list[str] = []
        with trio.move_on_after(EVEN_TIMEOUT):
            while True:
                source, target = await self.rows()
                found = [
                    f"{one[out]} {out} by one bridge are {other[into]} at the other"
                    for one, other in ((source, target), (target, source))
                    for out, into in zip(sent, received, strict=True)
                    if one.get(out) != other.get(into)
                ]
                if not found:
                    break
                await trio.sleep(POLL)
        return found

    def ended(self) -> list[dict[str, Any]]:
        """Sessions that ended, as either bridge told."""
        return [event for log in self.logs for _, event in log.of("session-ended")]


@asynccontextmanager
async def scene(
    lab: RunningLab,
    kaspad: Path,
    chain: Chain,
    folder: Path,
    *,
    relays: Sequence[str] = (),
    others: Sequence[str] = (),
    flags: Sequence[str] = FLAGS,
    relay_flags: Sequence[str] = (),
    look: float = LOOK,
) -> AsyncIterator[Scene]:
    """Everything up, and not connected.

    Args:
        relays: hosts with public addresses, in each of which a relay of ours is run.
        others: multiaddrs of further relays.
        flags: of both bridges.
        relay_flags: of the relays.
        look: seconds between two looks at each kaspad's peers.
    """
    async with (
        inside(lab, *(lab[name] for name in (*HOMES, *relays))) as (alice, bob, *at),
        AsyncExitStack() as stack,
    ):
        found: dict[str, RelayProcess] = {}
        for name, host in zip(relays, at, strict=True):
            relay, address = await stack.enter_async_context(relay_at(folder / name, host, *relay_flags))
            found[address] = relay
        async with (
            pair_at(chain, kaspad, folder, alice, bob) as pair,
            Bridges("relayed", relays=(*found, *others), flags=flags).prepare(pair) as link,
            trio.open_nursery() as nursery,
        ):
            made = Scene(lab, pair, link, found, Blocks(chain, pair), nursery)
            await nursery.start(made.blocks.run)
            for node, bridge in zip((pair.source, pair.target), made.bridges, strict=True):
                made.watches.append(PeerWatch(node, look))
                nursery.start_soon(made.watches[-1].run)
                made.logs.append(EventLog(bridge))
                await nursery.start(made.logs[-1].run)
            yield made
            nursery.cancel_scope.cancel()


@dataclass(frozen=True, slots=True, kw_only=True)
class Cycle:
    """One way from the direct path to a relay and back.

    Attributes:
        lost: seconds from the cut until both bridges were on a relay.
        back: seconds from its healing until both were direct again.
        held_up: seconds that a block which was made around the cut took, at most.
        relayed: median of the same on the relay.
        moved: seconds by which a block around the move back was later than that, at most.
        calm: the same on the direct path, where nothing happens: what the machine does by itself.
    """

    lost: float
    back: float
    held_up: float
    relayed: float
    moved: float
    calm: float


async def cycle(at: Scene) -> Cycle:
    """Cut the direct way under live blocks, heal it, and wait until it is used again and has lasted.

    Raises:
        trio.TooSlowError: the session did not come where it should, or blocks did not arrive.
    """
    way = at.lab.between(*HOMES)
    since = time.monotonic()
    way.cut()
    relayed = await at.wait_path("relayed")
    await trio.sleep(ON_RELAY)
    healed = time.monotonic()
    way.heal()
    direct = await at.wait_path("punched")
    await trio.sleep(STEADY)
    await at.blocks.caught_up()
    calm = at.blocks.delays(direct + AROUND) or [0.0]
    usual = statistics.median(at.blocks.delays(relayed, direct - AROUND) or [0.0])
    return Cycle(
        lost=relayed - since,
        back=direct - healed,
        held_up=max(at.blocks.delays(since - 1, relayed), default=0.0),
        relayed=usual,
        moved=max((at.blocks.pause(when, usual) for when in _moves(at, healed)), default=0.0),
        calm=max(calm) - statistics.median(calm),
    )


def _moves(at: Scene, since: float) -> list[float]:
    return [when for log in at.logs for when, event in log.of("session-moved", since)]
