"""What has to be known of a model before its tensors can be named: sizes, layers and what each has, counts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace


@dataclass(frozen=True, slots=True)
class Facts:
    """What a config says about the tensors of a model."""

    sizes: Mapping[str, int]
    """Named sizes for the fuses: `heads`, `groups`, `head_dim`, `hidden`, `vocab`, ..."""
    layers: tuple[frozenset[str], ...]
    """The tags of each layer: `full` or `linear` attention, `dense` or `moe`, ..."""
    tags: frozenset[str] = frozenset()
    """The tags of the model: `tied` or `untied`, `qkv_bias`, `mtp`, ..."""
    counts: Mapping[str, int] = field(default_factory=dict)
    """How many there are of what the other placeholders number: `expert`, `mtp`, `block`, ..."""

    def without(self, *tags: str) -> Facts:
        """The same model without some of its parts."""
        return replace(self, tags=self.tags - set(tags))

    def sized(self, **sizes: int) -> Facts:
        """The same model with other sizes."""
        return replace(self, sizes={**self.sizes, **sizes})
