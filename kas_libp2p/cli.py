"""The command ``kas-libp2p``, a network tool for whoever tests libp2p. See ``docs/kas-libp2p.md``.

Only what a command needs is imported, and only when it runs: libp2p alone takes a second.
"""

from __future__ import annotations

import base64
import binascii
import errno
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Coroutine, Sequence
from enum import IntEnum
from importlib.metadata import version as distribution_version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import cyclopts
import trio
from cyclopts import App, Parameter

from kas_libp2p.errors import (
    AddressError,
    ConfigError,
    DialError,
    IdentityError,
    KasError,
    ListenError,
    NegotiationError,
    PeerIdMismatch,
    ResolveError,
    SecurityError,
    UpgradeTimeout,
)
from kas_libp2p.units import parse_size

if TYPE_CHECKING:
    from kas_libp2p.identity import Identity


class Exit(IntEnum):
    """How the command ends. Ended by a signal: 128 and its number, unless a signal is the ordinary end."""

    DONE = 0
    FAILED = 1
    """For a reason that has no number of its own."""
    MISUSED = 2
    """Called wrongly: an option, an address, a size."""
    UNREACHABLE = 3
    """No address led to a verified connection."""
    WRONG_PEER = 4
    """Somebody else answered than the peer that was named."""
    KEY = 5
    """A key, or its file, can't be used."""
    LISTEN = 6
    """An address can't be listened on."""
    PEER = 7
    """Connected, but the peer did not do what was asked: it does not speak the protocol, or stopped."""
    RELAYED = 8
    """Connected, but by way of a relay only, and a direct connection was waited for."""


MAX_KEY = 4096
"""Bytes of a key that are read; an ed25519 key has 68."""
DEFAULT_SIZE = "64MiB"
"""What ``perf`` sends each way, if nothing else is said."""

_EXAMPLES = """
kas-libp2p listen --port 4001             serve ping, perf and identify
kas-libp2p dial /ip4/…/tcp/…/p2p/12D3…    who is there, and by which way
kas-libp2p why /ip4/…/p2p-circuit/p2p/…   whether a relayed connection becomes direct, and why not
kas-libp2p ping /ip4/…/tcp/…/p2p/12D3…    round trips
kas-libp2p perf 192.0.2.1:4001            how much goes through
kas-libp2p relay --port 4001              carry others' connections
kas-libp2p key new node.key               an identity that stays
"""

FLAG = Parameter(negative=(), show_default=False)
"""An option without a value."""

app = App(
    name="kas-libp2p",
    version=distribution_version("kas-libp2p"),
    help=f"A network tool for libp2p.\n\n```\n{_EXAMPLES.strip()}\n```",
    help_format="markdown",
    help_on_error=False,
)
key_app = App(name="key", help="Key files: ed25519, in libp2p's protobuf form, mode 0600.", help_format="markdown")
app.command(key_app)

Json = Annotated[bool, FLAG, Parameter(name="--json", help="one JSON object a line, for programs")]
KeyFile = Annotated[
    Path | None, Parameter(name="--key", help="key file, made if missing; else a new key for this run only")
]


Port = Annotated[int | None, Parameter(help="listen on every interface, at this port")]
Announce = Annotated[list[str] | None, Parameter(negative=(), help="address to tell others (repeatable)")]
Verbose = Annotated[bool, FLAG, Parameter(name=["--verbose", "-v"], help="also the small events")]
Meet = Annotated[
    list[str] | None,
    Parameter(negative=(), help="meet this relay first: it tells where others see us (repeatable)"),
]


def _size(_: Any, tokens: Sequence[Any]) -> int:
    return parse_size(tokens[0].value)


Size = Annotated[int | None, Parameter(converter=_size)]


# Commands that need a node


