"""Plain sockets: what a port-restricted router lets in. No libp2p, no asynchronous library, one process."""

import socket

import pytest


def test_a_stranger_is_let_in_only_after_we_wrote_to_it(lab):
    alice = lab.home("alice", nat="pr")
    friend, stranger = lab.public("friend"), lab.public("stranger")

    def udp(host, port):
        sock = host.socket(socket.AF_INET, socket.SOCK_DGRAM)
        sock.bind(("0.0.0.0", port))
        sock.settimeout(0.5)
        return sock

    with udp(alice, 4000) as mine, udp(friend, 5000) as theirs, udp(stranger, 6000) as other:
        mine.sendto(b"hello", (friend.address, 5000))
        _, outside = theirs.recvfrom(100)
        assert outside == (alice.public_address, 4000)  # the router keeps the port

        other.sendto(b"who are you?", outside)
        with pytest.raises(TimeoutError):
            mine.recv(100)

        mine.sendto(b"hello", (stranger.address, 6000))
        other.sendto(b"welcome", outside)
        assert mine.recv(100) == b"welcome"
