"""What `reshard --version` says."""

from __future__ import annotations

from importlib.util import find_spec

from reshard.formats import FORMATS
from reshard.version import __version__

_EXTRAS = {"hub": "huggingface_hub", "zstd": "zstandard"}


def version_text() -> str:
    """Version, formats and extras, a line each."""
    extras = ", ".join(
        f"{name} ({'there' if find_spec(module) else 'not installed'})" for name, module in _EXTRAS.items()
    )
    return f"reshard {__version__}\nformats: {', '.join(FORMATS)}\nextras: {extras}\n"
