"""Python stages: the Worker's pool of processes that run them, and those processes."""
