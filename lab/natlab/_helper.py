"""The process that holds one lab: started fresh, never forked from the test process, and gone with it in any case.

::

    test process ── control socket ──┐
      └─ keeper: unshares, waits     │
           └─ init of a PID namespace: holds the namespaces, obeys
                ├─ wires             (only once a link does something)
                ├─ nft …             (for milliseconds)
                └─ whatever runs in hosts

When the control socket is closed or the test process is gone, init ends; with the init of a PID namespace the kernel
kills everything inside, and network namespaces that nobody is in vanish. Nothing has a name: no file, no mount, no
``/run/netns``. If the keeper is killed, init is killed by the kernel, too.

This module imports as little as it can: a lab has to be there in a blink.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import select
import signal
import socket
import struct
from typing import Any

from . import _channel, _kernel, _netlink

PARALLEL_NFT = 8
"""Scripts that are loaded side by side: more would only queue for the kernel's lock."""


class _Refused(Exception):
    """A request can't be done; the text is for the user."""


class _Lacking(_Refused):
    """The kernel was built without something, or may not load it."""

    def __init__(self, what: str) -> None:
        super().__init__(
            f"this kernel lacks something ({what}): natlab needs veth, bridge, IPv6 and nf_tables, with nft_chain_nat, "
            "nft_masq, nft_ct, nft_reject_inet, nft_numgen, nft_hash and nft_fwd_netdev; load them with modprobe -a"
        )


def _namespace(kind: str) -> int:
    return os.open(f"/proc/self/ns/{kind}", os.O_RDONLY | os.O_CLOEXEC)


def _enter_new_namespaces() -> list[int]:
    """Unshare what a lab needs; returns the user namespace, if one had to be made."""
    uid, gid = os.getuid(), os.getgid()
    try:
        _kernel.unshare(_kernel.CLONE_NEWNET | _kernel.CLONE_NEWPID)
        return []
    except PermissionError:
        _kernel.unshare(_kernel.CLONE_NEWUSER)
    for file, content in (("setgroups", "deny"), ("uid_map", f"0 {uid} 1"), ("gid_map", f"0 {gid} 1")):
        with open(f"/proc/self/{file}", "w", encoding="ascii") as target:
            target.write(content)
    _kernel.unshare(_kernel.CLONE_NEWNET | _kernel.CLONE_NEWPID)
    return [_namespace("user")]


def main(control_fd: int, nft: str) -> None:
    """The keeper's whole life."""
    control = socket.socket(fileno=control_fd)
    try:
        parent = os.pidfd_open(os.getppid())
        user = _enter_new_namespaces()
        keeper = os.pidfd_open(os.getpid())
        child = os.fork()
    except OSError as error:
        _channel.send(control, {"unsupported": f"{error.strerror} ({type(error).__name__})"})
        return
    if child:
        control.close()
        os.close(parent)
        os.waitpid(child, 0)
        return
    _kernel.die_with_parent(signal.SIGKILL)
    if select.select([keeper], [], [], 0)[0]:
        os._exit(0)  # the keeper ended before the kernel knew that we want to follow
    os.close(keeper)
    try:
        _Lab(control, parent, user, nft).run()
    except BaseException:  # noqa: BLE001 - whatever it is, the lab ends here, and should say why
        import traceback

        traceback.print_exc()
    finally:
        os._exit(0)


