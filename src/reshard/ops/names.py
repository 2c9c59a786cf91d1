"""Which tensors of a checkpoint are the model, and what the model itself calls them.

Trainers put the model's state dict somewhere into a larger one: `{"model": ..., "optimizer": ...}`, `{"app": {"model":
...}}`, or beside the rest at the top level. Paths tell where the model's own names begin, because names contain dots:
`("model", "model.layers.0.weight")` is `model.layers.0.weight` in the container `model`.

Wrappers leave segments inside names: FSDP1 `_fsdp_wrapped_module`, activation checkpointing
`_checkpoint_wrapped_module`, torch.compile `_orig_mod`, DDP and DeepSpeed a leading `module`. torch does not count the
first three as part of an FQN.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from reshard.core.checkpoint import Checkpoint, KeyPath
from reshard.errors import Mismatch, NotFound, listed

_CONTAINERS = ("model", "state_dict", "module", "model_state_dict", "model_states", "weights", "app", "state")
"""What holds the model where a state dict holds more than it, best first."""
_SURELY = ("model", "state_dict", "model_state_dict", "model_states")
"""Those that hold the model whatever else is there; the others may be a module of it, or the trainer's."""
_NOT_THE_MODEL = re.compile(
    r"(optim|optimizers?|optimizer_states?)(_\d+)?|(lr_)?schedulers?(_\d+)?|dataloaders?(_\w+)?|train_state|trainer(_\w+)?"
    r"|extra_state|rng(_\w+)?|random_states?(_\d+)?|ema(_\w+)?|epoch|step|global_step|iteration|callbacks|loops|args"
)
_WRAPPERS = ("_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod")


def model_only(checkpoint: Checkpoint) -> Checkpoint:
    """The model's tensors, located, under the model's own names: containers taken off by path; a notice lists them.

    Raises NotFound when everything in the checkpoint is an optimizer's or a trainer's.
    """
    paths = {fqn: checkpoint.path(fqn) for fqn in checkpoint}
    containers: list[str] = []
    while True:
        roots = Counter(str(path[0]) for path in paths.values())
        inside = {str(path[0]) for path in paths.values() if len(path) > 1}
        named = next((c for c in _CONTAINERS if c in inside), None)
        if named is None or (len(roots) > 1 and not _others_are_no_model(roots, named)):
            break
        paths = {fqn: path[1:] for fqn, path in paths.items() if str(path[0]) == named and len(path) > 1}
        containers.append(named)
    paths = {fqn: path for fqn, path in paths.items() if not _belongs_elsewhere(path)}
    if checkpoint.tensors and not paths:
        raise NotFound(
            f"{checkpoint.origin.path}: no model in it, only {listed(_roots(checkpoint))}",
            hint="--optimizer takes the optimizer, --all everything",
        )
    renamed = _renamed(
        checkpoint.select(paths).located(), {fqn: ".".join(map(str, path)) for fqn, path in paths.items()}
    )
    renamed = replace(renamed, paths={})
    notices = []
    if containers:
        notices.append(f"the model is under {'.'.join(containers)!r}")
    left = dict.fromkeys(_beside(checkpoint.path(fqn), containers) for fqn in checkpoint if fqn not in paths)
    if left:
        notices.append(f"left out: {listed(left)}")
    return replace(renamed, notices=renamed.notices + tuple(notices))


def optimizer_only(checkpoint: Checkpoint) -> Checkpoint:
    """The optimizer's tensors, under their full names. Raises NotFound when there are none."""
    chosen = [
        fqn for fqn in checkpoint if any(re.fullmatch(r"optim\w*", str(part)) for part in checkpoint.path(fqn)[:-1])
    ]
    if not chosen:
        raise NotFound(f"{checkpoint.origin.path}: no optimizer in it, only {listed(_roots(checkpoint))}")
    return checkpoint.select(chosen)


def unwrapped(checkpoint: Checkpoint) -> Checkpoint:
    """The same under FQNs as torch counts them, without the segments that wrappers add; a notice lists those.

    Raises Mismatch when two tensors would get one name.
    """
    return _without(checkpoint, lambda parts: [p for p in parts if p not in _WRAPPERS], ", ".join(_WRAPPERS))


def without_ddp(checkpoint: Checkpoint) -> Checkpoint:
    """The same without a leading `module.`, where every name has it."""
    if not all(fqn.startswith("module.") for fqn in checkpoint):
        return checkpoint
    return _without(checkpoint, lambda parts: parts[1:], "module")


