"""Two machines whose every frame is written down, as ``docs/session-protocol.md`` shows it."""

from __future__ import annotations

from kas_libp2p.session._machine import DropPath, EndPath, Session
from kas_libp2p.session._wire import Ack, Attach, Control, Data, Fin, Open, Parser, Probe, Reset, Welcome

ID = bytes(range(16))
WINDOW = 8 * 1024 * 1024


class Transcript:
    """Sides A (the opener) and B, and what they have sent, a line for each frame: who, path, frame.

    What is sent arrives when `arrive` says so.
    """

    def __init__(self) -> None:
        self.now = 0.0
        self.a = Session(ID, opener=True, window=WINDOW, instance=b"instance", patience=30.0, now=0.0)
        self.b = Session(ID, opener=False, window=WINDOW, instance=b"another.", patience=30.0, now=0.0)
        self.lines: list[str] = []
        self._under_way: dict[tuple[str, int], list[bytes | None]] = {}
        self._parsers: dict[tuple[str, int], Parser] = {}
        self._known = {("A", 1)}
        self.a.open(1, 0.0)

    def attach(self, who: str, path: int) -> None:
        self._known.add((who, path))
        self._side(who).attach(path, self.now)
        self.send(who)

    def send(self, who: str) -> None:
        """Write down, and put under way, what this side has to send."""
        side = self._side(who)
        for path in side.paths:
            for piece in side.take(path, 1 << 20, self.now):
                self._put(who, path, piece)
        for command in side.take_commands():
            if isinstance(command, EndPath | DropPath):
                if command.last:
                    self._put(who, command.path, command.last)
                self.lines.append(f"{who} {command.path} {'ends' if isinstance(command, EndPath) else 'resets'}")
                self._under_way.setdefault((who, command.path), []).append(None)

    def arrive(self, who: str, path: int) -> None:
        """What this side has sent on a path arrives, and is answered."""
        to = "B" if who == "A" else "A"
        other = self._side(to)
        for piece in self._under_way.pop((who, path), []):
            if piece is None:
                other.path_eof(path, self.now)
            elif (to, path) in self._known:
                other.receive(path, piece, self.now)
            else:
                self._known.add((to, path))
                parser = Parser()
                first = parser.first(piece)
                if isinstance(first, Open):
                    other.accept(path, parser, first, self.now)
                elif first is not None:
                    other.attached(path, parser, first, self.now)
        self.send(to)

    def cut(self, path: int, *notice: str) -> None:
        """A path is gone, and these sides notice."""
        self.lines.append(f"- {path} is cut")
        for who in "AB":
            self._under_way.pop((who, path), None)
        for who in notice:
            self._side(who).path_lost(path, "cut", self.now)
            self.send(who)

    def wait(self, seconds: float) -> None:
        self.now += seconds
        for who in "AB":
            side = self._side(who)
            if self.now >= side.deadline:
                side.on_timeout(self.now)
            self.send(who)

    def _side(self, who: str) -> Session:
        return self.a if who == "A" else self.b

    def _put(self, who: str, path: int, piece: bytes) -> None:
        self._under_way.setdefault((who, path), []).append(piece)
        parser = self._parsers.setdefault((who, path), Parser())
        self.lines += [f"{who} {path} {show(each)}" for each in parser.feed(piece)]


def show(frame: Data | Control) -> str:
    """A frame in words."""
    match frame:
        case Open(limit=limit):
            return f"OPEN limit {limit}"
        case Attach(received=received, limit=limit, turn=turn, lost=lost):
            return f"ATTACH received {received} limit {limit} turn {turn}{' LOST' if lost else ''}"
        case Welcome(received=received, limit=limit, lost=lost):
            return f"WELCOME received {received} limit {limit}{' LOST' if lost else ''}"
        case Ack(received=received, limit=limit, lost=lost):
            return f"ACK received {received} limit {limit}{' LOST' if lost else ''}"
        case Fin(final=final):
            return f"FIN {final}"
        case Reset(code=code, turn=turn):
            return f"RESET {code} turn {turn}"
        case Probe():
            return "PROBE"
        case (int(offset), bytes(payload)):
            return f"DATA {offset}..{offset + len(payload)}"
    raise AssertionError(frame)


def opening() -> Transcript:
    both = Transcript()
    both.a.write(b"a" * 100)
    both.send("A")
    both.arrive("A", 1)
    both.b.write(b"b" * 50)
    both.send("B")
    both.arrive("B", 1)
    both.wait(1.0)
    return both


def opened() -> Transcript:
    both = opening()
    both.arrive("A", 1)
    both.arrive("B", 1)
    both.lines.clear()
    return both


def a_move() -> Transcript:
    both = opened()
    both.attach("A", 2)
    both.a.write(b"a" * 100)
    both.send("A")
    both.arrive("A", 2)
    both.b.write(b"b" * 50)
    both.send("B")
    both.arrive("B", 2)
    both.a.write(b"a" * 100)
    both.send("A")
    both.arrive("A", 2)  # before what came by the old path
    both.arrive("A", 1)
    both.arrive("B", 1)
    both.wait(1.0)
    return both


def crossing_moves() -> Transcript:
    both = opened()
    both.attach("A", 2)
    both.attach("B", 3)
    both.arrive("B", 3)
    both.arrive("A", 2)
    both.arrive("A", 3)
    both.arrive("B", 3)
    both.arrive("B", 2)
    both.arrive("A", 1)
    both.arrive("B", 1)
    return both


def a_loss() -> Transcript:
    both = opened()
    both.a.write(b"a" * 100)
    both.b.write(b"b" * 50)
    both.send("A")
    both.send("B")
    both.cut(1, "B")
    both.attach("B", 2)
    both.arrive("B", 2)
    both.arrive("A", 2)
    both.wait(1.0)
    return both


def an_end() -> Transcript:
    both = opened()
    both.a.finish(both.now)
    both.send("A")
    both.arrive("A", 1)
    both.b.write(b"b" * 50)
    both.b.finish(both.now)
    both.send("B")
    both.arrive("B", 1)
    both.arrive("A", 1)
    return both


TRANSCRIPTS = {
    "Opening": opening,
    "A move": a_move,
    "Moves that cross": crossing_moves,
    "A loss": a_loss,
    "The end": an_end,
}
