"""200 labs in a row and 8 side by side: what is left? Exit status 1 if anything is.

usage: python lab/bench/leaks.py [IN_A_ROW] [SIDE_BY_SIDE]
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from natlab import Lab, RunningLab, home, public

PAIR = Lab((home("alice", "sym", delay=0.005), public("relay")))


KINDS = ("net:[", "user:[", "pid:[", "mnt:[")
"""Of namespaces that a lab could make."""


def one(_: int) -> None:
    with RunningLab(PAIR) as lab:
        lab.capture()
        lab["alice"].spawn(["sleep", "1000"])
        assert lab["alice"].run(["echo", "x"]).stdout == "x\n"
        assert lab["relay"].python(os.getpid)


def left() -> dict[str, int]:
    """Counts of what a lab could leave."""
    spaces, mounts, mine = set(), set(), 0
    for each in map(Path, filter(str.isdigit, os.listdir("/proc"))):
        process = "/proc" / each
        try:
            links = [*(process / "ns").iterdir(), *(process / "fd").iterdir()]
            spaces |= {target for target in map(os.readlink, links) if target.startswith(KINDS)}
            mounts |= set((process / "mountinfo").read_text(encoding="utf-8").splitlines())
            mine += b"natlab" in (process / "cmdline").read_bytes()
        except OSError:
            continue
    names = Path("/run/netns")
    return {
        "namespaces that a process is in or holds": len(spaces),
        "mounts that a process sees": len(mounts),
        "processes": mine,
        "open files": len(os.listdir("/proc/self/fd")),
        "named namespaces": len(os.listdir(names)) if names.is_dir() else 0,
        "temporary files": sum("natlab" in name for name in os.listdir(tempfile.gettempdir())),
    }


def main() -> int:
    rows, columns = (int(each) for each in [*sys.argv[1:], "200", "8"][:2])
    one(0)
    before = left()
    start = time.monotonic()
    for number in range(rows):
        one(number)
    print(
        f"{rows} labs in a row: {(time.monotonic() - start) / rows * 1e3:.0f} ms each, with two programs and a function"
    )
    with ThreadPoolExecutor(columns) as pool:
        list(pool.map(one, range(columns * 3)))
    after = left()
    for what, count in after.items():
        print(f"{what}: {before[what]} before, {count} after")
    return 0 if all(after[what] <= before[what] for what in after) else 1


if __name__ == "__main__":
    sys.exit(main())
