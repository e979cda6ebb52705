"""A lab that runs: its hosts, routers and links, from the process that made it. Any thread may use it.

Nothing here forks: programs and functions are started by processes that were started fresh. Calls take milliseconds,
except where they wait for a program; a trio or asyncio program puts those into a thread, and takes `Host.socket` for
what it wants to do itself.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shlex
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from . import _channel, _fresh, _remote, _zygote, plan
from .errors import CommandFailed, LabError, TopologyError, Unsupported
from .processes import COMMAND_TIMEOUT, END_TIMEOUT, Call, Completed, Log, Process
from .topology import Lab, Link, Site, home, lab_as_json, lab_from_json, public

T = TypeVar("T")

ANSWER_TIMEOUT = 60.0
"""Seconds for one change of a lab: a large one takes 2 on a busy machine."""
MAX_ENDED = 50
"""Processes that have ended and whose output is still a file, so that children that outlive them may go on writing."""
INSIDE = "NATLAB_HOST"
"""Environment variable of everything in a host: its name."""


def find_nft() -> str:
    """The path of ``nft``.

    Raises:
        Unsupported: it is not installed.
    """
    path = shutil.which("nft", path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")
    if path is None:
        raise Unsupported("natlab needs nft, which is not here: install the package nftables")
    return path


def _why_not(refusal: str) -> str:
    """What to do about a system that allows no namespaces."""
    for key, bad, cure in (
        ("kernel/unprivileged_userns_clone", "0", "sysctl kernel.unprivileged_userns_clone=1"),
        ("kernel/apparmor_restrict_unprivileged_userns", "1", "sysctl kernel.apparmor_restrict_unprivileged_userns=0"),
        ("user/max_user_namespaces", "0", "sysctl user.max_user_namespaces=10000"),
        ("user/max_net_namespaces", "0", "sysctl user.max_net_namespaces=10000"),
    ):
        with contextlib.suppress(OSError):
            if Path("/proc/sys", key).read_text(encoding="ascii").strip() == bad:
                return f"this system allows us no namespaces ({refusal}): run as root, or allow them with {cure}"
    return (
        f"this system allows us no namespaces ({refusal}): run as root with CAP_SYS_ADMIN, or where user namespaces are"
        " allowed"
    )


def _check_system() -> str:
    if sys.platform != "linux":
        raise Unsupported(f"natlab needs Linux, not {sys.platform}")
    if inside := os.environ.get(INSIDE):
        raise LabError(
            f"this process runs in host {inside} of a lab, and a lab can't hold another: start it outside, and in a "
            "script below `if __name__ == '__main__':`, since functions import the script into their host"
        )
    release = tuple(int(part) for part in re.findall(r"\d+", os.uname().release)[:2])
    if release < (5, 10):
        raise Unsupported(f"natlab needs Linux 5.10 or newer, not {os.uname().release}")
    return find_nft()


class Host:
    """A namespace of a lab: a host, or a router.

    Attributes:
        name: as in the topology.
        address, address6: of its interface; None where it has none.
        public_address: what the outside sees of it now: its own address, unless a router translates it.
    """

    def __init__(self, lab: RunningLab, name: str, address: str, address6: str | None, number: int) -> None:
        self._lab, self.name, self.address, self.address6, self._number = lab, name, address, address6, number

    @property
    def public_address(self) -> str:
        site = self._lab.topology.sites[self._number - 1]
        return self._lab._wan[self._number] if site.translates else self.address

    def run(
        self,
        command: str | Sequence[str],
        *,
        input: str | None = None,
        timeout: float | None = COMMAND_TIMEOUT,
        check: bool = True,
        env: Mapping[str, str] | None = None,
        cwd: str | os.PathLike[str] = ".",
    ) -> Completed:
        """Run a program and wait for its end. A command in one string is split as a shell would, without being one.

        Raises:
            CommandFailed: its status is not 0 and ``check`` is left on.
            LabError: it can't be started, or runs longer than ``timeout`` seconds (then it is killed).
        """
        process = self.spawn(command, stdin=input is not None, env=env, cwd=cwd)
        if input is not None:
            with contextlib.suppress(BrokenPipeError), process.stdin:
                process.stdin.write(input.encode())
        try:
            status = process.wait(timeout)
        except BaseException:
            process.kill()
            raise
        if check and status:
            raise CommandFailed(
                f"{process} failed with status {status}{process._tail()}", status, process.stdout, process.stderr
            )
        return Completed(status, process.stdout, process.stderr)

    def spawn(
        self,
        command: str | Sequence[str],
        *,
        stdin: bool = False,
        env: Mapping[str, str] | None = None,
        cwd: str | os.PathLike[str] = ".",
    ) -> Process:
        """Start a program that goes on by itself, until it ends or the lab does.

        Args:
            stdin: whether to write to it (`Process.stdin`); else it reads nothing.
            env: on top of our own environment.

        Raises:
            LabError: it can't be started.
        """
        argv = shlex.split(command) if isinstance(command, str) else [os.fspath(each) for each in command]
        if not argv:
            raise LabError(f"there is no command to run in {self.name}")
        process = Process(self, os.path.basename(argv[0]))
        request = {"name": self.name, "argv": argv, "env": self._env(env), "cwd": os.path.abspath(cwd)}
        with self._standard(process, stdin) as fds:
            answer, _ = self._lab._ask("spawn", request, [*fds, process._reporting])
        process._started(answer["pid"])
        self._lab._keep(process)
        return process

    @contextlib.contextmanager
    def _standard(self, process: Process, stdin: bool = False) -> Any:
        """What a new process gets as standard input, output and error; if it does not come to be, all is closed."""
        if stdin:
            theirs, ours = os.pipe2(os.O_CLOEXEC)
            process.stdin = os.fdopen(ours, "wb", buffering=0)
        else:
            theirs = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
        try:
            yield theirs, process._out.fileno(), process._err.fileno()
        except BaseException:
            process._close()
            raise
        finally:
            os.close(theirs)

    def _env(self, more: Mapping[str, str] | None) -> dict[str, str]:
        return {**os.environ, **(more or {}), INSIDE: self.name}

    def python(
        self, function: Callable[..., T], *args: Any, timeout: float | None = COMMAND_TIMEOUT, **keywords: Any
    ) -> T:
        """Call a function in the host, in a process of its own, and return what it returns.

        Lambdas and functions inside of functions are fine; an async one is run by trio if this process has that
        loaded, else by asyncio. What it prints is printed here.

        Raises:
            LabError: it can't be sent, takes longer than ``timeout`` seconds (then it is killed), or dies.
            BaseException: what it raises.
        """
        call = self._start(False, function, args, keywords)
        try:
            value: T = call.result(timeout)
            return value
        finally:
            if call.status is None:
                call.kill()
            sys.stdout.write(call.stdout)
            sys.stderr.write(call.stderr)

    def spawn_python(self, function: Callable[..., Any], *args: Any, **keywords: Any) -> Call:
        """Start a function in the host; see `python`, and `Call.result` for what comes of it.

        What is written to `Call.stdin` is for the function to read; what it prints is for `Call.expect`.

        Raises:
            LabError: it can't be sent.
        """
        return self._start(True, function, args, keywords)

    def _start(
        self, stdin: bool, function: Callable[..., Any], args: tuple[Any, ...], keywords: dict[str, Any]
    ) -> Call:
        data = _remote.pack(function, args, keywords, {INSIDE: self.name})
        call = Call(self, getattr(function, "__name__", "function"))
        with tempfile.TemporaryFile() as file, self._standard(call, stdin) as standard:
            file.write(data)
            file.flush()
            net = self._lab._namespace(self.name)
            try:
                fds = [file.fileno(), call._outcome.fileno(), call._reporting, *standard, net, *self._lab._entrance]
                pid = _zygote.shared().start(fds)
            finally:
                os.close(net)
        call._started(pid)
        self._lab._keep(call)
        return call

    def socket(self, family: int = socket.AF_INET, kind: int = socket.SOCK_STREAM, protocol: int = 0) -> socket.socket:
        """A new socket that lives in the host, for use by this process: what it sends, the host sends."""
        request = {"name": self.name, "family": int(family), "kind": int(kind), "protocol": protocol}
        _, fds = self._lab._ask("socket", request)
        return socket.socket(fileno=fds[0])

    def kill(self) -> None:
        """Kill every process in the host."""
        fd = self._lab._namespace(self.name)
        try:
            mine = os.fstat(fd)
        finally:
            os.close(fd)
        while True:  # until nobody is left who could fork
            found = False
            for each in os.listdir("/proc"):
                if not each.isdigit():
                    continue
                try:
                    there = os.stat(f"/proc/{each}/ns/net")
                    if (there.st_dev, there.st_ino) == (mine.st_dev, mine.st_ino):
                        os.kill(int(each), signal.SIGKILL)
                        found = True
                except OSError:  # it is gone, or not ours
                    continue
            if not found:
                return
            time.sleep(0.001)  # the dead are in the list until their parent has buried them; nothing tells us

    def __str__(self) -> str:
        return self.name


class Router(Host):
    """A site's router. What a host can, it can too."""

    def __init__(self, lab: RunningLab, name: str, number: int, depth: int) -> None:
        super().__init__(lab, name, plan.router_address(number, depth) if depth else lab._wan[number], None, number)
        self._depth = depth

    def _start_services(self, site: Site) -> None:
        if services := site.routers[self._depth].services:
            program = os.path.join(os.path.dirname(os.path.abspath(__file__)), "services.py")
            gateway, gateway6 = plan.lan_gateway(site, self._number), plan.lan_gateway6(site, self._number)
            command = [sys.executable, "-I", "-S", program, gateway, ",".join(services), find_nft(), gateway6]
            self.spawn(command).expect("^serving")

    def _restart(self, what: plan.Plan) -> None:
        self.kill()
        self._lab._build(what)
        self._start_services(self._lab.topology.sites[self._number - 1])

    def reboot(self) -> None:
        """Forget all mappings and connections, in a moment. What runs in the router is killed."""
        lab = self._lab
        wan = lab._wan[self._number] if self._depth == 0 else self.address
        self._restart(plan.plan_reboot(lab.topology, self._number, self._depth, wan))

    def change_address(self) -> str:
        """Get another public IPv4 address, as from a provider, and with it forget all connections. Returns it.

        Raises:
            LabError: it is not the site's outer router.
        """
        if self._depth:
            raise LabError(f"{self.name} has no public address: change that of the carrier's router")
        lab, old = self._lab, self.public_address
        prefix, _, last = old.rpartition(".")
        new = f"{prefix}.{int(last) + 1 if int(last) < 250 else 2}"
        self._restart(plan.plan_new_address(lab.topology, self._number, old, new))
        lab._wan[self._number] = self.address = new
        lab._note()
        return new


