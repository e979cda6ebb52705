"""Ask the prober what kind of NAT a host is behind, as an application would before it promises to be reachable."""

import pytest

from natlab import Filtering, Mapping
from natlab.probe import probe
from natlab.reflector import add_reflector


@pytest.mark.natlab("alice=cgn-symseq,hairpin,delay=5ms")
def test_alice_learns_that_nobody_can_reach_her(lab):
    found = probe(add_reflector(lab), lab["alice"].socket, tcp=False)
    assert found.udp.mapping is Mapping.APDM
    assert found.udp.filtering is Filtering.APDF
    assert found.udp.port == "plus one"  # a peer could guess the next one


@pytest.mark.nat_types("fc", "adm")
def test_a_type_is_known_by_what_it_does(lab, nat_type):
    alice = lab.home("alice", nat=nat_type)
    assert probe(add_reflector(lab), alice.socket).types == (nat_type,)
