"""The version, in one place: pyproject.toml reads it from here, so it needs no installation and no torch."""

__version__ = "0.1.0"
