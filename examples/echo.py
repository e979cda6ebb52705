"""A node inside a program, and a protocol of one's own on it.

python examples/echo.py               listens, and sends back what comes
python examples/echo.py MULTIADDR     says hello to the other
"""

import sys

import trio

from kas_libp2p import Config, DialError, OverlayStream, open_node

PROTOCOL = "/example/echo/1.0.0"


async def echo(stream: OverlayStream) -> None:
    """Serves one stream, in a task of its own. The stream is closed when this returns, and reset if it raises."""
    async for data in stream:
        await stream.send_all(data)


async def listen() -> None:
    async with open_node(Config(listen=("/ip4/0.0.0.0/tcp/0",))) as node:
        await node.serve(echo, PROTOCOL)
        for address in node.addresses:
            print("listening at", address, flush=True)
        await trio.sleep_forever()


async def say_hello(address: str) -> None:
    async with open_node(Config(listen=())) as node:
        try:
            stream = await node.connect(address, PROTOCOL)
        except DialError as error:
            sys.exit(str(error))  # with the reason of every address that was tried
        async with stream:
            await stream.send_all(b"hello")
            await stream.send_eof()
            answer = b"".join([data async for data in stream])
        print(stream.metadata.peer, "said", answer.decode(), "by a path that is", stream.metadata.path)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        trio.run(say_hello, sys.argv[1])
    else:
        trio.run(listen)
