"""How lists of paths and sentences are laid out as text."""
