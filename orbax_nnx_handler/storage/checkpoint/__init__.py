"""What is stored: finding a checkpoint and reading its metadata."""
