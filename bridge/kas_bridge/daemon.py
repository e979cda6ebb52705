"""What a bridge and a relay have in common: a node, who is kept out of it, how it is asked, and how it ends."""

from __future__ import annotations

import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import version as distribution_version
from pathlib import Path
from typing import Any, Protocol

import trio
from trio import TaskStatus  # type: ignore[attr-defined,unused-ignore]  # libp2p brings stubs that lack it

from kas_bridge import reach
from kas_bridge._control import ActionError
from kas_bridge.bans import DEFAULT_SECONDS, Ban, Bans, BansError
from kas_bridge.config import NodeSettings, parse_entry
from kas_bridge.events import BanLifted, Trouble
from kas_libp2p._identify import PeerInfo
from kas_libp2p.addresses import ip_port
from kas_libp2p.errors import AddressError, ConfigError
from kas_libp2p.events import Banned, EventBus
from kas_libp2p.metadata import OverlayStream, PeerId
from kas_libp2p.node import Candidate
from kas_libp2p.seams import Overlay
from kas_libp2p.status import Status

VERSION = distribution_version("kas-bridge")

STOP_WITHIN = 1.0
"""Seconds for the peers to be told that we go; what is left of two seconds is the connections'."""


class DaemonNode(Overlay, Protocol):
    """What is needed of the node below; `kas_libp2p.node.Node` has it."""

    bus: EventBus

    @property
    def on_direct(self) -> list[Callable[[PeerId], None]]: ...

    @property
    def peer_id(self) -> PeerId: ...

    @property
    def addresses(self) -> tuple[str, ...]: ...

    def set_policy(self, policy: Callable[[Candidate], str | None] | None) -> None: ...

    def withdraw(self, protocol: str | Sequence[str] = ...) -> None: ...

    async def connect_past_relay(self, peer: PeerId) -> OverlayStream: ...

    async def disconnect(self, peer: str, reason: str = "", *, hung: bool = ...) -> int: ...

    def peer_info(self, peer: PeerId) -> PeerInfo | None: ...

    def status(self) -> Status: ...

    def why(self, peer: str) -> list[str]: ...


