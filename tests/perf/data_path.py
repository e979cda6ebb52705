"""How fast the data path is: one server process, one client process, loopback TCP.

usage: python -m tests.perf.data_path [--rounds N] [--mb N] [--connections N] [--bound FILE] [CASE ...]

Cases: bulk64, bulk4, echo, dial, mixed, idle; all of them if none is named. Only ratios of figures of one run say
anything: rounds are interleaved, and each figure is a median with its spread. FILE is a program that shows how fast
Noise and Yamux framing can be on trio; its figures stand beside ours.

A subject is one way to get a byte stream: `Raw` is plain trio TCP, `Ours` is this library. Another one needs `serve`
and `connect` only.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import Any, Protocol

import trio

from kas_libp2p.config import Config
from kas_libp2p.identity import Identity
from kas_libp2p.transport.connection import Connection
from kas_libp2p.transport.raw import RawConnection
from kas_libp2p.transport.tcp import Dialer, listen
from kas_libp2p.transport.upgrade import upgrade

ECHO_SIZE = 32
SINK, ECHO, USAGE = "/perf/sink", "/perf/echo", "/perf/usage"
SERVICES = (SINK, ECHO, USAGE)

Stream = trio.abc.HalfCloseableStream
Opener = Callable[[str], Awaitable[Stream]]


def usage() -> dict[str, float]:
    """CPU seconds and resident KiB of this process."""
    with open("/proc/self/statm") as file:
        pages = int(file.read().split()[1])
    return {"cpu": time.process_time(), "kib": pages * resource.getpagesize() / 1024}


# The service, on any stream


async def sink(stream: Stream) -> None:
    """Read to the end, then say one byte."""
    while await stream.receive_some():
        pass
    await stream.send_all(b"k")
    await stream.aclose()


async def echo(stream: Stream) -> None:
    while data := await stream.receive_some():
        await stream.send_all(data)
    await stream.aclose()


async def tell_usage(stream: Stream) -> None:
    await stream.receive_some()
    await stream.send_all(json.dumps(usage()).encode())
    await stream.aclose()


async def serve_stream(service: str, stream: Stream) -> None:
    """Serve one stream; a client that leaves in the middle ends it."""
    with suppress(trio.BrokenResourceError):
        await HANDLERS[service](stream)


HANDLERS = {SINK: sink, ECHO: echo, USAGE: tell_usage}


async def bulk(opener: Opener, total: int, size: int) -> float:
    """Write ``total`` bytes in pieces of ``size`` and wait until the other side has read them. Returns MB/s."""
    stream = await opener(SINK)
    data = bytes(size)
    start = time.perf_counter()
    for _ in range(total // size):
        await stream.send_all(data)
    await stream.send_eof()
    assert await stream.receive_some() == b"k"
    seconds = time.perf_counter() - start
    await stream.aclose()
    return total / seconds / 1e6


async def echoes(opener: Opener, count: int) -> list[float]:
    """Round trips of small messages, in microseconds."""
    stream = await opener(ECHO)
    data = bytes(ECHO_SIZE)
    times = []
    for _ in range(count):
        start = time.perf_counter()
        await stream.send_all(data)
        missing = ECHO_SIZE
        while missing:
            missing -= len(await stream.receive_some())
        times.append((time.perf_counter() - start) * 1e6)
    await stream.aclose()
    return times


async def ask_usage(opener: Opener) -> dict[str, float]:
    stream = await opener(USAGE)
    await stream.send_all(b"?")
    answer: dict[str, float] = json.loads(await stream.receive_some())
    await stream.aclose()
    return answer


# The subjects


class Subject(Protocol):
    name: str

    async def serve(self) -> None: ...

    def connect(self, port: int) -> Any: ...


class Raw:
    """Plain trio TCP: a connection per stream, whose first byte names the service."""

    name = "raw"

    async def serve(self) -> None:
        async def handle(stream: trio.SocketStream) -> None:
            async with stream:
                service = SERVICES[(await stream.receive_some(1))[0]]
                await serve_stream(service, stream)

        async with trio.open_nursery() as nursery:
            listeners: list[trio.SocketListener] = await nursery.start(trio.serve_tcp, handle, 0)
            print(listeners[0].socket.getsockname()[1], flush=True)

    @asynccontextmanager
    async def connect(self, port: int) -> AsyncIterator[Opener]:
        async def opener(service: str) -> Stream:
            stream = await trio.open_tcp_stream("127.0.0.1", port)
            await stream.send_all(bytes((SERVICES.index(service),)))
            return stream

        yield opener


class Ours:
    """This library from the raw connection up."""

    name = "ours"

    def __init__(self) -> None:
        self.identity = Identity.generate()
        self.config = Config()
        self.dialer = Dialer()

    async def serve(self) -> None:
        listener = await listen("/ip4/127.0.0.1/tcp/0")
        print(str(listener.address).rpartition("/")[2], flush=True)
        async with trio.open_nursery() as nursery:
            while True:
                nursery.start_soon(self._serve_one, await listener.accept(), nursery)

    async def _serve_one(self, raw: RawConnection, nursery: trio.Nursery) -> None:
        connection = await upgrade(raw, identity=self.identity, initiator=False, expected=None, config=self.config)

        async def handle(stream: Any) -> None:
            await serve_stream(await connection.accept(stream, SERVICES), stream)

        await connection.run(lambda stream: nursery.start_soon(handle, stream))

    async def dial(self, port: int) -> Connection:
        raw = await self.dialer.dial(f"/ip4/127.0.0.1/tcp/{port}")
        return await upgrade(raw, identity=self.identity, initiator=True, expected=None, config=self.config)

    @asynccontextmanager
    async def connect(self, port: int) -> AsyncIterator[Opener]:
        connection = await self.dial(port)
        async with trio.open_nursery() as nursery:
            await nursery.start(run, connection)
            yield connection.open_stream
            await connection.aclose()


async def run(connection: Connection, task_status: Any = trio.TASK_STATUS_IGNORED) -> None:
    await connection.run(lambda stream: stream.reset(), task_status=task_status)


class Bound:
    """The program that shows what is possible, in its own words: bulk only."""

    name = "bound"

    def __init__(self, path: str) -> None:
        self.path = path
        spec = importlib.util.spec_from_file_location("bound", path)
        assert spec is not None
        assert spec.loader is not None
        self.module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(self.module)

    async def bulk(self, port: int, total: int, size: int) -> float:
        rate: float = await self.module.one(port, 2, total, size)
        return rate


SUBJECTS: dict[str, Callable[[], Subject]] = {"raw": Raw, "ours": Ours}


class Server:
    """A subject's server process."""

    def __init__(self, *command: str) -> None:
        self.process = subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.port = int(self.process.stdout.readline())

    @classmethod
    def of(cls, subject: str) -> Server:
        return cls("-m", "tests.perf.data_path", "--serve", subject)

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


