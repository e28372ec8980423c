"""The decision: pure functions of (target, metadata, options).

Nothing in this package opens a file, allocates an array or imports Orbax.
"""
