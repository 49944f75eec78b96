"""`python -m comfyfleet`: the same as the `comfyfleet` command."""

from __future__ import annotations

from comfyfleet.cli.main import main

if __name__ == "__main__":
    main()
