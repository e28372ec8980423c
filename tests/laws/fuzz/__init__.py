"""Random train states, random targets, and what must come back, by an oracle without the library's code.

A model is drawn first, as a description. From it follow, each by itself, the tree that a Linen program would
store and the tree that an NNX program would want. Every element is its own number, so the expected value of a
wanted leaf is known from the arrays that were stored.
"""
