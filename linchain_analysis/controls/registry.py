"""The controls, found by looking through this package: each file of it that defines `CONTROL` is one."""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Sequence
from difflib import get_close_matches
from functools import cache

from linchain_analysis.controls.control import Control
from linchain_analysis.errors import InputError

_NAME = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")


@cache
def all_controls() -> dict[str, Control]:
    """Return every control by name, in the order of names.

    Raises:
        InputError: A `CONTROL` that is none, or two of one name.
    """
    package = importlib.import_module("linchain_analysis.controls")
    found: dict[str, Control] = {}
    for entry in pkgutil.iter_modules(package.__path__):
        module = importlib.import_module(f"{package.__name__}.{entry.name}")
        if not hasattr(module, "CONTROL"):
            continue  # what several controls share
        control = module.CONTROL
        if not isinstance(control, Control) or not _NAME.fullmatch(control.name) or control.name in found:
            raise InputError(
                module.__name__,
                expected="CONTROL, a Control with a name of its own in small letters and hyphens",
                got=repr(getattr(control, "name", control)),
                do="correct the name",
            )
        found[control.name] = control
    return dict(sorted(found.items()))


def find_controls(names: Sequence[str]) -> list[Control]:
    """Return the controls of these names, each once, in the order of first mention; all of them for no name.

    Raises:
        InputError: A name that no control has.
    """
    known = all_controls()
    for name in names:
        if name not in known:
            # As the source writes it, LoRA+ is nearer to rslora than to lora-plus.
            close = get_close_matches(name.lower().replace("+", "-plus"), known, n=1)
            do = f"did you mean {close[0]!r}?" if close else "choose one of them"
            raise InputError("control", expected=f"one of {', '.join(known)}", got=repr(name), do=do)
    return [known[name] for name in dict.fromkeys(names)] if names else list(known.values())
