"""One bridge as a process: data directory, node, control socket, signals, and what is printed."""

from __future__ import annotations

import json
import signal
import sys
import time
from typing import Any

import trio

from kas_bridge import datadir, views
from kas_bridge._control import encode, event_values
from kas_bridge._keeper import MAX_KEPT
from kas_bridge.app import Bridge
from kas_bridge.config import Settings
from kas_bridge.control import ControlServer, open_socket
from kas_libp2p.errors import ListenError
from kas_libp2p.events import Subscription
from kas_libp2p.node import open_node

STOP_HARD = 1.4
"""Seconds from the wish to stop until whatever is left is cut: an operator, and a service manager, is promised two, and
the interpreter's own end takes its part on a small machine."""

FIRST_LOOK = 2.0
"""Seconds that the start-up text waits for what kaspad says."""


async def serve(settings: Settings, *, as_json: bool = False, verbose: bool = False) -> None:
    """Run a bridge until it is told to stop.

    Raises:
        DataDirError: the data directory can't be used, or another bridge uses it.
        IdentityError, ListenError, ControlError, ConfigError, BansError: as their names say; the text tells what helps.
    """
    datadir.prepare(settings.data_dir)
    # The whole of it, the node's own end included, is over when this scope says so.
    with datadir.locked(settings.data_dir), trio.CancelScope() as everything:
        try:
            await _serve(settings, everything, as_json, verbose)
        except ListenError as error:
            raise ListenError(f"{error}; listen elsewhere with --listen /ip4/0.0.0.0/tcp/PORT") from error


async def _serve(settings: Settings, everything: trio.CancelScope, as_json: bool, verbose: bool) -> None:
    async with open_node(settings.overlay_config()) as node:
        path, listener = open_socket(datadir.socket_paths(settings.data_dir))
        bridge = Bridge(settings, node, control=path)
        control = ControlServer(bridge, listener, path)
        show = _ShowJson() if as_json else _Show(bridge, verbose)
        async with trio.open_nursery() as nursery:
            with node.bus.subscribe() as events:
                nursery.start_soon(_watch_signals, bridge)
                nursery.start_soon(_cut_when_late, bridge, everything)
                nursery.start_soon(control.run)
                nursery.start_soon(show.run, events)
                await bridge.run()
                await trio.lowlevel.checkpoint()
            nursery.cancel_scope.cancel()


async def _watch_signals(bridge: Bridge) -> None:
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async for number in signals:
            bridge.stop(f"by {signal.Signals(number).name}")


async def _cut_when_late(bridge: Bridge, everything: trio.CancelScope) -> None:
    await bridge.wait_stop()
    everything.deadline = trio.current_time() + STOP_HARD


class _Show:
    """Prints for people."""

    def __init__(self, bridge: Bridge, verbose: bool) -> None:
        self._bridge = bridge
        self._verbose = verbose
        self._problems: dict[str, str] = {}

    async def run(self, events: Subscription) -> None:
        with trio.move_on_after(FIRST_LOOK):
            await self._bridge.watch.wait_looked()
        _tell(*views.startup(self._bridge.status()))
        shown_at = time.time()
        async for event in events:
            values: dict[str, Any] = json.loads(encode(event_values(event)))
            if values["event"] == "kaspad-changed" and values["at"] <= shown_at:
                continue
            if (
                values["event"] == "peer-failed"
                and not self._verbose
                and self._known(values["peer"], values["problem"])
            ):
                continue
            line = views.event_line(values, verbose=self._verbose)
            if line is not None:
                _tell(line)

    def _known(self, peer: str, problem: str) -> bool:
        """Whether the last attempt at this peer failed for the same reason: said once, it is known."""
        if peer not in self._problems and len(self._problems) >= MAX_KEPT:
            self._problems.clear()
        known = self._problems.get(peer) == problem
        self._problems[peer] = problem
        return known


class _ShowJson:
    """Prints for programs."""

    async def run(self, events: Subscription) -> None:
        async for event in events:
            _line(encode(event_values(event)).decode().rstrip())


def _tell(*lines: str) -> None:
    """Print for people, within the width of their terminal."""
    out = views.console()
    _line(*(views.wrapped(line, out) for line in lines))


def _line(*lines: str) -> None:
    try:
        sys.stdout.write("".join(f"{line}\n" for line in lines))
        sys.stdout.flush()
    except BrokenPipeError:
        # Whoever read the output is gone; the bridge has other readers.
        sys.stdout = open("/dev/null", "w")  # noqa: SIM115
