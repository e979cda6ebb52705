"""One bridge, or one relay, as a process: data directory, node, control socket, signals, and what is printed."""

from __future__ import annotations

import json
import os
import signal
import time
from typing import Any

import trio

from kas_bridge import datadir, reach, views
from kas_bridge._control import encode, event_values
from kas_bridge._keeper import MAX_KEPT
from kas_bridge.app import Bridge
from kas_bridge.config import NodeSettings, Settings
from kas_bridge.control import ControlServer, open_socket
from kas_bridge.daemon import Daemon
from kas_bridge.relay import Relay
from kas_libp2p.errors import ListenError
from kas_libp2p.events import Subscription
from kas_libp2p.node import open_node

STDOUT = 1
"""File descriptor."""

STOP_HARD = 1.4
"""Seconds from the wish to stop until whatever is left is cut: an operator, and a service manager, is promised two, and
the interpreter's own end takes its part on a small machine."""

LAST_WORDS = 0.2
"""Seconds for what was not printed yet when the peers are gone."""

FIRST_LOOK = 2.0
"""Seconds that the start-up text waits for what kaspad says."""


async def serve(settings: NodeSettings, *, as_json: bool = False, verbose: bool = False) -> None:
    """Run a bridge, or a relay, as the settings are of the one or the other, until it is told to stop.

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


async def _serve(settings: NodeSettings, everything: trio.CancelScope, as_json: bool, verbose: bool) -> None:
    async with open_node(settings.overlay_config()) as node:
        path, listener = open_socket(datadir.socket_paths(settings.data_dir))
        daemon: Daemon
        if isinstance(settings, Settings):
            daemon = Bridge(settings, node, control=path)
        else:
            daemon = Relay(settings, node, control=path)
        control = ControlServer(daemon, listener, path)
        show = _ShowJson() if as_json else _Show(daemon, verbose)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_watch_signals, daemon)
            nursery.start_soon(_cut_when_late, daemon, everything)
            nursery.start_soon(control.run)
            async with trio.open_nursery() as printing:
                with node.bus.subscribe() as events:
                    printing.start_soon(show.run, events)
                    await daemon.run()
                printing.cancel_scope.deadline = trio.current_time() + LAST_WORDS
            nursery.cancel_scope.cancel()


async def _watch_signals(daemon: Daemon) -> None:
    wanted = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # that is what nohup(1) is for
        wanted.append(signal.SIGHUP)
    with trio.open_signal_receiver(*wanted) as signals:
        async for number in signals:
            daemon.stop(f"by {signal.Signals(number).name}")


async def _cut_when_late(daemon: Daemon, everything: trio.CancelScope) -> None:
    await daemon.wait_stop()
    everything.deadline = trio.current_time() + STOP_HARD


_OPENING = frozenset(
    {
        "kaspad-changed",
        "role-changed",
        "reservation-made",
        "reservation-failed",
        "reservation-lost",
        "port-mapped",
        "port-mapping-failed",
    }
)
"""What happened before the start-up text stands in it."""

_SAID_ONCE = {
    "peer-failed": ("peer", "problem"),
    "reservation-failed": ("relay", "reason"),
    "port-mapped": ("local", "external"),
    "port-mapping-failed": ("local", "reason"),
    "relay-request-served": ("peer", "status"),
}
"""Events that come again and again, about whom, and what they have to say: said once, it is known."""

MAX_SAID = 4 * MAX_KEPT
"""How much of that is remembered; then it may be said again."""


class _Show:
    """Prints for people."""

    def __init__(self, daemon: Daemon, verbose: bool) -> None:
        self._daemon = daemon
        self._verbose = verbose
        self._said: dict[tuple[str, str], str] = {}
        self._nat = ""

    async def run(self, events: Subscription) -> None:
        with trio.move_on_after(FIRST_LOOK):
            await self._daemon.wait_looked()
        status, shown_at = self._daemon.status(), time.time()
        self._nat = reach.nat_name(status["reachability"]["nat"])
        await _tell(*views.startup(status))
        async for event in events:
            values: dict[str, Any] = json.loads(encode(event_values(event)))
            if values["event"] in _OPENING and values["at"] <= shown_at:
                continue
            if values["event"] == "connection-closed":
                self._said.pop(("relay-request-served", values["peer"]), None)
            if values["event"] == "reachability-tested":
                await self._tell_nat()
            if not self._verbose and self._known(values):
                continue
            line = views.event_line(values, verbose=self._verbose)
            if line is not None:
                await _tell(line)

    async def _tell_nat(self) -> None:
        """Nothing else tells that it was found out what kind of NAT there is."""
        status = self._daemon.status()
        name = reach.nat_name(status["reachability"]["nat"])
        if name and name != self._nat:
            self._nat = name
            await _tell(views.at(time.time(), f"role  {reach.role_line(status)}"))

    def _known(self, values: dict[str, Any]) -> bool:
        """Whether the same was said of the same before."""
        names = _SAID_ONCE.get(values["event"])
        if names is None:
            return False
        whom, what = ((values["event"], str(values[names[0]])), str(values[names[1]]))
        if whom not in self._said and len(self._said) >= MAX_SAID:
            self._said.clear()
        known = self._said.get(whom) == what
        self._said[whom] = what
        return known


class _ShowJson:
    """Prints for programs."""

    async def run(self, events: Subscription) -> None:
        async for event in events:
            await _print(encode(event_values(event)))


async def _tell(*lines: str) -> None:
    """Print for people, within the width of their terminal."""
    out = views.console()
    await _print("".join(f"{views.wrapped(line, out)}\n" for line in lines).encode("utf-8", "replace"))


async def _print(data: bytes) -> None:
    """Write to standard output. A reader that does not read (a terminal after Ctrl-S, a full pipe) holds up no peer."""
    await trio.to_thread.run_sync(_write, data, abandon_on_cancel=True)  # type: ignore[call-arg,unused-ignore]


def _write(data: bytes) -> None:
    # Not by way of sys.stdout: a thread that was left in there would hold its lock when the interpreter ends.
    try:
        while data:
            data = data[os.write(STDOUT, data) :]
    except OSError:
        pass  # the reader is gone, or the disk is full; the bridge has other readers
