"""Single files of `torch.save`: .pt, .pth, .bin, .ckpt. Both directions.

    zip archive (1.6 and later)     data.pkl and the storages data/0, data/1, ...; see `storage/torch_zip.py`
    legacy stream                   five pickles: 0x1950a86a20f9469cfc6c, 1001, {little_endian, ...}, the object, a list
                                    of storage keys; then, for each key: i64 number of elements, the elements
    not read                        bare pickles, tar archives (before 0.1.10), TorchScript

An object may be a state dict, anything that holds one, or a whole module: its tensors are then named as its
`state_dict()` would name them. Several tensors may lie in one storage; those that are the same part of it are one node,
and are written as one storage again.

Source: pytorch `torch/serialization.py`, `torch/_utils.py` and `torch/nn/modules/module.py`, 1.6 to 2.15.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from reshard.core.box import Shape
from reshard.core.checkpoint import Checkpoint, KeyPath, Origin
from reshard.core.dtypes import DType, dtype
from reshard.core.tensor import Deferred, Extent, Stored, Tensor
from reshard.errors import Corrupt, Incomplete, InputError, NotFound, Unsupported, listed
from reshard.formats import huggingface
from reshard.formats.torch_archive import Archive, segments, tensor_ref
from reshard.formats.torch_distributed import is_distributed, plain_tensor, settled, share
from reshard.formats.torch_tensor import check_storage, fqn, stored, walk
from reshard.storage.files import Files, LazySource
from reshard.storage.pickler import dumps
from reshard.storage.plan import FilePlan
from reshard.storage.scratch import Scratch, inflate, stream
from reshard.storage.torch_zip import DEFLATED, SMALL_NBYTES, Record, archive_prefix, lay_out, open_archive
from reshard.storage.unpickle import (
    Global,
    Inert,
    QTensorRef,
    Rebuilt,
    StorageRef,
    TensorRef,
    load,
    load_from,
)

NAME = "torch_save"
INDEX = "pytorch_model.bin.index.json"
WHOLE = ("pytorch_model.bin", "adapter_model.bin")
"""The file that a directory in HuggingFace's layout keeps its weights in, where it is one."""
BARE = "tensor"
"""The FQN of a tensor that was saved by itself."""

_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001
_WINDOW_NBYTES = 1 << 20
_MAX_NUM_MODULE_TENSORS = 1 << 20


# ---------------------------------------------------------------------------------------------------------- one file


