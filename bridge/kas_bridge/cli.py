"""The command ``kas-bridge``. Exit codes: 0 it worked, 1 it did not and the text says why, 2 it was called wrongly."""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
import sys
from collections.abc import Callable, Coroutine, Sequence
from importlib.metadata import version as distribution_version
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar

import cyclopts
import trio
from cyclopts import App, Parameter
from cyclopts.config import Dict, Env
from rich.text import Text

from kas_bridge import views
from kas_bridge.config import CONFIG_FILE, ENVIRONMENT_PREFIX, Settings, check_environment, default_data_dir, read_file
from kas_libp2p.errors import ConfigError, KasError

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
_DATA_DIR = default_data_dir()

DataDir = Annotated[
    Path, Parameter(name="--data-dir", env_var=ENVIRONMENT_PREFIX + "DATA_DIR", help="the bridge's data directory")
]
Json = Annotated[
    bool, Parameter(name="--json", negative=(), show_default=False, help="plain values for programs, one object a line")
]


def _run_config(app: App, commands: tuple[str, ...], arguments: cyclopts.ArgumentCollection) -> None:
    """Settings from the environment, then from config.toml in the data directory, for what no flag gave."""
    if commands[:1] != ("run",):
        return
    check_environment(os.environ)
    Env(ENVIRONMENT_PREFIX, command=False)(app, commands, arguments)
    given = next((each for each in arguments if each.name == "--data-dir"), None)
    data_dir = Path(given.tokens[-1].value) if given is not None and given.tokens else default_data_dir()
    path = data_dir.expanduser() / CONFIG_FILE
    values = read_file(path)
    Dict(values, source=str(path), use_commands_as_keys=False)(app, commands, arguments)
    for each in arguments:
        for token in each.tokens:
            # cyclopts would round 1.5 to a whole number, and read 0x10.
            if each.hint is int and not token.value.isdecimal():
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


@app.command
def run(
    *,
    settings: Annotated[Settings, Parameter(name="*")] = _DEFAULTS,
    json: Annotated[
        bool, Parameter(name="--json", negative=(), show_default=False, env_var=(), help="events as JSON, one a line")
    ] = False,
    verbose: Annotated[
        bool,
        Parameter(name=["--verbose", "-v"], negative=(), show_default=False, help="every event, also the small ones"),
    ] = False,
) -> None:
    """Run the bridge in front of a kaspad, until it is told to stop (Ctrl-C, SIGTERM, or kas-bridge stop).

    kaspad needs no flag for it. Settings come from flags, then KAS_BRIDGE_* variables, then config.toml in the data
    directory, then the defaults.
    """
    from kas_bridge.run import serve

    try:
        _run(lambda: serve(settings, as_json=json, verbose=verbose))
    except ConfigError as error:
        _fail(error, MISUSED)
    except KasError as error:
        _fail(error)


@app.command
def status(*, data_dir: DataDir = _DATA_DIR, json: Json = False) -> None:
    """How the bridge is doing: kaspad, peers, limits, bans."""
    answer = _ask(data_dir, {"action": "status"})
    _tell(answer, json, lambda: _print(*views.status(answer)))


@app.command
def peers(*, data_dir: DataDir = _DATA_DIR, json: Json = False) -> None:
    """Who is joined, by which way, since when, and what it carried; and who is not, and why."""
    answer = _ask(data_dir, {"action": "peers"})
    out = views.console()
    _tell(answer, json, lambda: out.print(views.peers(answer["peers"], out)))


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
    verbose: Annotated[
        bool, Parameter(name=["--verbose", "-v"], negative=(), show_default=False, help="also the small ones")
    ] = False,
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
def stop(*, data_dir: DataDir = _DATA_DIR, json: Json = False) -> None:
    """End the bridge in order, and wait until it is gone."""
    answer = _ask(data_dir, {"action": "stop"})
    _wait_gone(data_dir.expanduser().absolute())
    _tell(answer, json, lambda: _print("The bridge has stopped."))


@app.command
def demo(
    *,
    kaspad: Annotated[
        Path | None,
        Parameter(help="the kaspad to use; else $KASPAD, PATH, the cache of scripts/build-kaspad"),
    ] = None,
    light: Annotated[
        bool, Parameter(negative=(), show_default=False, help="with light nodes even if there is a kaspad")
    ] = False,
    blocks: Annotated[int, Parameter(help="filled blocks of 240 kB that the kaspads sync")] = 600,
    delay: Annotated[bool, Parameter(help="also with 50 ms of delay each way, between two network namespaces")] = True,
    json: Annotated[
        bool, Parameter(name="--json", negative=(), show_default=False, help="only the figures, as one object")
    ] = False,
) -> None:
    """See it work: two bridges, two nodes, and what they carry.

    With a kaspad: two unmodified nodes sync through two bridges, beside plain TCP. Without: light nodes, in seconds.
    """
    from kas_bridge import demo as show
    from kas_bridge.simnet.node import KaspadMissing, find_kaspad
    from kas_bridge.simnet.process import ProcessEnded

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
    if not 10 <= blocks <= 5000:
        _fail("--blocks must be 10 to 5000", MISUSED)
    try:
        if binary is None:
            result = _run(lambda: show.interruptible(stage, lambda: show.light(stage)))
            show.show_light(stage, result)
            values = dataclasses.asdict(result)
        else:
            figures = _run(
                lambda: show.interruptible(stage, lambda: show.kaspads(stage, binary, full=blocks, distance=delay))
            )
            show.show_kaspads(stage, figures)
            values = dataclasses.asdict(figures)
    except (KasError, trio.TooSlowError, ProcessEnded) as error:
        _fail(str(error) or "a step of the demonstration took too long")
    except KeyboardInterrupt:
        sys.exit(130)
    if json:
        _json_line(values)


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
