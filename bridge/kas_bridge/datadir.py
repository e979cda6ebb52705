"""The data directory: made for its owner alone, locked by one bridge at a time, and where the control socket lies."""

from __future__ import annotations

import fcntl
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from kas_bridge.config import default_data_dir
from kas_libp2p.errors import KasError

LOCK_FILE = "lock"
SOCKET_FILE = "control.sock"


class DataDirError(KasError):
    """The data directory can't be used, or another bridge uses it. The text says what helps."""


def prepare(path: Path) -> None:
    """Make the data directory if it is missing, readable by its owner alone.

    Raises:
        DataDirError: it can't be made or written to, or everybody can write to it.
    """
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise DataDirError(
            f"can't make the data directory {path}: {error.strerror}; give another one with --data-dir"
        ) from error
    if path.stat().st_mode & stat.S_IWOTH:
        raise DataDirError(f"everybody can write to {path}, and so replace the bridge's key. Type: chmod o-w {path}")
    if not os.access(path, os.W_OK | os.X_OK):
        raise DataDirError(f"can't write to the data directory {path}; give another one with --data-dir")


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the data directory for this process. The lock ends with the process, however that ends.

    Raises:
        DataDirError: another bridge holds it; the text names it.
    """
    file = path / LOCK_FILE
    try:
        handle = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise DataDirError(f"can't open {file}: {error.strerror}") from error
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(handle, 32).decode("ascii", "replace").strip()
            who = f"process {holder}" if holder.isdigit() else "another process"
            raise DataDirError(
                f"{path} is in use by {who}, which is a kas-bridge: see kas-bridge status, end it with"
                " kas-bridge stop, or run a second one with another --data-dir"
            ) from None
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"{os.getpid()}\n".encode(), 0)
        yield
        os.ftruncate(handle, 0)
    finally:
        os.close(handle)


def is_locked(path: Path) -> bool:
    """Whether a bridge holds the data directory now."""
    try:
        handle = os.open(path / LOCK_FILE, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(handle)
    return False


def socket_paths(data_dir: Path, environ: Mapping[str, str] = os.environ) -> list[Path]:
    """Where the control socket of a data directory may be, the place that a new bridge takes first.

    ``$XDG_RUNTIME_DIR/kas-bridge.sock`` for the default data directory, and always ``control.sock`` in the directory
    itself: a bridge that was started by the system may have had no runtime directory, and who asks it does.
    """
    paths = [data_dir / SOCKET_FILE]
    runtime = environ.get("XDG_RUNTIME_DIR", "")
    if data_dir == default_data_dir(environ) and runtime.startswith("/") and Path(runtime).is_dir():
        paths.insert(0, Path(runtime) / "kas-bridge.sock")
    return paths
