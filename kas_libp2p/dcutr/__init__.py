"""Direct connection upgrade through relay: two peers on a circuit agree on the moment at which both dial."""
