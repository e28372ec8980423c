"""Which stored optimizer state becomes which wanted one."""
