"""What the lab's own tests share."""

import socket

import pytest

pytest_plugins = ["pytester"]

PORT = 7000
PATIENCE = 5.0
"""Seconds for a packet that is to arrive: long, because a test that waits for it has failed."""


class Ends:
    """Two UDP sockets that talk, one of which is at a known port."""

    def __init__(self, client, server, version=4):
        family, everything = (socket.AF_INET6, "::") if version == 6 else (socket.AF_INET, "0.0.0.0")
        self.target = (server.address6 if version == 6 else server.public_address, PORT)
        self.client = client.socket(family, socket.SOCK_DGRAM)
        self.server = server.socket(family, socket.SOCK_DGRAM)
        if version == 6:
            self.server.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        self.server.bind((everything, PORT))
        self.client.settimeout(PATIENCE)
        self.server.settimeout(PATIENCE)

    def ask(self, text=b"?"):
        """A packet there; returns whom it came from."""
        self.client.sendto(text, self.target)
        got, origin = self.server.recvfrom(100)
        assert got == text
        return origin

    def echo(self, text=b"?"):
        """A packet there and back; returns whom it came from."""
        origin = self.ask(text)
        self.server.sendto(text, origin)
        assert self.client.recv(100) == text
        return origin

    def close(self):
        self.client.close()
        self.server.close()


@pytest.fixture
def ends():
    """Makes pairs of UDP sockets and closes them."""
    made = []

    def make(client, server, version=4):
        pair = Ends(client, server, version)
        made.append(pair)
        return pair

    yield make
    for each in made:
        each.close()
