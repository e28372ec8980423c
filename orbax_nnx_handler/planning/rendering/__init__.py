"""Plans and reports for a person: as text, on a terminal, in a notebook, and as plain dicts."""