class File:
    """One file, its pickle read. Storages are looked at when a tensor of theirs is."""

    def __init__(self, path: Path, value: Any, byteorder: str, files: Files) -> None:
        self.path = path
        self.value = value
        """The saved object, inert."""
        self.files = files
        self.byteorder = byteorder
        """Of the numbers in the storages."""
        self._records: dict[str, Record] = {}
        self._extents: dict[str, Extent] = {}
        self._tensors: dict[tuple[object, ...], Tensor] = {}
        self._scratch: Scratch | None = None

    def tensor(self, ref: TensorRef) -> Tensor:
        """The tensor that a leaf of `value` refers to; the same node for the same part of a storage.

        Raises Corrupt when the storage is not there or has not the size that the pickle says.
        """
        key = (ref.storage.key, ref.dtype, ref.offset, tuple(ref.size), tuple(ref.stride), ref.conj, ref.neg)
        if key not in self._tensors:
            self._tensors[key] = self._tensor(ref)
        return self._tensors[key]

    def extent(self, storage: StorageRef) -> Extent:
        """The bytes of a storage; compressed ones are decoded into a temporary file first."""
        if self._is_compressed(storage):
            record, where = self._records[storage.key], f"{self.path}: {storage.key}"
            if storage.key not in self._extents:
                packed = Extent(str(self.path), record.offset, record.stored_nbytes)
                self._scratch = self._scratch or Scratch()
                pieces = inflate(stream(self.files, packed), where)
                plain = self._scratch.decoded(pieces, record.nbytes, where)
                if plain.nbytes != record.nbytes:
                    raise Corrupt(f"{where} inflates to {plain.nbytes} bytes, the archive says {record.nbytes}")
                self._extents[storage.key] = replace(plain, crc32=record.crc32)
        return self._place(storage)

    def _tensor(self, ref: TensorRef) -> Tensor:
        tensor = stored(ref, self._place(ref.storage), self.byteorder)
        if self._is_compressed(ref.storage):
            find = partial(self._decoded, ref)
            return Deferred(tensor.dtype, tensor.shape, find)
        return tensor

    def _decoded(self, ref: TensorRef) -> Tensor:
        return stored(ref, self.extent(ref.storage), self.byteorder)

    def _is_compressed(self, storage: StorageRef) -> bool:
        return storage.key in self._records and self._records[storage.key].method == DEFLATED

    def _place(self, storage: StorageRef) -> Extent:
        """The extent of a storage, checked against the pickle; of compressed ones only the size counts."""
        extent = self._extents.get(storage.key)
        if extent is None:
            record = self._records.get(storage.key)
            if record is None:
                raise Corrupt(f"{self.path}: the pickle refers to storage {storage.key[:100]!r}, which is not there")
            extent = Extent(str(self.path), record.offset, record.nbytes, record.crc32)
            if record.method != DEFLATED:
                self._extents[storage.key] = extent
        check_storage(storage, extent.nbytes, str(self.path))
        return extent

    @classmethod
    def of_archive(cls, path: Path, files: Files) -> File:
        """A zip archive, every header checked."""
        name = str(path)
        archive = open_archive(partial(files.pread, name), files.nbytes(name), name)
        if "constants.pkl" in archive.records or any(n.startswith("code/") for n in archive.records):
            raise Unsupported(
                f"{path} is a TorchScript archive: code with its weights",
                hint="save the weights alone: torch.save(torch.jit.load(path).state_dict(), new_path)",
            )
        file = cls(path, load(archive.payload, where=name), archive.byteorder, files)
        file._records = archive.storages
        return file

    @classmethod
    def of_stream(cls, path: Path, files: Files) -> File:
        """A legacy stream. Its storages are little-endian on any machine, and it keeps no checksums."""
        value, storages, keys, at = _legacy_pickles(path, files)
        file = cls(path, value, "little", files)
        end = files.nbytes(str(path))
        for key in keys:
            storage = storages.get(key)
            if storage is None:
                raise Corrupt(f"{path}: storage {str(key)[:100]!r} is listed, and no tensor says what it holds")
            if end - at < 8:
                raise Incomplete(f"{path} ends at byte {end}, before storage {storage.key}")
            numel = int.from_bytes(files.pread(str(path), at, 8), "little", signed=True)
            nbytes = storage.numel * dtype(storage.dtype).itemsize
            if numel != storage.numel:
                raise Corrupt(f"{path}: storage {storage.key} has {numel} elements, the pickle says {storage.numel}")
            if at + 8 + nbytes > end:
                raise Incomplete(
                    f"{path}: storage {storage.key} ends at byte {at + 8 + nbytes}, the file at {end}",
                    hint="the file was truncated or is still being written",
                )
            file._extents[storage.key] = Extent(str(path), at + 8, nbytes)
            at += 8 + nbytes
        if at != end:
            raise Corrupt(f"{path}: {end - at} bytes after the last storage belong to none")
        return file


def read(path: Path, files: Files | None = None) -> File:
    """One file: every header and the pickle, no storage.

    Raises Unsupported for what torch wrote and this does not read, NotFound for what is no file of torch.save,
    Incomplete and Corrupt for what was one.
    """
    files = files or Files()
    nbytes = files.nbytes(str(path))
    head = files.pread(str(path), 0, min(nbytes, 512))
    if head.startswith(b"PK\3\4"):
        return File.of_archive(path, files)
    if _is_legacy(head):
        return File.of_stream(path, files)
    raise _not_read(path, head, nbytes)


def _is_legacy(head: bytes) -> bool:
    """Whether a file begins with the magic number, in whatever pickle protocol."""
    if head[:1] != b"\x80":
        return False
    try:
        magic, _ = load_from(head[:64], 0, where="magic number")
    except InputError:
        return False
    return type(magic) is int and magic == _MAGIC


def _not_read(path: Path, head: bytes, nbytes: int) -> InputError:
    if nbytes < 16:
        return Incomplete(f"{path} has {nbytes} bytes", hint="it may still be being written, or was never finished")
    if head.startswith(b"version https://git-lfs"):
        return Incomplete(f"{path} is a Git LFS pointer, not the file itself", hint="git lfs pull")
    if head[257:262] == b"ustar":
        return Unsupported(f"{path} is a tar archive, as torch wrote them before 2017", hint=_SAVE_AGAIN)
    if head[:1] == b"\x80":
        return Unsupported(f"{path} is a bare pickle, not a file of torch.save", hint=_SAVE_AGAIN)
    return NotFound(f"{path} is not a file of torch.save: it begins with {head[:8]!r}")


