"""Real kaspads on a network of their own (simnet), for the demonstration, the benchmarks and the tests.

* `node` finds kaspad, starts and ends it in a temporary folder;
* `mine` makes blocks, empty or filled with signed transactions, and keeps a filled chain for the next time;
* `wire` joins two network namespaces by a wire that delays;
* `measure` times how one kaspad syncs from another, and how fast live blocks arrive.

Nothing here is imported by ``kas-bridge run``.
"""
