"""Mistakes that end in one line which says what to do, and the words that help: the nearest valid name."""

from __future__ import annotations

import difflib


class UsageError(ValueError):
    """A command line that cannot be meant: exit status 2."""


class DataError(ValueError):
    """Input that cannot be used (a file, a checkpoint, a prompt): exit status 1."""


class ConfigError(ValueError):
    """A configuration that cannot be used; the message is one line that says what to do."""


def nearest(name: str, valid) -> str:
    """The end of an error message: the nearest valid name, if one is near, and the list of all."""
    valid = sorted(str(v) for v in valid)
    close = difflib.get_close_matches(str(name), valid, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}valid: {', '.join(valid) if valid else '(none)'}"
