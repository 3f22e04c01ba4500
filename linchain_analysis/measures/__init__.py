"""Pure mathematics on stacks of small matrices: NumPy in, NumPy out, float64, no torch.

Every function works on a whole stack at once: leading axes are kept, and a stack of k modules costs one call.
"""