_SAVE_AGAIN = "if you trust it, load it with the program that wrote it and save its state dict with torch.save"


def _legacy_pickles(path: Path, files: Files) -> tuple[Any, dict[object, StorageRef], list[Any], int]:
    """The object, its storages by key, the keys in file order, and where the first storage starts."""
    nbytes = files.nbytes(str(path))
    window = min(_WINDOW_NBYTES, nbytes)
    while True:
        storages: dict[object, StorageRef] = {}
        data = files.pread(str(path), 0, window)
        try:
            values, at = [], 0
            for _ in range(5):
                value, at = load_from(data, at, where=str(path), persistent_load=partial(_storage, storages))
                values.append(value)
            break
        except Corrupt:  # it may only be that the pickles are longer than the window
            if window == nbytes or window >= SMALL_NBYTES:
                raise
            window = min(window * 8, nbytes, SMALL_NBYTES)
    _, protocol, _, value, keys = values
    if protocol != _LEGACY_PROTOCOL or not isinstance(keys, list):
        raise Corrupt(f"{path}: a legacy file of protocol {protocol!r}"[:300])
    return value, storages, keys, at


def _storage(storages: dict[object, StorageRef], pid: object) -> object:
    """The persistent ids of legacy files, which also remember the source of modules."""
    if type(pid) is tuple and len(pid) == 4 and pid[0] == "module" and isinstance(pid[1], Global):
        return pid[1]
    if type(pid) is not tuple or len(pid) not in (5, 6) or pid[0] != "storage" or not isinstance(pid[1], Global):
        raise Corrupt("a persistent id that is no storage")
    if len(pid) == 6 and pid[5] is not None:
        raise Unsupported("a storage that is a view of another one, as torch 0.3 wrote them")
    found = StorageRef(pid[1].name, *pid[2:5])
    if storages.setdefault(found.key, found).numel != found.numel:
        raise Corrupt(f"storage {found.key[:100]} has two sizes")
    return found


# ------------------------------------------------------------------------------------------------------------ leaves


