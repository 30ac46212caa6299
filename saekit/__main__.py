"""Run saekit with `python -m saekit` or `accelerate launch -m saekit`."""

from saekit.cli import main

if __name__ == "__main__":
    main()
