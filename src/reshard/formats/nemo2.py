"""NeMo 2's directories, written; `megatron.py` reads the weights again and `nemo2_context.py` what lies beside them.

    DIR/weights/.metadata, __0_0.distcp   a DCP as `torch_dist.py` has it, every name behind `module.`
    DIR/weights/metadata.json             that this is `torch_dist`
    DIR/weights/common.pt                 the counters of a run that has not begun
    DIR/context/io.json, model.yaml       what the model is
    DIR/context/tokenizer.model           or nemo_tokenizer/, under the name that io.json has for it
    DIR/context/artifacts/                generation_config.json

NeMo demands an extra state of every module that its release of Transformer Engine gives one, and leaves others alone.
`[None]` under all of these names is what releases from 1.7 to 2.5 take.

Source: NeMo `lightning/io/pl.py`, `lightning/ckpt_utils.py`, 2.0 to 2.6; Megatron-LM
`megatron/core/transformer/transformer_layer.py`, core_v0.8.0 to core_v0.15.0.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping

from reshard.core.tensor import Tensor
from reshard.formats import dcp_write, torch_dist
from reshard.formats.dcp_write import ByteItem
from reshard.formats.torch_archive import file_of
from reshard.storage.plan import FilePlan, Segment

PREFIX = "module."
WEIGHTS, CONTEXT = "weights", "context"

_COMMON = {
    "epoch": 0,
    "global_step": 0,
    # Lightning asks for it before it goes on with a run
    "pytorch-lightning_version": "2.4.0",
    "state_dict": {},
    "callbacks": {},
    "optimizer_states": [],
    "lr_schedulers": [],
}
_NOTHING = ByteItem([None])
_CORE = ".core_attention._extra_state/"


def plan(
    tensors: Mapping[str, Tensor],
    *,
    io: str,
    model_yaml: str,
    files: Mapping[str, Tensor],
    max_file_nbytes: int | None = None,
) -> tuple[FilePlan, ...]:
    """The files of a directory that NeMo 2 restores.

    Args:
        tensors: By Megatron's names on disk, each whole, without a prefix.
        io: The text of io.json.
        model_yaml: The text of model.yaml.
        files: To be carried byte for byte, by their names in `context`.
        max_file_nbytes: See `dcp_write.plan`.
    """
    entries: dict[str, Tensor | ByteItem] = {PREFIX + name: tensor for name, tensor in tensors.items()}
    entries |= dict.fromkeys((PREFIX + key for key in extra_state_keys(tensors)), _NOTHING)
    texts = {"io.json": io, "model.yaml": model_yaml}
    return (
        *dcp_write.plan(entries, directory=WEIGHTS, max_file_nbytes=max_file_nbytes),
        FilePlan(f"{WEIGHTS}/{torch_dist.CONFIG}", (Segment(json.dumps(torch_dist.CONFIG_JSON).encode()),)),
        file_of(f"{WEIGHTS}/{torch_dist.COMMON}", dict(_COMMON)),
        *(FilePlan(f"{CONTEXT}/{name}", (Segment(text.encode()),)) for name, text in texts.items()),
        *(FilePlan(f"{CONTEXT}/{name}", (Segment(data),)) for name, data in sorted(files.items())),
    )


def extra_state_keys(tensors: Mapping[str, Tensor]) -> Iterator[str]:
    """The names that any release asks for; Transformer Engine 1.6 and 1.7 have the attention's one level deeper."""
    for key in torch_dist.extra_state_keys(tensors):
        yield key
        if _CORE in key:
            yield key.replace(_CORE, ".core_attention.fused_attention._extra_state/")
