"""natlab: real NATs on one machine. See README.md of the distribution."""
