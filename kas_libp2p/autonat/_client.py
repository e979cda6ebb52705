"""One test of one address by one server, as its asker sees it. No I/O.

A server's word is worth little, so what counts is what we see: an address is reachable if the number that we sent
came back on a connection that is inbound, direct, and younger than the request. Whatever the server says beside, or
if it says nothing more, the proof stands. Without it "reachable" is a lie, and is counted as one; "unreachable" is an
opinion, of which several are needed (`kas_libp2p.autonat._roles`). A refusal says nothing at all.

One address per request: rust-libp2p up to 0.56 (autonat 0.15) tests the last address of several and reports index 0.

v1 has no number. There a fresh inbound connection, seen while the request was under way, is the proof.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from kas_libp2p.autonat._messages import (
    DialDataRequest,
    DialResponse,
    DialStatus,
    ResponseStatus,
    V1Response,
    V1Status,
    V2Message,
)
from kas_libp2p.errors import RemoteProtocolError

MAX_PAID = 100_000
"""Bytes of dial data for one request: the most that the specification has a server ask for."""


class Verdict(StrEnum):
    """What a test showed."""

    REACHABLE = "reachable"
    UNREACHABLE = "unreachable"
    REFUSED = "refused"
    """Nothing: the server would not, could not, failed, or lied."""


@dataclass(frozen=True, slots=True)
class Proof:
    """A connection that came in for a request of ours.

    Attributes:
        remote_address: where it came from, as multiaddr text.
    """

    remote_address: str


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a test ended.

    Attributes:
        verdict: what it showed.
        reason: more words.
        proof: the dial-back, if there was one.
        lie: whether the server claimed what is not so.
    """

    verdict: Verdict
    reason: str
    proof: Proof | None = None
    lie: bool = False


def pay(request: DialDataRequest) -> int:
    """How many bytes to send.

    Raises:
        RemoteProtocolError: more than any server may ask for, or for an address that was not sent.
    """
    if request.index:
        raise RemoteProtocolError(f"dial data for address {request.index} of one")
    if request.size > MAX_PAID:
        raise RemoteProtocolError(f"{request.size} bytes of dial data, at most {MAX_PAID} are paid")
    return request.size


def expect_answer(message: V2Message) -> DialDataRequest | DialResponse:
    """What a server may say.

    Raises:
        RemoteProtocolError: it said something else, or spoke of an address that was not sent.
    """
    if not isinstance(message, DialDataRequest | DialResponse):
        raise RemoteProtocolError("a server of AutoNAT sent what only an asker sends")
    if isinstance(message, DialResponse) and message.status is ResponseStatus.OK and message.index:
        raise RemoteProtocolError(f"an answer about address {message.index} of one")
    return message


def judge(response: DialResponse | None, proof: Proof | None, problem: str = "") -> Outcome:
    """What a v2 test showed.

    Args:
        response: the server's answer, ``None`` if it gave none.
        proof: the dial-back that brought our number.
        problem: why there was no answer.
    """
    if proof is not None:
        return Outcome(Verdict.REACHABLE, f"dialed from {proof.remote_address}", proof)
    if response is None:
        return Outcome(Verdict.REFUSED, problem)
    if response.status is not ResponseStatus.OK:
        return Outcome(Verdict.REFUSED, response.status.name)
    match response.dial:
        case DialStatus.E_DIAL_ERROR:
            return Outcome(Verdict.UNREACHABLE, response.dial.name)
        case DialStatus.OK:
            return Outcome(Verdict.REFUSED, "it claims a dial-back that never came", lie=True)
    return Outcome(Verdict.REFUSED, response.dial.name)


def judge_v1(response: V1Response | None, proof: Proof | None, problem: str = "") -> Outcome:
    """What a v1 test showed; arguments as for `judge`."""
    if response is None:
        return Outcome(Verdict.REFUSED, problem)
    if response.status is V1Status.OK:
        if proof is None:
            return Outcome(Verdict.REFUSED, "it claims a dial-back that never came", lie=True)
        return Outcome(Verdict.REACHABLE, f"dialed from {proof.remote_address}", proof)
    if response.status is V1Status.E_DIAL_ERROR:
        return Outcome(Verdict.UNREACHABLE, response.text or response.status.name)
    return Outcome(Verdict.REFUSED, response.text or response.status.name)
