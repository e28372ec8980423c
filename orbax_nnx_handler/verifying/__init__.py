"""Both programs run on one input and compared: their outputs, and module by module."""