class _Lab:
    def __init__(self, control: socket.socket, parent: int, user: list[int], nft: str) -> None:
        self.clients: dict[int, socket.socket] = {control.fileno(): control}
        self.parent: int | None = parent
        self.listener: socket.socket | None = None
        self.note: Any = None
        self.user = user
        self.nft = nft
        self.home = _namespace("net")
        self.pids = _namespace("pid")
        self.namespaces: dict[str, int] = {}
        self.peers: dict[tuple[str, str], tuple[str, str]] = {}
        self.reports: dict[int, int] = {}
        """Where the end of a process is to be told, by its id."""
        self.links = _netlink.Links()
        self.sockets: dict[str, _netlink.Links] = {}
        self.wires: socket.socket | None = None
        self.offloaded: dict[int, bool] = {}
        _raise_fd_limit()

    def run(self) -> None:
        """Obey until nobody is left who could ask."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
        wake, wakes = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(wakes, warn_on_full_buffer=False)
        for client in self.clients.values():
            _channel.send(client, {"pid": _outer_pid()}, [*self.user, self.pids])
        while self.clients or self.listener:
            poll = select.poll()
            watched = [wake, *self.clients, *([self.parent] if self.parent is not None else [])]
            if self.listener:
                watched.append(self.listener.fileno())
            for fd in watched:
                poll.register(fd, select.POLLIN)
            for fd, _ in poll.poll():
                if fd == wake:
                    os.read(wake, 4096)
                    self.reap()
                elif fd == self.parent:
                    return
                elif self.listener and fd == self.listener.fileno():
                    self.accept(self.listener)
                elif not self.serve(fd):
                    return

    def accept(self, listener: socket.socket) -> None:
        client, _ = listener.accept()
        # An abstract address has no owner: only our own user and root may ask.
        _, uid, _ = struct.unpack("=iII", client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        if uid not in (0, os.getuid()):
            client.close()
            return
        try:
            _channel.send(client, {"note": self.note, "pid": _outer_pid()}, [*self.user, self.pids])
        except _channel.Closed:
            client.close()
            return
        self.clients[client.fileno()] = client

    def serve(self, fd: int) -> bool:
        """Answer one request; False: the lab is to end."""
        client = self.clients[fd]
        fds: list[int] = []
        try:
            request, fds = _channel.receive(client)
            if request["do"] == "down":
                return False
            try:
                answer, out = getattr(self, "do_" + request["do"])(request, fds)
            except _Refused as error:
                answer, out = {"error": str(error), "unsupported": isinstance(error, _Lacking)}, []
            except OSError as error:
                answer, out = {"error": f"{request['do']}: {error}"}, []
            fds += out
            _channel.send(client, answer, out)
        except _channel.Closed:
            del self.clients[fd]
            client.close()
        finally:
            for each in fds:
                os.close(each)
        return True

    def reap(self) -> None:
        """As init we bury every process, and tell whoever asked for it."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if not pid:
                return
            if (report := self.reports.pop(pid, None)) is not None:
                with contextlib.suppress(OSError):  # nobody waits for it any more
                    os.write(report, b"%d\n" % os.waitstatus_to_exitcode(status))
                os.close(report)

    def enter(self, name: str) -> int:
        fd = self.find(name)
        _kernel.setns(fd, _kernel.CLONE_NEWNET)
        return fd

    def find(self, name: str) -> int:
        try:
            return self.namespaces[name]
        except KeyError:
            raise _Refused(f"there is no namespace {name}") from None

    def do_build(self, request: dict[str, Any], _: list[int]) -> tuple[dict[str, Any], list[int]]:
        """Make namespaces and take the steps of a plan."""
        for name in request["namespaces"]:
            if name in self.namespaces:
                raise _Refused(f"there is a namespace {name} already")
            _kernel.unshare(_kernel.CLONE_NEWNET)
            self.namespaces[name] = _namespace("net")
        scripts: list[tuple[str, str]] = []
        wires: list[dict[str, Any]] = []
        forget: list[str] = []
        try:
            for step in request["steps"]:
                match step.pop("step"):
                    case "Nft":
                        scripts.append((step["at"], step["script"]))
                    case "Wire":
                        wires.append(step)
                    case "Forget":
                        forget.append(step["at"])
                    case kind:
                        self.take(kind, step)
            for wire in wires:
                self.set_offload(wire)
            if wires:
                scripts.append(("wires", "".join(map(_wire_rules, wires))))
            self.load(scripts)
            for name in forget:
                self.enter(name)
                _netlink.forget_connections()
            for wire in wires:
                self.set_wire(wire)
        finally:
            _kernel.setns(self.home, _kernel.CLONE_NEWNET)
            for sock in self.sockets.values():
                sock.close()
            self.sockets.clear()
        return {}, []

    def take(self, kind: str, step: dict[str, Any]) -> None:
        """One step in the kernel."""
        try:
            match kind, step:
                case "Veth", {"a": a, "a_name": a_name, "b": b, "b_name": b_name}:
                    self.links.veth(a_name, self.find(a), b_name, self.find(b))
                    self.peers[a, a_name], self.peers[b, b_name] = (b, b_name), (a, a_name)
                case "Bridge", {"at": at, "name": name, "ports": ports}:
                    self.at(at).bridge(name, ports)
                case "Up", {"at": at, "name": name}:
                    self.at(at).up(name)
                case "Address", {"at": at, "name": name, "address": address, "remove": remove}:
                    self.at(at).address(name, address, remove)
                case "Route", {"at": at, "prefix": prefix, "via": via}:
                    self.at(at).route(prefix, via)
                case "Sysctl", {"at": at, "key": key, "value": value, "optional": optional}:
                    self.enter(at)
                    try:
                        with open(f"/proc/sys/net/{key}", "w", encoding="ascii") as file:
                            file.write(value)
                    except OSError:
                        if not optional:
                            raise
                case _:
                    raise _Refused(f"there is no step {kind}")
        except OSError as error:
            refusal = _Lacking if error.errno in (errno.EOPNOTSUPP, errno.EAFNOSUPPORT) else _Refused
            raise refusal(f"the kernel refuses {kind} {json.dumps(step)}: {error}") from None

    def at(self, name: str) -> _netlink.Links:
        """Enter a namespace, with a netlink socket that stays for this build."""
        self.enter(name)
        if name not in self.sockets:
            self.sockets[name] = _netlink.Links()
        return self.sockets[name]

    def load(self, scripts: list[tuple[str, str]]) -> None:
        """Load nftables scripts side by side."""
        started: list[tuple[int, int, str]] = []
        failures: list[str] = []

        def finish() -> None:
            pid, errors, name = started.pop(0)
            _, status = os.waitpid(pid, 0)
            if status:
                failures.append(f"nft fails in {name}: {os.pread(errors, 1000, 0).decode(errors='replace').strip()}")
            os.close(errors)

        for name, script in scripts:
            if not script:
                continue
            if len(started) == PARALLEL_NFT:
                finish()
            namespace = self.find(name)
            text, errors = os.memfd_create("nft"), os.memfd_create("nft-errors")
            os.write(text, script.encode())
            os.lseek(text, 0, os.SEEK_SET)
            pid = os.fork()
            if not pid:
                _become([self.nft, "-f", "-"], {}, "/", (text, errors, errors), namespace)
            os.close(text)
            started.append((pid, errors, name))
        while started:
            finish()
        if failures:
            reason = failures[0].splitlines()[0]
            raise (_Lacking if "not supported" in reason else _Refused)(reason)

    def set_offload(self, wire: dict[str, Any]) -> None:
        """On a link that does something, a packet is a packet; on a plain one the kernels may batch."""
        number = wire["number"]
        batch = all(each is None or _is_plain(each) for each in (wire["up"], wire["down"]))
        if self.offloaded.get(number, True) == batch:
            return
        self.offloaded[number] = batch
        for end in "ab":
            at, name = self.peers["wires", f"{number}{end}"]
            self.enter(at)
            _netlink.set_checksum_offload(name, batch)

    def set_wire(self, wire: dict[str, Any]) -> None:
        """Tell the wire process, which is started by the first link that needs it."""
        number = wire["number"]
        for way, source, target in (("up", "b", "a"), ("down", "a", "b")):
            link = wire[way]
            if link is not None and _is_plain(link):
                link = None
            if link is None and self.wires is None:
                continue
            if self.wires is None:
                from . import _wire

                _, self.wires = _wire.start(self.find("wires"))
            request = {
                "key": f"{number}{way}",
                "source": f"{number}{source}",
                "target": f"{number}{target}",
                "seed": wire[way + "_seed"],
                "link": link,
            }
            self.ask_wires(request)

    def ask_wires(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self.wires is not None
        try:
            _channel.send(self.wires, request)
            answer, _ = _channel.receive(self.wires)
        except _channel.Closed:
            raise _Refused("the wire process is gone") from None
        if "error" in answer:
            raise _Refused(answer["error"])
        return answer

    def do_stats(self, *_: Any) -> tuple[dict[str, Any], list[int]]:
        return (self.ask_wires({"stats": True}) if self.wires else {}), []

    def do_namespace(self, request: dict[str, Any], _: list[int]) -> tuple[dict[str, Any], list[int]]:
        """Hand out a network namespace."""
        return {}, [os.dup(self.find(request["name"]))]

    def do_socket(self, request: dict[str, Any], _: list[int]) -> tuple[dict[str, Any], list[int]]:
        """Hand out a socket that lives in a namespace."""
        self.enter(request["name"])
        try:
            sock = socket.socket(request["family"], request["kind"], request["protocol"])
        finally:
            _kernel.setns(self.home, _kernel.CLONE_NEWNET)
        return {}, [sock.detach()]

    def do_spawn(self, request: dict[str, Any], fds: list[int]) -> tuple[dict[str, Any], list[int]]:
        """Start a program in a namespace; its end is told through the last file descriptor."""
        namespace = self.find(request["name"])
        hearing, telling = os.pipe2(os.O_CLOEXEC)
        *standard, report = fds
        pid = os.fork()
        if not pid:
            os.write(telling, b"%d\n" % _outer_pid())
            _become(request["argv"], request["env"], request["cwd"], standard, namespace, telling)
        os.close(telling)
        said = b""
        while part := os.read(hearing, 4096):  # ends when the program has begun, or could not
            said += part
        os.close(hearing)
        outer, _, failure = said.decode().partition("\n")
        if failure:
            os.waitpid(pid, 0)
            raise _Refused(f"{request['argv'][0]} can't be started in {request['name']}: {failure}")
        self.reports[pid] = os.dup(report)
        return {"pid": int(outer)}, []

    def do_capture(self, request: dict[str, Any], fds: list[int]) -> tuple[dict[str, Any], list[int]]:
        """Write what passes in a namespace into a file, until the lab ends."""
        from . import _pcap

        namespace = self.find(request["name"])
        hearing, telling = os.pipe2(os.O_CLOEXEC)
        if not os.fork():
            try:
                _calm()
                _kernel.setns(namespace, _kernel.CLONE_NEWNET)
                frames = _pcap.listen()
                _kernel.setns(self.home, _kernel.CLONE_NEWNET)  # whoever kills all in there does not mean us
                _pcap.record(frames, fds[0], telling)
            finally:
                os._exit(0)
        os.close(telling)
        os.read(hearing, 1)  # it listens
        os.close(hearing)
        return {}, []

    def do_detach(self, request: dict[str, Any], fds: list[int]) -> tuple[dict[str, Any], list[int]]:
        """Outlive the client; from now on whoever connects to this listening socket may ask."""
        self.listener = socket.socket(fileno=os.dup(fds[0]))
        self.parent = None
        return {}, []

    def do_note(self, request: dict[str, Any], _: list[int]) -> tuple[dict[str, Any], list[int]]:
        """Remember what whoever connects is to be told."""
        self.note = request["note"]
        return {}, []


def _is_plain(link: dict[str, float]) -> bool:
    return not any(link.values())


_NEIGHBOURS = ("ether type arp", "icmpv6 type { nd-neighbor-solicit, nd-neighbor-advert }")


def _wire_rules(wire: dict[str, Any]) -> str:
    """What the kernel does with frames of a link: pass them on, or leave them to the wire process, or to nobody.

    On a link that is cut neighbours still find each other, else whoever sends would be told that the host is not there,
    and a link that is cut one way would end the other way, too.
    """
    text = "add table netdev wire\n"
    for way, source, target in (("up", "b", "a"), ("down", "a", "b")):
        link, name = wire[way], f"{wire['number']}{source}"
        hook = f'type filter hook ingress device "{name}" priority 0'
        text += f"add chain netdev wire from{name} {{ {hook}; policy drop; }}\nflush chain netdev wire from{name}\n"
        passing = _NEIGHBOURS if link is None else ("",) if _is_plain(link) else ()
        for frames in passing:
            text += f'add rule netdev wire from{name} {frames} fwd to "{wire["number"]}{target}"\n'
    return text


def _outer_pid() -> int:
    """Our process id as the rest of the system sees it: ``/proc`` is still that of the outside."""
    return int(os.readlink("/proc/self"))


def _raise_fd_limit() -> None:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 1 << 16), hard))
    _LIMITS.append((soft, hard))