class Daemon(ABC):
    """One process with a node.

    Args:
        settings: see there.
        node: the overlay, running.
        control: where the control socket is, for those who ask.
        bans: who is kept out; from the data directory if left out.
        wall_clock: seconds since the epoch.

    Attributes:
        mode: what it is: ``bridge`` or ``relay``.

    Raises:
        BansError: the list of bans is not usable.
    """

    mode: str

    def __init__(
        self,
        settings: NodeSettings,
        node: DaemonNode,
        *,
        control: Path | None = None,
        bans: Bans | None = None,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self.node = node
        self.control = control
        self.events = node.bus
        self.bans = bans if bans is not None else Bans(settings.data_dir / "bans.json")
        self.started_at = trio.current_time()
        self._settings = settings
        self._wall = wall_clock
        self._stop_reason: str | None = None
        self._stop = trio.Event()

    # -- Running -------------------------------------------------------------------------------------------------------

    @abstractmethod
    async def run(self, *, task_status: TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until `stop` is called or it is cancelled."""

    async def wait_looked(self) -> None:
        """Wait until what can be known at the start is known: here, what the first relays answered."""
        with self.events.subscribe() as events:
            while any(not (each.held or each.failures) for each in self.node.status().reservations):
                await anext(events)
        await trio.lowlevel.checkpoint()

    def stop(self, reason: str = "") -> None:
        """End it. Returns at once; `run` returns when its peers are gone."""
        if self._stop_reason is None:
            self._stop_reason = reason
            self._stop.set()

    async def wait_stop(self) -> None:
        """Wait until `stop` is called."""
        await self._stop.wait()

    @property
    def stopping(self) -> bool:
        """Whether `stop` was called."""
        return self._stop.is_set()

    def trouble(self, where: str, error: BaseException) -> None:
        """Tell of a fault of our own that was contained."""
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        self.events.emit(Trouble(where=where, reason=f"{type(error).__name__}: {error}"))

    def _policy(self, candidate: Candidate) -> str | None:
        return None if self._banned(candidate.peer or "", candidate.ip) is None else "banned here"

    # -- What the operator asks ----------------------------------------------------------------------------------------

    def find_peer(self, text: str) -> PeerId:
        """The peer that a part of its id stands for.

        Raises:
            ActionError: none, or several.
        """
        known = dict.fromkeys(self._known())
        if text in known:
            return PeerId(text)
        part = text.strip("…").removeprefix("12D3…")
        hits = [peer for peer in known if part in peer] if len(part) >= 3 else []
        if len(hits) == 1:
            return hits[0]
        if not hits:
            raise ActionError(f"no peer {text} is known here; kas-bridge peers lists them")
        raise ActionError(f"{text} stands for {len(hits)} peers: {', '.join(hits[:4])}; give more of it")

    def _known(self) -> Iterable[PeerId]:
        """The peers that the operator may speak of."""
        return (each.peer for each in self.node.status().connections)

    @abstractmethod
    def connect(self, address: str) -> dict[str, Any]:
        """Keep a peer connected from now on.

        Raises:
            ActionError: that can't be done.
        """

    async def disconnect(self, text: str) -> dict[str, Any]:
        """End a peer.

        Raises:
            ActionError: no such peer.
        """
        peer = self.find_peer(text)
        closed = await self.node.disconnect(peer, "by the operator")
        return {"peer_id": peer, "was_joined": False, "was_kept": False, "connections": closed}

    async def ban(self, target: str, seconds: float | None = DEFAULT_SECONDS, reason: str = "") -> dict[str, Any]:
        """Keep a peer id, IP address or network out, and end what is there of it.

        Raises:
            ActionError: it is none of these, or the list can't be written.
        """
        try:
            if not _is_entry(target):
                target = self.find_peer(target)
            if target == self.node.peer_id:
                raise ActionError(f"that is this {self.mode} itself")
            ban = self.bans.add(target, self._wall(), seconds=seconds, reason=reason)
        except (ConfigError, BansError) as error:
            raise ActionError(str(error)) from None
        self.events.emit(Banned(target=ban.target, seconds=seconds if seconds is not None else float("inf")))
        ended = [peer for peer, ips in self._connected().items() if any(self._banned(peer, ip) is ban for ip in ips)]
        await self._end(ban, ended)
        async with trio.open_nursery() as nursery:
            for peer in ended:
                nursery.start_soon(self.node.disconnect, peer, "banned")
        return {"target": ban.target, "until": ban.until, "ended": ended}

    async def _end(self, ban: Ban, peers: Sequence[PeerId]) -> None:
        """Tell peers that they are banned, before their connections are closed."""
        await trio.lowlevel.checkpoint()

    def _banned(self, peer: str, ip: str | None) -> Ban | None:
        return self.bans.find(peer, ip, self._wall())

    def _connected(self) -> dict[PeerId, set[str | None]]:
        """Every peer that there is a connection with, and its IPs."""
        found: dict[PeerId, set[str | None]] = {}
        for connection in self.node.status().connections:
            found.setdefault(connection.peer, set()).add(ip_of(connection.remote_address))
        return found

    def unban(self, target: str) -> dict[str, Any]:
        """Lift a ban.

        Raises:
            ActionError: there is none.
        """
        try:
            if not _is_entry(target):
                hits = [ban.target for ban in self.bans.current(self._wall()) if target in ban.target]
                target = hits[0] if len(hits) == 1 else target
            lifted = self.bans.remove(target, self._wall())
        except (ConfigError, BansError) as error:
            raise ActionError(str(error)) from None
        if not lifted:
            raise ActionError(f"{target} is not banned; kas-bridge status lists the bans")
        self.events.emit(BanLifted(target=target))
        return {"target": target}

    # -- What the operator sees ----------------------------------------------------------------------------------------

    def status(self) -> dict[str, Any]:
        """Everything as plain values: seconds, bytes, bytes per second."""
        now = trio.current_time()
        node = self.node.status()
        return {
            "mode": self.mode,
            "version": VERSION,
            "peer_id": self.node.peer_id,
            "pid": os.getpid(),
            "uptime_s": round(now - self.started_at, 3),
            "stopping": self.stopping,
            "addresses": list(self.node.addresses),
            "data_dir": str(self._settings.data_dir),
            "control": str(self.control or ""),
            **reach.values(node, self._settings),
            "connections": len(node.connections),
            "limits": {name: {"limit": getattr(node.limits, name), "used": used} for name, used in node.in_use.items()},
            "limit_hits": dict(node.limit_hits),
            "bans": [
                {"target": ban.target, "since": ban.since, "until": ban.until, "reason": ban.reason}
                for ban in self.bans.current(self._wall())
            ],
            "events": dict(node.events),
        }

    def upgrades(self) -> list[dict[str, Any]]:
        """How it stands with each peer that was reached through a relay, as plain values."""
        return reach.upgrades(self.node.status().upgrades)

    @abstractmethod
    def peers(self) -> list[dict[str, Any]]:
        """Every peer, as plain values."""

    @abstractmethod
    def why(self, text: str) -> dict[str, Any]:
        """How a peer is connected, or why it is not.

        Raises:
            ActionError: no such peer.
        """


def _is_entry(text: str) -> bool:
    try:
        parse_entry(text)
    except ConfigError:
        return False
    return True


def ip_of(address: str) -> str | None:
    """The IP of a multiaddr, or ``None`` where it has none."""
    try:
        found = ip_port(address)
    except AddressError:
        return None
    return None if found is None else found[0]