class Line:
    """The link between a site and the core. ``up`` is from the site, ``down`` to it.

    Attributes:
        up, down: what it does to packets now; None: cut.
    """

    def __init__(self, lab: RunningLab, number: int, link: Link) -> None:
        self._lab, self._number = lab, number
        self._whole = {"up": link, "down": link}
        self.up: Link | None = link
        self.down: Link | None = link

    def cut(self, direction: str = "both") -> None:
        """Let nothing pass, also not what is under way: "up", "down" or "both"."""
        self._be(dict.fromkeys(self._ways(direction)))

    def heal(self) -> None:
        """Be as before the cut."""
        self._be(self._whole)

    def set(
        self,
        direction: str = "both",
        *,
        delay: float | str | None = None,
        jitter: float | str | None = None,
        loss: float | str | None = None,
        rate: float | str | None = None,
    ) -> None:
        """Change what is named, for packets from now on; the rest stays, and a cut is healed. Units as in `Link.of`."""
        wanted = {"delay": delay, "jitter": jitter, "loss": loss, "rate": rate}
        self._be({way: self._whole[way].changed(wanted) for way in self._ways(direction)})

    def _ways(self, direction: str) -> tuple[str, ...]:
        if direction not in ("up", "down", "both"):
            raise LabError(f"a link has no direction {direction!r}: it can be up, down or both")
        return ("up", "down") if direction == "both" else (direction,)

    def _be(self, changes: Mapping[str, Link | None]) -> None:
        now = {"up": self.up, "down": self.down, **changes}
        lab = self._lab
        lab._build(plan.Plan((), (plan.wire_step(lab.topology, self._number, now["up"], now["down"]),)))
        self.up, self.down = now["up"], now["down"]
        self._whole |= {way: link for way, link in changes.items() if link is not None}


