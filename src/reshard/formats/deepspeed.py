"""DeepSpeed checkpoints: ZeRO 0 to 3, universal checkpoints, pipeline layers and experts.

    latest                                                  text: the name of the newest tag
    TAG/                                                    global_stepN, pytorch_model (accelerate), or any name
    ├─ mp_rank_MM_model_states.pt                           ZeRO 0 to 2: `module`, the state dict as it was trained
    ├─ zero_pp_rank_R_mp_rank_MM_model_states.pt            ZeRO 3: its parameters are empty; one a rank
    ├─ [bf16_]zero_pp_rank_R_mp_rank_MM_optim_states.pt     the fp32 weights and optimizer states of rank R, flat
    ├─ layer_LL[-model_MM]-model_states.pt                  pipeline: the state dict of one layer
    └─ layer_L_expert_E_mp_rank_MM_model_states.pt          mixture of experts: one expert, by full FQNs
    TAG_universal/
    ├─ mp_rank_00_model_states.pt                           a copy; for ZeRO 3 zero_pp_rank_0_mp_rank_00_...
    └─ zero/FQN/{fp32,exp_avg,exp_avg_sq,step}.pt           {"param": tensor, ...}, or a bare tensor

What is trained is kept twice: in 16 bits in `module`, and in float32 by the optimizer. The model is the second.
What is not trained is taken from `module`: buffers and, where there are no `frozen_param_fragments`, frozen parameters.
`shared_params` names what is tied.

    deepspeed_directory     which files there are
    deepspeed_states        what one of them says
    deepspeed_partitions    parameters out of flat tensors
    deepspeed_trained       the optimizer's weights and states, from its partitions; deepspeed_universal, whole
    deepspeed_model         which of them the model is made of

Source: DeepSpeed `runtime/engine.py`, `runtime/zero/{stage_1_and_2,stage3}.py`, `runtime/pipe/module.py`,
`utils/zero_to_fp32.py` and `checkpoint/ds_to_universal.py`, 0.9 to 0.19.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from reshard.core.checkpoint import Checkpoint, KeyPath, Origin
from reshard.errors import Corrupt, Incomplete, NotFound, Unsupported, listed
from reshard.formats.deepspeed_directory import (
    COPY_AGAIN,
    Listing,
    check_ranks,
    in_order,
    lacking,
    refuse_tensor_parallel,
)
from reshard.formats.deepspeed_model import model_of
from reshard.formats.deepspeed_states import ModelStates, count_of, dict_of, read
from reshard.formats.deepspeed_trained import Trained, from_partitions
from reshard.formats.deepspeed_universal import whole
from reshard.formats.torch_save import File, Leaves
from reshard.formats.torch_tensor import fqn, walk
from reshard.storage.files import Files, LazySource

NAME = "deepspeed"
_HANDLED = ("module", "buffer_names", "param_shapes", "frozen_param_shapes", "frozen_param_fragments", "shared_params")
"""Keys of a model_states file whose values the model is made of."""


def open(path: Path) -> Checkpoint:
    """The checkpoint in the directory of a tag or a universal checkpoint; pickles are read, storages are not.

    The model has float32 weights where ZeRO keeps them. Optimizer states are under `optimizer.state.FQN.KEY`. Raises
    Incomplete naming the files of ranks that are missing or too many, Corrupt when flat weights and shapes do not fit,
    Unsupported for tensor parallelism.
    """
    if not path.is_dir():
        path = path.parent
    listing = Listing.of(path)
    files = Files()
    if listing.universal:
        return _open_universal(path, listing, files)
    if listing.layers or listing.experts:
        return _open_parts(path, listing, files)
    return _open_partitions(path, listing, files)


def _open_partitions(path: Path, listing: Listing, files: Files) -> Checkpoint:
    """One state dict, and with ZeRO the optimizer's partitions of it."""
    if not listing.model:
        if listing.optim:
            raise Incomplete(f"{path}: {len(listing.optim)} optim_states and no model_states files", hint=COPY_AGAIN)
        raise NotFound(f"{path}: no files of DeepSpeed")
    refuse_tensor_parallel(path, listing)
    models = _models(path, listing, files)
    if not listing.optim and (models[0].groups or listing.zero3_ranks):
        raise Incomplete(
            f"{path}: the fp32 weights are missing: no *_optim_states.pt, and {models[0].file.path.name} is of ZeRO",
            hint=COPY_AGAIN,
        )
    trained = from_partitions(path, listing, models[0], files) if listing.optim else Trained()
    if trained.is_stage3 and trained.num_ranks is not None:
        check_ranks(path, models[0].file.path.name, listing.zero3_ranks, trained.num_ranks)
    notices = []
    optimizer = models[0].get("optimizer")
    if not listing.optim and isinstance(optimizer, dict) and "fp32_groups_flat" in optimizer:
        notices = [f"{path}: without ZeRO the fp32 weights are not rebuilt; these are as they were trained"]
    return _checkpoint(path, models, trained, files, model_of(models, trained), notices)


def _models(path: Path, listing: Listing, files: Files) -> list[ModelStates]:
    """The model_states files by rank: one for ZeRO 0 to 2."""
    if listing.zero3_ranks and any(rank is None for rank, _ in listing.model):
        raise Corrupt(
            f"{path}: model_states files of ZeRO 3 and of a lower stage: {listed(sorted(listing.model.values()))}",
            hint="two saves went into one directory: move the files of one away",
        )
    return [ModelStates.of(file) for file in read(path, in_order(listing.model), files)]


