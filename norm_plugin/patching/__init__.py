"""Source patches for engines that people build themselves: find, check, apply, and take back to the byte."""


class PatchError(Exception):
    """A patch cannot be applied, checked or taken back; the message says why and what to do. Nothing was changed."""
