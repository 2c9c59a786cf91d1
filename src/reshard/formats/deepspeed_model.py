"""The model of a tag: each tensor of `module`, from where it is most precise.

trained     the optimizer's float32, under its own name or that of the parameter it is tied to
frozen      its fragments, cut over the ranks as trained ones are
the rest    `module` itself; buffers of 16 bits become float32
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from reshard.core.compute import cast
from reshard.core.dtypes import dtype
from reshard.core.tensor import Tensor
from reshard.errors import Corrupt, Incomplete, listed
from reshard.formats.deepspeed_partitions import Flat, joined
from reshard.formats.deepspeed_states import ModelStates, tensor_of
from reshard.formats.deepspeed_trained import Trained
from reshard.formats.torch_distributed import plain_tensor
from reshard.formats.torch_save import Leaves


def model_of(models: Sequence[ModelStates], trained: Trained) -> Leaves:
    """Every tensor of the model by FQN, given all model_states files. Raises Incomplete for those without elements."""
    model = _Model(models, trained)
    model.run()
    return model.leaves


class _Model:
    """The model's tensors, in the order of `module`, each from where it is most precise."""

    def __init__(self, models: Sequence[ModelStates], trained: Trained) -> None:
        self.leaves = Leaves()
        self._models = models
        self._main = models[0]
        self._trained = trained
        self._frozen = {name: self._frozen_parameter(name) for name in self._main.frozen_shapes}
        self._aliases = self._same_storage()

    def run(self) -> None:
        module = self._main.module
        missing = []
        for name in [*module, *(n for n in (*self._trained.weights, *self._frozen) if n not in module)]:
            tensor = self._known(name)
            if tensor is None and name in module and self._is_placeholder(module[name], name):
                missing.append(name)
            elif tensor is None:
                self._add_plain(name, module[name])
            else:
                self._put(name, tensor)
        for alias, source in self._main.shared.items():
            if alias not in self.leaves.tensors and source in self.leaves.tensors:
                self._put(alias, self.leaves.tensors[source])
        if missing:
            raise Incomplete(
                f"{self._main.file.path}: {listed(missing)} have no elements here, and neither param_shapes,"
                " frozen_param_shapes nor shared_params name them"
            )

    def _known(self, name: str) -> Tensor | None:
        """A parameter, under its own name or that of the one it is tied to; None for what `module` itself holds."""
        for candidate in (name, self._main.shared.get(name), self._aliases.get(name)):
            for source in (self._trained.weights, self._frozen):
                if candidate in source:
                    return source[candidate]
        return None

    def _put(self, name: str, tensor: Tensor) -> None:
        self.leaves.tensors[name], self.leaves.paths[name] = tensor, (name,)

    def _add_plain(self, name: str, leaf: Any) -> None:
        self.leaves.add(self._main.file, (name,), leaf)
        tensor = self.leaves.tensors.get(name)
        if tensor is not None and self._trained.weights and name in self._main.buffer_names and _is_narrow(tensor):
            self.leaves.tensors[name] = cast(tensor, dtype("float32"))  # exact, and what zero_to_fp32 writes

    def _is_placeholder(self, leaf: Any, name: str) -> bool:
        ref = plain_tensor(leaf)
        return self._trained.is_stage3 and ref is not None and ref.size == (0,) and name not in self._main.buffer_names

    def _same_storage(self) -> dict[str, str]:
        """What is the same part of the same storage as a trained parameter: tied, as DeepSpeed before 0.9.2 left it."""
        owners: dict[object, str] = {}
        aliases = {}
        for name, leaf in self._main.module.items():
            ref = plain_tensor(leaf)
            if ref is None:
                continue
            place = (ref.storage.key, ref.offset, tuple(ref.size), tuple(ref.stride))
            if name in self._trained.weights:
                owners.setdefault(place, name)
            elif place in owners and name not in self._frozen and name not in self._main.buffer_names:
                aliases[name] = owners[place]
        return aliases

    def _frozen_parameter(self, name: str) -> Tensor:
        """A frozen parameter: whole in one file, or for ZeRO 3 cut over the ranks as trained ones are."""
        shape = self._main.frozen_shapes[name]
        parts = []
        for model in self._models:
            if name not in model.frozen:
                raise Incomplete(f"{model.file.path}: no part of the frozen parameter {name}")
            parts.append(tensor_of(model.file, model.frozen[name], name))
        if len(parts) == 1 and parts[0].shape == shape:
            return parts[0]
        numel = math.prod(shape)
        expected = [-(-numel // len(parts))] * len(parts)
        if [list(part.shape) for part in parts] != [[n] for n in expected] or not self._trained.is_stage3:
            raise Corrupt(
                f"{self._main.file.path.parent}: the frozen parameter {name} of the shape {list(shape)} has parts of"
                f" the shapes {listed(str(list(part.shape)) for part in parts)}"
            )
        return joined(Flat(parts).take(0, numel), parts[0], shape)


def _is_narrow(tensor: Tensor) -> bool:
    return tensor.dtype.kind == "float" and tensor.dtype.itemsize == 2
