"""Who can dial us: AutoNAT v1 and v2, observed addresses, and the role that follows."""
