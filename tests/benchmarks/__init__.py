"""Every benchmark at the size of a toy; in several files, so that workers share them."""
