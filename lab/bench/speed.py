"""How fast is a lab? Prints numbers, asserts nothing.

- Six namespaces (two homes, the core, the wires) made and gone; the same with both lines delayed.
- A delay of 25 ms at 20 000 packets a second: how exactly is it kept?
- TCP through one NAT: on a plain line, and on one that delays.

usage: python lab/bench/speed.py [life | delay | rate ...]
"""

from __future__ import annotations

import socket
import statistics
import struct
import sys
import time

from natlab import Lab, Link, RunningLab, home, public

PACKETS_PER_SECOND = 20_000
SECONDS = 5
PORT = 7000
RUNS = 30


def life() -> None:
    for name, wan in (("plain", Link()), ("delayed", Link(delay=0.025))):
        up, whole = [], []
        for _ in range(RUNS):
            start = time.perf_counter()
            lab = RunningLab(Lab((home("alice"), home("bob")), wan))
            up.append(time.perf_counter() - start)
            lab.close()
            whole.append(time.perf_counter() - start)
        print(
            f"six namespaces, {name}: up in {statistics.median(up) * 1e3:.0f} ms, up and gone in "
            f"{statistics.median(whole) * 1e3:.0f} ms (median of {RUNS}; worst {max(whole) * 1e3:.0f} ms)"
        )


def send_timed(address: str) -> None:
    """Packets with their time of sending, a few each millisecond: who spins takes a core from the wire."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.connect((address, PORT))
        start = time.monotonic()
        for tick in range(1000 * SECONDS):
            time.sleep(max(0.0, start + tick / 1000 - time.monotonic()))
            for _ in range(PACKETS_PER_SECOND // 1000):
                sock.send(struct.pack("=d", time.monotonic()))
        time.sleep(0.5)
        sock.send(struct.pack("=d", 0.0))


def receive_timed() -> list[float]:
    delays = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16 << 20)
        # The kernel's time of arrival, so that our own lateness counts for nothing.
        sock.setsockopt(socket.SOL_SOCKET, 35, 1)  # SO_TIMESTAMPNS
        sock.bind(("0.0.0.0", PORT))
        print("ready", flush=True)
        offset = time.time() - time.monotonic()
        while True:
            data, ancillary, _, _ = sock.recvmsg(16, 64)
            (sent,) = struct.unpack("=d", data)
            if not sent:
                return delays
            seconds, nanoseconds = struct.unpack("=qq", ancillary[0][2])
            delays.append(seconds + nanoseconds / 1e9 - offset - sent)


def delay() -> None:
    with RunningLab(Lab((public("alice", delay=0.025), public("relay")))) as lab:
        receiver = lab["relay"].spawn_python(receive_timed)
        receiver.expect("ready")
        sender = lab["alice"].spawn_python(send_timed, lab["relay"].address)
        sender.result()
        delays = sorted(receiver.result())
        stats = lab.stats()
    p50, p99, worst = (delays[int(len(delays) * share)] * 1e3 for share in (0.5, 0.99, 0.99999))
    print(
        f"25 ms at {PACKETS_PER_SECOND} packets/s: p50 {p50:.2f} ms, p99 {p99:.2f} ms, worst {worst:.2f} ms, "
        f"{len(delays)} of {PACKETS_PER_SECOND * SECONDS} arrived; the wire took {stats['cpu'] / SECONDS * 100:.0f} % "
        f"of a core and was {stats['late'] * 1e3:.2f} ms late at worst"
    )


def sink() -> float:
    """Takes one connection's bytes; returns bits per second."""
    with socket.create_server(("0.0.0.0", PORT)) as listener:
        print("ready", flush=True)
        sock, _ = listener.accept()
        with sock:
            buffer = bytearray(1 << 20)
            total, start = 0, time.monotonic()
            while size := sock.recv_into(buffer):
                total += size
            return total * 8 / (time.monotonic() - start)


def source(address: str) -> None:
    with socket.create_connection((address, PORT)) as sock:
        data = bytes(1 << 20)
        end = time.monotonic() + SECONDS
        while time.monotonic() < end:
            sock.sendall(data)


def rate() -> None:
    for name, link in (("a plain line", Link()), ("a line that delays 5 ms", Link(delay=0.005))):
        with RunningLab(Lab((home("alice"), public("relay")), link)) as lab:
            receiver = lab["relay"].spawn_python(sink)
            receiver.expect("ready")
            lab["alice"].spawn_python(source, lab["relay"].address).result()
            print(f"TCP through one NAT and {name}: {receiver.result() / 1e9:.2f} Gbit/s")


if __name__ == "__main__":
    for each in sys.argv[1:] or ("life", "delay", "rate"):
        {"life": life, "delay": delay, "rate": rate}[each]()
