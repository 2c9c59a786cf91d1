"""What Megatron's formats and releases make of a tensor's name, in one place.

Megatron's modules have a tensor for each layer and expert. On disk that is

                  torch_dist, zarr                                    fsdp_dtensor
    layers        alike: decoder.layers.mlp.linear_fc2.weight (L, ..)  decoder.layers.3.mlp.linear_fc2.weight
                  else: decoder.layers.3.mlp...
    experts       mlp.experts.experts.linear_fc2.weight (L, E, ..)     mlp.experts.linear_fc2.weight7
    gate and up   mlp.linear_fc1.weight                                mlp.linear_fc1.weight_w, ..._v
    GDN, Mamba    in_proj.weight.query, .key, ...                      the same (Megatron-Bridge), or whole (-LM)
    MTP           mtp.layers.0.transformer_layer                       that, or mtp.layers.0.mtp_model_layer
    prefix        none; NeMo: module. or model.                        model.module. or model.

`on_disk` makes such names, `in_memory` undoes them, whichever of them it meets. Read off checkpoints that Megatron-LM
0.8 to 0.20, Megatron-Bridge and NeMo wrote.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from reshard.core.compute import alike
from reshard.core.tensor import Tensor, concat, stack
from reshard.dialects.apply import Named
from reshard.dialects.fuse import Glu, InterleavedGlu, Sizes
from reshard.dialects.table import split_parts
from reshard.errors import Corrupt, Incomplete, Mismatch, listed


@dataclass(frozen=True, slots=True)
class Layout:
    """How a format names and groups the tensors of a model."""

    prefixes: tuple[str, ...] = ("",)
    """Every tensor is written once under each."""
    stacked: bool = True
    """Whether layers that are alike share one tensor, and experts too."""
    halves: bool = False
    """Whether gate and up are tensors of their own."""
    split_parts: tuple[bool, ...] = (True,)
    """Whether projections of several kinds are split into their parts; both for readers of either kind."""
    mtp: tuple[str, ...] = ("transformer_layer",)
    """What the block of a multi-token-prediction layer is called."""


TORCH_DIST = Layout()


# -------------------------------------------------------------------------------------------------------- writing


def on_disk(model: Mapping[str, Named], layout: Layout, sizes: Sizes, *, stack_layers: bool) -> dict[str, Tensor]:
    """Tensors under the names that a format has for them.

    `stack_layers` says whether the decoder's layers are alike; those of a vision model always are.
    """
    tensors: dict[str, Tensor] = {}
    for name, named in model.items():
        for key, tensor in _pieces(name, named, layout, sizes):
            tensors[key] = tensor
    if layout.stacked:
        tensors = _gathered(tensors, _place_of_expert)
        tensors = _gathered(tensors, _place_of_layer if stack_layers else _place_of_vision_layer)
    return {prefix + key: tensor for prefix in layout.prefixes for key, tensor in tensors.items()}


def _pieces(name: str, named: Named, layout: Layout, sizes: Sizes) -> Iterable[tuple[str, Tensor]]:
    row, tensor = named.entry.row, named.tensor
    for key in dict.fromkeys(name.replace(".transformer_layer.", f".{inner}.", 1) for inner in layout.mtp):
        if layout.halves and isinstance(row.fuse, Glu | InterleavedGlu):
            half = tensor.shape[0] // 2
            yield f"{key}_w", tensor[:half]
            yield f"{key}_v", tensor[half:]
        elif row.parts:
            for split in layout.split_parts:
                if split:
                    parts = split_parts(row).split(tensor, sizes)
                    yield from ((f"{key}.{part}", piece) for (part, _), piece in zip(row.parts, parts, strict=True))
                else:
                    yield key, tensor
        else:
            yield key, tensor


_EXPERT = re.compile(r"(?P<path>.+\.experts)\.(?P<linear>linear_fc[12])\.(?P<kind>weight|bias)(?P<expert>\d+)")
_LAYER = re.compile(r"(?P<path>(?:.+\.)?(?:decoder\.layers|deepstack_merger_list))\.(?P<layer>\d+)\.(?P<rest>.+)")


def _place_of_expert(name: str) -> tuple[str, int] | None:
    match = _EXPERT.fullmatch(name)
    return match and (f"{match['path']}.experts.{match['linear']}.{match['kind']}", int(match["expert"]))


def _place_of_layer(name: str) -> tuple[str, int] | None:
    match = _LAYER.fullmatch(name)
    return match and (f"{match['path']}.{match['rest']}", int(match["layer"]))


def _place_of_vision_layer(name: str) -> tuple[str, int] | None:
    return _place_of_layer(name) if name.startswith("vision_model.") else None


def _gathered(tensors: Mapping[str, Tensor], place_of: Callable[[str], tuple[str, int] | None]) -> dict[str, Tensor]:
    """Tensors that have a place, a name and a number, stacked under that name; the others as they are."""
    result: dict[str, Tensor | None] = {}
    groups: dict[str, dict[int, Tensor]] = {}
    for name, tensor in tensors.items():
        place = place_of(name)
        if place is None:
            result[name] = tensor
            continue
        key, number = place
        result.setdefault(key, None)
        groups.setdefault(key, {})[number] = tensor
    return {n: _stacked(n, groups[n]) if t is None else t for n, t in result.items()}


def _stacked(name: str, numbered: Mapping[int, Tensor]) -> Tensor:
    try:
        return stack(alike(_in_order(name, numbered)))
    except Corrupt as error:
        raise Mismatch(f"{name}, one tensor of all layers or experts: {error}") from error


def _in_order(name: str, numbered: Mapping[int, Tensor]) -> list[Tensor]:
    if sorted(numbered) != list(range(len(numbered))):
        raise Incomplete(f"{name}: there are numbers {listed(map(str, sorted(numbered)))} only")
    return [numbered[i] for i in range(len(numbered))]


# -------------------------------------------------------------------------------------------------------- reading


@dataclass(frozen=True, slots=True)
class InMemory:
    """Tensors under the names of Megatron's modules."""

    tensors: Mapping[str, Tensor]
    twins: tuple[tuple[str, Tensor, Tensor], ...] = field(default=())
    """Tensors that are there twice, under two prefixes or names: (name, one, other). They must hold the same."""


