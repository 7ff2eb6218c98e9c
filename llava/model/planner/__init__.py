"""Memory planner: micro-batches of a run, its flags, bytes by use and setups that fit, and a table of GPUs."""
