"""The control protocol: one JSON object a line, both ways. Pure.

A request is ``{"action": "peers"}`` with the action's own fields beside it. The answer is ``{"ok": true, …}`` or
``{"ok": false, "error": "…"}``. After ``{"action": "events"}`` has been answered, each line is an event, until one side
closes. ``docs/kas-bridge.md`` lists actions and fields.
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from enum import Enum
from typing import Any

from kas_libp2p.errors import KasError
from kas_libp2p.events import Event

MAX_LINE = 64 * 1024
"""Bytes of one request. The longest real one, a multiaddr, has some hundred."""


class RequestError(KasError):
    """A request can't be understood. The text says what would be."""


class ActionError(KasError):
    """What the operator asked for can't be done. The text says why, and what helps."""


@dataclass(frozen=True, slots=True)
class Field:
    """A field of a request.

    Attributes:
        kinds: the JSON types that it may have.
        required: whether it may be left out.
    """

    kinds: tuple[type, ...]
    required: bool = False


ACTIONS: dict[str, dict[str, Field]] = {
    "status": {},
    "peers": {},
    "why": {"peer": Field((str,), required=True)},
    "connect": {"multiaddr": Field((str,), required=True)},
    "disconnect": {"peer": Field((str,), required=True)},
    "ban": {
        "target": Field((str,), required=True),
        "seconds": Field((int, float, type(None))),
        "reason": Field((str,)),
    },
    "unban": {"target": Field((str,), required=True)},
    "events": {},
    "stop": {},
}

_NAMES = {str: "a text", int: "a number", float: "a number", type(None): "null"}


def parse_request(line: bytes) -> tuple[str, dict[str, Any]]:
    """Read one request.

    Returns:
        the action and its fields.

    Raises:
        RequestError: it is no request; the text says what is wrong.
    """
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError:
        raise RequestError("a request must be UTF-8") from None
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        raise RequestError('a request must be one JSON object a line, such as {"action": "status"}') from None
    if not isinstance(values, dict):
        raise RequestError('a request must be a JSON object, such as {"action": "status"}')
    action = values.pop("action", None)
    if not isinstance(action, str) or action not in ACTIONS:
        shown = repr(action[:40]) if isinstance(action, str) else "none" if action is None else "no text"
        raise RequestError(f"unknown action {shown}; allowed: {', '.join(ACTIONS)}")
    fields = ACTIONS[action]
    for name, value in values.items():
        field = fields.get(name)
        if field is None:
            allowed = ", ".join(fields) or "none"
            raise RequestError(f"unknown field {name[:40]!r} for {action}; allowed: {allowed}")
        if not isinstance(value, field.kinds) or isinstance(value, bool):
            kinds = " or ".join(dict.fromkeys(_NAMES[kind] for kind in field.kinds))
            raise RequestError(f"{name} must be {kinds}")
        if isinstance(value, float) and not math.isfinite(value):
            raise RequestError(f"{name} must be a finite number")
    for name, field in fields.items():
        if field.required and name not in values:
            raise RequestError(f"{action} needs the field {name}")
    return action, values


def encode(values: dict[str, Any]) -> bytes:
    """One line."""
    return json.dumps(_plain(values), ensure_ascii=False, allow_nan=False).encode("utf-8", "replace") + b"\n"


def event_values(event: Event) -> dict[str, Any]:
    """An event as plain values, its name under ``event``."""
    values = {each.name: getattr(event, each.name) for each in dataclasses.fields(event)}
    return {"event": event.name, **values}


def _plain(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {each.name: _plain(getattr(value, each.name)) for each in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, str | int | float | type(None)):
        return value
    return str(value)


class Lines:
    """Cuts bytes into lines, each at most `MAX_LINE` long."""

    def __init__(self, limit: int = MAX_LINE) -> None:
        self._limit = limit
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        """Take bytes and give the lines that are complete, without their ends; empty lines are left out.

        Raises:
            RequestError: a line is longer than allowed. Nothing can be read after that.
        """
        self._buffer += data
        *lines, rest = bytes(self._buffer).split(b"\n")
        if any(len(line) > self._limit for line in (*lines, rest)):
            raise RequestError(f"a line has more than {self._limit} bytes")
        self._buffer = bytearray(rest)
        return [line.strip() for line in lines if line.strip()]