@app.command
def listen(
    *addresses: str,
    port: Port = None,
    announce: Announce = None,
    echo: Annotated[bool, FLAG, Parameter(help="serve /echo/1.0.0 too, which sends back what comes")] = False,
    relay: Annotated[
        list[str] | None, Parameter(negative=(), help="be reachable through this relay (repeatable)")
    ] = None,
    key: KeyFile = None,
    verbose: Verbose = False,
    json: Json = False,
) -> None:
    """Listen, serve identify, ping and perf, and tell what happens, until Ctrl-C or SIGTERM.

    Args:
        addresses: multiaddrs to listen on, as /ip4/127.0.0.1/tcp/4001; port 0 takes a free one, as does none at all.
    """
    _listen(
        _where(addresses, port, json),
        json,
        key_file=key,
        announce=announce or (),
        echo=echo,
        verbose=verbose,
        relays=relay or (),
    )


@app.command
def relay(
    *addresses: str,
    port: Port = None,
    announce: Announce = None,
    limits: Annotated[
        Literal["default", "reference", "open"],
        Parameter(help="default: 2 h and 16 MiB/s a circuit; reference: 2 min and 128 KiB, as rust; open: none"),
    ] = "default",
    purpose: Annotated[
        Literal["any", "overlay"], Parameter(help="carry between any peers, or those only that serve a Kaspa stream")
    ] = "any",
    key: KeyFile = None,
    verbose: Verbose = False,
    json: Json = False,
) -> None:
    """Be a relay (circuit relay v2): keep places for peers that nobody can dial, and carry connections to them.

    Others use it as /ip4/.../p2p/RELAY; through it they are /ip4/.../p2p/RELAY/p2p-circuit/p2p/PEER.

    Args:
        addresses: multiaddrs to listen on, as /ip4/127.0.0.1/tcp/4001; port 0 takes a free one, as does none at all.
    """
    from kas_libp2p.config import Purpose, RelayConfig, RelayLimits

    presets = {"default": RelayLimits, "reference": RelayLimits.reference, "open": RelayLimits.open}
    _listen(
        _where(addresses, port, json),
        json,
        key_file=key,
        announce=announce or (),
        echo=False,
        verbose=verbose,
        serve=RelayConfig(serve=True, purpose=Purpose(purpose), limits=presets[limits]()),
    )


def _where(addresses: tuple[str, ...], port: int | None, as_json: bool) -> tuple[str, ...]:
    if port is not None and addresses:
        _fail("--port listens on every interface: give it or addresses, not both", Exit.MISUSED, as_json=as_json)
    if port is not None and not 0 <= port <= 0xFFFF:
        _fail(f"{port} is no port: 0 to 65535", Exit.MISUSED, as_json=as_json)
    return addresses or (f"/ip4/0.0.0.0/tcp/{port or 0}", f"/ip6/::/tcp/{port or 0}")


def _listen(where: tuple[str, ...], as_json: bool, **settings: Any) -> None:
    async def main() -> None:
        from kas_libp2p import tool

        try:
            await tool.listen(where, as_json=as_json, **settings)
        except tool.Interrupted:
            return  # the ordinary end

    _run(main, as_json)


@app.command
def dial(
    target: str,
    /,
    *more: str,
    wait: Annotated[
        Literal["punched"] | None, Parameter(help="until no relay carries it any more, or it is clear that one must")
    ] = None,
    relay: Meet = None,
    ping: Annotated[int, Parameter(help="then ping so many times, one a second")] = 0,
    stay: Annotated[bool, FLAG, Parameter(help="stay connected until the peer leaves, or Ctrl-C")] = False,
    port: Port = None,
    listen: Annotated[
        list[str] | None, Parameter(negative=(), help="listen here too, and dial from that port (repeatable)")
    ] = None,
    key: KeyFile = None,
    verbose: Verbose = False,
    json: Json = False,
) -> None:
    """Connect to a peer, and show by which way, who it is, what it serves, and how it sees us.

    With --wait punched it listens as well, at any port, and ends with code 8 if a relay still carries the connection.

    Args:
        target: a multiaddr, with or without /p2p/PEER, or host:port; with --relay also a peer id alone.
        more: more addresses of the same peer; they race as in RFC 8305.
    """
    _check_count(ping, "--ping", json)
    where = _where(tuple(listen or ()), port, json) if listen or port is not None or wait else ()
    _dial(where, json, (target, *more), key, relay, pings=ping, stay=stay, wait=wait is not None, verbose=verbose)


