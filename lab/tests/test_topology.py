"""Topologies as values: what can be said, and what is refused with which sentence."""

import pytest

from natlab.errors import TopologyError
from natlab.topology import Lab, Link, Router, Site, home, lab_from_text, public, site_from_text


def test_a_home_has_one_host_of_its_name_and_one_router():
    assert home("alice", "sym") == Site("alice", ("alice",), (Router("sym"),))


def test_a_carriers_customer_has_two_routers_and_the_outer_one_decides():
    site = home("bob", "cgn-sym", udp_lifetime="30s", services=("upnp",))
    assert site.routers == (Router("sym", udp_lifetime=30.0), Router("pr", services=("upnp",)))
    assert site.type == "cgn-sym"
    assert [site.router_name(depth) for depth in (0, 1)] == ["bob/carrier", "bob/router"]


def test_units():
    assert Link.of("25ms", "300us", "1%", "10Mbit") == Link(0.025, 0.0003, 0.01, 10e6)
    assert Link.of(0.5, loss=0.25) == Link(delay=0.5, loss=0.25)
    assert str(Link.of("25ms", loss="1%", rate="10Mbit")) == "25 ms, 1 % loss, 10 Mbit/s"


def test_a_lab_in_words_is_the_lab_in_values():
    words = ["alice=pr,delay=25ms,loss=1%", "bob=cgn-sym,hosts=bob+eve,hairpin", "relay=public,addresses=2", "seed=7"]
    assert lab_from_text([*words, "wan=10ms"]) == Lab(
        (
            home("alice", "pr", delay=0.025, loss=0.01),
            home("bob", "cgn-sym", hosts=("bob", "eve"), hairpin=True),
            public("relay", addresses=2),
        ),
        Link(delay=0.01),
        seed=7,
    )


def test_a_lab_in_a_file(tmp_path):
    file = tmp_path / "lab.toml"
    file.write_text(
        'seed = 3\n[wan]\ndelay = "10ms"\n[sites.alice]\ntype = "pr"\nservices = ["pcp"]\n[sites.relay]\n'
        'type = "public"\n'
    )
    assert lab_from_text([str(file)]) == Lab(
        (home("alice", services=("pcp",)), public("relay")), Link(delay=0.01), seed=3
    )


def _file(tmp_path, text):
    file = tmp_path / "lab.toml"
    file.write_text(text)
    return lab_from_text([str(file)])


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: home("alice", "full-cone"), r"no NAT type 'full-cone'; there are: open, fw, fc, .*cgn-symblk"),
        (lambda: Router("cgn-sym"), "no NAT type 'cgn-sym'"),
        (lambda: home("Alice"), "'Alice' can't be a name"),
        (lambda: home("core"), "a name of the lab's own"),
        (lambda: home("a" * 32), "can't be a name"),
        (lambda: home("alice", "fw", hairpin=True), "type fw maps no ports"),
        (lambda: home("alice", services=("dhcp",)), "no router service 'dhcp'; there are: upnp, natpmp, pcp"),
        (lambda: home("alice", udp_lifetime=0.5), "below the kernel's finest"),
        (lambda: home("alice", ipv6="on"), "ipv6 of alice is 'on'"),
        (lambda: public("relay", ipv6="fw"), "nothing there can be an IPv6 firewall"),
        (lambda: public("relay", addresses=0), "1 to 200 addresses"),
        (lambda: Site("x", ("a", "b")), "exactly one host"),
        (lambda: Site("x", ("a",), (Router(),) * 3), "two is the most"),
        (lambda: Site("x", ("a",), (Router("fw"), Router())), "must translate"),
        (lambda: Site("x", ("a",), (Router(),), addresses=2), "only a host without one"),
        (lambda: Site("x", tuple(f"h{n}" for n in range(201)), (Router(),)), "200 is the most"),
        (lambda: Lab((home("alice"), public("alice"))), "two things are called 'alice': one at alice, one at alice"),
        (lambda: Lab((home("a", hosts=("x",)), home("b", hosts=("x",)))), "called 'x': one at a, one at b"),
        (lambda: Lab((home("a", hosts=("x", "x")),)), "two hosts of one name"),
        (lambda: Lab((public("a"),) * 1001), "more than a lab can have"),
        (lambda: Link(delay=-1), "can't be negative"),
        (lambda: Link(jitter=0.01), "jitter of 10 ms needs a delay"),
        (lambda: Link(loss=2), "not between 0 and 1"),
        (lambda: Link.of("25 parsec"), "'25 parsec' is no time: write a number and one of s, ms, us, min"),
        (lambda: Link.of(rate="1.2.3Mbit"), "is no rate"),
        (lambda: site_from_text("alice"), "write NAME=TYPE"),
        (lambda: site_from_text("alice=pr,delay"), "write KEY=VALUE"),
        (lambda: site_from_text("alice=pr,colour=red"), "alice has no option 'colour'; there are: delay, hairpin"),
        (lambda: site_from_text("relay=public,hairpin"), "relay has no option 'hairpin'"),
        (lambda: site_from_text("relay=public,addresses=two"), "addresses of relay is 'two': write a whole number"),
        (lambda: site_from_text("alice=pr,hairpin=maybe"), "hairpin of alice is 'maybe': it can be yes or no"),
        (lambda: site_from_text("alice=pr,delay=1ms,delay=2ms"), "says delay twice"),
        (lambda: lab_from_text(["seed=lucky"]), "seed is 'lucky': write a whole number"),
        (lambda: lab_from_text(["no-such.toml"]), "no-such.toml can't be read"),
    ],
)
def test_bad_input_gets_one_sentence(make, sentence):
    with pytest.raises(TopologyError, match=sentence) as caught:
        make()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("sites = [", "can't be read"),
        ("links = 3", "has no use for 'links'"),
        ("[sites.alice]\nnat = 'pr'", r"write \[sites.alice\] and type"),
        ("[wan]\nspeed = 3", r"\[wan\] has no 'speed'"),
        ("wan = '25ms'", "wan is '25ms': write a table"),
        ("sites = []", r"sites is \[\]: write a table"),
        ("seed = '7x'", "seed in .* is '7x': write a whole number"),
        ("[sites.a]\ntype = 'pr'\nhosts = [1]", r"hosts of a are \[1\]: write names"),
        ("[sites.a]\ntype = 'pr'\nhairpin = [true]", r"hairpin of a is \[True\]: it can be yes or no"),
        ("[sites.a]\ntype = 'pr'\ndelay = nan", "nan is no time"),
        ("[sites.a]\ntype = 'public'\naddresses = 1.5", r"addresses of a is 1\.5: write a whole number"),
    ],
)
def test_a_bad_file_gets_one_sentence(tmp_path, text, sentence):
    with pytest.raises(TopologyError, match=sentence):
        _file(tmp_path, text)
