"""The command ``kas-bridge``. Exit codes: 0 it worked, 1 it did not and the text says why, 2 it was called wrongly."""

from __future__ import annotations

import dataclasses
import difflib
import gc
import json
import os
import sys
from collections.abc import Callable, Coroutine, Sequence
from importlib.metadata import version as distribution_version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, TypeVar

import cyclopts
import trio
from cyclopts import App, Parameter
from cyclopts.config import Dict, Env
from rich.text import Text

from kas_bridge import views
from kas_bridge.config import (
    CONFIG_FILE,
    ENVIRONMENT_PREFIX,
    NodeSettings,
    RelaySettings,
    Settings,
    check_environment,
    default_data_dir,
    read_file,
)
from kas_libp2p.errors import ConfigError, KasError

if TYPE_CHECKING:
    from kas_bridge.demo import Stage

T = TypeVar("T")

FAILED = 1
MISUSED = 2

STOP_WAIT = 3.0
"""Seconds to wait for a bridge that said that it stops; it takes two at most."""

_EXAMPLES = """
kas-bridge run                      in front of the kaspad on this machine
kas-bridge run --peer MULTIADDR     and keep that peer connected
kas-bridge peers                    who is joined
kas-bridge why PEER                 how one is, or why not
kas-bridge top                      all of it, live
kas-bridge relay                    help those whom nobody can dial; needs no kaspad
kas-bridge demo                     see it work, without a kaspad
"""

app = App(
    name="kas-bridge",
    version=distribution_version("kas-bridge"),
    help=f"A libp2p overlay in front of an unmodified kaspad.\n\n```\n{_EXAMPLES.strip()}\n```",
    help_format="markdown",
    help_on_error=False,
)

_DEFAULTS = Settings()
_RELAY_DEFAULTS = RelaySettings()
_DATA_DIR = default_data_dir()

_RELAY_NAMES = {each.name for each in dataclasses.fields(RelaySettings)} - {"serve_relay"}

DataDir = Annotated[
    Path, Parameter(name="--data-dir", env_var=ENVIRONMENT_PREFIX + "DATA_DIR", help="the bridge's data directory")
]
Json = Annotated[
    bool, Parameter(name="--json", negative=(), show_default=False, help="plain values for programs, one object a line")
]


def _run_config(app: App, commands: tuple[str, ...], arguments: cyclopts.ArgumentCollection) -> None:
    """Settings from the environment, then from config.toml in the data directory, for what no flag gave."""
    if commands[:1] not in (("run",), ("relay",)):
        return
    check_environment(os.environ)
    Env(ENVIRONMENT_PREFIX, command=False)(app, commands, arguments)
    given = next((each for each in arguments if each.name == "--data-dir"), None)
    data_dir = Path(given.tokens[-1].value) if given is not None and given.tokens else default_data_dir()
    path = data_dir.expanduser() / CONFIG_FILE
    values = read_file(path)
    if commands[0] == "relay":  # what is said of kaspad there is for the bridge
        values = {name: each for name, each in values.items() if name.replace("-", "_") in _RELAY_NAMES}
    Dict(values, source=str(path), use_commands_as_keys=False)(app, commands, arguments)
    for each in arguments:
        for token in each.tokens:
            # cyclopts would round 1.5 to a whole number, and read 0x10.
            if each.hint in (int, int | None) and not token.value.isdecimal():
                raise ConfigError(f"{token.keyword or each.name} must be a whole number, not {token.value!r}")


app.config = (_run_config,)


def _fail(error: BaseException | str, code: int = FAILED) -> NoReturn:
    out = views.console(error=True)
    text = Text(views.wrapped(f"kas-bridge: {error}", out), style="bold")
    text.stylize("red", 0, 11)
    out.print(text, soft_wrap=True)
    sys.exit(code)


def _print(*lines: str) -> None:
    out = views.console()
    for line in lines:
        out.print(Text(views.wrapped(line, out)), soft_wrap=True)


def _ask(data_dir: Path, request: dict[str, Any]) -> dict[str, Any]:
    from kas_bridge.control import ask
    from kas_bridge.datadir import socket_paths

    paths = socket_paths(data_dir.expanduser().absolute())
    try:
        return _run(lambda: ask(paths, request))
    except KasError as error:
        _fail(error)
    except KeyboardInterrupt:
        sys.exit(130)


