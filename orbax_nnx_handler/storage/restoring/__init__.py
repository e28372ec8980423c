"""Carrying out a plan: reading, filling, assembling."""
