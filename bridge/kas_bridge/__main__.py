"""``python -m kas_bridge`` is ``kas-bridge``."""

from kas_bridge.cli import main

if __name__ == "__main__":
    main()
