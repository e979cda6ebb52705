"""How we connect: which ways are tried, when a relayed connection becomes direct, and why one does not."""
