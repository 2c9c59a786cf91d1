"""The parameters of a universal checkpoint: a directory each, whole, with a file for each kind of state.

TAG_universal/zero/FQN/{fp32,exp_avg,exp_avg_sq,step}.pt       {"param": tensor, ...}, or a bare tensor
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path

from reshard.core.box import Shape
from reshard.core.tensor import Tensor, squeeze
from reshard.errors import Corrupt, Incomplete, listed
from reshard.formats.deepspeed_directory import FP32, UNIVERSAL
from reshard.formats.deepspeed_states import read, tensor_of
from reshard.formats.deepspeed_trained import Trained
from reshard.formats.torch_distributed import plain_tensor
from reshard.formats.torch_save import File
from reshard.storage.files import Files
from reshard.storage.unpickle import TensorRef


def whole(path: Path, shapes: Mapping[str, Shape], files: Files) -> Trained:
    """The parameters of a universal checkpoint. `shapes` are those of `param_shapes`, which flat tensors get."""
    zero = path / UNIVERSAL
    found = Trained()
    names = [name for name in sorted(os.listdir(zero)) if (zero / name).is_dir()]
    missing = [name for name in shapes if name not in names]
    missing += [name for name in names if not (zero / name / f"{FP32}.pt").is_file()]
    if missing:
        raise Incomplete(f"{zero}: no {FP32}.pt of {listed(missing)}", hint="convert the checkpoint again")
    for name in [*(n for n in shapes if n in names), *(n for n in names if n not in shapes)]:
        for file in read(zero / name, sorted(n for n in os.listdir(zero / name) if n.endswith(".pt")), files):
            found.files.append(file.path)
            key = file.path.stem
            value = file.value.get("param") if isinstance(file.value, dict) else file.value
            if key != FP32 and not isinstance(value, TensorRef) and plain_tensor(value) is None:
                found.objects["optimizer", "state", name, key] = value
                continue
            tensor = tensor_of(file, value, "the parameter")
            if tensor.shape:
                tensor = _shaped(file, tensor, name, shapes.get(name), flat=not isinstance(file.value, dict))
            if key == FP32:
                found.weights[name] = tensor
            else:
                found.states[name, key] = tensor
    return found


def _shaped(file: File, tensor: Tensor, name: str, shape: Shape | None, *, flat: bool) -> Tensor:
    """A parameter in its shape: conversions from ZeRO 3 store it flat, others as it is."""
    if not flat:
        return tensor
    if shape is None:
        raise Incomplete(
            f"{file.path}: {name} is stored flat, and no model_states file says its shape",
            hint="copy zero_pp_rank_0_mp_rank_00_model_states.pt from the checkpoint that was converted",
        )
    if math.prod(shape) != tensor.size:
        raise Corrupt(f"{file.path}: {tensor.size} elements, {name} of the shape {list(shape)} has {math.prod(shape)}")
    return tensor.reshape(shape) if shape else squeeze(tensor, 0)
