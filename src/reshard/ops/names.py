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
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from reshard.core.checkpoint import Checkpoint, KeyPath
from reshard.core.tensor import Tensor
from reshard.errors import Mismatch, NotFound, listed
from reshard.formats.torch_tensor import Key

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
    """The model's tensors under the model's own names: containers taken off by path; a notice lists them.

    Raises NotFound when everything in the checkpoint is an optimizer's or a trainer's.
    """
    paths, containers = _model_paths(checkpoint)
    renamed = _renamed(checkpoint.select(paths), {fqn: ".".join(map(str, path)) for fqn, path in paths.items()})
    renamed = replace(renamed, paths={})
    notices = []
    if containers:
        notices.append(f"the model is under {'.'.join(containers)!r}")
    left = dict.fromkeys(_beside(checkpoint.path(fqn), containers) for fqn in checkpoint if fqn not in paths)
    if left:
        notices.append(f"left out: {listed(left)}")
    return replace(renamed, notices=renamed.notices + tuple(notices))


def model_fqns(checkpoint: Checkpoint) -> list[str]:
    """The model's tensors by the names that the checkpoint has for them. Raises as `model_only`."""
    return list(_model_paths(checkpoint)[0])


def _model_paths(checkpoint: Checkpoint) -> tuple[dict[str, KeyPath], list[str]]:
    """(path below the containers by FQN, the containers) of the model's tensors."""
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
    return paths, containers


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
    renamed = _without(checkpoint, _without_wrappers, ", ".join(_WRAPPERS))
    if renamed is checkpoint:
        return checkpoint
    return replace(renamed, paths={**renamed.paths, **{fqn: _unwrapped(renamed.path(fqn)) for fqn in renamed}})


def _without_wrappers(parts: list[str]) -> list[str]:
    return [part for part in parts if part not in _WRAPPERS]


def _unwrapped(path: KeyPath) -> KeyPath:
    """A path whose keys, joined, are the name without the wrappers' segments."""
    if not any(wrapper in str(key) for key in path for wrapper in _WRAPPERS):
        return path
    keys = ((key, _without_wrappers(str(key).split("."))) for key in path)
    return tuple(".".join(left) if left != str(key).split(".") else key for key, left in keys if left)


def without_ddp(checkpoint: Checkpoint) -> Checkpoint:
    """The same without a leading `module.`, where every name has it."""
    if not all(fqn.startswith("module.") for fqn in checkpoint):
        return checkpoint
    return _without(checkpoint, lambda parts: parts[1:], "module")


def without_peft(checkpoint: Checkpoint) -> Checkpoint:
    """The model that an adapter was trained on, under its own names. Anything that holds an adapter is left as it is.

    Raises Mismatch when two tensors would get one name.
    """
    from reshard.formats import huggingface

    if huggingface.is_adapter(checkpoint) or huggingface.trained_with(checkpoint):
        return checkpoint
    return _without(checkpoint, lambda parts: huggingface.without_peft(".".join(parts)).split("."), "base_layer")


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
    root = _Container()
    for name, value in checkpoint.objects.items():
        _put(root, checkpoint.path(name), value)
    for fqn, leaf in leaves.items():
        _put(root, checkpoint.path(fqn), leaf)
    return _finished(root)


class _Container(dict[Any, Any]):
    """A container while it is being filled: one that only paths tell of, or the items of an object by key."""

    def __init__(self, was: Any = None) -> None:
        items = was if isinstance(was, dict) else enumerate(was) if isinstance(was, list | tuple) else ()
        super().__init__(items)
        self.was = was if isinstance(was, dict | list | tuple) else None

    def key(self, key: str | int) -> Any:
        """What a key of a path is in here."""
        return key.value if isinstance(key, Key) and self.was is not None else key


def _put(root: _Container, path: KeyPath, value: Any) -> None:
    for step in path[:-1]:
        key = root.key(step)
        child = root.get(key)
        root[key] = child if isinstance(child, _Container) else _Container(child)
        root = root[key]
    root[root.key(path[-1])] = value


def _finished(value: Any) -> Any:
    """Containers as what they were. Those that only paths tell of are lists where all keys are positions of one."""
    if not isinstance(value, _Container):
        return value
    children = {key: _finished(child) for key, child in value.items()}
    was = value.was
    if isinstance(was, dict):
        was.update(children)
        return was
    if was is not None:
        return type(was)(children[i] for i in range(len(children)))
    if children and all(type(key) is int for key in children) and sorted(children) == list(range(len(children))):
        return [children[i] for i in range(len(children))]
    return {key.value if isinstance(key, Key) else key: child for key, child in children.items()}


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
        paths={name: checkpoint.path(name) for name in checkpoint.objects}
        | {new: checkpoint.path(old) for old, new in names.items()},
        locate=checkpoint.locate and partial(_locate, checkpoint.locate, {new: old for old, new in names.items()}),
    )


def _locate(
    locate: Callable[[Iterable[str]], Mapping[str, Tensor]], stored: Mapping[str, str], names: Iterable[str]
) -> dict[str, Tensor]:
    """The tensors of these names, looked up by those that they are stored under."""
    asked = {stored[name]: name for name in names}
    return {asked[old]: tensor for old, tensor in locate(asked).items()}


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
