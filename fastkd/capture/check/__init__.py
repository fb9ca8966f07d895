"""A cache against its teacher, run again on a sample."""
