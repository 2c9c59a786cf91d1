"""Megatron checkpoints of every layout, opened: the model's tensors under their on-disk keys, and its settings.

    torch_dist     DCP by `torch.distributed.checkpoint` with Megatron's keys: layers stacked or numbered
    fsdp_dtensor   DCP of Megatron-FSDP: `model.` or `model.module.` in front, layers and experts numbered
    zarr           a directory of chunks for each tensor, keys as torch_dist's; see `zarr.py`
    .nemo          NeMo 1's archive of one of these, read where it lies
    legacy         one torch.save file for each rank of the model; see `megatron_legacy.py`

    beside the tensors                    what becomes of it
    optimizer.*, chained_N.optimizer.*    counted, its layout named, left out
    *._extra_state                        of Transformer Engine: FP8 scales at most; counted, left out
    rng_state, rerun_state_machine_state  counted, left out
    common.pt, common_state, args         the settings; kept among the objects

What `tensors` holds is whole, not per rank, and named as on disk: naming is the dialect's business.

Source: Megatron-LM `megatron/core/dist_checkpointing`, core 0.8 to 0.20; Transformer Engine `module/base.py`.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from reshard.core.checkpoint import Checkpoint
from reshard.core.tensor import Tensor
from reshard.errors import NotFound, Unsupported, listed
from reshard.formats import dcp, megatron_legacy, megatron_settings, nemo1, nemo2_context, torch_save, zarr
from reshard.formats.megatron_directory import FSDP_DTENSOR, TORCH_DIST, ZARR, Located, locate
from reshard.formats.megatron_settings import Settings
from reshard.storage.unpickle import Inert, Rebuilt, TensorRef

__all__ = ["NAME", "Located", "MegatronCheckpoint", "Settings", "locate", "open", "open_located"]

NAME = "megatron"

_LEFT_OUT = (
    ("extra_state", re.compile(r".*\._extra_state(?:$|[/.].*)|_extra_state(?:$|[/.].*)")),
    ("optimizer", re.compile(r"(?:chained_\d+\.)?(?:optimizer|optim)(?:$|[./].*)|opt_param_scheduler(?:$|[./].*)")),
    ("rng_state", re.compile(r"(?:rng_state|rerun_state_machine(?:_state)?)(?:$|[./].*)")),
    ("common", re.compile(r"common_state(?:$|[./].*)|args(?:\..*)?|iteration|checkpoint_version|num_floating_point_.*"
                          r"|content_metadata(?:\..*)?")),
)  # fmt: skip
_NUM_EXTRA_STATES = 4
"""Of each kind of module, so many are looked into."""
_MODEL_SECTION = re.compile(r"model\d*\.")
_NUMBERED_LAYER = re.compile(r"(?:^|\.)layers\.\d+\.")
_LAYER = re.compile(r"(?:^|\.)decoder\.layers\.")
_QUANTIZERS = re.compile(r"(?:weight|input|output)_quantizer[._]|\._amax$|\._scale_inv$|\.weight_scale(?:_inv|_2)?$")
_8_BIT = frozenset({"U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F4", "F8_E4M3FNUZ", "F8_E5M2FNUZ"})


@dataclass(frozen=True, slots=True)
class MegatronCheckpoint:
    """A Megatron checkpoint, opened."""

    located: Located
    checkpoint: Checkpoint
    """The model's tensors under on-disk keys, and what is not a tensor and not left out, inert."""
    settings: Settings
    optimizer: str = "none"
    """How the optimizer's state is laid out: `fully_sharded_model_space`, `dp_reshardable`, `fully_reshardable`,
    `dp_zero_gather_scatter`, `plain`, `fsdp_dtensor`, `distrib_optim.pt` or `none`."""
    left_out: Mapping[str, int] = field(default_factory=dict)
    """Entries that are not the model's, by kind: `optimizer`, `extra_state`, `rng_state`."""
    checkpoint_version: float | None = None
    """Megatron-LM's; 3.0 for every model of Megatron-Core."""
    stacked: bool | None = None
    """Whether the decoder's layers are one tensor of each kind; None for models without such layers."""
    core: str = ""
    """The release of Megatron-Core that wrote it, as far as the layout tells."""


