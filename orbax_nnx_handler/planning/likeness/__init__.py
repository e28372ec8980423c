"""How alike the parts of two models are: by what their names say, and by their shapes."""
