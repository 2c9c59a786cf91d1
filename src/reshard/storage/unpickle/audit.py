"""What a pickle would import, and which of it is known to be harmless.

Harmless are the names that have a meaning in `calls` or `values`, and those that torch, numpy and Python write for
plain state: importing them has no effects.
"""

from __future__ import annotations

from reshard.storage.unpickle.calls import BUILTINS, CALLS
from reshard.storage.unpickle.inert import CLASS_ARGUMENT, COPYREG, Global
from reshard.storage.unpickle.machine import DCP_RECORDS, names_asked_for
from reshard.storage.unpickle.opcodes import named_globals
from reshard.storage.unpickle.values import PATHS, STORAGE_DTYPES, TORCH_DTYPES


def globals_in(data: bytes | memoryview, *, offset: int = 0) -> list[Global]:
    """Everything a pickle asks to import, sorted and each once; of a broken one, what it asks for up to there.

    Found by running the pickle inertly, which no detour over the stack deceives. Where that fails, a real unpickler
    might go on, so the names in the opcodes count too.
    """
    view = memoryview(data).cast("B")[offset:]
    names: set[tuple[str, str]] = set()
    for records in (DCP_RECORDS, frozenset[str]()):
        asked_for, is_whole = names_asked_for(view, records)
        names |= asked_for
        if is_whole:
            break
    else:
        names.update(named_globals(view))
    return [Global(module, name) for module, name in sorted(names)]


_HARMLESS_NAMES = {
    "torch": {"Size", "device", "per_tensor_affine", "per_channel_affine", "per_channel_affine_float_qparams", "Tensor"}
    | TORCH_DTYPES
    | STORAGE_DTYPES.keys(),
    "torch.storage": {"UntypedStorage", "TypedStorage"},
    "torch.serialization": {"_get_layout"},
    "torch.nn.parameter": {"Parameter", "Buffer"},
    "torch._utils": {
        "_rebuild_wrapper_subclass",
        "_rebuild_sparse_tensor",
        "_rebuild_nested_tensor",
        "_rebuild_meta_tensor_no_storage",
        "_rebuild_device_tensor_from_numpy",
        "_rebuild_device_tensor_from_cpu_tensor",
    },
    "numpy": {"dtype", "ndarray"},
    "numpy.core.multiarray": {"_reconstruct", "scalar"},
    "numpy._core.multiarray": {"_reconstruct", "scalar"},
    "datetime": {"date", "datetime", "time", "timedelta", "timezone"},
    "uuid": {"UUID", "SafeUUID"},
    "argparse": {"Namespace"},
    "signal": {"Signals"},
    "types": {"SimpleNamespace"},
    "fractions": {"Fraction"},
    "decimal": {"Decimal"},
    "io": {"BytesIO"},
    "_io": {"BytesIO"},
    "pathlib": set(PATHS),
    "pathlib._local": set(PATHS),
    **{
        module: {"object", "dict", "list", "tuple", "int", "long", "float", "bool", "str", "unicode", "slice", "range"}
        for module in BUILTINS
    },
    **{module: set(CLASS_ARGUMENT) for module in COPYREG},
}
_HARMLESS_PACKAGES = (
    "torch.distributed._mesh_layout",
    "torch.distributed._shard",
    "torch.distributed._tensor",
    "torch.distributed.checkpoint",
    "torch.distributed.device_mesh",
    "torch.distributed.remote_device",
    "torch.distributed.tensor",
    "megatron.core",
    "omegaconf",
    "typing",
)


def is_known(found: Global) -> bool:
    """Whether a name is understood here, or known to be harmless to import. What is not is shown to the user."""
    if (found.module, found.name) in CALLS or found.name in _HARMLESS_NAMES.get(found.module, ()):
        return True
    return any(found.module == package or found.module.startswith(package + ".") for package in _HARMLESS_PACKAGES)
