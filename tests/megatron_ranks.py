"""Ranks of Megatron-Core on a CPU: its own model classes load what was written, cut as a real run would cut it.

`on_ranks(function, *args, tensor=2)` calls a function of a module on each of two gloo processes, with Megatron's
parallel state set up, and gives their results in the order of the ranks. Megatron is imported in those processes only:
its warnings stay there.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

TIMEOUT_S = 120

Chunk = tuple[str, tuple[int, ...], tuple[int, ...], torch.Tensor]
"""(name on disk, shape of the whole, offset in it, data): what one rank holds of one tensor."""


def on_ranks(
    function: Callable[..., Any],
    *args: Any,
    tensor: int = 1,
    pipeline: int = 1,
    expert: int = 1,
    num_ranks: int | None = None,
    has_megatron: bool = True,
) -> list[Any]:
    """What `function(*args)` returns on each rank. It must be a module's own, and so must all that it returns.

    Without Megatron they are ranks of torch alone, which takes a few seconds less.

    Raises AssertionError with the traceback of the first rank that failed.
    """
    num_ranks = num_ranks or tensor * pipeline * expert
    with tempfile.TemporaryDirectory() as folder:
        shape = (num_ranks, tensor, pipeline, expert) if has_megatron else (num_ranks,)
        spawn = multiprocessing.get_context("spawn")
        processes = [
            spawn.Process(target=_rank, args=(Path(folder), rank, shape, function, args)) for rank in range(num_ranks)
        ]
        for process in processes:
            process.start()
        deadline = time.monotonic() + TIMEOUT_S
        for process in processes:
            process.join(max(deadline - time.monotonic(), 0))
        for process in processes:
            process.kill()
            process.join()
        results = [_result(Path(folder) / f"{rank}.pt") for rank in range(num_ranks)]
    failed = [text for text, _ in results if text]
    assert not failed, failed[0]
    return [value for _, value in results]


def _result(path: Path) -> tuple[str, Any]:
    if not path.exists():
        return f"rank {path.stem} left no result", None
    result: tuple[str, Any] = torch.load(path, weights_only=False)
    return result


def _rank(folder: Path, rank: int, shape: tuple[int, ...], function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    """One rank, from its first line to its last: gloo's threads now and then abort a process that tears them down."""
    warnings.simplefilter("ignore")  # Megatron misses what only GPUs have, and torch's DCP its future
    try:
        _join(folder / "store", rank, shape[0])
        if len(shape) > 1:
            _set_up_megatron(*shape[1:])
        result: tuple[str, Any] = "", function(*args)
    except BaseException:  # Megatron's CheckpointException is no Exception
        result = f"rank {rank}:\n{traceback.format_exc()}", None
    part = folder / f"{rank}.part"
    torch.save(result, part)
    part.rename(folder / f"{rank}.pt")
    if not result[0]:
        torch.distributed.barrier()
    os._exit(0)


def _join(store: Path, rank: int, num_ranks: int) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=num_ranks, timeout=timedelta(seconds=TIMEOUT_S)
    )


def _set_up_megatron(tensor: int, pipeline: int, expert: int) -> None:
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
        expert_model_parallel_size=expert,
    )


# --------------------------------------------------------------------------------------------- in the ranks' processes


