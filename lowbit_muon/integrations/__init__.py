"""How the optimizers fit into what people train with."""
