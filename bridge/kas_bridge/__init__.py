"""kas-bridge: a libp2p overlay in front of an unmodified kaspad."""
