"""Settings of a model: what it computes with, under config.json's names and under Megatron's.

A family lists them as data, beside its rows. An item of the list is one of

    ("qk_layernorm", True)                             Megatron's setting, the same in all models of the family
    Setting("num_moe_experts", "num_local_experts")    one value, which both have
    Always("topk_method", "noaux_tc")                  the config's value, the same in all models of the family
    Rule("rope", settings, config)                     values that do not go one to one
    Nested("qwen3_5_text", outer=(...))                the language model's part lies in `text_config`

A later item replaces an earlier one of the same name, so a family says only what is its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from reshard.dialects.facts import Facts
from reshard.errors import Unsupported, listed

Values = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Setting:
    """One value that a config and Megatron's settings both have."""

    megatron: str
    hub: str | tuple[str, ...]
    """The config's key, or several that releases have used: the first that is there counts, the first is written."""
    default: Any = None
    """What a config without it means; None where nothing follows."""
    values: tuple[tuple[Any, Any], ...] = ()
    """(config's, Megatron's), where they are not the same. The first that fits is written."""

    @property
    def name(self) -> str:
        return self.megatron

    @property
    def hubs(self) -> tuple[str, ...]:
        return (self.hub,) if isinstance(self.hub, str) else self.hub

    def of_config(self, config: Values) -> Any:
        """Megatron's value. Raises Unsupported for one that Megatron does not have."""
        value = next((config[key] for key in self.hubs if config.get(key) is not None), self.default)
        return self._exchanged(value, 0)

    def of_settings(self, settings: Values) -> Any:
        """The config's value. Raises Unsupported for one that no config has."""
        return self._exchanged(settings.get(self.megatron), 1)

    def _exchanged(self, value: Any, side: int) -> Any:
        if not self.values or value is None:
            return value
        for pair in self.values:
            if pair[side] == value:
                return pair[1 - side]
        known = listed(dict.fromkeys(str(pair[side]) for pair in self.values))
        raise Unsupported(f"{(self.hubs[0], self.megatron)[side]} is {value!r:.100}: {known} are known")


@dataclass(frozen=True, slots=True)
class Always:
    """A value of the config that all models of a family have, and that Megatron need not be told."""

    hub: str
    value: Any

    @property
    def name(self) -> str:
        return self.hub


@dataclass(frozen=True, slots=True)
class Rule:
    """Values that a config and Megatron put differently."""

    name: str
    settings: Callable[[Values, Facts], Values]
    """Megatron's settings, of a config."""
    config: Callable[[Values], Values]
    """The config's values, of Megatron's settings."""


@dataclass(frozen=True, slots=True)
class Nested:
    """A model of several parts: the language model's values lie in the config's `text_config`."""

    model_type: str
    """The language model's."""
    outer: tuple[str, ...] = ()
    """Values that lie outside of it."""

    @property
    def name(self) -> str:
        return "text_config"


Item = tuple[str, Any] | Setting | Always | Rule | Nested


def merged(*lists: Iterable[Item]) -> list[Item]:
    """The items of several lists, where a later one replaces an earlier one of its name."""
    by_name: dict[str, Item] = {}
    for item in (item for items in lists for item in items):
        name = item[0] if isinstance(item, tuple) else item.name
        by_name.pop(name, None)
        by_name[name] = item
    return list(by_name.values())


ROPE = "rope"
"""The key under which `flat` keeps the scaling of the rotary embedding."""


def flat(config: Values) -> dict[str, Any]:
    """A config with the language model's values at the top, and one spelling of the rotary embedding.

    `rope_theta`, `partial_rotary_factor`, `rope_local_base_freq` (that of sliding layers) and `rope`, which holds the
    rest of `rope_parameters` or `rope_scaling` with its kind as `rope_type`.
    """
    text = config.get("text_config")
    values = {**config, **text} if isinstance(text, Mapping) else dict(config)
    rope = _mapping(values.get("rope_parameters")) or _mapping(values.get("rope_scaling"))
    by_layer = {kind: _mapping(rope.get(kind)) for kind in ("full_attention", "sliding_attention")}
    if any(by_layer.values()):
        rope = by_layer["full_attention"]
        local = by_layer["sliding_attention"].get("rope_theta")
        values["rope_local_base_freq"] = values.get("rope_local_base_freq") if local is None else local
    for key in ("rope_theta", "partial_rotary_factor"):
        if rope.get(key) is not None:
            values[key] = rope[key]
    values[ROPE] = {"rope_type": rope.get("rope_type") or rope.get("type") or "default"} | {
        key: value
        for key, value in rope.items()
        if key not in ("rope_type", "type", "rope_theta", "partial_rotary_factor") and value is not None
    }
    return values


def _mapping(value: Any) -> Values:
    return value if isinstance(value, Mapping) else {}
