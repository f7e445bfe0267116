"""What the names and values of a table mean: one home for every command that reads one."""
