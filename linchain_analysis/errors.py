"""The one form in which this package complains: *place: expected X, got Y; do Z.*"""

from __future__ import annotations


class LinchainError(Exception):
    """Base of every error this package raises on purpose.

    Args:
        place: Where the fault is, as the user knows it (an argument, a file, a module name).
        expected: What would have been right.
        got: What was found instead.
        do: What the user can do about it.
    """

    def __init__(self, place: str, *, expected: str, got: str, do: str) -> None:
        self.place = place
        self.expected = expected
        self.got = got
        self.do = do
        end = "" if do.endswith("?") else "."
        super().__init__(f"{place}: expected {expected}, got {got}; {do}{end}")

    def __reduce__(self) -> tuple[object, ...]:
        # Worker processes send errors home by pickling; keyword-only arguments need help with that.
        return (_rebuild, (type(self), self.place, self.expected, self.got, self.do))


class InputError(LinchainError, ValueError):
    """A value that can be put right by the caller: an argument, an option, a configuration."""


class UnsupportedError(LinchainError, ValueError, NotImplementedError):
    """Something well-formed that cannot be done, refused by name instead of done wrongly.

    It is a `ValueError` and a `NotImplementedError`, because PEFT uses the first for combinations of options and
    the second for operations, and code that catches either should catch this.
    """


class RunError(LinchainError, ValueError):
    """A run folder that cannot be read or written as asked."""


class DamageError(RunError):
    """Stored data whose checksum or structure is wrong. Damage is reported, never read as numbers."""


def _rebuild(kind: type[LinchainError], place: str, expected: str, got: str, do: str) -> LinchainError:
    return kind(place, expected=expected, got=got, do=do)
