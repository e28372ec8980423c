"""What is stored: what a path means, and what a checkpoint's metadata says."""
