"""The commands of `orbax-nnx`, one module each.

A command has `add_to`, which declares it, and `run`, which returns its exit status.
"""
