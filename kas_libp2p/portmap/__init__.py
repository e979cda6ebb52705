"""Asking the router for a port: PCP, NAT-PMP, UPnP."""
