"""`python -m orbax_nnx_handler`: the command line."""

import sys

from orbax_nnx_handler.cli import main

if __name__ == "__main__":
    sys.exit(main())
