"""Bans by peer id, IP address or network, kept in a file. kaspad's own need ``--unsaferpc``; these need nothing."""

from __future__ import annotations

import ipaddress
import json
import os
import tempfile
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kas_bridge.config import parse_entry
from kas_libp2p.errors import ConfigError, KasError

MAX_BANS = 4096
"""Entries; some hundred kB in the file."""

MAX_FILE = 2 * 1024 * 1024
"""Bytes of the file that are read."""

DEFAULT_SECONDS = 24 * 3600.0
"""kaspad's own default is a day as well."""


LONGEST = 100 * 365.25 * 24 * 3600.0
"""Seconds of a ban that ends; above it "for good" is meant."""


class BansError(KasError):
    """The list of bans can't be read, written or extended."""


@dataclass(frozen=True, slots=True)
class Ban:
    """One ban.

    Attributes:
        target: peer id, IP address or network.
        since: seconds since the epoch.
        until: seconds since the epoch, or ``None`` for good.
        reason: the operator's words; may be empty.
    """

    target: str
    since: float
    until: float | None
    reason: str = ""


class Bans:
    """The list.

    Args:
        path: the file; ``None`` keeps nothing.

    Raises:
        BansError: the file is there and can't be read; it is not overwritten then.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._bans: dict[str, Ban] = {}
        if path is not None:
            self._load(path)

    def _load(self, path: Path) -> None:
        try:
            with path.open("rb") as file:
                values = json.loads(file.read(MAX_FILE))
            for each in values["bans"]:
                ban = _read(each)
                self._bans[ban.target] = ban
        except FileNotFoundError:
            return
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise BansError(f"{path} can't be read ({error}); repair it, or remove it to start without bans") from error

    def add(self, target: str, now: float, *, seconds: float | None = DEFAULT_SECONDS, reason: str = "") -> Ban:
        """Ban a peer id, IP address or network, and write the file.

        Args:
            now: seconds since the epoch.
            seconds: for how long; ``None`` for good.

        Raises:
            ConfigError: the target is none of these, or the time is not above 0 and below a hundred years.
            BansError: the list is full, or can't be written; then nothing has changed.
        """
        if seconds is not None and not 0 < seconds <= LONGEST:
            raise ConfigError(f"a ban lasts more than 0 and at most {LONGEST:.0f} seconds, or null for good")
        ban = Ban(parse_entry(target, "a ban"), now, None if seconds is None else now + seconds, reason[:256])
        changed = {key: each for key, each in self._bans.items() if not _over(each, now)} | {ban.target: ban}
        if len(changed) > MAX_BANS:
            raise BansError(f"{MAX_BANS} bans are kept at most; lift some with kas-bridge unban, or use --deny")
        self._write(changed)
        return ban

    def remove(self, target: str, now: float) -> bool:
        """Lift a ban. False if there was none.

        Raises:
            ConfigError, BansError: as `add`.
        """
        key = parse_entry(target, "a ban")
        if key not in self._bans or _over(self._bans[key], now):
            return False
        self._write({other: each for other, each in self._bans.items() if other != key and not _over(each, now)})
        return True

    def current(self, now: float) -> list[Ban]:
        """The bans in force, the oldest first."""
        return [ban for ban in self._bans.values() if not _over(ban, now)]

    def find(self, peer: str, ip: str | None, now: float) -> Ban | None:
        """The ban that keeps a peer or an address out, or ``None``."""
        ban = self._bans.get(peer)
        if ban is not None and not _over(ban, now):
            return ban
        if ip is None or not self._bans:
            return None
        address = ipaddress.ip_address(ip)
        if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
            address = address.ipv4_mapped
        for ban in self._bans.values():
            inside = address in ipaddress.ip_network(ban.target) if "/" in ban.target else ban.target == str(address)
            if inside and not _over(ban, now):
                return ban
        return None

    def _write(self, bans: dict[str, Ban]) -> None:
        if self._path is not None:
            text = json.dumps({"version": 1, "bans": [asdict(ban) for ban in bans.values()]}, indent=1) + "\n"
            try:
                write_whole(self._path, text)
            except OSError as error:
                raise BansError(f"can't write {self._path}: {error.strerror}") from error
        self._bans = bans


def _read(value: Any) -> Ban:
    until = value["until"]
    try:
        target = parse_entry(value["target"])
    except ConfigError as error:
        raise ValueError(str(error)) from None
    return Ban(target, float(value["since"]), None if until is None else float(until), str(value.get("reason", "")))


def _over(ban: Ban, now: float) -> bool:
    return ban.until is not None and ban.until <= now


def write_whole(path: Path, text: str) -> None:
    """Write a file as a whole or not at all, readable by its owner alone.

    Raises:
        OSError: it can't be written.
    """
    handle, name = tempfile.mkstemp(prefix=path.name, suffix=".new", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(name, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(name)
        raise