def gpt_model(*, vocab_size: int = 64, tied: bool = False, **settings: Any) -> Any:
    """This rank's part of a small GPTModel on the CPU, without Transformer Engine.

    `settings` are those of TransformerConfig; the model is a small Llama without them. On disk it goes by the names of
    Transformer Engine's models, which a local MoE layer would not.
    """
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
    from megatron.core.transformer import TransformerConfig

    config = TransformerConfig(
        **{
            "num_layers": 2,
            "hidden_size": 32,
            "num_attention_heads": 4,
            "num_query_groups": 2,
            "kv_channels": 8,
            "ffn_hidden_size": 64,
            "gated_linear_unit": True,
            "activation_func": torch.nn.functional.silu,
            "add_bias_linear": False,
            "normalization": "RMSNorm",
            "use_cpu_initialization": True,
            "params_dtype": torch.bfloat16,
            "bf16": True,
            "pipeline_dtype": torch.bfloat16,
            "tensor_model_parallel_size": parallel_state.get_tensor_model_parallel_world_size(),
            "pipeline_model_parallel_size": parallel_state.get_pipeline_model_parallel_world_size(),
            "expert_model_parallel_size": parallel_state.get_expert_model_parallel_world_size(),
            **settings,
        }
    )
    spec = get_gpt_decoder_block_spec(config, use_transformer_engine=False, normalization=config.normalization)
    for layer in spec.layer_specs:
        names = layer.submodules.sharded_state_dict_keys_map
        if "MoELayer" in str(layer.submodules.mlp):
            names.pop("pre_mlp_layernorm.", None)
    return GPTModel(
        config,
        spec,
        vocab_size=vocab_size,
        max_sequence_length=16,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=tied,
        position_embedding_type="rope",
    )


def sharded_state_dict(model: Any, *, stacked: bool = True) -> dict[str, Any]:
    """What Megatron loads into this rank's part of a model; `stacked` where layers that are alike share a key."""
    metadata = {"singleton_local_shards": False, "chained_optim_avoid_prefix": True}
    found: dict[str, Any] = model.sharded_state_dict(
        metadata=metadata | ({} if stacked else {"non_homogeneous_layers": True})
    )
    return found


def shapes_on_disk(settings: Mapping[str, Any], stacked: bool = True) -> dict[str, tuple[int, ...]]:
    """The names and shapes under which Megatron itself stores a model. To be called on one rank."""
    return {name: shape for name, shape, _, _ in _chunks(gpt_model(**settings), stacked)}


def loaded(directory: Path, settings: Mapping[str, Any], stacked: bool = True) -> list[Chunk]:
    """What this rank's part of a model holds once Megatron has loaded a torch_dist directory into it."""
    from megatron.core import dist_checkpointing

    model = gpt_model(**settings)
    wanted = sharded_state_dict(model, stacked=stacked)
    names = list(wanted)
    found = dist_checkpointing.load(wanted, str(directory))  # with what common.pt holds beside them
    model.load_state_dict({name: found[name] for name in names})
    return _chunks(model, stacked)


def _chunks(model: Any, stacked: bool) -> list[Chunk]:
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

    state = sharded_state_dict(model, stacked=stacked)
    apply_factories(state)
    tensors = [item for item in nested_values(state) if isinstance(item, ShardedTensor)]
    return [(t.key, tuple(t.global_shape), tuple(t.global_offset), t.data.detach().clone()) for t in tensors]


# --------------------------------------------------------------------------------------------------- back in the test


def whole(ranks: Iterable[list[Chunk]]) -> dict[str, torch.Tensor]:
    """The tensors that all ranks hold together. Raises AssertionError where two disagree, or none has an element."""
    tensors: dict[str, torch.Tensor] = {}
    filled: dict[str, torch.Tensor] = {}
    for name, shape, offset, data in (chunk for chunks in ranks for chunk in chunks):
        sizes = (1,) * (len(shape) - data.ndim) + tuple(data.shape)  # of layers and experts it is one
        place = tuple(slice(o, o + n) for o, n in zip(offset, sizes, strict=True))
        tensor = tensors.setdefault(name, torch.zeros(shape, dtype=data.dtype))
        known = filled.setdefault(name, torch.zeros(shape, dtype=torch.bool))
        assert torch.equal(tensor[place][known[place]], data.reshape(sizes)[known[place]]), f"copies of {name} differ"
        tensor[place], known[place] = data.reshape(sizes), True
    assert [name for name, known in filled.items() if not known.all()] == []
    return tensors
