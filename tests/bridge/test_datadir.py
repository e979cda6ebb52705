from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from kas_bridge.datadir import LOCK_FILE, DataDirError, is_locked, locked, prepare, socket_paths


def test_it_is_made_for_its_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b"
    prepare(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o700
    prepare(path)


def test_where_it_can_not_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataDirError, match=r"can't make the data directory .*file/x: .*--data-dir"):
        prepare(tmp_path / "file" / "x")
    with pytest.raises(DataDirError, match=r"can't make the data directory .*file: "):
        prepare(tmp_path / "file")


def test_where_everybody_could_write(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    with pytest.raises(DataDirError, match="chmod o-w"):
        prepare(tmp_path)


@pytest.mark.skipif(os.getuid() == 0, reason="root may write everywhere")
def test_where_it_can_not_be_written_to(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(DataDirError, match=r"can't write to the data directory .*--data-dir"):
        prepare(tmp_path)


def test_one_bridge_at_a_time(tmp_path: Path) -> None:
    assert not is_locked(tmp_path)
    with locked(tmp_path):
        assert is_locked(tmp_path)
        assert (tmp_path / LOCK_FILE).read_text() == f"{os.getpid()}\n"
        assert stat.S_IMODE((tmp_path / LOCK_FILE).stat().st_mode) == 0o600
        in_use = rf"in use by process {os.getpid()}, which is a kas-bridge: .*--data-dir"
        with pytest.raises(DataDirError, match=in_use), locked(tmp_path):
            pass
    assert not is_locked(tmp_path)
    with locked(tmp_path):
        pass


def test_a_killed_process_leaves_no_lock(tmp_path: Path) -> None:
    script = (
        "import sys, time, pathlib; from kas_bridge.datadir import locked\n"
        "with locked(pathlib.Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    )
    other = subprocess.Popen([sys.executable, "-c", script, tmp_path], stdout=subprocess.PIPE)
    assert other.stdout is not None
    with other.stdout:
        try:
            assert other.stdout.readline() == b"held\n"
            with pytest.raises(DataDirError, match=f"in use by process {other.pid}"), locked(tmp_path):
                pass
        finally:
            other.kill()
            other.wait()
    with locked(tmp_path):
        assert is_locked(tmp_path)


def test_where_the_lock_can_not_be_opened(tmp_path: Path) -> None:
    with pytest.raises(DataDirError, match="can't open"), locked(tmp_path / "none"):
        pass


def test_where_the_socket_is(tmp_path: Path) -> None:
    default = Path("~/.local/share/kas-bridge").expanduser()
    runtime = {"XDG_RUNTIME_DIR": str(tmp_path)}
    assert socket_paths(tmp_path, runtime) == [tmp_path / "control.sock"]
    assert socket_paths(default, {}) == [default / "control.sock"]
    assert socket_paths(default, runtime) == [tmp_path / "kas-bridge.sock", default / "control.sock"]
    assert socket_paths(default, {"XDG_RUNTIME_DIR": str(tmp_path / "none")}) == [default / "control.sock"]
