"""`python -m vovnet_zoo` is the command `vovnet-zoo`."""

from .cli import main

if __name__ == "__main__":
    main()