_PREFIX = re.compile(r"(?:(?:model|module)\.)+")
_HALF = re.compile(r"(?P<name>.+\.linear_fc1\.(?:weight|bias)\d*)_(?P<half>[wv])")
_PART = re.compile(
    r"(?P<name>.+\.(?:in_proj|conv1d)\.(?:weight|bias))\.(?P<part>query|key|value|z|x|B|C|beta|alpha|dt)"
)
_STACKED_LAYERS = re.compile(r"(?P<path>(?:.+\.)?(?:decoder\.layers|deepstack_merger_list))\.(?P<rest>(?!\d).+)")
_STACKED_EXPERTS = re.compile(r"(?P<path>.+\.experts)\.experts\.(?P<rest>linear_fc[12]\.(?:weight|bias))")
_LOCAL_EXPERT = re.compile(
    # `experts` where Megatron was told to give each expert and each half a key of its own
    r"(?P<path>.+\.experts)\.(?:local_)?experts\.(?P<expert>\d+)\.(?P<rest>linear_fc[12]\.(?:weight|bias))(?P<half>(?:_[wv])?)"
)


def in_memory(tensors: Mapping[str, Tensor]) -> InMemory:
    """Tensors as Megatron's modules name them, from whatever a format or release made of the names.

    Raises Corrupt for what a writer is known to have damaged, Incomplete for half a pair.
    """
    plain: dict[str, Tensor] = {}
    twins = []
    for key, tensor in tensors.items():
        name = _PREFIX.sub("", key, count=1) if _PREFIX.match(key) else key
        name = name.replace(".mtp_model_layer.", ".transformer_layer.", 1)
        for single, piece in _singles(name, tensor):
            if single in plain:
                twins.append((single, plain[single], piece))
            else:
                plain[single] = piece
    halves = _joined_halves(plain)
    parts, more = _joined_parts(halves)
    return InMemory(parts, (*twins, *more))


def _singles(name: str, tensor: Tensor) -> Iterable[tuple[str, Tensor]]:
    """The tensors of single layers and experts."""
    match = _STACKED_LAYERS.fullmatch(name)
    if match is not None:
        for layer in range(tensor.shape[0] if tensor.shape else 0):
            yield from _singles(f"{match['path']}.{layer}.{match['rest']}", tensor[layer])
        return
    match = _STACKED_EXPERTS.fullmatch(name)
    if match is not None:
        for expert in range(tensor.shape[0] if tensor.shape else 0):
            yield f"{match['path']}.{match['rest']}{expert}", tensor[expert]
        return
    match = _LOCAL_EXPERT.fullmatch(name)
    if match is not None:
        yield f"{match['path']}.{match['rest']}{match['expert']}{match['half']}", tensor
        return
    yield name, tensor


def _joined_halves(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    result: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        match = _HALF.fullmatch(name)
        if match is None:
            result[name] = tensor
        elif match["half"] == "w":
            other = tensors.get(f"{match['name']}_v")
            if other is None:
                raise Incomplete(f"{name} is there without its other half, {match['name']}_v")
            if tensor.shape != other.shape:
                raise Corrupt(f"{name} is {list(tensor.shape)} and {match['name']}_v {list(other.shape)}")
            result[match["name"]] = concat([tensor, other], 0)
        elif f"{match['name']}_w" not in tensors:
            raise Incomplete(f"{name} is there without its other half, {match['name']}_w")
    return result


def _joined_parts(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[tuple[str, Tensor, Tensor]]]:
    result: dict[str, Tensor] = {}
    groups: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        match = _PART.fullmatch(name)
        if match is None:
            result[name] = tensor
        else:
            groups.setdefault(match["name"], {})[match["part"]] = tensor
    twins = []
    for name, parts in groups.items():
        whole = concat([parts[part] for part in _part_order(name, parts)], 0)
        if name in result:
            if result[name].shape != whole.shape:
                raise Mismatch(f"{name} is there whole and in parts, of shapes {result[name].shape} and {whole.shape}")
            twins.append((name, result[name], whole))
        else:
            result[name] = whole
    return result, twins


_PARTS_OF = {
    ("in_proj", "z"): ("z", "x", "B", "C", "dt"),
    ("in_proj", "query"): ("query", "key", "value", "z", "beta", "alpha"),
    ("conv1d", "query"): ("query", "key", "value"),
    ("conv1d", "x"): ("x", "B", "C"),
}


def _part_order(name: str, parts: Mapping[str, Tensor]) -> tuple[str, ...]:
    """The parts of a projection in the order in which Megatron's module holds them."""
    module = name.split(".")[-2]
    order = _PARTS_OF[module, "query" if "query" in parts else "z" if module == "in_proj" else "x"]
    missing = [part for part in order if part not in parts]
    if missing or len(parts) != len(order):
        raise Incomplete(f"{name}: of its parts there are {listed(parts)}, {listed(order)} expected")
    return order
