"""Whether a mapping fits: what is restored, missing, mismatched, defaulted."""
