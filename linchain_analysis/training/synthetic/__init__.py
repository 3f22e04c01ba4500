"""Train whole stacks of chains on linear maps at once."""
