"""Pairs of Linen and NNX programs that must give the same numbers from the same checkpoint."""