class Between:
    """The way between two sites. Each reaches everybody else whatever happens to it."""

    def __init__(self, lab: RunningLab, number: int, other: int) -> None:
        self._lab, self._number, self._other = lab, number, other

    def cut(self) -> None:
        """Let nothing pass between the two, in silence."""
        self._lab._build(plan.plan_between(self._number, self._other, cut=True))

    def heal(self) -> None:
        """Be as before the cut."""
        self._lab._build(plan.plan_between(self._number, self._other, cut=False))


def _abstract(id: str) -> str:
    """The address of a detached lab in the abstract namespace of Unix sockets."""
    return f"\0natlab-{os.getuid()}-{id}"


def detached() -> list[str]:
    """The names of this user's labs that were left running."""
    listening = re.compile(rf"@natlab-{os.getuid()}-([0-9a-f]+)$", re.MULTILINE)
    return sorted(set(listening.findall(Path("/proc/net/unix").read_text(encoding="ascii", errors="replace"))))


class RunningLab:
    """A lab in the kernel. A context manager; it also ends with this process, however that ends.

    Args:
        topology: what to build; more can be added while it runs.
        quiet: keep what the lab's own processes have to complain about to themselves.

    Attributes:
        topology: what there is by now.
        pid: of the lab's first process.

    Raises:
        Unsupported: this system can't hold a lab; the text says what to install or to allow.
    """

    def __init__(self, topology: Lab | None = None, *, quiet: bool = False) -> None:
        nft = _check_system()
        ours, theirs = socket.socketpair()
        here = os.path.dirname(os.path.abspath(__file__))
        # A bare package stands in for ours: importing all of it would take longer than building a lab.
        code = (
            f"import sys, types; p = sys.modules['natlab'] = types.ModuleType('natlab'); p.__path__ = [{here!r}];"
            f"from natlab._helper import main; main({theirs.fileno()}, {nft!r})"
        )
        with theirs:
            self._process: subprocess.Popen[bytes] | None = _fresh.start(
                "natlab", code, theirs.fileno(), "-I", "-S", stderr=subprocess.DEVNULL if quiet else None
            )
        self._begin(ours)
        try:
            try:
                answer, fds = _channel.receive(ours)
            except _channel.Closed as error:
                raise LabError(f"the lab's process did not start: {error}") from None
            self._entrance += fds
            if "unsupported" in answer:
                raise Unsupported(_why_not(answer["unsupported"]))
            self.pid = answer["pid"]
            topology = topology or Lab()
            self.topology = replace(topology, sites=())
            self._build(plan.plan_core())
            self._grow(topology)
        except BaseException:
            self.close()
            raise

    @classmethod
    def attach(cls, id: str) -> Self:
        """A lab that `detach` left running. Closing it leaves it so; `down` ends it.

        Raises:
            LabError: there is none of this name, or it is not ours.
        """
        ours = socket.socket(socket.AF_UNIX)
        try:
            ours.connect(_abstract(id))
        except OSError:
            ours.close()
            known = ", ".join(detached()) or "none"
            raise LabError(f"there is no lab {id!r} of yours; there are: {known}") from None
        self = cls.__new__(cls)
        self._process = None
        self._begin(ours)
        try:
            _, uid, _ = struct.unpack("=iII", ours.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
            if uid != os.getuid():
                raise LabError(f"the lab {id!r} is of another user")
            try:
                answer, self._entrance = _channel.receive(ours)
            except _channel.Closed as error:
                raise LabError(f"the lab {id!r} has just ended: {error}") from None
            self.pid = answer["pid"]
            self.topology = lab_from_json(answer["note"]["topology"])
            for number, site in enumerate(self.topology.sites, 1):
                self._register(self.topology, number, site, answer["note"]["wan"][number - 1])
            self._is_detached = True
        except BaseException:
            self.close()
            raise
        return self

    def detach(self) -> str:
        """Leave the lab running when this process ends; returns a name for `attach`, which this user alone may use."""
        id = secrets.token_hex(3)
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(_abstract(id))  # no file: the name is gone with the lab
            listener.listen()
            self._is_detached = True
            self._note()
            self._ask("detach", {}, [listener.fileno()])
        if self._process:
            self._process.returncode = 0  # it goes on without us: there is nothing to wait for, nor to warn of
            self._process = None
        return id

    def down(self) -> None:
        """End a lab that was detached."""
        with self._lock, contextlib.suppress(_channel.Closed):
            if self._socket:
                _channel.send(self._socket, {"do": "down"})
                _channel.receive(self._socket)  # it hangs up
        self.close()

    def _begin(self, ours: socket.socket) -> None:
        ours.settimeout(ANSWER_TIMEOUT)
        self._socket: socket.socket | None = ours
        self._lock = threading.RLock()
        self._entrance: list[int] = []
        self._hosts: dict[str, Host] = {}
        self._routers: dict[str, Router] = {}
        self._lines: dict[str, Line] = {}
        self._wan: dict[int, str] = {}
        self._is_detached = False
        self._processes: list[Process] = []
        self._open: list[Process] = []
        self._captures: dict[str, Log] = {}

    def add(self, site: Site) -> tuple[Host, ...]:
        """Add a site; returns its hosts.

        Raises:
            TopologyError: its names are taken.
        """
        with self._lock:
            self._grow(self.topology.with_site(site))
        return tuple(self._hosts[name] for name in site.hosts)

    def home(self, name: str, nat: str = "pr", **options: Any) -> Host:
        """Add a site behind NAT, see `natlab.home`; returns its first host."""
        return self.add(home(name, nat, **options))[0]

    def public(self, name: str, **options: Any) -> Host:
        """Add a host with a public address, see `natlab.public`."""
        return self.add(public(name, **options))[0]

    def _grow(self, topology: Lab) -> None:
        first = len(self.topology.sites) + 1
        plans = [plan.plan_site(topology, number) for number in range(first, len(topology.sites) + 1)]
        if plans:
            self._build(
                plan.Plan(
                    tuple(name for each in plans for name in each.namespaces),
                    tuple(step for each in plans for step in each.steps),
                )
            )
        self.topology = topology
        for number, site in enumerate(topology.sites[first - 1 :], first):
            self._register(topology, number, site, plan.site_address(number))
        self._note()
        for site in topology.sites[first - 1 :]:
            for depth in range(len(site.routers)):
                self._routers[site.router_name(depth)]._start_services(site)

    def _note(self) -> None:
        """Leave word of what there is for whoever attaches next."""
        if self._is_detached:
            wan = [self._wan[number] for number in range(1, len(self.topology.sites) + 1)]
            self._ask("note", {"note": {"topology": lab_as_json(self.topology), "wan": wan}})

    def _register(self, topology: Lab, number: int, site: Site, wan: str) -> None:
        self._wan[number] = wan
        for name in site.hosts:
            address = plan.host_address(topology, name)
            assert address is not None
            self._hosts[name] = Host(self, name, address, plan.host_address(topology, name, 6), number)
        for depth in range(len(site.routers)):
            name = site.router_name(depth)
            self._routers[name] = Router(self, name, number, depth)
        self._lines[site.name] = Line(self, number, topology.link_of(site))

    def __getitem__(self, name: str) -> Host:
        """A host by its name, or a router (``alice/router``)."""
        found = self._hosts.get(name) or self._routers.get(name)
        if found is None:
            raise TopologyError(f"there is no host {name!r}; there are: {', '.join(self._hosts) or 'none yet'}")
        return found

    @property
    def hosts(self) -> tuple[Host, ...]:
        return tuple(self._hosts.values())

    def router(self, site: str, *, inner: bool = False) -> Router:
        """A site's outer router, the one that decides; ``inner``: the one at home behind a carrier's."""
        for each in self.topology.sites:
            if each.name == site and each.routers:
                return self._routers[each.router_name(len(each.routers) - 1 if inner else 0)]
        raise TopologyError(f"there is no site {site!r} with a router")

    def link(self, site: str) -> Line:
        """The line of a site."""
        try:
            return self._lines[site]
        except KeyError:
            raise TopologyError(f"there is no site {site!r}; there are: {', '.join(self._lines)}") from None

    def between(self, site: str, other: str) -> Between:
        """The way between two sites."""
        numbers = self.link(site)._number, self.link(other)._number
        if site == other:
            raise TopologyError(f"what {site} has with itself does not pass the core: name two sites")
        return Between(self, *numbers)

    def stats(self) -> dict[str, Any]:
        """What the links that do something carried: ``{"1up": {"frames": 3, "lost": 0}, …}`` by the site's number and
        direction; ``overrun``, frames that came faster than they could be read since last time (0, or a measurement
        means nothing); ``late`` and ``cpu``, seconds by which the latest was late since last time, and of CPU time."""
        return self._ask("stats", {})[0]

    def capture(self, name: str = plan.CORE) -> None:
        """Record what passes in a namespace from now on, see `save`. "core" sees every site's line."""
        if name in self._captures:
            return
        log = Log()
        self._ask("capture", {"name": name}, [log.fileno()])
        self._captures[name] = log

    def save(self, directory: str | os.PathLike[str]) -> list[Path]:
        """Write logs and captures into a directory, which is made if need be: ``alice-0-curl.stdout.log``,
        ``core.pcapng``. Returns the files."""
        logs = {f"{name.replace('/', '-')}.pcapng": log for name, log in self._captures.items()}
        for number, process in enumerate(self._processes):
            start = f"{process.host.name.replace('/', '-')}-{number}-{process.name}"
            logs[f"{start}.stdout.log"], logs[f"{start}.stderr.log"] = process._out, process._err
        written = []
        for name, log in logs.items():
            if content := log.content():
                path = Path(directory, re.sub(r"[^\w.-]", "_", name))
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
                written.append(path)
        return written

    def entrance(self, name: str) -> list[int]:
        """File descriptors of the namespaces to enter (``setns``) to be in a host: user, if there is one, PID and
        network. The caller closes them."""
        return [*map(os.dup, self._entrance), self._namespace(name)]

    def _namespace(self, name: str) -> int:
        return self._ask("namespace", {"name": name})[1][0]

    def _keep(self, process: Process) -> None:
        """Remember it. A test process may have but 1024 file descriptors: what ended long ago gives up its own."""
        with self._lock:
            self._processes.append(process)
            self._open.append(process)
            ended = [each for each in self._open if each.status is not None]
            for each in ended[:-MAX_ENDED]:
                each._settle()
                self._open.remove(each)

    def _build(self, what: plan.Plan) -> None:
        self._ask("build", what.as_json())

    def _ask(self, what: str, request: dict[str, Any], fds: Sequence[int] = ()) -> tuple[dict[str, Any], list[int]]:
        with self._lock:
            if self._socket is None:
                raise LabError("the lab is closed")
            try:
                _channel.send(self._socket, {**request, "do": what}, fds)
                answer, got = _channel.receive(self._socket)
            except _channel.Closed as error:
                self._end()  # what was written can still be saved
                raise LabError(f"the lab's process is gone: {error}") from None
        if "error" in answer:
            raise (Unsupported if answer.get("unsupported") else LabError)(answer["error"])
        return answer, got

    def close(self) -> None:
        """End the lab with everything in it. Sockets of `Host.socket` stay open until you close them."""
        self._end()
        self._open.clear()
        while self._processes:
            self._processes.pop()._close()
        while self._captures:
            self._captures.popitem()[1].close()

    def _end(self) -> None:
        with self._lock:
            if self._socket:
                self._socket.close()
                self._socket = None
        for fd in self._entrance:
            os.close(fd)
        self._entrance = []
        if self._process:
            try:
                self._process.wait(END_TIMEOUT)
            except subprocess.TimeoutExpired:  # pragma: no cover - only if the machine is stuck
                self._process.kill()
                self._process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