def _open_universal(path: Path, listing: Listing, files: Files) -> Checkpoint:
    models = _models(path, listing, files) if listing.model else []
    shapes = {name: shape for model in models for name, shape in model.shapes.items()}
    trained = whole(path, shapes, files)
    if listing.mp_ranks != [0]:
        there = (
            f"there are model_states of {len(listing.mp_ranks)} model-parallel ranks" if models else "there are none"
        )
        notice = f"{path}: buffers and frozen parameters are not read, which model_states files hold: {there}"
        return _checkpoint(path, models, trained, files, Leaves(dict(trained.weights)), [notice])
    trained.is_stage3 = bool(listing.zero3_ranks)
    if trained.is_stage3 and models[0].frozen_shapes:
        count = count_of(models[0].get("dp_world_size")) or len(listing.zero3_ranks)
        check_ranks(path, models[0].file.path.name, listing.zero3_ranks, count)
    return _checkpoint(path, models, trained, files, model_of(models, trained))


def _open_parts(path: Path, listing: Listing, files: Files) -> Checkpoint:
    """Pipeline layers and experts: every weight as it was trained, from the files that hold it."""
    models = [ModelStates.of(file) for file in read(path, in_order(listing.model), files)]
    if not models:
        raise Incomplete(f"{path}: no mp_rank_00_model_states.pt beside {listed(listing.names)}", hint=COPY_AGAIN)
    leaves = Leaves()
    for layer, names in listing.layers.items():
        if len(names) > 1:
            raise Unsupported(
                f"{path} is a tensor-parallel pipeline: layer {layer} is in {listed(names)}, and how they join is not"
                " stored",
                hint="convert it to a universal checkpoint with DeepSpeed's ds_to_universal first",
            )
        for file in read(path, names, files):
            _add_all(leaves, file, file.value, f"{layer}.")
    _check_layers(path, models, leaves)
    if listing.experts:
        refuse_tensor_parallel(path, listing)
        _check_experts(path, listing, models[0])
        _add_all(leaves, models[0].file, models[0].module, "")
        for file in read(path, listing.experts.values(), files):
            _add_all(leaves, file, file.value, "")
    notices = []
    if listing.optim or listing.expert_optim:
        what = "pipeline" if listing.layers else "mixture-of-experts"
        notices = [f"{path}: the fp32 weights of a {what} checkpoint are not rebuilt; these are as they were trained"]
    trained = Trained(files=[path / name for name in listing.names if name not in listing.model.values()])
    return _checkpoint(path, models, trained, files, leaves, notices)


def _add_all(leaves: Leaves, file: File, state: Any, prefix: str) -> None:
    for name, leaf in dict_of(file, state, "the state dict").items():
        leaves.add(file, (prefix + name,), leaf)


def _check_layers(path: Path, models: Sequence[ModelStates], leaves: Leaves) -> None:
    """Raise Incomplete when a trained parameter is in no layer. What layers tie has a name of its own."""
    layers = {name.partition(".")[0] for name in leaves.tensors}
    expected = [name for model in models for name in model.shapes if re.match(r"\d+\.", name)]
    missing = [name for name in expected if name not in leaves.tensors]
    if missing and layers:
        raise Incomplete(f"{path}: no layer file has {listed(missing)}", hint=COPY_AGAIN)


def _check_experts(path: Path, listing: Listing, model: ModelStates) -> None:
    if model.get("ds_autoep_layers") or model.get("autoep_layers"):
        raise Unsupported(f"{path}: the experts were cut out of fused tensors by AutoEP, which is not read")
    stated = model.get("num_experts")
    stated = stated if isinstance(stated, list | tuple) else []
    for layer in range(max(len(stated), 1 + max(layer for layer, _ in listing.experts))):
        here = {expert for number, expert in listing.experts if number == layer}
        count = max([stated[layer]] if layer < len(stated) and type(stated[layer]) is int else [], default=0)
        missing = lacking(here, max(count, max(here, default=-1) + 1))
        if missing or not here:
            what = f"experts {listed(map(str, missing))}" if missing else "all experts"
            raise Incomplete(f"{path}: {what} of layer {layer} are missing", hint=COPY_AGAIN)


def _checkpoint(
    path: Path,
    models: Sequence[ModelStates],
    trained: Trained,
    files: Files,
    leaves: Leaves,
    notices: Sequence[str] = (),
) -> Checkpoint:
    for (name, key), tensor in trained.states.items():
        where: KeyPath = ("optimizer", "state", name, key)
        leaves.tensors[fqn(where)], leaves.paths[fqn(where)] = tensor, where
    for where, value in trained.objects.items():
        leaves.objects[fqn(where)], leaves.paths[fqn(where)] = value, where
    for model in models[:1]:
        for where, leaf in _rest(model):
            leaves.add(model.file, where, leaf)
    left_out = [f"optimizer states that are not cut as the weights are, left out: {listed(trained.left_out)}"]
    return Checkpoint(
        leaves.tensors,
        Origin(
            path,
            NAME,
            " ".join(["DeepSpeed", *(str(v) for v in [models[0].get("ds_version") if models else None] if v)]),
            step=count_of(models[0].get("global_steps")) if models else None,
            world_size=trained.num_ranks,
            placements=(f"{trained.placement} ({len(trained.weights)} tensors)",) if trained.placement else (),
            files=tuple(dict.fromkeys([*(model.file.path for model in models), *trained.files])),
        ),
        LazySource(files),
        objects=leaves.objects,
        paths=leaves.paths,
        notices=(*notices, *leaves.notices, *(left_out if trained.left_out else ())),
    )


def _rest(model: ModelStates) -> Iterator[tuple[KeyPath, Any]]:
    """What else a model_states file holds: the optimizer without ZeRO, schedulers, counters, the caller's own."""
    for key, value in model.file.value.items():
        if key == "optimizer" and value is not None:
            yield from walk(value, ("optimizer",))
        elif key not in (*_HANDLED, "optimizer"):
            yield from walk(value, ("extra_state", str(key)))
