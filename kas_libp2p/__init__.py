"""kas-libp2p: a libp2p overlay transport that makes Kaspa nodes behind home routers reachable."""
