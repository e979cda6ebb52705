"""Every pair of NAT types: where a hole can be punched, it is; where not, we know."""

import pytest

from natlab.punch import expected, punch
from natlab.reflector import add_reflector


@pytest.mark.nat_types("fc", "pr", "eimx", "sym")
def test_two_homes_meet_where_their_routers_allow_it(nat_pair):
    server = add_reflector(nat_pair.lab)
    trial = punch(nat_pair.alice, nat_pair.bob, server, protocol="udp")
    assert trial.succeeded == expected(*nat_pair.types, "udp")
