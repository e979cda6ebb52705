"""Who holds a TCP port, as far as Linux tells: the kernel's socket tables, and the open files of each process.

A refusal that names the other program saves its reader a search. Where /proc is missing or closed to us, the answer is
just less exact.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import pwd
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")
_LISTEN = "0A"


@dataclass(frozen=True, slots=True)
class _Row:
    ip: ipaddress.IPv4Address | ipaddress.IPv6Address
    port: int
    listening: bool
    uid: int
    inode: int


def who_holds(ip: str, port: int, proc: Path = PROC) -> str | None:
    """The process whose socket stands in the way of a listener on ``ip`` and ``port``.

    Args:
        ip: the address to listen on, wildcard or not.
        proc: where the proc file system is.

    Returns:
        words that fit after "held by", such as ``kas-bridge (pid 4711)``; ``None`` if nobody was found.
    """
    wanted = ipaddress.ip_address(ip.partition("%")[0])
    rows = [row for row in _rows(proc) if row.port == port and _collide(wanted, row.ip)]
    if not rows:
        return None
    row = max(rows, key=lambda each: (each.listening, each.inode))  # a listener before the connections it accepted
    held = _process(proc, row.inode)
    if held is None:
        return f"a process of user {_user(row.uid)}"
    pid, name = held
    if pid == os.getpid():
        return "this very process"
    return f"{name} (pid {pid})" if row.listening else f"a connection of {name} (pid {pid})"


def _rows(proc: Path) -> Iterator[_Row]:
    for table in ("tcp", "tcp6"):
        try:
            lines = (proc / "net" / table).read_text("ascii").splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            fields = line.split()
            with contextlib.suppress(ValueError, IndexError):
                ip, port = fields[1].split(":")
                yield _Row(_address(ip), int(port, 16), fields[3] == _LISTEN, int(fields[7]), int(fields[9]))


def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    # The kernel prints each 32-bit word in the machine's byte order, which is little-endian wherever this runs.
    data = b"".join(bytes.fromhex(text[index : index + 8])[::-1] for index in range(0, len(text), 8))
    if len(data) == 4:
        return ipaddress.IPv4Address(data)
    address = ipaddress.IPv6Address(data)
    return address.ipv4_mapped or address


def _collide(
    wanted: ipaddress.IPv4Address | ipaddress.IPv6Address, held: ipaddress.IPv4Address | ipaddress.IPv6Address
) -> bool:
    if held.is_unspecified:
        return held.version == wanted.version or held.version == 6  # [::] without V6ONLY takes IPv4 too
    return wanted == held or (wanted.is_unspecified and wanted.version == held.version)


def _process(proc: Path, inode: int) -> tuple[int, str] | None:
    link = f"socket:[{inode}]"
    for process in proc.glob("[0-9]*"):
        try:
            if any(os.readlink(file) == link for file in _files(process)):
                return int(process.name), (process / "comm").read_text().strip()
        except OSError:
            continue
    return None


def _files(process: Path) -> Iterator[str]:
    with os.scandir(process / "fd") as entries:
        for entry in entries:
            yield entry.path


def _user(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)
