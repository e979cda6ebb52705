"""From a topology to steps: without root, without a kernel."""

import ipaddress
import json

import pytest

from natlab import plan
from natlab.nat import NATS, TYPES, Filtering, chain_of, promise_of, ruleset
from natlab.topology import Lab, Link, home, public


def _of(kind, steps, **where):
    return [step for step in steps if isinstance(step, kind) and all(getattr(step, k) == v for k, v in where.items())]


def test_a_home_is_a_host_a_router_and_a_wire_to_the_core():
    made = plan.plan_site(Lab((home("alice"),)), 1)
    assert made.namespaces == ("alice/router", "alice")
    assert _of(plan.Veth, made.steps) == [
        plan.Veth("core", "s1", "wires", "1a"),
        plan.Veth("wires", "1b", "alice/router", "wan"),
        plan.Veth("alice/router", "p0", "alice", "eth0"),
    ]
    assert plan.Address("alice/router", "wan", "11.1.0.2/24") in made.steps
    assert plan.Address("alice", "eth0", "192.168.1.10/24") in made.steps
    assert plan.Route("alice", "default", "192.168.1.1") in made.steps
    assert plan.Route("alice/router", "default", "11.1.0.1") in made.steps
    assert not [step for step in _of(plan.Address, made.steps) if ":" in step.address]


def test_behind_a_carrier_there_is_a_second_router():
    made = plan.plan_site(Lab((home("bob", "cgn-sym"),)), 1)
    assert made.namespaces == ("bob/carrier", "bob/router", "bob")
    assert plan.Address("bob/router", "wan", "100.64.0.2/24") in made.steps
    assert plan.Route("bob/router", "default", "100.64.0.1") in made.steps
    carrier, router = _of(plan.Nft, made.steps)
    assert "fully-random" in carrier.script
    assert "masquerade" in router.script
    assert "fully-random" not in router.script


def test_without_translation_the_lan_is_public_and_the_core_knows_the_way():
    lab = Lab((home("alice", "fw"),))
    assert plan.host_address(lab, "alice") == "11.129.0.10"
    assert plan.Route("core", "11.129.0.0/24", "11.1.0.2") in plan.plan_site(lab, 1).steps


def test_ipv6_reaches_a_host_behind_two_routers():
    lab = Lab((public("relay"), home("bob", "cgn-pr", ipv6="fw")))
    steps = plan.plan_site(lab, 2).steps
    assert plan.host_address(lab, "bob", 6) == "2d00:102:2::a"
    assert plan.Route("core", "2d00:102::/32", "2d00:0:2::2") in steps
    assert plan.Route("bob/carrier", "2d00:102:2::/64", "2d00:102:1::2") in steps
    assert plan.Address("bob/router", "wan", "2d00:102:1::2/64") in steps
    assert plan.Route("bob/router", "default", "2d00:102:1::1") in steps
    carrier, router = _of(plan.Nft, steps)
    assert "meta nfproto ipv6 accept" in carrier.script
    assert "meta nfproto ipv6 accept" not in router.script


@pytest.mark.parametrize("kind", TYPES)
def test_every_address_is_its_own_and_every_next_hop_is_a_neighbour(kind):
    lab = Lab((home("a", kind, hosts=("a", "b"), ipv6="fw"), home("c", kind, ipv6="open"), public("d", addresses=3)))
    for number in (1, 2, 3):
        steps = plan.plan_site(lab, number).steps
        addresses = [(step.at, ipaddress.ip_interface(step.address)) for step in _of(plan.Address, steps)]
        interfaces = [(at, interface) for at, interface in addresses if not interface.is_link_local]
        assert len({interface.ip for _, interface in interfaces}) == len(interfaces)
        for route in _of(plan.Route, steps):
            hop = ipaddress.ip_address(route.via)
            assert any(at == route.at and hop in interface.network for at, interface in interfaces), route
            assert any(at != route.at and hop == interface.ip for at, interface in interfaces), route


def test_addresses_count_as_public_also_in_a_large_lab():
    lab = Lab(tuple(public(f"p{n}") for n in range(1000)))
    for name in ("p0", "p300", "p999"):
        for version in (4, 6):
            assert ipaddress.ip_address(plan.host_address(lab, name, version)).is_global
    assert plan.host_address(lab, "p999") == "11.104.7.2"


def test_the_wire_takes_the_labs_link_unless_the_site_has_one():
    lab = Lab((home("a", delay="5ms"), home("b")), wan=Link(delay=0.02), seed=4)
    wires = [_of(plan.Wire, plan.plan_site(lab, number).steps)[0] for number in (1, 2)]
    assert [wire.up for wire in wires] == [Link(delay=0.005), Link(delay=0.02)]
    assert wires[0].up_seed == "4/a/up"


def test_lifetimes_go_to_the_kernel_and_to_the_maps():
    steps = plan.plan_site(Lab((home("a", "ar", udp_lifetime=3, tcp_lifetime=9),)), 1).steps
    assert plan.Sysctl("a/router", "netfilter/nf_conntrack_udp_timeout_stream", "3") in steps
    assert plan.Sysctl("a/router", "netfilter/nf_conntrack_tcp_timeout_established", "9") in steps
    (rules,) = _of(plan.Nft, steps)
    assert rules.script.count("timeout 3000ms") == rules.script.count("timeout 9000ms") == 2


def test_a_reboot_loads_the_same_rules_and_forgets():
    lab = Lab((home("a", "fcx"),))
    made = plan.plan_reboot(lab, 1, 0, plan.router_address(1, 0))
    assert _of(plan.Nft, made.steps) == _of(plan.Nft, plan.plan_site(lab, 1).steps)
    assert made.steps[-1] == plan.Forget("a/router")


def test_a_new_address_is_in_the_rules():
    made = plan.plan_new_address(Lab((home("a", "fcx"),)), 1, "11.1.0.2", "11.1.0.77")
    (rules,) = _of(plan.Nft, made.steps)
    assert "11.1.0.77:61000" in rules.script
    assert "11.1.0.2" not in rules.script


def test_a_plan_travels_as_json():
    made = plan.plan_site(Lab((home("a", "sym", delay="5ms"),)), 1)
    again = json.loads(json.dumps(made.as_json()))
    assert again["namespaces"] == ["a/router", "a"]
    assert again["steps"][-1]["up"] == {"delay": 0.005, "jitter": 0, "loss": 0, "rate": 0}


@pytest.mark.parametrize("nat", NATS.values(), ids=lambda nat: nat.name)
def test_only_open_routers_are_without_rules(nat):
    assert (ruleset(nat, "11.1.0.2") == "flush ruleset\n") == (nat.name == "open")
    assert ("dnat to" in ruleset(nat, "11.1.0.2")) == (nat.filtering in (Filtering.EIF, Filtering.ADF))
    assert ruleset(nat, "11.1.0.2").count("{") == ruleset(nat, "11.1.0.2").count("}")


def test_the_outer_of_two_routers_makes_the_promise():
    assert chain_of("cgn-sym") == ("sym", "pr")
    assert promise_of("cgn-sym") == promise_of("sym")
    assert promise_of("pr-rst").unsolicited_tcp == "refused"
