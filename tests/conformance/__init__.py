"""The same programs with Orbax's own handler and with this one: what is not NNX comes out alike."""