@app.command
def why(
    target: str,
    /,
    *more: str,
    relay: Meet = None,
    port: Port = None,
    key: KeyFile = None,
    verbose: Verbose = False,
    json: Json = False,
) -> None:
    """Connect to a peer through a relay, see whether the connection becomes direct, and explain what came of it.

    Args:
        target: /ip4/.../p2p/RELAY/p2p-circuit/p2p/PEER; with --relay also a peer id alone.
        more: more addresses of the same peer.
    """
    where = _where((), port, json)
    _dial(where, json, (target, *more), key, relay, pings=0, stay=False, wait=True, why=True, verbose=verbose)


def _dial(
    where: tuple[str, ...],
    as_json: bool,
    targets: tuple[str, ...],
    key: Path | None,
    relays: list[str] | None,
    **settings: Any,
) -> None:
    async def main() -> None:
        from kas_libp2p import tool

        await tool.dial(targets, key_file=key, listen_on=where, as_json=as_json, relays=relays or (), **settings)

    _run(main, as_json)


@app.command
def ping(
    target: str,
    /,
    *more: str,
    count: Annotated[int, Parameter(name=["--count", "-c"], help="how many; 0: until Ctrl-C")] = 5,
    interval: Annotated[float, Parameter(name=["--interval", "-i"], help="seconds from one to the next")] = 1.0,
    key: KeyFile = None,
    json: Json = False,
) -> None:
    """Measure round trips to a peer, through everything that a stream goes through.

    Args:
        target: a multiaddr, with or without /p2p/PEER, or host:port.
        more: more addresses of the same peer.
    """
    _check_count(count, "--count", json)
    if not interval >= 0:
        _fail("--interval must be 0 or more seconds", Exit.MISUSED, as_json=json)

    async def main() -> None:
        from kas_libp2p import tool

        await tool.measure_pings((target, *more), key_file=key, count=count, interval=interval, as_json=json)

    _run(main, json)


@app.command
def perf(
    target: str,
    /,
    *more: str,
    upload: Annotated[Size, Parameter(help="bytes to send, as 256MiB or 1.5GB")] = None,
    download: Annotated[Size, Parameter(help="bytes to get")] = None,
    key: KeyFile = None,
    json: Json = False,
) -> None:
    """Measure how much goes through in each direction. kas-libp2p listen is the other end, as is any /perf/1.0.0.

    Without --upload and --download: 64 MiB each way.

    Args:
        target: a multiaddr, with or without /p2p/PEER, or host:port.
        more: more addresses of the same peer.
    """
    if upload is None and download is None:
        upload = download = parse_size(DEFAULT_SIZE)
    up, down = upload or 0, download or 0
    if not up + down:
        _fail("nothing to measure: give --upload or --download more than 0 bytes", Exit.MISUSED, as_json=json)
    if down >= 1 << 64:
        _fail("--download is a number of 64 bits on the wire: ask for less", Exit.MISUSED, as_json=json)

    async def main() -> None:
        from kas_libp2p import tool

        await tool.measure_perf((target, *more), key_file=key, upload=up, download=down, as_json=json)

    _run(main, json)


def _check_count(count: int, name: str, as_json: bool) -> None:
    if count < 0:
        _fail(f"{name} must be 0 or more", Exit.MISUSED, as_json=as_json)


@app.command(name="holepunch-test", show=False)
def holepunch_test() -> None:
    """Be a peer in the hole-punch test of the libp2p project; the environment says what to do."""

    async def main() -> None:
        from kas_libp2p import contract

        await contract.run(contract.Contract.from_environment(os.environ))

    _run(main, as_json=False)


# Keys


@key_app.command(name="show")
def key_show(file: Path, /, *, json: Json = False) -> None:
    """Show whose key a file holds. Nothing secret is printed.

    Args:
        file: the key file.
    """
    _show_key(_load(file, json), file, json)


