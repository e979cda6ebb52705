"""A relay by itself: keeps places for peers that nobody can dial, and carries circuits between them. No kaspad."""

from __future__ import annotations

from collections import Counter
from typing import Any

import trio
from trio import TaskStatus  # type: ignore[attr-defined,unused-ignore]  # libp2p brings stubs that lack it

from kas_bridge._control import ActionError
from kas_bridge.daemon import VERSION, Daemon
from kas_bridge.events import BridgeStarted, BridgeStopping

NO_KASPAD = "this is a relay, in front of no kaspad: it joins nobody by itself (kas-bridge run does)"


class Relay(Daemon):
    """``kas-bridge relay``: the node does the work, and here the operator is answered."""

    mode = "relay"

    async def run(self, *, task_status: TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until `stop` is called or it is cancelled."""
        self.node.set_policy(self._policy)
        self.events.emit(
            BridgeStarted(
                version=VERSION,
                peer_id=self.node.peer_id,
                addresses=self.node.addresses,
                control=str(self.control or ""),
                kept=0,
            )
        )
        task_status.started()
        await self.wait_stop()
        self.events.emit(BridgeStopping(reason=self._stop_reason or ""))

    def connect(self, address: str) -> dict[str, Any]:
        """Refused: see `NO_KASPAD`."""
        raise ActionError(NO_KASPAD)

    def why(self, text: str) -> dict[str, Any]:
        """Refused: see `NO_KASPAD`."""
        raise ActionError(f"{NO_KASPAD}; kas-bridge peers lists who is connected")

    def peers(self) -> list[dict[str, Any]]:
        """Every connection, with what its peer has here, as plain values."""
        status = self.node.status()
        places = {each.peer for each in status.relay.reservations} if status.relay is not None else set()
        circuits: Counter[str] = Counter()
        for each in status.relay.circuits if status.relay is not None else ():
            circuits.update((each.source, each.destination))
        return [
            {
                "peer_id": each.peer,
                "state": "connected",
                "direction": str(each.direction),
                "path": str(each.path.kind),
                "relay_id": each.path.relay,
                "address": each.remote_address,
                "agent": each.agent,
                "rtt_ms": None if each.rtt is None else round(each.rtt * 1000, 2),
                "since_ms": round(each.seconds * 1000),
                "place": each.peer in places,
                "circuits": circuits[each.peer],
                "received": each.received,
                "sent": each.sent,
            }
            for each in status.connections
        ]
