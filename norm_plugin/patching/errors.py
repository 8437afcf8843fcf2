"""Why something was not done."""

from __future__ import annotations


class PatchError(Exception):
    """A patch cannot be applied, checked or taken back; the message says why and what to do. Nothing was changed."""