@key_app.command(name="new")
def key_new(file: Path, /, *, json: Json = False) -> None:
    """Make a new key.

    Args:
        file: where to; a file that exists is never overwritten.
    """
    from kas_libp2p.identity import Identity

    identity = Identity.generate()
    _save(identity, file, json)
    _show_key(identity, file, json)


@key_app.command(name="import")
def key_import(file: Path, source: str = "-", /, *, json: Json = False) -> None:
    """Make a key file of a private key that another libp2p wrote: libp2p's protobuf, raw or in base64.

    Args:
        file: where to; a file that exists is never overwritten.
        source: where from; standard input if left out, so that the key stands in no list of processes.
    """
    from kas_libp2p.identity import Identity

    try:
        if source == "-":
            if sys.stdin.isatty():
                print("the private key in base64, then Enter and Ctrl-D:", file=sys.stderr)
            data = sys.stdin.buffer.read(MAX_KEY + 1)
        else:
            with open(source, "rb") as opened:
                data = opened.read(MAX_KEY + 1)
    except OSError as error:
        _fail(f"can't read {source}: {error.strerror}", Exit.KEY, as_json=json)
    try:
        identity = Identity.from_protobuf(_unarmoured(data))
    except IdentityError as error:
        hint = "give a private key as libp2p's protobuf, raw or in base64, as kas-libp2p key export writes it"
        _fail(str(error), Exit.KEY, hint, as_json=json)
    _save(identity, file, json)
    _show_key(identity, file, json)