_LIMITS: list[tuple[int, int]] = []
"""What programs in hosts get back: some close every descriptor they might have."""


def _calm() -> None:
    """In a forked child: no signal handling of ours."""
    signal.set_wakeup_fd(-1)
    for kind in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD):
        signal.signal(kind, signal.SIG_DFL)


def _become(
    argv: list[str], env: dict[str, str], cwd: str, standard: Any, namespace: int, telling: int | None = None
) -> None:
    """In a forked child: become a program in a namespace."""
    try:
        _calm()
        os.setsid()
        _kernel.setns(namespace, _kernel.CLONE_NEWNET)
        os.chdir(cwd)
        for target, fd in enumerate(standard):
            # None of these is 0, 1 or 2: the keeper got those from its parent, so what came later is above.
            os.dup2(fd, target)
        for each in (signal.SIGPIPE, signal.SIGXFSZ):
            signal.signal(each, signal.SIG_DFL)
        if _LIMITS:
            import resource

            resource.setrlimit(resource.RLIMIT_NOFILE, _LIMITS[0])
        os.execvpe(argv[0], argv, env)
    except BaseException as error:  # noqa: BLE001 - whatever it is, this child ends here
        if telling is not None:
            os.write(telling, str(getattr(error, "strerror", None) or error).encode())
    finally:
        os._exit(127)
