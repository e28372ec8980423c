"""How fast, how much memory, and whether the result is right."""