@dataclass(slots=True)
class Leaves:
    """What the leaves of a state dict are: tensors by FQN, and the rest."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    objects: dict[str, Any] = field(default_factory=dict)
    paths: dict[str, KeyPath] = field(default_factory=dict)
    _noted: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    @property
    def notices(self) -> tuple[str, ...]:
        """What the user should know, one line for each kind of thing."""
        return tuple(f"{what}: {listed(names)}" for what, names in self._noted.items())

    def note(self, what: str, name: str) -> None:
        self._noted[what].append(name)

    def add(self, file: File, path: KeyPath, leaf: Any) -> None:
        """Put a leaf where it belongs. Raises Unsupported when its name is taken."""
        path = path or (BARE,)
        name = fqn(path)
        tensor = self.tensor(file, name, leaf)
        if tensor is None:
            self.objects[name] = leaf
        elif name in self.tensors:
            raise Unsupported(f"{file.path}: {name} names two tensors, at {self.paths[name]} and {path}")
        else:
            self.tensors[name] = tensor
        self.paths[name] = path

    def tensor(self, file: File, name: str, leaf: Any) -> Tensor | None:
        """The tensor that a leaf is; None for what is none."""
        if isinstance(leaf, QTensorRef):
            self.note("quantized; the stored integers are given, without scale and zero point", name)
            leaf = leaf.tensor
        if isinstance(leaf, Rebuilt) and is_distributed(leaf):
            return _local_whole(file, name, leaf)
        if isinstance(leaf, Rebuilt) and isinstance(leaf.inner, TensorRef | QTensorRef):
            if plain_tensor(leaf) is None:
                self.note(f"of the class {_class(leaf)}; its elements are given as they are stored", name)
            return self.tensor(file, name, leaf.inner)
        if isinstance(leaf, TensorRef):
            try:
                dtype(leaf.dtype)
            except Unsupported:
                self.note(f"of the dtype {leaf.dtype}, which is not read", name)
                return None
            return _for(file, name, leaf)
        if isinstance(leaf, Inert):
            return self._special(file, name, leaf)
        return None

    def _special(self, file: File, name: str, leaf: Inert) -> Tensor | None:
        """Tensors without strides or bytes are listed and refuse to be read; objects that hide tensors are named."""
        what = _SPECIAL.get(leaf.maker.name, "") if leaf.maker.module == "torch._utils" else ""
        if not what and isinstance(leaf, Rebuilt):
            what = f"a {_class(leaf)}, whose layout only its own library knows"
        if what:
            self.note(f"{what}; cannot be read", name)
            return _refused(file, name, leaf, what)
        hidden = sum(1 for _ in _tensors_in(leaf))
        if hidden:
            self.note(f"an object of {_class(leaf)} with {hidden} tensors inside, which are not read", name)
        return None


_SPECIAL = {
    "_rebuild_sparse_tensor": "a sparse tensor",
    "_rebuild_nested_tensor": "a nested tensor",
    "_rebuild_meta_tensor_no_storage": "a tensor on the meta device, without elements",
    "_rebuild_device_tensor_from_numpy": "a tensor of an accelerator, pickled through numpy",
    "_rebuild_device_tensor_from_cpu_tensor": "a tensor of an accelerator, pickled through the CPU",
    "_rebuild_wrapper_subclass": "a tensor subclass without elements of its own",
}


def _class(leaf: Inert) -> str:
    return f"{leaf.cls.module}.{leaf.cls.name}"[:200]


def _refused(file: File, name: str, leaf: Inert, what: str) -> Tensor | None:
    """A node that can be listed, not read; None when the pickle does not say what it is of."""

    def find() -> Tensor:
        raise Unsupported(f"{file.path}: {name} is {what}", hint="leave it out, or save it as a dense tensor")

    described = _described(leaf.inner if isinstance(leaf, Rebuilt) else leaf)
    return None if described is None else Deferred(*described, find)


def _described(leaf: object) -> tuple[DType, Shape] | None:
    """Dtype and shape of a tensor that cannot be read, where its arguments are of the usual form."""
    if not isinstance(leaf, Inert):
        return None
    args, kind, size = leaf.args, None, None
    match leaf.maker.name:
        case "_rebuild_sparse_tensor" if len(args) == 2 and isinstance(args[1], tuple):
            kinds = [part.dtype for part in args[1] if isinstance(part, TensorRef)]
            kind = kinds[-1] if kinds else None  # indices come first
            size = next((part for part in args[1] if isinstance(part, tuple)), None)
        case "_rebuild_wrapper_subclass" if len(args) > 2:
            kind, size = getattr(args[1], "name", None), args[2]
        case "_rebuild_meta_tensor_no_storage" if len(args) > 1:
            kind, size = getattr(args[0], "name", None), args[1]
    if not isinstance(kind, str) or not isinstance(size, tuple):
        return None
    if any(type(n) is not int or not 0 <= n < 1 << 62 for n in size):
        return None
    try:
        return dtype(kind), tuple(size)
    except Unsupported:
        return None


def _for(file: File, name: str, ref: TensorRef) -> Tensor:
    try:
        return file.tensor(ref)
    except InputError as error:
        raise type(error)(f"{name}: {error}", hint=error.hint) from error


def _local_whole(file: File, name: str, leaf: Rebuilt) -> Tensor:
    """A DTensor or ShardedTensor of which this file has everything; otherwise one that refuses to be read."""
    (held,) = settled([share(leaf, f"{file.path}: {name}")])
    if held.is_whole and len(held.pieces) == 1:
        piece = held.pieces[0]
        return _for(file, name, piece.local)[piece.part.slices]

    def find() -> Tensor:
        raise Unsupported(
            f"{file.path}: {name} is one rank's share of a {leaf.cls.name} ({held.cut})",
            hint="give the directory with the files of all ranks",
        )

    return Deferred(dtype(held.dtype), held.shape, find)


def _tensors_in(root: object) -> Iterator[TensorRef]:
    """Every tensor that can be reached from a value, each once."""
    seen: set[int] = set()
    stack = [root]
    while stack:
        item = stack.pop()
        if isinstance(item, TensorRef):
            yield item
            continue
        children: Iterable[object] = ()
        if isinstance(item, dict):
            children = item.values()
        elif isinstance(item, list | tuple | set | frozenset):
            children = item
        elif isinstance(item, Inert):
            inner = (item.inner,) if isinstance(item, Rebuilt) else ()
            children = (*item.args, *(change for _, change in item.changes), *inner)
        elif isinstance(item, QTensorRef):
            children = (item.tensor,)
        if children and id(item) not in seen:
            seen.add(id(item))
            stack.extend(children)


# ----------------------------------------------------------------------------------------------------------- modules


def module_state(value: Any) -> Mapping[str, Any] | None:
    """What `state_dict()` of a pickled module would hold, by FQN; None for what is no module.

    Non-persistent buffers are left out, as torch does. A class that overrides how its state is saved is not asked.
    """
    if not _is_module(value):
        return None
    found: dict[str, Any] = {}
    stack: list[tuple[str, Inert, tuple[int, ...]]] = [("", value, ())]
    while stack:
        prefix, module, ancestors = stack.pop()
        if id(module) in ancestors or len(ancestors) > 1000:
            continue
        private = module.attr("_non_persistent_buffers_set")
        private = private if isinstance(private, set) else set()
        found |= {f"{prefix}{name}": tensor for name, tensor in _held(module, "_parameters")}
        found |= {f"{prefix}{name}": tensor for name, tensor in _held(module, "_buffers") if name not in private}
        children = [
            (f"{prefix}{name}.", child, (*ancestors, id(module)))
            for name, child in _held(module, "_modules")
            if _is_module(child)
        ]
        stack.extend(reversed(children))
        if len(found) + len(stack) > _MAX_NUM_MODULE_TENSORS:
            raise Corrupt(f"a module of more than {_MAX_NUM_MODULE_TENSORS} tensors")
    return found


def _held(module: Inert, kind: str) -> list[tuple[str, Any]]:
    """The named values of one kind that a module holds."""
    held = module.attr(kind)
    pairs = held.items() if isinstance(held, dict) else ()
    return [(name, value) for name, value in pairs if isinstance(name, str) and value is not None]


def _is_module(value: object) -> bool:
    return isinstance(value, Inert) and all(isinstance(value.attr(k), dict) for k in ("_parameters", "_modules"))


# -------------------------------------------------------------------------------------------------------------- open


def matches(head: bytes) -> bool:
    """Whether a file that begins like this is one of torch.save."""
    return head.startswith(b"PK\3\4") or _is_legacy(head)


def open(path: Path) -> Checkpoint:
    """One file, or a directory or index of `pytorch_model.bin`, as a checkpoint; no storage is read.

    FQNs are the keys on the way to a tensor, joined with dots. What is not a tensor is in `objects`.
    """
    if path.is_dir() or path.name.endswith(".index.json"):
        return _open_directory(path)
    files = Files()
    file = read(path, files)
    leaves = Leaves()
    _add(leaves, file)
    return Checkpoint(
        leaves.tensors,
        Origin(path, NAME, "torch.save", files=(path,)),
        LazySource(files),
        objects=leaves.objects,
        paths=leaves.paths,
        notices=leaves.notices,
        locate=_locator(leaves.tensors),
    )


def _open_directory(path: Path) -> Checkpoint:
    """HuggingFace's layout of the time before safetensors, companions included."""
    whole = next((path / name for name in WHOLE if (path / name).is_file()), None)
    if whole is None:
        return open_sharded(path)
    config, assets = huggingface.companions(path)
    return replace(open(whole), config=config, assets=assets)


