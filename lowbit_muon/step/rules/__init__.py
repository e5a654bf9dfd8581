"""What is done with a momentum: one file a stage of an update rule, one class a choice."""
