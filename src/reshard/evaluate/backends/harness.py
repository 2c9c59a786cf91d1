"""What requests to both harnesses have in common, and what lmms-eval makes of a model's settings.

lmms-eval gets them as `key=value,key=value`: what follows a comma is another setting for it, and lists are none. The
first that is named in PATH_KEYS is the model for it, and names the directory of the results.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from reshard.errors import listed
from reshard.evaluate.backend import Refused
from reshard.evaluate.config import EvalConfig

PATH_KEYS = ("peft", "delta", "pretrained", "model", "model_version", "model_name", "model_id", "path", "engine")
_OF_THE_REQUEST = ("num_gpus", "batch_size")


def settled(config: EvalConfig) -> EvalConfig:
    """The settings with `num_gpus` and `batch_size` where the harnesses look for them.

    LMMs-Engine's guide has them among the model's own, which no model takes.
    """
    moved = {
        name: config.model_args[name]
        for name in _OF_THE_REQUEST
        if name in config.model_args and getattr(config, name) is None
    }
    kept = {name: value for name, value in config.model_args.items() if name not in _OF_THE_REQUEST}
    return replace(config, model_args=kept, **moved)


def lmms_model_args(config: EvalConfig, model: str) -> dict[str, Any]:
    """The model's settings for lmms-eval, the path among them. Raises Refused for what it would misunderstand."""
    if config.checkpoint_key not in PATH_KEYS:
        raise Refused(
            f"checkpoint_key: lmms-eval finds no model in {config.checkpoint_key}",
            hint=f"it looks at {listed(PATH_KEYS)}",
        )
    chosen = {name: value for name, value in config.model_args.items() if value is not None}
    chosen[config.checkpoint_key] = model
    if config.device is not None:  # of the request it takes no notice
        chosen.setdefault("device", config.device)
    commas = [f"{name}={value}" for name, value in chosen.items() if "," in str(name) or "," in str(value)]
    if commas:
        raise Refused(f"lmms-eval takes what follows a comma for another setting: {listed(commas)}")
    nested = [name for name, value in chosen.items() if isinstance(value, Mapping | list | tuple)]
    if nested:
        raise Refused(f"model_args: {listed(nested)}: lmms-eval takes texts, numbers and truth values only")
    if config.limit == 0:
        raise Refused("limit: lmms-eval takes 0 for no limit")
    if wrong := [task for task in config.tasks if "," in task or "/" in task]:
        raise Refused(f"tasks: {listed(wrong)}: lmms-eval knows tasks by their names only")
    return chosen


def model_named_in(model_args: Mapping[str, Any]) -> str | None:
    """What lmms-eval takes for the model."""
    return next((str(model_args[key]) for key in PATH_KEYS if model_args.get(key) is not None), None)