def without_attribute(checkpoint: Checkpoint, config: Mapping[str, object] | None) -> Checkpoint:
    """The same without the attribute that holds the model in a LightningModule, as in `llm.model.layers.0...`.

    Only with a config, and only when the names are a HuggingFace model's without that first segment and not with it.
    """
    if config is None or not checkpoint.tensors:
        return checkpoint
    while not any(_looks_like_huggingface(fqn) for fqn in checkpoint):
        first = {fqn.partition(".")[0] for fqn in checkpoint}
        if len(first) != 1 or not any("." in fqn for fqn in checkpoint):
            return checkpoint
        shorter = [fqn.partition(".")[2] for fqn in checkpoint]
        if not any(_looks_like_huggingface(fqn) or _looks_like_huggingface(fqn.partition(".")[2]) for fqn in shorter):
            return checkpoint
        checkpoint = _without(checkpoint, lambda parts: parts[1:], first.pop())
    return checkpoint


def nested(checkpoint: Checkpoint, leaves: Mapping[str, Any]) -> Any:
    """The state dict as it was before it was flattened: `leaves` (one for each FQN) and the objects at their paths.

    Tensors inside of an object stay where they are in it.
    """
    root: dict[Any, Any] = {}
    for name, value in checkpoint.objects.items():
        _put(root, checkpoint.path(name), value)
    for fqn, leaf in leaves.items():
        _put(root, checkpoint.path(fqn), leaf)
    return _with_lists(root)


def _put(root: dict[Any, Any], path: KeyPath, value: Any) -> None:
    for key in path[:-1]:
        child = root.get(key)
        if isinstance(child, tuple | list):
            child = dict(enumerate(child)) | {_WAS: type(child)}
        elif not isinstance(child, dict):
            child = {}
        root[key] = child
        root = child
    root[path[-1]] = value


_WAS = object()
"""Marks a dict that stands for a tuple or a list while its tensors are put in."""


def _with_lists(value: Any) -> Any:
    """Dicts that stand for lists or tuples, or have the positions of a list for keys, as those."""
    if not isinstance(value, dict):
        return value
    was = value.pop(_WAS, None)
    children = {key: _with_lists(child) for key, child in value.items()}
    if was is not None:
        return was(children[i] for i in range(len(children)))
    if children and all(type(key) is int for key in children) and sorted(children) == list(range(len(children))):
        return [children[i] for i in range(len(children))]
    return type(value)(children) if type(value) is not dict else children


def _looks_like_huggingface(fqn: str) -> bool:
    return fqn in (
        "model.embed_tokens.weight",
        "transformer.wte.weight",
        "model.norm.weight",
        "lm_head.weight",
    ) or bool(re.match(r"(model|transformer|model\.language_model|language_model\.model)\.(layers|h)\.0\.", fqn))


def _without(checkpoint: Checkpoint, shorten: Callable[[list[str]], list[str]], what: str) -> Checkpoint:
    names = {fqn: ".".join(shorten(fqn.split("."))) for fqn in checkpoint}
    changed = sum(fqn != name for fqn, name in names.items())
    if not changed:
        return checkpoint
    removed = sorted({p for fqn in names for p in fqn.split(".")} - {p for n in names.values() for p in n.split(".")})
    renamed = _renamed(checkpoint, names)
    return replace(renamed, notices=(*renamed.notices, f"taken off {changed} names: {listed(removed) or what}"))


def _renamed(checkpoint: Checkpoint, names: Mapping[str, str]) -> Checkpoint:
    twice = [name for name, count in Counter(names.values()).items() if count > 1]
    if twice:
        both = listed((f"{a} and {b}" for a, b in (_pair(names, name) for name in twice)), 5)
        raise Mismatch(f"{checkpoint.origin.path}: several tensors would get one name: {both}", hint="--keep-names")
    return replace(
        checkpoint,
        tensors={new: checkpoint.tensors[old] for old, new in names.items()},
        paths={new: checkpoint.path(old) for old, new in names.items()},
    )


def _pair(names: Mapping[str, str], name: str) -> tuple[str, str]:
    first, second, *_ = [old for old, new in names.items() if new == name]
    return first, second


def _others_are_no_model(roots: Counter[str], named: str) -> bool:
    """Whether `named` is the model's container: nothing else is called so, or the rest is known to be no model."""
    return named in _SURELY or all(_NOT_THE_MODEL.fullmatch(root) for root in roots if root != named)


def _beside(path: KeyPath, containers: list[str]) -> str:
    """The first keys of a path, as far as they lead away from the model."""
    shared = next((i for i, key in enumerate(containers) if str(path[i]) != key), len(containers))
    return ".".join(map(str, path[: shared + 1]))


def _belongs_elsewhere(path: KeyPath) -> bool:
    return len(path) > 1 and bool(_NOT_THE_MODEL.fullmatch(str(path[0])))


def _roots(checkpoint: Checkpoint) -> list[str]:
    return list(dict.fromkeys(str(checkpoint.path(fqn)[0]) for fqn in checkpoint))