def open_located(located: Located, *, verify: bool = False) -> MegatronCheckpoint:
    """The checkpoint, from headers, pickles and settings alone.

    With `verify` copies that several ranks hold are read and compared. Raises Incomplete when shards or chunks are
    missing, Unsupported for weights that are stored quantized.
    """
    _check_whole(located)
    match located.format:
        case "torch_dist" | "fsdp_dtensor":
            opened = _of_dcp(located, verify)
        case "zarr":
            opened = _of_zarr(located)
        case "megatron_legacy":
            opened = _of_rank_files(located, verify)
        case other:
            raise Unsupported(f"{located.weights}: Megatron's {other} is not read")
    _check_unquantized(opened)
    return opened


def open(path: Path, kind: str = "model", *, verify: bool = False) -> Checkpoint:
    """The model's tensors of the Megatron checkpoint at a path. See `open_located` for all that is known of it.

    With the kind `optimizer` its entries instead, of DCP formats, as they are stored.
    """
    located = locate(path)
    if kind == "model":
        return open_located(located, verify=verify).checkpoint
    checkpoint = dcp.open(located.weights, verify=verify, is_wanted=lambda n: kind_of(n, located.format) == "optimizer")
    return checkpoint.select(name for name in checkpoint if kind_of(name, located.format) == "optimizer")


# ---------------------------------------------------------------------------------------------------- DCP and zarr


def _of_dcp(located: Located, verify: bool) -> MegatronCheckpoint:
    names: list[str] = []
    num_looked_at: Counter[str] = Counter()

    def is_wanted(name: str) -> bool:
        names.append(name)
        what = kind_of(name, located.format)
        if what == "extra_state":  # one for every module, layer and expert: the first of each kind tell
            num_looked_at[re.sub(r"\d+", "", name)] += 1
            return num_looked_at[re.sub(r"\d+", "", name)] <= _NUM_EXTRA_STATES
        return what not in ("optimizer", "rng_state")

    checkpoint = dcp.open(located.weights, verify=verify, is_wanted=is_wanted)
    common = _common(located) | _common_of_objects(checkpoint.objects)
    return _of_entries(located, checkpoint, common, names)


def _of_zarr(located: Located) -> MegatronCheckpoint:
    names: list[str] = []

    def is_wanted(name: str) -> bool:
        names.append(name)
        return kind_of(name, ZARR) not in ("optimizer", "rng_state")

    checkpoint = zarr.open(located.weights, is_wanted=is_wanted)
    return _of_entries(located, checkpoint, _common(located), names)


def _of_rank_files(located: Located, verify: bool) -> MegatronCheckpoint:
    stated = _settings(located, {})
    opened = megatron_legacy.open(located, stated=stated if stated.values else None, verify=verify)
    writer = _writer(located, opened.settings, opened.checkpoint)
    checkpoint = replace(opened.checkpoint, origin=replace(opened.checkpoint.origin, writer=writer))
    return MegatronCheckpoint(
        located, checkpoint, opened.settings, opened.optimizer, opened.left_out, opened.checkpoint_version,
        is_stacked(checkpoint),
    )  # fmt: skip


def _of_entries(
    located: Located, checkpoint: Checkpoint, common: Mapping[str, Any], objects: Iterable[str] = ()
) -> MegatronCheckpoint:
    """The model among the entries of a checkpoint; `objects` names those that were not read too."""
    kinds = {name: kind_of(name, located.format) for name in checkpoint.tensors}
    tensors = {name: t for name, t in checkpoint.tensors.items() if kinds[name] == "model"}
    if not tensors:
        raise NotFound(
            f"{located.weights} holds no weights of a model: {listed(sorted(set(kinds.values())))} only",
            hint=f"its weights are in {located.huggingface}" if located.huggingface else "name the model's directory",
        )
    inside = dict.fromkeys([*objects, *checkpoint.objects])
    names = dict.fromkeys([*inside, *(name for name in checkpoint.tensors if checkpoint.path(name)[0] not in inside)])
    left_out = Counter(kind_of(name, located.format) for name in names)
    kept = {n: o for n, o in checkpoint.objects.items() if kind_of(n, located.format) in ("model", "common")}
    version = common.get("checkpoint_version")
    settings = _settings(located, common)
    origin = replace(
        checkpoint.origin,
        format=located.format,
        writer=_writer(located, settings, tensors),
        step=located.iteration if isinstance(located.iteration, int) else _step(common),
    )
    states = {n: o for n, o in checkpoint.objects.items() if _kind(n) == "extra_state"}
    return MegatronCheckpoint(
        located,
        replace(
            checkpoint,
            tensors=tensors,
            objects=kept,
            origin=origin,
            dialect="megatron",
            notices=(*located.notices, *checkpoint.notices, *_scales(states)),
        ),
        settings,
        _optimizer(names, checkpoint.tensors, common, located.format),
        {what: left_out[what] for what in ("optimizer", "extra_state", "rng_state") if left_out[what]},
        float(version) if isinstance(version, int | float) else None,
        is_stacked(tensors),
        _core(located, common, names),
    )


