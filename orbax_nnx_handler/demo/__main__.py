"""`python -m orbax_nnx_handler.demo`."""

from orbax_nnx_handler.demo import main

if __name__ == "__main__":
    main()
