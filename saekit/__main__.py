"""`python -m saekit`, and with it `accelerate launch -m saekit`."""

from saekit.cli import main

if __name__ == "__main__":
    main()
