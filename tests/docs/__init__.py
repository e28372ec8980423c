"""Runs the pages of the documentation."""
