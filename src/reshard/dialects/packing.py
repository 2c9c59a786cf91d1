"""Experts of a layer in one tensor, as some of the hub's checkpoints have them and transformers 5 has in memory.

    packed    mlp.experts.gate_up_proj (E, 2I, H)     mlp.experts.down_proj (E, H, I)
    turned    mlp.experts.gate_up_proj (E, H, 2I)     mlp.experts.down_proj (E, I, H)
    single    mlp.experts.{e}.gate_proj.weight, .up_proj.weight (I, H)    .down_proj.weight (H, I)

The tables of the families have single experts. Which of the others a checkpoint has is seen on its tensors, and what is
written is what the reference has.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping

from reshard.core.box import Shape
from reshard.core.tensor import Tensor
from reshard.dialects import match
from reshard.dialects.fuse import GLU, SAME
from reshard.dialects.table import Row
from reshard.errors import Mismatch, listed

TURNED_ON_HUB = ("qwen3_vl_moe", "qwen3_vl_moe_text")
"""Model types whose experts are turned on the hub."""

PACKED_ON_HUB = frozenset(
    ("gpt_oss", "llama4", "llama4_text", "gemma4", "gemma4_text", "mistral4", "granitemoe_swa", "zaya", *TURNED_ON_HUB)
)
"""Model types whose experts transformers saves in one tensor, either way round."""


def rows(packed: str, single: str, names: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj")) -> tuple[Row, Row]:
    """The rows of experts that are packed in `packed` and single in `single`, which has `{expert}`.

    `names` are the single matrices': gate, where there is one, up and down.
    """
    *up, down = (f"{single}.{name}.weight" for name in names)
    joint = f"{packed}.gate_up_proj" if len(up) == 2 else f"{packed}.up_proj"
    return Row(joint, tuple(up), GLU if len(up) == 2 else SAME), Row(f"{packed}.down_proj", down)


_ANYWHERE = rows("{rest}.experts", "{rest}.experts.{expert}")


def unpacked(tensors: Mapping[str, Tensor], known: Collection[str]) -> dict[str, Tensor]:
    """Tensors with single experts. Names that the family's table has itself (`known`) stay.

    Raises Mismatch when the shapes of a layer's two tensors are not those of experts, or an expert is there twice.
    """
    result: dict[str, Tensor] = {}
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        found = match.by_name(name, _ANYWHERE) if name not in known and len(tensor.shape) == 3 else None
        parts = {name: tensor}
        if found is not None:
            row, at = found
            way_round = tensor.permute(0, 2, 1) if is_turned(_place(name), shapes) else tensor
            parts = match.split(way_round, row, at, {})
        twice = [part for part in parts if part in result or (part in tensors and part != name)]
        if twice:
            raise Mismatch(f"{_place(name)}: experts are there packed and single: {listed(twice)}")
        result |= parts
    return result


def usual(tensors: Mapping[str, Tensor], model_type: str) -> dict[str, Shape]:
    """The shapes of packed experts that a model of this type has on the hub, where no reference shows them."""
    if model_type not in TURNED_ON_HUB:
        return {}
    result: dict[str, Shape] = {}
    counts = Counter(at["rest"] for name in tensors if (at := match.pattern(_DOWN).fullmatch(name)))
    for path, count in counts.items():
        rows, columns = tensors[f"{path}.experts.0.down_proj.weight"].shape
        result[f"{path}.experts.gate_up_proj"] = (count, rows, 2 * columns)
        result[f"{path}.experts.down_proj"] = (count, columns, rows)
    return result


_DOWN = "{rest}.experts.{expert}.down_proj.weight"


def packed(tensors: Mapping[str, Tensor], reference: Mapping[str, Shape]) -> dict[str, Tensor]:
    """Tensors with experts packed wherever the reference's names have them packed, and turned where its are.

    A tower that transformers saved without the level `vision_model` lacks it again. Raises Incomplete when an expert
    is missing.
    """
    tensors = {_spelled(name, reference): tensor for name, tensor in tensors.items()}
    wanted = {name for name in reference if name not in tensors and match.by_name(name, _ANYWHERE)}
    if not wanted:
        return tensors
    result = match.joined(tensors, _ANYWHERE, {}, only=wanted)
    for name in wanted & result.keys():
        if is_turned(_place(name), reference):
            result[name] = result[name].permute(0, 2, 1)
    return result


def _spelled(name: str, reference: Collection[str]) -> str:
    short = name.replace("vision_tower.vision_model.", "vision_tower.", 1)
    return short if name not in reference and short in reference else name


def turned(tensors: Mapping[str, Tensor], *, to_hub: bool = True) -> tuple[dict[str, Tensor], list[str]]:
    """Packed experts turned the hub's way round (or back), and sentences about them.

    Which way they are is seen on both tensors of a layer together. Square ones transformers reads as they are, so
    they stay.
    """
    result = dict(tensors)
    count, square = 0, []
    for name in tensors:
        if not name.endswith(".experts.gate_up_proj"):
            continue
        pair = name, f"{_place(name)}.down_proj"
        gate_up, down = (tensors[one].shape if one in tensors else () for one in pair)
        if len(gate_up) != 3 or len(down) != 3 or _fits(gate_up, down) != to_hub:
            continue
        if gate_up[1] == gate_up[2] or down[1] == down[2]:
            square.append(name)
            continue
        result |= {one: tensors[one].permute(0, 2, 1) for one in pair}
        count += 2
    said = [f"{count} tensors of fused experts turned to (E, in, out), as on the hub"] if count else []
    if square and to_hub:
        said.append(f"square experts keep (E, out, in), which transformers 5 reads as it is: {listed(square, 3)}")
    return result, said


def is_turned(place: str, shapes: Mapping[str, Shape]) -> bool:
    """Whether packed experts are (E, in, out). Raises Mismatch when a layer's two tensors do not fit each other."""
    gate_up, down = shapes.get(f"{place}.gate_up_proj"), shapes.get(f"{place}.down_proj")
    if gate_up is None or down is None or len(gate_up) != 3 or len(down) != 3:
        raise Mismatch(f"{place}: gate_up_proj and down_proj of three dimensions each were expected")
    if 0 not in (*gate_up, *down) and gate_up[0] == down[0]:
        if _fits(gate_up, down):
            return False
        if _fits(_turned(gate_up), _turned(down)):
            return True
    raise Mismatch(f"{place}: gate_up_proj {list(gate_up)} and down_proj {list(down)} are not those of experts")


def is_packed(name: str, tensor: Tensor) -> bool:
    """Whether a tensor holds all experts of a layer."""
    return len(tensor.shape) == 3 and bool(_PACKED.fullmatch(name))


_PACKED = re.compile(r"(?:.+\.)?experts\.(?:gate_up_proj|up_proj|down_proj)")


def _place(name: str) -> str:
    return name.rpartition(".")[0]


def _fits(gate_up: Shape, down: Shape) -> bool:
    """Whether these are (E, 2I, H) and (E, H, I)."""
    return gate_up[1] == 2 * down[2] and gate_up[2] == down[1]


def _turned(shape: Shape) -> Shape:
    return shape[0], shape[2], shape[1]
