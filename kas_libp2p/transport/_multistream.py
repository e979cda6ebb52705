"""multistream-select 1.0: which protocol a connection or a stream speaks. No I/O.

::

    > /multistream/1.0.0
    > /proto/a              both may leave together, even with data of /proto/a behind them (lazy)
    < /multistream/1.0.0
    < na                    not spoken here
    > /proto/b
    < /proto/b              agreed; what follows belongs to /proto/b

Rules

* A line is a varint length, the text, and a line feed, which the length counts. A line is at most 1024 bytes long.
* A side that says anything else than the header first does not speak multistream.
* `ls` is answered with one line that holds every protocol as a line of its own and ends with a line feed, as rust and
  js send and read it.
* A peer has a limited number of proposals, `ls` included.
* What comes behind the agreement is not touched: `Proposer.rest` and `Responder.rest` hand it on.

Sources: multiformats/multistream-select, libp2p specs ``connections/README.md`` ("multistream-select").
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from kas_libp2p.errors import NegotiationError, RemoteProtocolError, Stage
from kas_libp2p.framing import FrameDecoder, frame

MAX_LINE = 1024
"""Bytes of a line, its line feed included; as in go and js."""
MAX_PROPOSALS = 32
"""Proposals of one peer; an honest one knows from identify what we speak, or tries a handful of versions."""
NOT_AVAILABLE = b"na"
LIST = b"ls"


def line(text: bytes) -> bytes:
    """One line as it goes over the wire."""
    return frame(text + b"\n")


HEADER = line(b"/multistream/1.0.0")


class _Lines:
    """The reading half of both sides."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self._decoder = FrameDecoder(MAX_LINE)
        self._greeting = b""
        self.greeted = False

    def feed(self, data: bytes | bytearray | memoryview) -> None:
        missing = len(HEADER) - len(self._greeting)
        if missing:
            # Whoever speaks something else is known by the first bytes, not only by a line that may never end.
            self._greeting += data[:missing]
            if not HEADER.startswith(self._greeting):
                said = bytes(self._greeting[:64])
                raise NegotiationError(f"the peer does not speak multistream, it said {said!r}", self._stage)
        self._decoder.feed(data)

    def next(self) -> bytes | None:
        """The next line behind the header, or ``None`` if more bytes are needed."""
        while True:
            try:
                text = self._decoder.next_frame()
            except RemoteProtocolError as error:
                raise NegotiationError(f"multistream: {error}", self._stage) from error
            if text is None:
                return None
            if not text.endswith(b"\n"):
                raise NegotiationError(f"multistream: a line has no end: {text[:64]!r}", self._stage)
            text = text[:-1]
            if self.greeted:
                return text
            self.greeted = True

    def rest(self) -> bytes:
        return self._decoder.take_rest()


class Proposer:
    """The side that wants a protocol.

    Args:
        protocols: at least one, in order of preference.
        stage: the stage that errors name.

    Attributes:
        selected: the protocol that was agreed on, once it was.
    """

    __slots__ = ("_index", "_lines", "_protocols", "_stage", "selected")

    def __init__(self, protocols: Sequence[str], stage: Stage = Stage.STREAM) -> None:
        if not protocols:
            raise ValueError("at least one protocol is needed")
        self._protocols = [protocol.encode() for protocol in protocols]
        if any(not p or b"\n" in p or len(p) >= MAX_LINE or p in (NOT_AVAILABLE, LIST) for p in self._protocols):
            raise ValueError(f"these are no protocol names: {', '.join(map(repr, protocols))}")
        self._index = 0
        self._stage = stage
        self._lines = _Lines(stage)
        self.selected: str | None = None

    @property
    def proposed(self) -> str:
        """The protocol that was proposed last."""
        return self._protocols[min(self._index, len(self._protocols) - 1)].decode()

    def start(self) -> bytes:
        """The header and the first proposal. Data may follow at once if there is only one protocol."""
        return HEADER + line(self._protocols[0])

    def receive(self, data: bytes | bytearray | memoryview) -> bytes:
        """Take bytes from the peer.

        Returns:
            what to send next, often nothing.

        Raises:
            NegotiationError: the peer speaks none of the protocols, or breaks the rules.
        """
        self._lines.feed(data)
        answer = b""
        while self.selected is None and (text := self._lines.next()) is not None:
            proposed = self._protocols[self._index]
            if text == proposed:
                self.selected = proposed.decode()
            elif text == NOT_AVAILABLE:
                self._index += 1
                if self._index == len(self._protocols):
                    wanted = " or ".join(p.decode() for p in self._protocols)
                    raise NegotiationError(f"the peer does not speak {wanted}", self._stage)
                answer += line(self._protocols[self._index])
            else:
                raise NegotiationError(
                    f"{proposed.decode()} was proposed, but the answer is {text[:64]!r}", self._stage
                )
        return answer

    def rest(self) -> bytes:
        """What the peer sent behind its agreement."""
        return self._lines.rest()


class Responder:
    """The side that is asked.

    Args:
        protocols: what is spoken here.
        stage: the stage that errors name.

    Attributes:
        selected: the protocol that was agreed on, once it was.
    """

    __slots__ = ("_greeted", "_lines", "_proposals", "_protocols", "_stage", "selected")

    def __init__(self, protocols: Collection[str], stage: Stage = Stage.STREAM) -> None:
        self._protocols = protocols
        self._stage = stage
        self._lines = _Lines(stage)
        self._proposals = 0
        self._greeted = False
        self.selected: str | None = None

    def receive(self, data: bytes | bytearray | memoryview) -> bytes:
        """Take bytes from the peer.

        Returns:
            what to send.

        Raises:
            NegotiationError: the peer breaks the rules, or proposes too often.
        """
        self._lines.feed(data)
        answer = b""
        while self.selected is None:
            text = self._lines.next()
            if not self._greeted and self._lines.greeted:
                self._greeted = True
                answer += HEADER
            if text is None:
                break
            self._proposals += 1
            if self._proposals > MAX_PROPOSALS:
                raise NegotiationError(f"the peer made more than {MAX_PROPOSALS} proposals", self._stage)
            if text == LIST:
                answer += _listing(self._protocols)
                continue
            protocol = text.decode(errors="replace")
            if protocol in self._protocols:
                self.selected = protocol
                answer += line(text)
            else:
                answer += line(NOT_AVAILABLE)
        return answer

    def rest(self) -> bytes:
        """What the peer sent behind its proposal, if it did not wait for the answer."""
        return self._lines.rest()


def _listing(protocols: Iterable[str]) -> bytes:
    return line(b"".join(line(protocol.encode()) for protocol in protocols))
