"""The one kind of error that changes what a driver does."""

from __future__ import annotations


class Unrecoverable(RuntimeError):
    """A run must stop for a reason that starting it again from its checkpoint would only meet again."""
