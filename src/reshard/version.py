"""The version, in one place that needs no import of anything."""

__version__ = "0.1.0"
