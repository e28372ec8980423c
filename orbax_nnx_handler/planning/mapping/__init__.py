"""Which stored leaf becomes which wanted one."""
