"""The conversations of multistream-select, without a stream."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kas_libp2p.errors import NegotiationError, Stage
from kas_libp2p.transport._multistream import HEADER, MAX_LINE, MAX_PROPOSALS, Proposer, Responder, line

ECHO, PING = "/echo/1.0.0", "/ipfs/ping/1.0.0"


def test_one_proposal_leaves_with_the_header():
    proposer = Proposer([ECHO])
    assert proposer.start() == b"\x13/multistream/1.0.0\n" + b"\x0c/echo/1.0.0\n"
    assert proposer.receive(HEADER) == b""
    assert proposer.selected is None
    assert proposer.receive(line(b"/echo/1.0.0")) == b""
    assert proposer.selected == ECHO
    assert proposer.rest() == b""


def test_what_follows_the_agreement_is_handed_on():
    proposer, responder = Proposer([ECHO]), Responder([PING, ECHO])
    answer = responder.receive(proposer.start() + b"data\n\x00")
    assert answer == HEADER + line(ECHO.encode())
    assert responder.selected == ECHO
    assert responder.rest() == b"data\n\x00"
    proposer.receive(answer + b"more")
    assert proposer.selected == ECHO
    assert proposer.rest() == b"more"


def test_several_proposals_go_one_by_one():
    proposer, responder = Proposer(["/a", "/b", ECHO]), Responder([ECHO])
    said = proposer.start()
    heard = []
    while proposer.selected is None:
        answer = responder.receive(said)
        heard.append(answer)
        said = proposer.receive(answer)
    assert heard == [HEADER + line(b"na"), line(b"na"), line(ECHO.encode())]
    assert responder.selected == proposer.selected == ECHO


def test_nothing_in_common():
    proposer = Proposer(["/a", "/b"], Stage.MUXER_NEGOTIATION)
    proposer.start()
    assert proposer.receive(HEADER + line(b"na")) == line(b"/b")
    with pytest.raises(NegotiationError, match="does not speak /a or /b") as caught:
        proposer.receive(line(b"na"))
    assert caught.value.stage is Stage.MUXER_NEGOTIATION


def test_the_responder_greets_at_once():
    responder = Responder([ECHO])
    assert responder.receive(HEADER) == HEADER
    assert responder.receive(b"") == b""
    assert responder.receive(line(ECHO.encode())) == line(ECHO.encode())


def test_a_listing_holds_every_protocol_and_does_not_end_the_negotiation():
    responder = Responder([ECHO, PING])
    answer = responder.receive(HEADER + line(b"ls"))
    inner = b"\x0c/echo/1.0.0\n" + b"\x11/ipfs/ping/1.0.0\n" + b"\n"
    assert answer == HEADER + bytes((len(inner),)) + inner
    responder.receive(line(ECHO.encode()))
    assert responder.selected == ECHO


def test_a_listing_of_nothing():
    assert Responder([]).receive(HEADER + line(b"ls")) == HEADER + b"\x01\n"


def test_endless_proposals_end():
    responder = Responder([ECHO])
    responder.receive(HEADER)
    for number in range(MAX_PROPOSALS):
        assert responder.receive(line(b"/no/%d" % number)) == line(b"na")
    with pytest.raises(NegotiationError, match="more than 32 proposals"):
        responder.receive(line(ECHO.encode()))


def test_endless_listings_end():
    responder = Responder([ECHO])
    with pytest.raises(NegotiationError, match="more than"):
        responder.receive(HEADER + line(b"ls") * (MAX_PROPOSALS + 1))


@pytest.mark.parametrize("side", [lambda: Responder([ECHO]), lambda: Proposer([ECHO])])
@pytest.mark.parametrize(
    "junk",
    [
        line(b"/multistream/2.0.0"),
        line(ECHO.encode()),
        HEADER[:-1] + b"x",
        b"G",
        b"SSH-2.0",
        HEADER + b"\x80\x80\x40",  # a line of 1 MiB
        HEADER + b"\xff" * 12,
        HEADER + b"\x81\x08" + bytes(MAX_LINE + 1),
        HEADER + b"\x80\x00",
        HEADER + b"\x03/a/",
        HEADER + b"\x00",
    ],
)
def test_junk_is_refused(side, junk):
    with pytest.raises(NegotiationError):
        side().receive(junk)


def test_a_long_line_is_refused_by_its_length_alone():
    with pytest.raises(NegotiationError, match="1048576 bytes"):
        Responder([ECHO]).receive(HEADER + b"\x80\x80\x40")


def test_another_answer_than_what_was_proposed():
    proposer = Proposer([ECHO])
    with pytest.raises(NegotiationError, match="was proposed, but the answer is"):
        proposer.receive(HEADER + line(PING.encode()))


@pytest.mark.parametrize("protocols", [[], [""], ["na"], ["ls"], ["/a\n"], ["/" + "a" * MAX_LINE]])
def test_what_is_no_protocol_is_not_proposed(protocols):
    with pytest.raises(ValueError):
        Proposer(protocols)


@given(st.integers(1, 40), st.lists(st.sampled_from(["/a", "/b", ECHO, PING]), min_size=1, max_size=6, unique=True))
def test_bytes_may_come_in_any_pieces(size, protocols):
    proposer, responder = Proposer(protocols), Responder([ECHO, PING])
    to_responder, to_proposer = proposer.start(), b""
    try:
        while to_responder or to_proposer:
            to_proposer += responder.receive(to_responder[:size])
            to_responder = to_responder[size:] + proposer.receive(to_proposer[:size])
            to_proposer = to_proposer[size:]
    except NegotiationError:
        assert not {ECHO, PING} & set(protocols)
    else:
        assert responder.selected == proposer.selected == next(p for p in protocols if p in (ECHO, PING))
