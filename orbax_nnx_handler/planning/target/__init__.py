"""What is wanted: the leaves of a target, their roles and shardings."""
