"""The optimizers, the routing of parameters to them, and hooks around them."""
