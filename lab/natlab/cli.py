"""The command ``natlab``."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from . import _kernel, matrix
from ._stun import DEFAULT_PORT
from .errors import LabError
from .nat import TYPES, chain_of, nat_named, promise_of
from .picture import picture
from .probe import Behaviour, probe, serve
from .punch import group_of
from .reflector import add_reflector, probe_types
from .running import INSIDE, RunningLab, detached
from .topology import Lab, home, lab_as_json, lab_from_text, seconds

TOPOLOGY = """\
A topology is one word per site, or the name of a TOML file:
  alice=pr  bob=cgn-sym,delay=25ms,loss=1%  relay=public
  NAME=TYPE with options after commas: delay, jitter, loss, rate, ipv6=none|open|fw, hosts=A+B, hairpin,
  udp_lifetime, tcp_lifetime, services=upnp+natpmp+pcp; NAME=public with addresses=N. Also wan=25ms and seed=7.
"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="natlab", description="Real NATs on one machine, without root, virtual machine or container engine."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, does: Callable[[argparse.Namespace], int], help: str, topology: bool = False) -> Any:
        sub = commands.add_parser(
            name, help=help, description=help, epilog=TOPOLOGY if topology else None,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip
        sub.set_defaults(does=does)
        sub.add_argument("--json", action="store_true", help="print JSON")
        if topology:
            sub.add_argument("topology", nargs="+", metavar="TOPOLOGY")
        return sub

    types = command("types", _types, "List the NAT types and what each promises.")
    types.add_argument("--check", action="store_true", help="probe each in a lab; exit status 1 if one differs")

    grid = command("matrix", _matrix, "Punch every type against every other; exit status 1 if one is not as expected.")
    grid.add_argument("--types", default=",".join(matrix.TYPES), help="separated by commas; default: %(default)s")
    grid.add_argument("--protocol", choices=("tcp", "udp", "both"), default="both")
    grid.add_argument(
        "--skews", default="0ms,10ms,-10ms,90ms,-90ms", help="by how much one begins later; default: %(default)s"
    )
    grid.add_argument("--retry", action="store_true", help="try again when refused, at random within 10 to 100 ms")

    up = command("up", _up, "Start a lab that stays, and print its id.", topology=True)
    up.add_argument("--reflector", action="store_true", help="with a host that answers `natlab probe`")

    shell = command("shell", _shell, "Open a shell in a host, or run what follows --.")
    shell.add_argument("id")
    shell.add_argument("host")

    down = command("down", _down, "End labs.")
    down.add_argument("id", nargs="+", help="or: all")

    command("list", _list, "List the labs that are up.")

    run = command("run", _run, "Run the command after -- in a host of a lab that ends with it.", topology=True)
    run.add_argument("--in", dest="host", help="the host; default: the first")
    run.add_argument("--reflector", action="store_true", help="with a host that answers `natlab probe`")

    measure = command("probe", _probe, "Find out what the NAT before us does, or be the server for that.")
    measure.add_argument(
        "server", nargs="?", help="HOST or HOST:PORT of a prober's server, or of any that knows RFC 5780 (UDP)"
    )
    measure.add_argument("--serve", nargs="+", metavar="ADDRESS", help="be a server at one address, or better at two")
    measure.add_argument("--type", help="probe this NAT type, in a lab")
    measure.add_argument("--port", type=int, default=DEFAULT_PORT, help="of the server, which also uses the next")
    measure.add_argument(
        "--lifetime", type=int, default=0, metavar="S", help="see up to so many seconds how long mappings live"
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else argv
    rest: list[str] = []
    if "--" in arguments:
        at = arguments.index("--")
        arguments, rest = arguments[:at], arguments[at + 1 :]
    options = _parser().parse_args(arguments)
    options.rest = rest
    try:
        status: int = options.does(options)
        return status
    except LabError as error:
        print(f"natlab: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _print(value: Any) -> None:
    print(json.dumps(value, indent=2, default=str))


def _types(options: argparse.Namespace) -> int:
    rows: list[dict[str, Any]] = []
    for name in TYPES:
        promise = promise_of(name)
        nat = nat_named(chain_of(name)[0])
        row = {"type": name, "group": group_of(name).name, **asdict(promise), "port": nat.port}
        rows.append(row)
    if options.check:
        found = probe_types()
        for row in rows:
            row["differences"] = found[row["type"]].differences(row["type"])
    wrong = [row for row in rows if row.get("differences")]
    if options.json:
        _print(rows)
        return 1 if wrong else 0
    print(f"{'TYPE':<12}{'MAPPING':<9}{'PORT':<10}{'FILTERING':<11}{'UNSOLICITED TCP, UDP':<24}{'TCP GROUP':<11}")
    for row in rows:
        unsolicited = f"{row['unsolicited_tcp']}, {row['unsolicited_udp']}"
        print(
            f"{row['type']:<12}{row['mapping']:<9}{row['port']:<10}{row['filtering']:<11}{unsolicited:<24}{row['group']:<11}"
            + ("; ".join(row["differences"]) or "as promised" if options.check else "")
        )
    return 1 if wrong else 0


def _matrix(options: argparse.Namespace) -> int:
    types = options.types.split(",")
    for name in types:
        chain_of(name)
    skews = [-seconds(each[1:]) if each.startswith("-") else seconds(each) for each in options.skews.split(",")]
    protocols = ("tcp", "udp") if options.protocol == "both" else (options.protocol,)

    def progress(done: int, total: int) -> None:
        if sys.stderr.isatty():
            print(f"\rround {done} of {total}", end="\n" if done == total else "", file=sys.stderr, flush=True)

    cells = matrix.measure(types, protocols=protocols, skews=skews, retry=options.retry, progress=progress)
    wrong = sum(cell.seen != cell.expected for cell in cells)
    if options.json:
        tables = {
            protocol: {f"{one.name} {two.name}": share for (one, two), share in matrix.groups(cells, protocol).items()}
            for protocol in protocols
        }
        _print({"cells": [asdict(cell) for cell in cells], "groups": tables, "unexpected": wrong})
    else:
        for line in matrix.render(cells, types):
            print(line)
    return 1 if wrong else 0


def _lab(options: argparse.Namespace, *, quiet: bool = False) -> RunningLab:
    lab = RunningLab(lab_from_text(options.topology), quiet=quiet)
    try:
        if options.reflector:
            add_reflector(lab)
    except BaseException:
        lab.close()
        raise
    return lab


def _up(options: argparse.Namespace) -> int:
    lab = _lab(options, quiet=True)
    id = lab.detach()
    if options.json:
        _print({"id": id, "pid": lab.pid, "topology": lab_as_json(lab.topology)})
    else:
        print(id)
        for line in picture(lab.topology):
            print(line, file=sys.stderr)
    lab.close()
    return 0


def _down(options: argparse.Namespace) -> int:
    ids = detached() if options.id == ["all"] else options.id
    for id in ids:
        RunningLab.attach(id).down()
    if options.json:
        _print({"ended": ids})
    return 0


def _list(options: argparse.Namespace) -> int:
    found = []
    for id in detached():
        with RunningLab.attach(id) as lab:
            found.append((id, lab.pid, lab.topology))
    if options.json:
        _print([{"id": id, "pid": pid, "topology": lab_as_json(topology)} for id, pid, topology in found])
        return 0
    for id, _, topology in found:
        print(id)
        for line in picture(topology):
            print("  " + line)
    return 0


def _shell(options: argparse.Namespace) -> int:
    with RunningLab.attach(options.id) as lab:
        return _enter(lab, options.host, options.rest or [os.environ.get("SHELL", "/bin/sh")], options.json)


def _run(options: argparse.Namespace) -> int:
    if not options.rest:
        raise LabError("there is nothing to run: write the command after --")
    with _lab(options) as lab:
        first = next(iter(lab.hosts), None)
        if first is None and options.host is None:
            raise LabError("there is no host in this lab to run it in")
        return _enter(lab, options.host or str(first), options.rest, options.json)


def _enter(lab: RunningLab, name: str, argv: list[str], as_json: bool) -> int:
    """Run a command in a host, with our own terminal or for JSON; it is told every host's address as NATLAB_NAME."""
    host = lab[name]
    addresses = {f"NATLAB_{each.name.upper().replace('-', '_')}": each.address for each in lab.hosts}
    if as_json:
        done = host.run(argv, env=addresses, check=False, timeout=None)
        status = done.status
        _print({"host": host.name, "argv": argv, **asdict(done)})
    else:
        status = _execute(lab.entrance(host.name), argv, {**os.environ, **addresses, INSIDE: host.name})
    return status if status >= 0 else 128 - status


def _execute(namespaces: list[int], argv: list[str], env: Mapping[str, str]) -> int:
    """Run a command in namespaces. Twice forked, because a PID namespace counts for children only."""
    middle = os.fork()
    if not middle:
        status = 127
        try:
            for fd in namespaces:
                _kernel.setns(fd)
            child = os.fork()
            if not child:
                os.execvpe(argv[0], argv, env)
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C is for the command
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        except OSError as error:
            print(f"natlab: {argv[0]} can't be run: {error.strerror}", file=sys.stderr)
        finally:
            os._exit(status if status >= 0 else 128 - status)
    for fd in namespaces:
        os.close(fd)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        return os.waitstatus_to_exitcode(os.waitpid(middle, 0)[1])
    finally:
        signal.signal(signal.SIGINT, before)


def _probe(options: argparse.Namespace) -> int:
    if sum(each is not None for each in (options.server, options.serve, options.type)) != 1:
        raise LabError("say one of: a SERVER to ask, --serve to be one, --type to probe a type in a lab")
    if options.serve:
        if len(options.serve) > 2:
            raise LabError("a prober's server has two addresses at most")
        said = json.dumps({"serving": options.serve}) if options.json else " ".join(["serving", *options.serve])
        serve(options.serve, options.port, ready=lambda: print(said, flush=True))
    if options.type:
        with RunningLab(Lab((home("home", options.type),))) as lab:
            found = probe(add_reflector(lab), lab["home"].socket, lifetime=options.lifetime)
    else:
        found = probe(_endpoint(options.server, options.port), lifetime=options.lifetime)
    if options.json:
        _print({**asdict(found), "types": found.types})
        return 0
    for protocol, behaviour in (("UDP", found.udp), ("TCP", found.tcp)):
        print(f"{protocol}: {_describe(behaviour, options.lifetime) if behaviour else 'no answer'}")
    print(f"as the type {' or '.join(found.types)}" if found.types else "as no type of natlab")
    return 0


def _endpoint(text: str, port: int) -> tuple[str, int]:
    host, colon, number = text.rpartition(":")
    if colon and number.isdigit() and (":" not in host or host.startswith("[")):
        return host.strip("[]"), int(number)
    return text.strip("[]"), port


def _describe(found: Behaviour, lifetime: int) -> str:
    lives = ""
    if found.lifetime is not None:
        more = " or more" if found.lifetime == lifetime else ""
        lives = f", an idle mapping lives {found.lifetime} s{more}"
    return (
        f"{found.local[0]}:{found.local[1]} is seen as {found.mapped[0]}:{found.mapped[1]}; mapping {found.mapping}, "
        f"port {found.port}, filtering {found.filtering}, unsolicited {found.unsolicited or 'unknown'}, "
        f"{'hairpin' if found.hairpin else 'no hairpin'}{lives}"
    )
