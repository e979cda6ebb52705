"""From the start of a process behind a NAT to a direct connection with a peer behind another, through a known relay.

    python -m tests.perf.punch_start [--times 10]

Each time `kas-libp2p dial --wait punched` starts in a home of its own; the time includes Python's own start.
"""

from __future__ import annotations

import argparse
import statistics
import time

from natlab import RunningLab
from natlab.topology import lab_from_text
from tests.command import COMMAND, PATIENCE


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=10)
    times = parser.parse_args().times
    homes = [f"alice{number}=pr,delay=25ms" for number in range(times)]
    took = []
    with RunningLab(lab_from_text(["relay=public", "bob=eimx,delay=25ms", *homes]), quiet=True) as lab:
        relay = lab["relay"].spawn([*COMMAND, "relay", "--port", "4001"])
        at = relay.expect(rf"/ip4/{lab['relay'].address}/tcp/4001/p2p/\S+", PATIENCE)[0]
        bob = lab["bob"].spawn([*COMMAND, "listen", "--relay", at])
        circuit = bob.expect(rf"reachable at .*({at}/p2p-circuit/[^\s,]+)", PATIENCE)[1]
        for number in range(times):
            begun = time.monotonic()
            dial = lab[f"alice{number}"].spawn([*COMMAND, "dial", circuit, "--wait", "punched"])
            dial.expect("punched: direct", PATIENCE)
            took.append(time.monotonic() - begun)
            dial.wait(PATIENCE)
    print(f"{times} times, pr x eimx, 100 ms of round trip:", end=" ")
    print(f"{statistics.median(took):.2f} s (p50), {max(took):.2f} s (longest)")


if __name__ == "__main__":
    main()
