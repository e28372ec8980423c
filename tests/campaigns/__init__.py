"""Campaigns: thousands of damaged, hostile and interrupted checkpoints, beside stock Orbax on the same bytes.

`python -m tests.campaigns corruption|hostile|kill|pressure`; docs/reliability.md has the last figures.
"""
