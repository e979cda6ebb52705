"""How true the wire between two namespaces is: the delay of single packets, and what fits through.

usage: python tests/perf/wire.py [MILLISECONDS ...]
"""

from __future__ import annotations

import socket
import sys
import threading
import time

from kas_bridge.simnet.wire import Wire

PACKETS = 400
STREAMS = 8
BYTES = 64 << 20


def packets(wire: Wire) -> list[float]:
    """Seconds that single datagrams take, both ways, sorted."""
    taken = []
    for sender, receiver in ((wire.a, wire.b), (wire.b, wire.a)):
        here, there = (end.socket(kind=socket.SOCK_DGRAM) for end in (sender, receiver))
        with here, there:
            there.bind((receiver.address, 5000))
            for _ in range(PACKETS // 2):
                begun = time.monotonic()
                here.sendto(b"x", (receiver.address, 5000))
                there.recv(10)
                taken.append(time.monotonic() - begun)
                time.sleep(0.003)
    return sorted(taken)


def streams(wire: Wire) -> float:
    """Bytes per second of several TCP streams from a to b."""

    def send(port: int) -> None:
        with wire.a.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 << 20)
            client.connect((wire.b.address, port))
            client.sendall(bytes(BYTES))

    def receive(listener: socket.socket) -> None:
        accepted, _ = listener.accept()
        room = bytearray(1 << 20)
        with accepted, listener:
            while accepted.recv_into(room):
                pass

    threads = []
    for _ in range(STREAMS):
        listener = wire.b.socket()
        listener.bind((wire.b.address, 0))
        listener.listen()
        threads += [
            threading.Thread(target=receive, args=(listener,)),
            threading.Thread(target=send, args=(listener.getsockname()[1],)),
        ]
    begun = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return STREAMS * BYTES / (time.monotonic() - begun)


def main() -> None:
    print("| asked | p50 | p99 | most | 8 TCP streams, MB/s | its CPU s per GB | frames lost |")
    print("|---|---|---|---|---|---|---|")
    for text in sys.argv[1:] or ["0", "5", "25", "100"]:
        asked = float(text)
        with Wire(asked / 1000) as wire:
            taken = packets(wire)
            begun = wire.stats()
            rate = streams(wire)
            after = wire.stats()
            cpu = (after.cpu - begun.cpu) / (after.bytes[0] - begun.bytes[0]) * 1e9
            figures = [taken[len(taken) // 2], taken[int(len(taken) * 0.99)], taken[-1]]
            shown = " | ".join(f"{figure * 1000:.2f} ms" for figure in figures)
            print(f"| {asked:g} ms | {shown} | {rate / 1e6:.0f} | {cpu:.2f} | {after.dropped} |", flush=True)


if __name__ == "__main__":
    main()
