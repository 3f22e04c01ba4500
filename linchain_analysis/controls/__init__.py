"""Positive controls: effects that are known to exist, reproduced with the measures of this package.

A null result means something only if the instrument sees effects that are known to exist. Each file that defines a
`CONTROL` is one of them; `python -m linchain_analysis.calibrate` runs them.
"""

from linchain_analysis.controls.control import Control, Finding

__all__ = ["Control", "Finding"]