# The cases


class Figures:
    """Figures by name, printed as median and spread."""

    def __init__(self) -> None:
        self.values: dict[str, list[float]] = {}

    def add(self, name: str, value: float) -> None:
        self.values.setdefault(name, []).append(value)

    def show(self) -> None:
        for name, values in self.values.items():
            low, high = min(values), max(values)
            print(f"{name:34} {statistics.median(values):10.1f}   ({low:.1f} to {high:.1f})", flush=True)


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(len(values) * share))]


async def run_round(
    figures: Figures, cases: set[str], servers: dict[str, Server], bound: Bound | None, mb: int
) -> None:
    for name, server in servers.items():
        if name == "bound":
            assert bound is not None
            for case, size in (("bulk64", 65536), ("bulk4", 4096)):
                if case in cases:
                    figures.add(
                        f"{case} bound, MB/s", await bound.bulk(server.port, mb * 1_000_000 // size * size, size)
                    )
            continue
        subject: Any = SUBJECTS[name]()
        async with subject.connect(server.port) as opener:
            for case, size in (("bulk64", 65536), ("bulk4", 4096)):
                if case in cases:
                    total = mb * 1_000_000 // size * size
                    before, theirs = usage(), await ask_usage(opener)
                    figures.add(f"{case} {name}, MB/s", await bulk(opener, total, size))
                    after, theirs_after = usage(), await ask_usage(opener)
                    gigabytes = total / 1e9
                    figures.add(f"{case} {name} writer, CPU s/GB", (after["cpu"] - before["cpu"]) / gigabytes)
                    figures.add(f"{case} {name} reader, CPU s/GB", (theirs_after["cpu"] - theirs["cpu"]) / gigabytes)
            if "echo" in cases:
                times = await echoes(opener, 1000)
                figures.add(f"echo {name} p50, us", percentile(times, 0.5))
                figures.add(f"echo {name} p95, us", percentile(times, 0.95))
            if "mixed" in cases:
                await mixed(figures, name, opener, mb)
        if name == "ours" and "dial" in cases:
            await dial(figures, subject, server.port)


async def mixed(figures: Figures, name: str, opener: Opener, mb: int) -> None:
    """A bulk stream beside an echo stream, on one connection where the subject has such a thing."""
    alone = await echoes(opener, 300)
    figures.add(f"mixed {name} echo alone p95, us", percentile(alone, 0.95))
    async with trio.open_nursery() as nursery:

        async def fill() -> None:
            stream = await opener(SINK)
            data = bytes(65536)
            while True:
                await stream.send_all(data)

        nursery.start_soon(fill)
        await trio.sleep(0.05)
        beside = await echoes(opener, 300)
        nursery.cancel_scope.cancel()
    figures.add(f"mixed {name} echo beside bulk p50, us", percentile(beside, 0.5))
    figures.add(f"mixed {name} echo beside bulk p95, us", percentile(beside, 0.95))


async def dial(figures: Figures, subject: Ours, port: int, count: int = 50) -> None:
    """From nothing to the first answer on a stream."""
    async with subject.connect(port) as opener:
        before, theirs = usage(), await ask_usage(opener)
        for _ in range(count):
            start = time.perf_counter()
            connection = await subject.dial(port)
            async with trio.open_nursery() as nursery:
                await nursery.start(run, connection)
                stream = await connection.open_stream(ECHO)
                await stream.send_all(b"x")
                await stream.receive_some()
                figures.add("dial to first echo, ms", (time.perf_counter() - start) * 1e3)
                connection.abort()
        after, theirs_after = usage(), await ask_usage(opener)
        figures.add("dial, dialer's CPU, ms", (after["cpu"] - before["cpu"]) * 1e3 / count)
        figures.add("dial, listener's CPU, ms", (theirs_after["cpu"] - theirs["cpu"]) * 1e3 / count)


async def idle(figures: Figures, port: int, count: int) -> None:
    """Memory of the server per idle connection, and of this process per connection it made."""
    subject = Ours()
    async with subject.connect(port) as opener, AsyncExitStack() as stack:
        for _ in range(20):  # what is allocated once
            async with subject.connect(port):
                pass
        before, theirs = usage(), await ask_usage(opener)
        nursery = await stack.enter_async_context(trio.open_nursery())
        connections = []
        for _ in range(count):
            connection = await subject.dial(port)
            await nursery.start(run, connection)
            stream = await connection.open_stream(ECHO)
            await stream.send_all(b"x")
            await stream.receive_some()
            await stream.aclose()
            connections.append(connection)
        await trio.sleep(0.2)
        after, theirs_after = usage(), await ask_usage(opener)
        figures.add("idle listener, KiB per connection", (theirs_after["kib"] - theirs["kib"]) / count)
        figures.add("idle dialer, KiB per connection", (after["kib"] - before["kib"]) / count)
        for connection in connections:
            connection.abort()


CASES = ("bulk64", "bulk4", "echo", "mixed", "dial", "idle")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--serve")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--mb", type=int, default=200)
    parser.add_argument("--connections", type=int, default=1000)
    parser.add_argument("--bound")
    parser.add_argument("cases", nargs="*")
    arguments = parser.parse_args()
    if arguments.serve:
        trio.run(SUBJECTS[arguments.serve]().serve)
        return
    cases = set(arguments.cases or CASES)
    if not cases <= set(CASES):
        parser.error(f"cases are {', '.join(CASES)}")
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    figures = Figures()
    bound = Bound(arguments.bound) if arguments.bound else None
    with Server.of("raw") as raw, Server.of("ours") as ours:
        servers = {"raw": raw, "ours": ours}
        if bound is not None:
            servers["bound"] = Server(bound.path, "serve")
        try:
            if cases - {"idle"}:
                for _ in range(arguments.rounds):
                    trio.run(run_round, figures, cases, servers, bound, arguments.mb)
            if "idle" in cases:
                trio.run(idle, figures, ours.port, arguments.connections)
        finally:
            if bound is not None:
                servers["bound"].__exit__()
    figures.show()


if __name__ == "__main__":
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    main()
