"""Numbers as people read them, each with its unit, and the way back for sizes. Pure."""

from __future__ import annotations

import re

_SCALES = {
    "": 1,
    **{prefix + suffix: 10**power for prefix, power in (("k", 3), ("m", 6), ("g", 9)) for suffix in ("", "b")},
    **{f"{prefix}i{suffix}": 2**power for prefix, power in (("k", 10), ("m", 20), ("g", 30)) for suffix in ("", "b")},
    "b": 1,
}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", re.IGNORECASE | re.ASCII)


def parse_size(text: str) -> int:
    """Bytes from a text such as ``1500``, ``64MiB`` or ``1.5 GB``. MB are powers of ten, MiB of two.

    Raises:
        ValueError: it is none.
    """
    found = _SIZE.fullmatch(text)
    scale = _SCALES.get(found[2].lower()) if found is not None else None
    if found is None or scale is None:
        raise ValueError(f"{text!r} is no size: write 64MiB, 1.5GB, or a number of bytes")
    return int(float(found[1]) * scale) if "." in found[1] else int(found[1]) * scale


def size(count: float) -> str:
    """Bytes, in powers of ten."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale * 0.9995:
            value = count / scale
            return f"{value:.1f} {unit}" if value < 99.95 else f"{value:.0f} {unit}"
    return f"{count:.0f} B"


def rate(per_second: float) -> str:
    """Bytes per second."""
    return f"{size(per_second)}/s"


def seconds(value: float) -> str:
    """A duration, in the one unit that tells most."""
    if value < 0.0995:
        return f"{value * 1000:.1f} ms" if value < 0.00995 else f"{value * 1000:.0f} ms"
    if value < 9.95:
        return f"{value:.1f} s"
    if value < 120:
        return f"{value:.0f} s"
    if value < 7200:
        return f"{value / 60:.0f} min"
    if value < 172800:
        return f"{value / 3600:.0f} h"
    return f"{value / 86400:.0f} d"


def milliseconds(value: float | None) -> str:
    """A round trip in milliseconds; a dash for none."""
    if value is None:
        return "-"
    return f"{value:.1f} ms" if value < 9.95 else f"{value:.0f} ms"


def plural(count: int, one: str, many: str | None = None) -> str:
    """``1 peer``, ``2 peers``."""
    return f"{count} {one if count == 1 else many or one + 's'}"


def short(peer: str) -> str:
    """A peer id short enough for a line. Every ed25519 id begins with 12D3KooW; what follows tells them apart."""
    return f"{peer[:12]}…" if len(peer) > 16 else peer
