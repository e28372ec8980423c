"""Broken restores and the message of each; `python -m tests.gallery` writes them to docs/errors.md."""
