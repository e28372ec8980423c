"""The handler and the functions, promise by promise."""
