"""Experts of a layer in one tensor, as some of the hub's checkpoints have them and transformers 5 has in memory.

    packed    mlp.experts.gate_up_proj (E, 2I, H)     mlp.experts.down_proj (E, H, I)
    turned    mlp.experts.gate_up_proj (E, H, 2I)     mlp.experts.down_proj (E, I, H)
    single    mlp.experts.{e}.gate_proj.weight, .up_proj.weight (I, H)    .down_proj.weight (H, I)

The tables of the families have single experts. Which of the others a checkpoint has is seen on its tensors, and what is
written is what the reference has.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping

from reshard.core.box import Shape
from reshard.core.tensor import Tensor, concat, stack
from reshard.errors import Incomplete, Mismatch, listed

_PACKED = re.compile(r"(?P<path>.+\.experts)\.(?P<what>gate_up_proj|down_proj)")
_SINGLE = re.compile(r"(?P<path>.+\.experts)\.(?P<expert>\d{1,7})\.(?:gate_proj|up_proj|down_proj)\.weight")


def unpacked(tensors: Mapping[str, Tensor], known: Collection[str]) -> dict[str, Tensor]:
    """Tensors with single experts. Names that the family's table has itself (`known`) stay.

    Raises Mismatch when the shapes of a layer's two tensors are not those of experts.
    """
    result: dict[str, Tensor] = {}
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        match = _PACKED.fullmatch(name)
        if match is None or name in known or len(tensor.shape) != 3:
            result[name] = tensor
            continue
        if is_turned(match["path"], shapes):
            tensor = tensor.permute(0, 2, 1)
        result |= _single(match["path"], match["what"], tensor)
    return result


def packed(tensors: Mapping[str, Tensor], reference: Mapping[str, Shape]) -> dict[str, Tensor]:
    """Tensors with experts packed wherever the reference's names have them packed, and turned where its are.

    Raises Incomplete when an expert is missing.
    """
    result = dict(tensors)
    counts = _counts(tensors)
    for name in reference:
        match = _PACKED.fullmatch(name)
        if match is None or name in tensors or match["path"] not in counts:
            continue
        path = match["path"]
        wanted = ("gate_proj", "up_proj") if match["what"] == "gate_up_proj" else ("down_proj",)
        single = [[f"{path}.{expert}.{w}.weight" for w in wanted] for expert in range(counts[path])]
        missing = [one for names in single for one in names if one not in tensors]
        if missing:
            raise Incomplete(f"{name}: {len(missing)} matrices of its experts are missing: {listed(missing)}")
        whole = stack([concat([result.pop(one) for one in names], 0) for names in single])
        result[name] = whole.permute(0, 2, 1) if is_turned(path, reference) else whole
    return result


def is_turned(path: str, shapes: Mapping[str, Shape]) -> bool:
    """Whether packed experts are (E, in, out). Raises Mismatch when a layer's two tensors do not fit each other."""
    gate_up, down = shapes.get(f"{path}.gate_up_proj"), shapes.get(f"{path}.down_proj")
    if gate_up is None or down is None or len(gate_up) != 3 or len(down) != 3:
        raise Mismatch(f"{path}: gate_up_proj and down_proj of three dimensions each were expected")
    if gate_up[0] == down[0]:
        if gate_up[1] == 2 * down[2] and gate_up[2] == down[1]:
            return False
        if gate_up[2] == 2 * down[1] and gate_up[1] == down[2]:
            return True
    raise Mismatch(f"{path}: gate_up_proj {list(gate_up)} and down_proj {list(down)} are not those of experts")


def _single(path: str, what: str, tensor: Tensor) -> Iterable[tuple[str, Tensor]]:
    half = tensor.shape[1] // 2
    for expert in range(tensor.shape[0]):
        matrix = tensor[expert]
        if what == "down_proj":
            yield f"{path}.{expert}.down_proj.weight", matrix
        else:
            yield f"{path}.{expert}.gate_proj.weight", matrix[:half]
            yield f"{path}.{expert}.up_proj.weight", matrix[half:]


def _counts(names: Iterable[str]) -> dict[str, int]:
    """How many single experts there are at each path."""
    counts: dict[str, int] = {}
    for name in names:
        match = _SINGLE.fullmatch(name)
        if match is not None:
            counts[match["path"]] = max(counts.get(match["path"], 0), int(match["expert"]) + 1)
    return counts
