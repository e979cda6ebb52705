from __future__ import annotations

import json
from pathlib import Path

import pytest

from kas_libp2p.events import EventBus, FileDamaged
from kas_libp2p.statefile import MAX_FILE, StateFile, read_entries


class Told(EventBus):
    def __init__(self) -> None:
        super().__init__(lambda: 0.0)
        self.reasons: list[str] = []

    def emit(self, event: object) -> None:
        assert isinstance(event, FileDamaged)
        self.reasons.append(event.reason)


def refuse(text: str) -> int:
    raise ValueError(f"{text} is no list")


def test_what_was_written_is_read(tmp_path: Path) -> None:
    told, found = Told(), list[str]()
    file = StateFile(tmp_path / "new" / "state.json", told, "known things")
    file.load(lambda text: found.append(text) or 0)
    assert found == []
    file.save("ünïcode")
    file.load(lambda text: found.append(text) or 0)
    assert found == ["ünïcode"]
    assert [each.name for each in (tmp_path / "new").iterdir()] == ["state.json"]
    assert told.reasons == []


def test_a_damaged_file_is_put_aside_and_told(tmp_path: Path) -> None:
    told = Told()
    path = tmp_path / "state.json"
    path.write_text("junk")
    StateFile(path, told, "known things").load(refuse)
    assert told.reasons == [
        "can't be read, and known things are found anew; it is kept as state.json.damaged: junk is no list"
    ]
    assert (tmp_path / "state.json.damaged").read_text() == "junk"
    assert not path.exists()


def test_what_is_left_out_is_told(tmp_path: Path) -> None:
    told = Told()
    (tmp_path / "state.json").write_bytes(b"x" * (MAX_FILE + 10))
    sizes = []
    StateFile(tmp_path / "state.json", told, "known things").load(lambda text: sizes.append(len(text)) or 3)
    assert sizes == [MAX_FILE]
    assert told.reasons == ["3 of its known things are left out"]


def test_a_file_that_can_not_be_written_is_told(tmp_path: Path) -> None:
    told = Told()
    (tmp_path / "in the way").write_text("")
    StateFile(tmp_path / "in the way" / "state.json", told, "known things").save("x")
    assert told.reasons[0].startswith("known things can't be saved")


def test_of_a_list_what_is_whole_is_taken_up_to_its_bound() -> None:
    taken: list[int] = []

    def take(entry: object) -> None:
        taken.append(int(entry["n"]))  # type: ignore[index]

    text = json.dumps(
        {"format": 3, "things": [{"n": 1}, {}, None, {"n": "x"}, {"n": float("inf")}, {"n": 2}, {"n": 9}]}
    )
    assert read_entries(text, "things", 3, 6, take) == 4
    assert taken == [1, 2]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("junk", "Expecting value"),
        ("[]", "it is not a list of things"),
        ('{"format": 3}', "it is not a list of things"),
        ('{"format": 3, "things": 7}', "it is not a list of things"),
        ('{"format": 4, "things": []}', "it has format 4, and 3 is read here"),
        ("[" * 100_000, "it is not a list of things"),
    ],
)
def test_what_is_no_list_is_told(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        read_entries(text, "things", 3, 6, lambda each: None)