def open_sharded(path: Path) -> Checkpoint:
    """Shards `pytorch_model-00001-of-0000N.bin` with their index; `path` is the directory or the index.

    Raises Incomplete when files or tensors that the index lists are missing.
    """
    index = path / INDEX if path.is_dir() else path
    if not index.is_file():
        raise NotFound(f"{index}: no such file")
    files = Files()
    weight_map = huggingface.read_index(index, files)
    shards = huggingface.shard_paths(index, weight_map)
    read_shards: dict[str, Leaves] = {}
    notices: list[str] = []
    for shard in shards:
        leaves = read_shards[shard.name] = Leaves()
        _add(leaves, read(shard, files))
        notices += leaves.notices
    huggingface.check_index(index, weight_map, {name: leaves.tensors for name, leaves in read_shards.items()})
    tensors = {name: read_shards[where].tensors[name] for name, where in weight_map.items()}
    config, assets = huggingface.companions(index.parent)
    return Checkpoint(
        tensors,
        Origin(index.parent, NAME, "torch.save, sharded (HuggingFace)", files=(index, *shards)),
        LazySource(files),
        config=config,
        assets=assets,
        notices=tuple(notices),
        locate=_locator(tensors),
    )


def _add(leaves: Leaves, file: File) -> None:
    where = str(file.path)
    try:
        for path, leaf in walk(file.value, (), module_state):
            leaves.add(file, path, leaf)
    except InputError as error:
        raise error if where in str(error) else type(error)(f"{where}: {error}", hint=error.hint) from error
    if isinstance(file.value, Inert) and _is_module(file.value):
        leaves.note("a whole module; its tensors are named as state_dict() names them", _class(file.value))