def _run(main: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """`trio.run`; a lone exception comes out as it is, not in the groups of the nurseries that it went through."""
    try:
        return trio.run(main)
    except BaseExceptionGroup as group:
        lone: BaseException = group
        while isinstance(lone, BaseExceptionGroup) and len(lone.exceptions) == 1:
            lone = lone.exceptions[0]
        if isinstance(lone, BaseExceptionGroup):
            raise
        raise lone from None


def _tell(answer: dict[str, Any], as_json: bool, show: Callable[[], None]) -> None:
    if as_json:
        print(json.dumps(answer, ensure_ascii=False))
    else:
        show()


RunJson = Annotated[
    bool, Parameter(name="--json", negative=(), show_default=False, env_var=(), help="events as JSON, one a line")
]
Verbose = Annotated[
    bool, Parameter(name=["--verbose", "-v"], negative=(), show_default=False, help="every event, also the small ones")
]


@app.command
def run(
    *,
    settings: Annotated[Settings, Parameter(name="*")] = _DEFAULTS,
    json: RunJson = False,
    verbose: Verbose = False,
) -> None:
    """Run the bridge in front of a kaspad, until it is told to stop (Ctrl-C, SIGTERM, or kas-bridge stop).

    kaspad needs no flag for it. Settings come from flags, then KAS_BRIDGE_* variables, then config.toml in the data
    directory, then the defaults.
    """
    _serve(settings, json, verbose)


@app.command
def relay(
    *,
    settings: Annotated[RelaySettings, Parameter(name="*")] = _RELAY_DEFAULTS,
    json: RunJson = False,
    verbose: Verbose = False,
) -> None:
    """Run a relay, without a kaspad, on a machine that everybody can dial, until it is told to stop.

    It keeps places for nodes that nobody can dial, and carries the connections to them. Others use it with --relay.
    Settings come from where those of run come from.
    """
    _serve(settings, json, verbose)


def _serve(settings: NodeSettings, as_json: bool, verbose: bool) -> None:
    from kas_bridge.run import serve

    try:
        _run(lambda: serve(settings, as_json=as_json, verbose=verbose))
        # All is closed. The interpreter would take apart what is left, object by object: 0.2 s of CPU of the 2 s that
        # an operator is promised, and on a busy machine a multiple.
        gc.freeze()
    except ConfigError as error:
        _fail(error, MISUSED)
    except KasError as error:
        _fail(error)


@app.command
def status(*, data_dir: DataDir = _DATA_DIR, json: Json = False) -> None:
    """How the bridge or relay is doing: kaspad, role, relays, addresses, peers, limits, bans."""
    answer = _ask(data_dir, {"action": "status"})
    _tell(answer, json, lambda: _print(*views.status(answer)))


@app.command
def peers(*, data_dir: DataDir = _DATA_DIR, json: Json = False) -> None:
    """Who is joined, by which way, since when, and what it carried; and who is not, and why.

    Of a relay: who is connected, and has a place there.
    """
    answer = _ask(data_dir, {"action": "peers"})
    out = views.console()
    _tell(
        answer,
        json,
        lambda: out.print(views.peers(answer["peers"], answer["upgrades"], out, relay=answer["mode"] == "relay")),
    )


@app.command
def why(peer: str, *, data_dir: DataDir = _DATA_DIR, json: Json = False) -> None:
    """How one peer is connected, or why it is not, and what would help.

    Args:
        peer: its peer id, or a part of it that no other peer's has.
    """
    answer = _ask(data_dir, {"action": "why", "peer": peer})
    _tell(answer, json, lambda: _print(*views.why(answer)))


@app.command
def connect(multiaddr: str, *, data_dir: DataDir = _DATA_DIR, json: Json = False) -> None:
    """Keep a peer connected from now on, until the bridge stops. For good: `peer = [...]` in config.toml.

    Args:
        multiaddr: where it is and who it is, such as /ip4/192.0.2.1/tcp/16117/p2p/12D3KooW…
    """
    answer = _ask(data_dir, {"action": "connect", "multiaddr": multiaddr})

    def show() -> None:
        name = views.short(answer["peer_id"])
        if answer["state"] == "joined":
            _print(f"{name} is joined already, and kept connected.")
        elif answer["kaspad"] != "up":
            _print(f"{name} is kept connected, as soon as kaspad is there (kas-bridge status).")
        else:
            _print(f"{name} is kept connected until the bridge stops; see kas-bridge why {answer['peer_id'][:12]}")

    _tell(answer, json, show)


@app.command
def disconnect(peer: str, *, data_dir: DataDir = _DATA_DIR, json: Json = False) -> None:
    """End a peer and keep it connected no longer. It may come back by itself: see ban.

    Args:
        peer: its peer id, or a part of it that no other peer's has.
    """
    answer = _ask(data_dir, {"action": "disconnect", "peer": peer})

    def show() -> None:
        state = "left" if answer["was_joined"] else "was not joined"
        kept = ", and is kept connected no longer" if answer["was_kept"] else ""
        _print(f"{views.short(answer['peer_id'])} {state}{kept}.")

    _tell(answer, json, show)


@app.command
def ban(
    target: str,
    *,
    hours: Annotated[float, Parameter(help="for how long")] = 24.0,
    forever: Annotated[bool, Parameter(negative=(), show_default=False, help="for good")] = False,
    reason: Annotated[str, Parameter(help="a note to yourself")] = "",
    data_dir: DataDir = _DATA_DIR,
    json: Json = False,
) -> None:
    """Keep a peer id, IP address or network out, also after a restart, and end what is there of it.

    Args:
        target: a peer id (or a part of one that is here), an IP address, or a network such as 203.0.113.0/24.
    """
    if hours <= 0:
        _fail("--hours must be above 0", MISUSED)
    request = {"action": "ban", "target": target, "seconds": None if forever else hours * 3600, "reason": reason}
    answer = _ask(data_dir, request)

    def show() -> None:
        until = "for good" if forever else f"for {views.seconds(hours * 3600)}"
        ended = f"; {views.plural(len(answer['ended']), 'peer')} ended" if answer["ended"] else ""
        _print(f"{answer['target']} is banned {until}{ended}.")

    _tell(answer, json, show)


@app.command
def unban(target: str, *, data_dir: DataDir = _DATA_DIR, json: Json = False) -> None:
    """Lift a ban.

    Args:
        target: as it stands in kas-bridge status, or a part of it.
    """
    answer = _ask(data_dir, {"action": "unban", "target": target})
    _tell(answer, json, lambda: _print(f"{answer['target']} is banned no longer."))


@app.command
def events(
    *,
    data_dir: DataDir = _DATA_DIR,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """What happens, as it happens, until the bridge ends or Ctrl-C."""
    from kas_bridge.control import follow
    from kas_bridge.datadir import socket_paths

    def show(event: dict[str, Any]) -> None:
        if json:
            _json_line(event)
            return
        line = views.event_line(event, verbose=verbose)
        if line is not None:
            _print(line)

    try:
        _run(lambda: follow(socket_paths(data_dir.expanduser().absolute()), show))
    except KasError as error:
        _fail(error)
    except (KeyboardInterrupt, BrokenPipeError):
        sys.exit(130)


@app.command
def top(*, data_dir: DataDir = _DATA_DIR, json: Json = False) -> None:
    """Peers, paths, relays and events, live, until Ctrl-C. With --json: status and peers, once a second."""
    from kas_bridge.control import ask
    from kas_bridge.datadir import socket_paths
    from kas_bridge.top import EVERY, show

    paths = socket_paths(data_dir.expanduser().absolute())
    out = views.console()
    if not json and not out.is_terminal:
        _fail(
            "top needs a terminal; kas-bridge status and kas-bridge peers print it once, --json all the time", MISUSED
        )

    async def print_all() -> None:
        while True:
            status = await ask(paths, {"action": "status"})
            _json_line({"status": status, **await ask(paths, {"action": "peers"})})
            await trio.sleep(EVERY)

    try:
        _run(print_all if json else lambda: show(paths, out))
    except KasError as error:
        _fail(error)
    except (KeyboardInterrupt, BrokenPipeError):
        sys.exit(130)


@app.command
def stop(*, data_dir: DataDir = _DATA_DIR, json: Json = False) -> None:
    """End the bridge in order, and wait until it is gone."""
    answer = _ask(data_dir, {"action": "stop"})
    _wait_gone(data_dir.expanduser().absolute())
    _tell(answer, json, lambda: _print(f"The {answer['mode']} has stopped."))


@app.command
def demo(
    *,
    nat: Annotated[str, Parameter(help="the types of the two home routers (natlab types lists them)")] = "pr,eimx",
    kaspad: Annotated[
        Path | None,
        Parameter(help="the kaspad to use; else $KASPAD, PATH, the cache of scripts/build-kaspad"),
    ] = None,
    light: Annotated[
        bool, Parameter(negative=(), show_default=False, help="with light nodes even if there is a kaspad")
    ] = False,
    all_pairs: Annotated[
        bool,
        Parameter(name="--all", negative=(), show_default=False, help="instead: every pair of types, and the matrix"),
    ] = False,
    compare: Annotated[
        bool,
        Parameter(negative=(), show_default=False, help="instead: how fast, beside plain TCP, without NATs"),
    ] = False,
    blocks: Annotated[
        int | None, Parameter(help="filled blocks of 240 kB that the kaspads sync; else 300, with --compare 600")
    ] = None,
    delay: Annotated[
        bool, Parameter(help="with --compare also with 50 ms of delay each way, between two network namespaces")
    ] = True,
    json: Annotated[
        bool, Parameter(name="--json", negative=(), show_default=False, help="only the figures, as one object")
    ] = False,
) -> None:
    """See it work: two nodes behind home routers meet through a relay, become direct, and sync.

    The routers are real NATs in network namespaces, the bridges and the relay real processes. With a kaspad the nodes
    are two unmodified ones; without, light ones. Where there are no namespaces, all of it takes place on loopback.
    """
    from kas_bridge import demo as show
    from kas_bridge.simnet.node import KaspadMissing, find_kaspad
    from kas_bridge.simnet.process import ProcessEnded
    from kas_bridge.simnet.wire import WireError
    from natlab import LabError

    stage = show.Stage(quiet=json)
    binary = None
    if not light:
        try:
            binary = find_kaspad(kaspad)
        except KaspadMissing as error:
            if kaspad is not None:
                _fail(error)
            stage.say(f"(With light nodes: {error}.)")
            stage.say()
    if blocks is not None and not 10 <= blocks <= 5000:
        _fail("--blocks must be 10 to 5000", MISUSED)
    try:
        if all_pairs:
            _every_pair(stage, json)
            return
        values = _demo(stage, nat, binary, compare=compare, blocks=blocks, delay=delay)
    except (KasError, trio.TooSlowError, ProcessEnded, WireError, LabError, OSError) as error:
        _fail(str(error) or "a step of the demonstration took too long: try again when this machine has less to do")
    except KeyboardInterrupt:
        sys.exit(130)
    if json:
        _json_line(values)


def _every_pair(stage: Stage, as_json: bool) -> None:
    from kas_bridge import demo_nat

    found = demo_nat.every_pair(stage)
    if as_json:
        for each in found:
            _json_line(dataclasses.asdict(each))
    if not demo_nat.show_every_pair(stage, found):
        sys.exit(FAILED)


def _demo(
    stage: Stage, nat: str, kaspad: Path | None, *, compare: bool, blocks: int | None, delay: bool
) -> dict[str, Any]:
    """Show what was asked for; returns the figures."""
    from kas_bridge import demo, demo_nat

    nats = demo_nat.parse_nats(nat)
    missing = "" if compare else demo_nat.no_lab()
    if missing:
        stage.say(f"(On loopback, without NATs: {missing}.)")
        stage.say()
    if not (compare or missing):
        if kaspad is None:
            met = _run(lambda: demo.interruptible(stage, lambda: demo_nat.light(stage, nats)))
        else:
            full = blocks or demo_nat.FULL_BLOCKS
            met = _run(lambda: demo.interruptible(stage, lambda: demo_nat.kaspads(stage, nats, kaspad, full=full)))
        demo_nat.show(stage, met)
        return dataclasses.asdict(met)
    if kaspad is None:
        result = _run(lambda: demo.interruptible(stage, lambda: demo.light(stage)))
        demo.show_light(stage, result)
        return dataclasses.asdict(result)
    full = blocks or demo.FULL_BLOCKS
    figures = _run(lambda: demo.interruptible(stage, lambda: demo.kaspads(stage, kaspad, full=full, distance=delay)))
    demo.show_kaspads(stage, figures)
    return dataclasses.asdict(figures)


def _wait_gone(data_dir: Path) -> None:
    from kas_bridge.datadir import is_locked

    async def wait() -> None:
        with trio.move_on_after(STOP_WAIT):
            while is_locked(data_dir):  # noqa: ASYNC110 - another process holds it, which sets no event of ours
                await trio.sleep(0.02)

    trio.run(wait)


def _json_line(values: dict[str, Any]) -> None:
    print(json.dumps(values, ensure_ascii=False), flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    """The command's entry point."""
    try:
        app(argv, exit_on_error=False, print_error=False)
    except cyclopts.CycloptsError as error:
        _fail(f"{_words(error)} (see kas-bridge --help)", MISUSED)
    except KasError as error:
        _fail(error, MISUSED)
    except BrokenPipeError:
        # Whoever read the output has had enough of it; nothing may be written at the interpreter's end either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(FAILED)


def _words(error: cyclopts.CycloptsError) -> str:
    match error:
        case cyclopts.UnknownCommandError(unused_tokens=[unknown, *_]):
            commands = [name for name in app if not name.startswith("-")]
            close = difflib.get_close_matches(unknown, commands, n=1)
            guess = f" (did you mean {close[0]}?)" if close else ""
            return f"unknown command {unknown!r}{guess}; there are: {', '.join(commands)}"
        case cyclopts.MissingArgumentError(command_chain=[command, *_], argument=argument) if argument is not None:
            if argument.field_info.is_positional:
                return f"{command} needs {argument.name.lstrip('-').upper()}"
    text = " ".join(str(error).split())
    return text[:1].lower() + text[1:].rstrip(".")
