"""What is wanted: the leaves of a target, their roles, train states and shardings."""