def _locator(tensors: Mapping[str, Tensor]) -> Callable[[Iterable[str]], Mapping[str, Tensor]] | None:
    """Decodes compressed storages at once, where there are any."""
    waiting = {name: tensor for name, tensor in tensors.items() if isinstance(tensor, Deferred)}
    if not waiting:
        return None
    return lambda names: {name: waiting[name].find() for name in names if name in waiting}


# -------------------------------------------------------------------------------------------------------------- plan

Wrap = Callable[["OrderedDict[str, Any]"], Any]
"""Takes the state dict that is written and returns the object to be pickled, such as {"state_dict": it}."""


def plan(
    checkpoint: Checkpoint,
    path_in_plan: str,
    *,
    wrap: Wrap | None = None,
    carried: File | None = None,
    name: str = "archive",
) -> FilePlan:
    """A file that `torch.load` reads: an OrderedDict of the tensors, by FQN, or what `wrap` makes of it.

    Tensors that are one node share one storage. What `wrap` adds may be any inert values; tensors in it must be those
    of `carried`, the file that they were read from. `name` is the archive's folder where `path_in_plan` is empty.
    Raises Unsupported for what cannot be pickled.
    """
    archive = _Archive(carried)
    state = OrderedDict((fqn, archive.refer(fqn, tensor)) for fqn, tensor in checkpoint.tensors.items())
    payload = dumps(wrap(state) if wrap else state, persistent_id=archive.persistent_id)
    prefix = archive_prefix(path_in_plan) if path_in_plan else name
    pieces = lay_out(prefix, payload, [tensor.nbytes for _, tensor in archive.storages])
    laid_out = Archive(tuple(pieces), tuple(archive.storages))
    return FilePlan(path_in_plan, tuple(segments(laid_out, path_in_plan)), crc32=True)


class _Archive:
    """Numbers storages in the order in which the pickle refers to them, as torch.save does."""

    def __init__(self, carried: File | None) -> None:
        self.storages: list[tuple[str, Tensor]] = []
        self._carried = carried
        self._waiting: dict[int, tuple[str, Tensor]] = {}
        self._references: dict[int, StorageRef] = {}
        self._numbers: dict[object, int] = {}

    def refer(self, name: str, tensor: Tensor) -> TensorRef:
        """What the pickle says of a tensor of ours."""
        ref = tensor_ref(name, tensor, f"new {len(self._references)}")
        if id(tensor) not in self._references:
            self._references[id(tensor)] = ref.storage
            self._waiting[id(ref.storage)] = (name, tensor)
        return replace(ref, storage=self._references[id(tensor)])

    def persistent_id(self, value: object) -> object:
        """torch's ('storage', class, key, location, numel) for a storage; None for anything else."""
        if not isinstance(value, StorageRef):
            return None
        key: object = id(value) if id(value) in self._waiting else value.key
        if key not in self._numbers:
            self._numbers[key] = len(self.storages)
            self.storages.append(self._waiting[id(value)] if key == id(value) else ("", self._foreign(value)))
        module = "torch.storage" if value.kind == "UntypedStorage" else "torch"
        return ("storage", Global(module, value.kind), str(self._numbers[key]), "cpu", value.numel)

    def _foreign(self, storage: StorageRef) -> Tensor:
        if self._carried is None:
            raise Unsupported(
                "an object beside the tensors has tensors inside of it, which cannot be written there",
                hint="leave objects out: --model, or .safetensors, which holds tensors only",
            )
        if self._carried.byteorder != "little":
            raise Unsupported(f"{self._carried.path}: tensors of a big-endian file are not carried over")
        extent = self._carried.extent(storage)
        tensor: Tensor = Stored(dtype("uint8"), (extent.nbytes,), extent)
        return tensor
