"""The package's version; it is part of the keys under which results are cached."""

__version__ = "0.1.0"
