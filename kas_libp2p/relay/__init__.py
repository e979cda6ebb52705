"""Circuit relay v2: being reachable through others, and carrying others."""
