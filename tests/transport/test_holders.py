from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from kas_libp2p.transport.holders import who_holds

HEADER = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n"


class Proc:
    """A proc file system with these sockets and processes."""

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / "net").mkdir()
        for table in ("tcp", "tcp6"):
            (root / "net" / table).write_text(HEADER)

    def socket(self, address: str, state: str, inode: int, uid: int = 0) -> None:
        table = "tcp" if len(address.split(":")[0]) == 8 else "tcp6"
        with (self.root / "net" / table).open("a") as file:
            file.write(
                f"   0: {address} 00000000:0000 {state} 00000000:00000000 00:00000000 00000000 {uid} 0 {inode} 1\n"
            )

    def process(self, pid: int, name: str, inode: int) -> None:
        (self.root / str(pid) / "fd").mkdir(parents=True)
        (self.root / str(pid) / "comm").write_text(f"{name}\n")
        (self.root / str(pid) / "fd" / "3").symlink_to(f"socket:[{inode}]")


@pytest.fixture
def proc(tmp_path: Path) -> Proc:
    return Proc(tmp_path)


V4, V6 = "0100007F:3EF5", "00000000000000000000000001000000:3EF5"  # 127.0.0.1 and ::1, port 16117
ANY4, ANY6 = "00000000:3EF5", f"{'0' * 32}:3EF5"
MAPPED = "0000000000000000FFFF00000100007F:3EF5"


@pytest.mark.parametrize(
    ("held", "wanted", "in_the_way"),
    [
        (V4, "127.0.0.1", True),
        (V4, "0.0.0.0", True),
        (V4, "127.0.0.2", False),
        (V4, "::1", False),
        (V4, "::", False),
        (V6, "::1", True),
        (V6, "::", True),
        (V6, "127.0.0.1", False),
        (ANY4, "127.0.0.1", True),
        (ANY4, "::1", False),
        (ANY6, "::1", True),
        (ANY6, "127.0.0.1", True),
        (MAPPED, "127.0.0.1", True),
    ],
)
def test_which_sockets_are_in_the_way(proc: Proc, held: str, wanted: str, in_the_way: bool) -> None:
    proc.socket(held, "0A", 77)
    proc.process(4711, "kas-bridge", 77)
    assert who_holds(wanted, 16117, proc.root) == ("kas-bridge (pid 4711)" if in_the_way else None)
    assert who_holds(wanted, 16118, proc.root) is None


def test_a_listener_is_named_before_its_connections(proc: Proc) -> None:
    proc.socket(V4, "01", 99)
    proc.socket(V4, "0A", 77)
    proc.process(1, "client", 99)
    proc.process(2, "server", 77)
    assert who_holds("127.0.0.1", 16117, proc.root) == "server (pid 2)"


def test_a_mere_connection(proc: Proc) -> None:
    proc.socket(V4, "01", 99)
    proc.process(1, "curl", 99)
    assert who_holds("127.0.0.1", 16117, proc.root) == "a connection of curl (pid 1)"


def test_a_process_that_we_may_not_look_into(proc: Proc) -> None:
    proc.socket(V4, "0A", 77, uid=0)
    proc.socket(V6, "0A", 78, uid=4_000_000)
    assert who_holds("127.0.0.1", 16117, proc.root) == "a process of user root"
    assert who_holds("::1", 16117, proc.root) == "a process of user 4000000"


def test_ourselves(proc: Proc) -> None:
    proc.socket(V4, "0A", 77)
    proc.process(os.getpid(), "python", 77)
    assert who_holds("127.0.0.1", 16117, proc.root) == "this very process"


def test_no_proc_at_all(tmp_path: Path) -> None:
    assert who_holds("127.0.0.1", 16117, tmp_path / "nothing") is None


def test_lines_that_make_no_sense_are_passed_over(proc: Proc) -> None:
    with (proc.root / "net" / "tcp").open("a") as file:
        file.write("what is this\n\n  1: xyz:12 0 0A\n")
    proc.socket(V4, "0A", 77)
    proc.process(5, "x", 77)
    assert who_holds("127.0.0.1", 16117, proc.root) == "x (pid 5)"


def test_the_real_one() -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        assert who_holds("0.0.0.0", sock.getsockname()[1]) == "this very process"
