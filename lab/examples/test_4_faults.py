"""What happens to a connection when its router reboots, its line is cut, and its provider hands out another address."""

import pytest


@pytest.fixture
def connection(lab):
    """A TCP connection from behind a symmetric NAT, and its other end."""
    relay, alice = lab.public("relay"), lab.home("alice", nat="sym", delay="5ms")
    listener, client = relay.socket(), alice.socket()
    with listener, client:
        listener.bind(("0.0.0.0", 80))
        listener.listen()
        client.connect((relay.address, 80))
        server, _ = listener.accept()
        with server:
            client.settimeout(2)
            server.settimeout(0.5)
            yield client, server


def test_a_cut_line_only_delays(lab, connection):
    client, server = connection
    lab.link("alice").cut()
    client.send(b"x")
    with pytest.raises(TimeoutError):
        server.recv(1)
    lab.link("alice").heal()
    server.settimeout(5)
    assert server.recv(1) == b"x"


def test_a_new_address_ends_it(lab, connection):
    client, server = connection
    before = server.getpeername()[0]
    assert lab.router("alice").change_address() != before
    client.send(b"x")  # comes from an address that the server knows nothing of
    with pytest.raises(TimeoutError):
        server.recv(1)


def test_a_reboot_ends_what_comes_from_outside(lab, connection):
    client, server = connection
    lab.router("alice").reboot()
    server.send(b"x")
    client.settimeout(0.5)
    with pytest.raises(TimeoutError):
        client.recv(1)
