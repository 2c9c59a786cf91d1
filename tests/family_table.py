"""The table of families in docs/megatron.md. `python tests/family_table.py` writes it anew."""

from __future__ import annotations

from pathlib import Path

from reshard.families import families

PAGE = Path(__file__).parent.parent / "docs" / "megatron.md"
HEAD = "| family | architectures | held against |\n|---|---|---|\n"


def table() -> str:
    return HEAD + "".join(
        f"| {family.name} | {', '.join(family.architectures)} | {family.verified} |\n" for family in families()
    )


def documented() -> str:
    """The table as the page has it: all of the page from its head on."""
    return HEAD + PAGE.read_text(encoding="utf-8").partition(HEAD)[2]


if __name__ == "__main__":
    PAGE.write_text(PAGE.read_text(encoding="utf-8").partition(HEAD)[0] + table(), encoding="utf-8")
