"""Protobuf schemas of the libp2p protocols, and the modules generated from them by ``scripts/generate-protobuf``.

Package names are our own: py-libp2p registers the same messages under its names in the one descriptor pool that a
process has.
"""
