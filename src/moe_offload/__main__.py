"""``python -m moe_offload`` is the command ``moe-offload``."""

from moe_offload.cli.main import main

if __name__ == "__main__":
    main()
