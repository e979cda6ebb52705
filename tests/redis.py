"""As much of a Redis server as the tests of the libp2p project use: GET and SET of texts."""

from __future__ import annotations

from functools import partial

import trio


async def serve(stream: trio.abc.Stream, values: dict[bytes, bytes]) -> None:
    """Answer one client's commands, each of which must come in arrays of bulk strings."""
    held = b""

    async def line() -> bytes:
        nonlocal held
        while b"\r\n" not in held:
            data = await stream.receive_some()
            if not data:
                raise EOFError
            held += data
        found, _, held = held.partition(b"\r\n")
        return found

    async with stream:
        try:
            while True:
                words = []
                for _ in range(int((await line())[1:])):
                    await line()  # its length; no value of ours holds a line's end
                    words.append(await line())
                if words[0] == b"SET":
                    values[words[1]] = words[2]
                    await stream.send_all(b"+OK\r\n")
                elif words[0] == b"GET":
                    value = values.get(words[1])
                    await stream.send_all(b"$-1\r\n" if value is None else b"$%d\r\n%s\r\n" % (len(value), value))
                else:
                    await stream.send_all(b"-ERR unknown command\r\n")
        except (EOFError, trio.BrokenResourceError):
            pass


async def run(host: str, port: int) -> None:
    """Serve at an address until cancelled; print a line when it can be reached."""
    async with trio.open_nursery() as nursery:
        handler = partial(serve, values={})
        await nursery.start(partial(trio.serve_tcp, handler, port, host=host))
        print("ready", flush=True)
