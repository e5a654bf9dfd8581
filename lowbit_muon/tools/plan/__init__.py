"""The memory planner: what training a model would take with each optimizer and state format."""
