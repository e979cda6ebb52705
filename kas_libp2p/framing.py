"""Length-prefixed frames with an unsigned varint length, as multistream, identify, and the relay protocols use them.

Pure: bytes in, frames out. A length is believed only up to a cap, and a varint only up to nine bytes, in its shortest
form (multiformats unsigned-varint), so nothing that a peer sends can make a reader allocate or loop.
"""

from __future__ import annotations

from collections.abc import Iterator

from kas_libp2p.errors import RemoteProtocolError

MAX_VARINT_BYTES = 9
"""unsigned-varint: at most 63 bits."""


def encode_varint(value: int) -> bytes:
    """An unsigned varint.

    Raises:
        ValueError: the value is negative or does not fit 63 bits.
    """
    if not 0 <= value < 1 << 63:
        raise ValueError(f"{value} does not fit an unsigned varint of 63 bits")
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def decode_varint(data: bytes | bytearray | memoryview, offset: int = 0) -> tuple[int, int] | None:
    """Read an unsigned varint.

    Returns:
        The value and the offset behind it, or ``None`` if more bytes are needed.

    Raises:
        RemoteProtocolError: it is longer than nine bytes, or not in its shortest form.
    """
    value = 0
    for index in range(MAX_VARINT_BYTES):
        if offset + index >= len(data):
            return None
        byte = data[offset + index]
        value |= (byte & 0x7F) << (7 * index)
        if byte < 0x80:
            if byte == 0 and index:
                raise RemoteProtocolError("a varint is not in its shortest form")
            return value, offset + index + 1
    raise RemoteProtocolError(f"a varint is longer than {MAX_VARINT_BYTES} bytes")


def frame(payload: bytes) -> bytes:
    """A payload behind its length."""
    return encode_varint(len(payload)) + payload


class FrameDecoder:
    """Cuts a byte stream into frames.

    Args:
        max_size: largest payload in bytes that is accepted.
    """

    def __init__(self, max_size: int) -> None:
        self._max_size = max_size
        self._buffer = bytearray()

    def feed(self, data: bytes | bytearray | memoryview) -> None:
        """Add received bytes. Holds at most what was fed and not yet taken out."""
        self._buffer += data

    @property
    def pending(self) -> int:
        """Bytes received that do not make a frame yet."""
        return len(self._buffer)

    def take_rest(self) -> bytes:
        """Take out what follows the last frame, when another protocol goes on from here."""
        rest = bytes(self._buffer)
        self._buffer.clear()
        return rest

    def next_frame(self) -> bytes | None:
        """The next frame's payload, or ``None`` if more bytes are needed.

        Raises:
            RemoteProtocolError: the length is malformed or over the cap.
        """
        header = decode_varint(self._buffer)
        if header is None:
            return None
        size, start = header
        if size > self._max_size:
            raise RemoteProtocolError(f"a frame of {size} bytes is refused, at most {self._max_size} are allowed")
        end = start + size
        if len(self._buffer) < end:
            return None
        payload = bytes(self._buffer[start:end])
        del self._buffer[:end]
        return payload

    def __iter__(self) -> Iterator[bytes]:
        while (payload := self.next_frame()) is not None:
            yield payload
