"""A checkpoint written anew in another layout, arrangement or dtype."""
