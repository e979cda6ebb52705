"""The command."""

import json
import subprocess
import sys

import pytest

from natlab.cli import main
from natlab.picture import picture
from natlab.topology import lab_as_json, lab_from_json, lab_from_text


def _natlab(*arguments):
    """The command in a process of its own, as a shell starts it."""
    return subprocess.run([sys.executable, "-m", "natlab", *arguments], capture_output=True, text=True, timeout=60)


def test_types_are_listed(capsys):
    assert main(["types"]) == 0
    assert "symseq      APDM     plus one" in capsys.readouterr().out
    assert main(["types", "--json"]) == 0
    rows = {row["type"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["cgn-fc"]["filtering"] == "APDF"
    assert rows["pr-icmp"]["group"] == "G3"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["up", "alice=cone"], "natlab: there is no NAT type 'cone'; there are: open"),
        (["up", "alice"], "natlab: 'alice' is no site: write NAME=TYPE"),
        (["up", "a=pr", "a=pr"], "natlab: two things are called 'a'"),
        (["shell", "beef", "alice"], "natlab: there is no lab 'beef' of yours"),
        (["down", "beef"], "natlab: there is no lab 'beef' of yours"),
        (["run", "alice=pr"], "natlab: there is nothing to run: write the command after --"),
        (["run", "alice=pr", "--in", "bob", "--", "true"], "natlab: there is no host 'bob'; there are: alice"),
        (["matrix", "--types", "pr,cone"], "natlab: there is no NAT type 'cone'"),
        (["matrix", "--skews", "soon"], "natlab: 'soon' is no time"),
        (["probe"], "natlab: say one of: a SERVER to ask"),
        (["probe", "1.2.3.4:65535"], "natlab: the prober's server can't have port 65535"),
        (["probe", "--serve", "1.2.3.4", "--port", "0"], "natlab: the prober's server can't have port 0"),
        (["probe", "--serve", "1.2.3.4"], "natlab: the prober's server can't be at 1.2.3.4 port 3478"),
    ],
)
def test_bad_input_gets_one_sentence(arguments, sentence, capsys):
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert said.startswith(sentence)
    assert said.count("\n") == 1


def test_run_ends_with_the_status_of_its_command():
    done = _natlab("run", "alice=pr", "my-relay=public", "--", "sh", "-c", "ip -br addr; echo $NATLAB_MY_RELAY; exit 3")
    assert done.returncode == 3
    assert "192.168.1.10/24" in done.stdout
    assert done.stdout.endswith("11.2.0.2\n")
    assert (
        _natlab("run", "alice=pr", "--", "no-such").stderr
        == "natlab: no-such can't be run: No such file or directory\n"
    )


def test_for_a_program_all_that_is_written_is_json():
    command = ["sh", "-c", "echo $NATLAB_RELAY; echo oops >&2; exit 3"]
    done = _natlab("run", "alice=pr", "relay=public", "--json", "--", *command)
    assert json.loads(done.stdout) == {
        "host": "alice",
        "argv": command,
        "status": 3,
        "stdout": "11.2.0.2\n",
        "stderr": "oops\n",
    }
    assert done.returncode == 3


def test_a_lab_is_up_until_it_is_down():
    up = _natlab("up", "alice=cgn-pr,delay=1ms", "relay=public")
    assert up.returncode == 0, up.stderr
    id = up.stdout.strip()
    try:
        assert "└── relay 11.2.0.2" in up.stderr
        assert id in [each["id"] for each in json.loads(_natlab("list", "--json").stdout)]
        shell = _natlab("shell", id, "alice", "--", "sh", "-c", "echo $NATLAB_HOST; kill -9 $$")
        assert (shell.stdout, shell.returncode) == ("alice\n", 137)
    finally:
        assert _natlab("down", id).returncode == 0
    assert id not in _natlab("list").stdout


def test_a_type_is_probed():
    done = _natlab("probe", "--type", "symseq", "--json")
    assert json.loads(done.stdout)["types"] == ["symseq"]


def test_a_picture():
    lab = lab_from_text(
        ["alice=pr,delay=25ms,services=upnp", "bob=cgn-sym,hosts=bob+eve,ipv6=fw,hairpin", "relay=public"]
    )
    assert list(picture(lab)) == [
        "core",
        "├── 25 ms ── alice/router 11.1.0.2 (pr, upnp) ── alice 192.168.1.10",
        "├── bob/carrier 11.2.0.2 (sym, hairpin) ── bob/router 100.64.0.2 (pr, IPv6 firewall)",
        "│   ├── bob 192.168.1.10 2d00:102:2::a",
        "│   └── eve 192.168.1.11 2d00:102:2::b",
        "└── relay 11.3.0.2 2d00:0:3::2",
    ]
    assert lab_from_json(json.loads(json.dumps(lab_as_json(lab)))) == lab
