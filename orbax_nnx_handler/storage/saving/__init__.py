"""NNX state as a Linen program stores it."""
