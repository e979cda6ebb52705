"""One Kaspa byte stream over changing paths."""
