"""Pickles as values, with nothing imported and nothing called that the pickle names.

What a checkpoint's pickle holds comes back as plain Python values, and as these where it names something:

    torch.bfloat16                          TorchDType("bfloat16")
    torch.Size                              Size, a tuple
    a storage (persistent id)               StorageRef
    a dense tensor, a parameter             TensorRef; a quantized one QTensorRef
    any other class or function             Global(module, name)
    any other object                        Inert, an instance of the Global that made it
    DCP's metadata classes, on request      Record, which only keeps its state

The C unpickler does the work. It reaches a class only through `find_class`, so every class it can instantiate is one
of ours: a `Global` is a type (NEWOBJ accepts nothing else) whose instances record what is done to them. All that a
pickle can do to an object, BUILD included, therefore ends in an `Inert`, a `Record` or a plain container of this load;
what is shared between loads refuses to be changed.

    limits.py     how many names and copies a pickle may ask for
    opcodes.py    before the load: lengths, memo numbers, and that dict keys can be hashed
    inert.py      what a name stands for, and an object that was not made
    values.py     dtypes, storages, tensors and containers
    calls.py      the few calls that give a value
    machine.py    the load
    audit.py      what a pickle would import
"""

from reshard.storage.unpickle.audit import globals_in, is_known
from reshard.storage.unpickle.inert import Global, Inert, Rebuilt, Record
from reshard.storage.unpickle.machine import DCP_RECORDS, load, load_from
from reshard.storage.unpickle.values import (
    STORAGE_DTYPES,
    Counter,
    DefaultDict,
    OrderedDict,
    QTensorRef,
    Size,
    StorageRef,
    TensorRef,
    TorchDType,
    as_path,
)

__all__ = [
    "DCP_RECORDS",
    "STORAGE_DTYPES",
    "Counter",
    "DefaultDict",
    "Global",
    "Inert",
    "OrderedDict",
    "QTensorRef",
    "Rebuilt",
    "Record",
    "Size",
    "StorageRef",
    "TensorRef",
    "TorchDType",
    "as_path",
    "globals_in",
    "is_known",
    "load",
    "load_from",
]