def _kind(name: str) -> str:
    """What an entry of this name is: `model`, `optimizer`, `extra_state`, `rng_state` or `common`."""
    return next((what for what, pattern in _LEFT_OUT if pattern.fullmatch(name)), "model")


def kind_of(name: str, format: str) -> str:
    """`_kind`; fsdp_dtensor says itself what is the model's, by its first name."""
    found = _kind(name)
    if found == "model" and format == FSDP_DTENSOR and not _MODEL_SECTION.match(name):
        return "common"
    return found


def is_stacked(names: Iterable[str]) -> bool | None:
    """Whether the decoder's layers share one tensor of each kind; None when there are no such layers."""
    layers = [name for name in names if _LAYER.search(name)]
    return not any(_NUMBERED_LAYER.search(name) for name in layers) if layers else None


# ------------------------------------------------------------------------------------------------------ common state


def _common(located: Located) -> dict[str, Any]:
    """What common.pt holds."""
    path = located.weights / "common.pt"
    if not path.is_file():
        return {}
    value = torch_save.read(path).value
    return dict(value) if isinstance(value, Mapping) else {}


def _common_of_objects(objects: Mapping[str, Any]) -> dict[str, Any]:
    """What core 0.19 and later keep as a byte entry, and fsdp_dtensor as several."""
    found: dict[str, Any] = {}
    for name, value in objects.items():
        if name.startswith("common_state/"):
            inner = value[0] if isinstance(value, list) and len(value) == 1 else value
            found |= dict(inner) if isinstance(inner, Mapping) else {}
        elif name in ("args", "iteration", "checkpoint_version"):
            found[name] = value
    return found


def _settings(located: Located, common: Mapping[str, Any]) -> Settings:
    """From the file that says most, or from the arguments in the checkpoint."""
    context = located.context if located.context and nemo2_context.describes(located.context) else None
    stated = megatron_settings.first_stated(
        (located.run_config, megatron_settings.of_run_config),
        (context, nemo2_context.settings_of),
        (located.model_config, nemo1.settings_of),
    )
    if stated is not None:
        return stated
    hyper = nemo1.settings_among(common, str(located.weights))
    if hyper is not None:
        return hyper
    if isinstance(common.get("args"), Inert | Mapping):
        return megatron_settings.of_args(common["args"])
    return (
        megatron_settings.first_stated((located.transformer_config, megatron_settings.of_transformer_config))
        or Settings()
    )


def _step(common: Mapping[str, Any]) -> int | None:
    return common["iteration"] if type(common.get("iteration")) is int else None


def _core(located: Located, common: Mapping[str, Any], names: Iterable[str]) -> str:
    if located.format == ZARR:
        return "0.15 or earlier"
    if located.format != TORCH_DIST:
        return ""
    if any(name.startswith("common_state/") for name in names):
        return "0.19 or later"
    return "0.13 to 0.18" if "content_metadata" in common else ""


def _writer(located: Located, settings: Settings, names: Iterable[str]) -> str:
    """Who wrote it; slime is known by its arguments or by the modules that only it has, NeMo by its prefixes."""
    if located.writer != "Megatron-LM":
        return located.writer
    names = list(names)
    if settings.values.get("rollout_function_path") is not None or any(".linear_attn." in name for name in names):
        return "slime"
    first = {name.partition(".")[0] for name in names} if located.format in (TORCH_DIST, ZARR) else set()
    return {"module": "NeMo 2", "model": "NeMo 1"}.get(first.pop(), "Megatron-LM") if len(first) == 1 else "Megatron-LM"


# -------------------------------------------------------------------------------------------------- optimizer, FP8


