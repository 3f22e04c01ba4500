"""The equations of chains as functions: gradients, preconditioner, counts of paths, factors as they start."""