@key_app.command(name="export")
def key_export(
    file: Path,
    to: Path | None = None,
    /,
    *,
    raw: Annotated[bool, FLAG, Parameter(help="the bytes of the protobuf instead of base64")] = False,
    json: Json = False,
) -> None:
    """Write a private key as libp2p's protobuf, for another libp2p. Whoever has it can pose as its owner.

    Args:
        file: the key file.
        to: where to, with mode 0600; standard output if left out. A file that exists is never overwritten.
    """
    identity = _load(file, json)
    data = identity.to_protobuf()
    if to is not None and raw:
        _save(identity, to, json)
    elif to is not None:
        try:
            with open(os.open(to, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as opened:
                opened.write(base64.b64encode(data) + b"\n")
        except OSError as error:
            _fail(f"can't write {to}: {error.strerror}", Exit.KEY, as_json=json)
    elif json:
        _json_line("key", peer_id=identity.peer_id, private_key=base64.b64encode(data).decode())
    elif raw and sys.stdout.isatty():
        _fail("raw bytes would garble the terminal: name a file, or leave --raw out", Exit.MISUSED)
    elif raw:
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
    else:
        print(base64.b64encode(data).decode())


def _unarmoured(data: bytes) -> bytes:
    """The protobuf itself. No protobuf of a key is base64 as well: it begins with the byte 8."""
    text = b"".join(data.split())
    try:
        return base64.b64decode(text, validate=True) if text and not data.startswith(b"\x08") else data
    except binascii.Error:
        return data


def _load(file: Path, as_json: bool) -> Identity:
    from kas_libp2p.identity import Identity

    try:
        return Identity.load(file)
    except IdentityError as error:
        hint = "" if file.exists() else f"make one with: kas-libp2p key new {file}"
        _fail(str(error), Exit.KEY, hint, as_json=as_json)


def _save(identity: Identity, file: Path, as_json: bool) -> None:
    try:
        identity.save(file)
    except IdentityError as error:
        _fail(str(error), Exit.KEY, "name another file" if file.exists() else "", as_json=as_json)


def _show_key(identity: Identity, file: Path, as_json: bool) -> None:
    from kas_libp2p.addresses import peer_id_to_cid

    values = {
        "file": str(file),
        "type": "ed25519",
        "peer_id": identity.peer_id,
        "cid": peer_id_to_cid(identity.peer_id),
        "public_key": base64.b64encode(identity.public_key).decode(),
    }
    if as_json:
        _json_line("key", **values)
        return
    for label, value in values.items():
        print(f"{label.replace('_', ' '):<10}  {value}")


# How it ends


def _run(main: Callable[[], Coroutine[Any, Any, None]], as_json: bool) -> None:
    from kas_libp2p.tool import Interrupted, StayedRelayed

    try:
        trio.run(main)
    except Interrupted as interrupted:
        sys.exit(128 + interrupted.number)
    except StayedRelayed as error:
        _fail(str(error), Exit.RELAYED, as_json=as_json)
    except (KasError, trio.TooSlowError) as error:
        code, hint = _judge(error)
        _fail(str(error), code, hint, error, as_json=as_json)


def _judge(error: Exception) -> tuple[Exit, str]:
    """The exit code for an error, and what would help."""
    match error:
        case DialError():
            return _judge_dial(error)
        case AddressError() | ConfigError():
            return Exit.MISUSED, ""
        case IdentityError():
            return Exit.KEY, ""
        case ListenError():
            return Exit.LISTEN, ""
        case NegotiationError():
            return Exit.PEER, "kas-libp2p dial shows what the peer serves"
        case KasError() | trio.TooSlowError():
            return Exit.PEER, ""
    return Exit.FAILED, ""


def _judge_dial(error: DialError) -> tuple[Exit, str]:
    causes = [failure.error for failure in error.failures]
    for cause in causes:
        if isinstance(cause, PeerIdMismatch):
            return Exit.WRONG_PEER, f"if {cause.actual} is whom you mean, dial the address with /p2p/{cause.actual}"
    match causes[0] if causes else None:
        case ConnectionRefusedError():
            hint = "nothing listens at that port: see that the peer runs, and that the port is right"
        case TimeoutError() | OSError(errno=errno.EHOSTUNREACH | errno.ENETUNREACH):
            hint = "see that the address is right, and that no firewall or router drops what comes for it"
        case ResolveError():
            hint = "see that the name is right, or give an IP address"
        case UpgradeTimeout():
            hint = "something accepts there and then says nothing: another service, or a peer that hangs"
        case NegotiationError() | SecurityError():
            hint = "is that a libp2p port? The peer must speak Noise and Yamux over TCP"
        case _:
            hint = ""
    return Exit.UNREACHABLE, hint


def _fail(
    message: str, code: Exit, hint: str = "", error: Exception | None = None, *, as_json: bool = False
) -> NoReturn:
    if as_json:
        failures = error.failures if isinstance(error, DialError) else ()
        _json_line(
            "error",
            code=int(code),
            message=message.partition("\n")[0],
            help=hint,
            failures=[
                {"address": each.address, "stage": each.stage, "reason": str(each.error), "seconds": each.seconds}
                for each in failures
            ],
        )
    else:
        from rich.console import Console
        from rich.text import Text

        text = Text.assemble(("kas-libp2p:", "bold red"), " ", (message, "bold"))
        console = Console(stderr=True, highlight=False)
        console.print(text, soft_wrap=True)
        if hint:
            console.print(Text(f"  what helps: {hint}"), soft_wrap=True)
    sys.exit(code)


def _json_line(event: str, **values: Any) -> None:
    print(json.dumps({"event": event, "at": time.time(), **values}, ensure_ascii=False), flush=True)


def _words(error: cyclopts.CycloptsError) -> str:
    text = " ".join(str(error).split())
    return text[:1].lower() + text[1:].rstrip(".")


def main(argv: Sequence[str] | None = None) -> None:
    """The command's entry point."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    try:
        app(arguments, exit_on_error=False, print_error=False)
    except cyclopts.CycloptsError as error:
        known = arguments[:1] if arguments and arguments[0] in app else []
        _fail(_words(error), Exit.MISUSED, " ".join(["kas-libp2p", *known, "--help"]), as_json="--json" in arguments)
    except (KeyboardInterrupt, BaseExceptionGroup) as error:  # the second Ctrl-C, maybe out of trio's nurseries
        if isinstance(error, BaseExceptionGroup) and error.split(KeyboardInterrupt)[1] is not None:
            raise
        sys.exit(128 + signal.SIGINT)
    except BrokenPipeError:
        # Whoever read the output is gone. Python would complain once more when it flushes at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
