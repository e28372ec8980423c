"""Each step of Flax's and Orbax's guides, with this package in the place of the hand-written step."""