def _optimizer(names: Iterable[str], tensors: Mapping[str, Tensor], common: Mapping[str, Any], format: str) -> str:
    """How the optimizer's state is laid out, by what the checkpoint says of it or by its keys."""
    states = [name for name in names if re.match(r"(?:chained_\d+\.)?optimizer\b", name)]
    if not states:
        return "plain" if isinstance(common.get("optimizer"), Mapping) and "state" in common["optimizer"] else "none"
    if format == FSDP_DTENSOR:
        return FSDP_DTENSOR
    said = _sharding_type(common)
    if said:
        return said
    if any(".gbuf_idx_" in name for name in states):
        return "dp_reshardable"
    if any(".state.param." in name for name in states):
        return "fully_reshardable"
    reformed = any(_is_reformed(name, tensors) for name in states)
    return "fully_sharded_model_space" if reformed else "plain"


def _sharding_type(common: Mapping[str, Any]) -> str:
    content = common.get("content_metadata")
    said = content.get("distrib_optim_sharding_type") if isinstance(content, Mapping) else None
    queue = [common.get("optimizer")]
    while not isinstance(said, str) and queue:
        item = queue.pop()
        if isinstance(item, Mapping):
            said = item.get("param_state_sharding_type")
            queue += [item[k] for k in item if k == "optimizer" or isinstance(k, int)]
    return said[:60] if isinstance(said, str) else ""


def _is_reformed(name: str, tensors: Mapping[str, Tensor]) -> bool:
    """Whether a state has another shape than its parameter, whose key ends its own."""
    match = re.search(r"\.state\.(?:exp_avg|exp_avg_sq|fp32_param)\.(.+)", name)
    if match is None or name not in tensors or match[1] not in tensors:
        return False
    state, parameter = tensors[name], tensors[match[1]]
    return state.shape != parameter.shape and math.prod(state.shape) >= parameter.size


def _scales(states: Mapping[str, Any]) -> tuple[str, ...]:
    """A sentence when extra states are more than empty: FP8 scaling factors, of no use to whole weights."""
    held = [name for name, value in states.items() if _is_filled(value)]
    what = "extra states of Transformer Engine hold FP8 scales and their history, which are left out: "
    return (what + listed(held, 3),) if held else ()


def _is_filled(value: Any) -> bool:
    """Whether an extra state holds anything: a tensor with elements, or a stream of some length."""
    if isinstance(value, list | tuple):
        return any(map(_is_filled, value))
    if isinstance(value, Mapping):
        return bool(value)
    if isinstance(value, TensorRef):
        return math.prod(value.size) > 0
    if isinstance(value, Rebuilt):
        return True
    if isinstance(value, Inert):  # BytesIO: (content, position, attributes); torch.save(None) is about 1 KiB
        content = value.state[0] if isinstance(value.state, tuple) and value.state else b""
        return isinstance(content, bytes) and len(content) > 2048
    return isinstance(value, bytes) and len(value) > 2048


def _check_whole(located: Located) -> None:
    """Raise Unsupported where NeMo 2 kept an adapter's weights alone."""
    path = located.weights / "adapter_metadata.json"
    if path.is_file():
        raise Unsupported(
            f"{located.weights} holds an adapter's weights alone: {path.name} names the model that it was trained on",
            hint="merge the adapter into that model with NeMo (llm.peft.merge_lora), and convert the result",
        )


def _check_unquantized(opened: MegatronCheckpoint) -> None:
    """Raise Unsupported, naming them, when weights are stored in 8 bits or less, or with quantizers beside them."""
    checkpoint, where = opened.checkpoint, opened.located.weights
    packed = [
        name for name, tensor in checkpoint.tensors.items() if tensor.dtype.name in _8_BIT or _QUANTIZERS.search(name)
    ]
    packed += [name for name, value in checkpoint.objects.items() if isinstance(value, Rebuilt)]
    if packed:
        raise Unsupported(
            f"{where}: weights are stored quantized: {listed(packed)}",
            hint="save the checkpoint again with weights of 16 or 32 bits (without --fp8-param-gather)",
        )
    if (where / "modelopt_state").is_dir():
        raise Unsupported(
            f"{where / 'modelopt_state'}: the model was changed by ModelOpt (quantized, pruned or distilled)",
            hint="export it with ModelOpt: the weights alone are not the model that it made",
        )
