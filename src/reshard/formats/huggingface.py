"""HuggingFace model directories, both directions.

    DIR/model.safetensors                      one file, or
    DIR/model-00001-of-0000N.safetensors       shard files, with
    DIR/model.safetensors.index.json           {"metadata": {total_parameters, total_size}, "weight_map": {FQN: file}}
                                               (where it is lost, the shard files' names and headers say as much)
    DIR/adapter_model.safetensors              an adapter's tensors, with adapter_config.json
    DIR/config.json                            what the model is
    DIR/tokenizer.json, *.jinja, *.model ...   companions, carried byte for byte

Source: transformers 5.23 `PreTrainedModel.save_pretrained` and `PreTrainedConfig.to_json_string`, huggingface_hub 1.x
`serialization/_base.py` (the rule that fills shard files), peft `get_peft_model_state_dict` (names of adapters).
Files without `__metadata__` and with unaligned data are read too: torch's `consolidate_safetensors_files` writes them.
"""

from __future__ import annotations

import ast
import json
import re
import stat
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from itertools import islice
from pathlib import Path
from typing import Any

import msgspec

from reshard.core.checkpoint import Checkpoint, Origin
from reshard.core.dtypes import dtype
from reshard.core.tensor import Stored, Tensor
from reshard.errors import Corrupt, Incomplete, InputError, Mismatch, NotFound, Unsupported, listed
from reshard.formats import safetensors
from reshard.storage import tar
from reshard.storage.files import Files, LazySource, file_extent
from reshard.storage.plan import FilePlan, Plan, Segment

NAME = "huggingface"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
CONFIG = "config.json"

MAX_SHARD_NBYTES = 50 * 10**9
"""What transformers 5 takes (`max_shard_size="50GB"`); transformers 4 and huggingface_hub take 5 GB."""
JSON_LIMIT_NBYTES = 64 << 20
"""The index of the largest models (hundreds of thousands of expert tensors) has some 30 MB."""

SHARD = re.compile(r"model-(?P<number>\d{5,9})-of-(?P<count>\d{5,9})\.safetensors")

COMPANIONS = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "normalizer.json",
    "tekken.json",
    "*.tiktoken",
    "*.model",
    "*.spm",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "feature_extractor_config.json",
    "audio_tokenizer_config.json",
    ADAPTER_CONFIG,
)
"""Files beside the weights that a model is loaded with, by name."""
TEMPLATES = "additional_chat_templates"
_CODE_NAMED_IN = (CONFIG, "tokenizer_config.json", "processor_config.json", "preprocessor_config.json")


class _Index(msgspec.Struct):
    weight_map: dict[str, str]


@dataclass(frozen=True, slots=True)
class JsonFile(Mapping[str, Any]):
    """A JSON object that remembers its bytes, so that what is not changed is copied byte for byte."""

    value: Mapping[str, Any]
    raw: bytes = field(repr=False)

    def __getitem__(self, key: str) -> Any:
        return self.value[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.value)

    def __len__(self) -> int:
        return len(self.value)


def matches(names: frozenset[str]) -> bool:
    """Whether a directory with these names in it holds safetensors weights in the HuggingFace layout."""
    return not names.isdisjoint((WEIGHTS, INDEX, ADAPTER_WEIGHTS)) or any(map(SHARD.fullmatch, names))


def open(path: Path) -> Checkpoint:
    """A directory of weights (or its index, or one of its files) as a checkpoint; only headers are read.

    Raises Incomplete, naming them, when shard files or tensors that the index lists are missing, and Corrupt when a
    shard file holds tensors that the index does not list there. Without an index the shard files' numbers tell.
    """
    directory, entry = (path, None) if path.is_dir() else (path.parent, path.name)
    entry = entry or next((name for name in (WEIGHTS, INDEX, ADAPTER_WEIGHTS) if (path / name).is_file()), None)
    files = Files()
    notices: tuple[str, ...] = ()
    if entry is None:
        shards = _numbered(directory)
        read = [safetensors.read(shard, files) for shard in shards]
        tensors, unsaved = _united(directory, read), {fqn for file in read for fqn in file.unsaved}
        notices = (f"{directory} has no {INDEX}: the headers of all {len(shards)} shard files were read instead",)
    elif entry.endswith(".json"):
        weight_map = read_index(directory / entry, files)
        shards = shard_paths(directory / entry, weight_map)
        read = [safetensors.read(p, files) for p in shards]
        unsaved = {fqn for file in read for fqn in file.unsaved}
        weight_map = {fqn: name for fqn, name in weight_map.items() if fqn not in unsaved}
        tensors = _indexed(directory / entry, weight_map, read)
        shards = [directory / entry, *shards]
    else:
        shards = [directory / entry]
        file = safetensors.read(directory / entry, files)
        tensors, unsaved = file.tensors, set(file.unsaved)
    config, assets = companions(directory)
    if unsaved:
        notices += (f"names without a tensor, which torch's consolidation lists: {listed(sorted(unsaved))}",)
    if entry == WEIGHTS and (directory / INDEX).is_file():
        notices += (f"{directory} holds both {WEIGHTS} and {INDEX}: {WEIGHTS} was read, as transformers does",)
    origin = Origin(directory, NAME, files=tuple(shards))
    return Checkpoint(tensors, origin, LazySource(files), config=config, assets=assets, notices=notices)


def read_index(path: Path, files: Files | None = None) -> dict[str, str]:
    """The `weight_map` of an index, FQN to file name; of `pytorch_model.bin.index.json` as well.

    Raises Corrupt unless every file name is a plain name, of a file in the same directory.
    """
    raw = _read_small(path, files or Files())
    try:
        weight_map = msgspec.json.decode(raw, type=_Index).weight_map
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise Corrupt(f"{path}: not an index of shard files: {error}") from error
    strange = sorted({name for name in weight_map.values() if name in ("", ".", "..") or re.search(r"[/\\\0]", name)})
    if strange:
        raise Corrupt(f"{path}: shard files outside of the directory: {listed(map(repr, strange))}")
    return weight_map


def shard_paths(index: Path, weight_map: Mapping[str, str]) -> list[Path]:
    """The shard files of an index, sorted by name. Raises Incomplete when any is missing."""
    names = sorted(set(weight_map.values()))
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise Incomplete(
            f"{index}: {len(missing)} of {len(names)} shard files are missing: {listed(missing)}",
            hint="copy them beside the index, or wait until they are written",
        )
    return [index.parent / name for name in names]


def _numbered(directory: Path) -> list[Path]:
    """The shard files of a directory without an index, by the numbers in their names. Raises Incomplete, naming all."""
    there = {name: found for name in tar.names(directory) if (found := SHARD.fullmatch(name))}
    if not there:
        raise NotFound(f"{directory}: neither {WEIGHTS} nor {INDEX} nor {ADAPTER_WEIGHTS}")
    counts = {found["count"] for found in there.values()}
    if len(counts) > 1:
        raise Mismatch(
            f"{directory}: no {INDEX}, and shard files of several saves: {listed(there)}",
            hint="keep the files of one save in the directory",
        )
    count, numbers = counts.pop(), {int(found["number"]) for found in there.values()}
    first = 0 if 0 in numbers else 1
    if len(numbers) != int(count) or max(numbers) >= first + int(count):
        wanted = (f"model-{i:05d}-of-{count}.safetensors" for i in range(first, first + int(count)) if i not in numbers)
        missing = list(islice(wanted, 10))
        raise Incomplete(
            f"{directory}: no {INDEX}, and of {int(count)} shard files there are {len(numbers)}; missing: "
            f"{', '.join(missing)}{' and more' if len(missing) == 10 else ''}",
            hint="copy the missing files beside the others, or wait until they are written",
        )
    return [directory / name for name in sorted(there)]


def _united(directory: Path, shards: Iterable[safetensors.File]) -> dict[str, Tensor]:
    """The tensors of all shard files. Raises Corrupt where two hold one of the same name."""
    where: dict[str, str] = {}
    twice = [f"{fqn} ({where[fqn]} and {shard.path.name})" for shard in shards for fqn in shard.tensors
             if where.setdefault(fqn, shard.path.name) != shard.path.name]  # fmt: skip
    if twice:
        raise Corrupt(
            f"{directory}: no {INDEX}, and {len(twice)} tensors are in several shard files: {listed(twice)}",
            hint="the shard files come from different saves",
        )
    return {fqn: tensor for shard in shards for fqn, tensor in shard.tensors.items()}


def check_index(index: Path, weight_map: Mapping[str, str], held: Mapping[str, Iterable[str]]) -> None:
    """Hold an index against the tensors that each shard file (by name) holds.

    Raises Incomplete when a tensor is not where the index says, Corrupt when a file holds one that is not listed.
    """
    where = {fqn: name for name, fqns in held.items() for fqn in fqns if weight_map.get(fqn, name) == name}
    missing = [f"{fqn} ({name})" for fqn, name in weight_map.items() if where.get(fqn) != name]
    if missing:
        raise Incomplete(f"{index}: {len(missing)} tensors are not in their shard file: {listed(missing)}")
    extra = [f"{fqn} ({name})" for name, fqns in held.items() for fqn in fqns if weight_map.get(fqn) != name]
    if extra:
        raise Corrupt(
            f"{index}: {len(extra)} tensors of the shard files are not in the index: {listed(extra)}",
            hint="the shard files and the index come from different saves",
        )


def _indexed(index: Path, weight_map: Mapping[str, str], shards: Iterable[safetensors.File]) -> dict[str, Tensor]:
    by_name = {shard.path.name: shard for shard in shards}
    check_index(index, weight_map, {name: shard.tensors for name, shard in by_name.items()})
    return {fqn: by_name[name].tensors[fqn] for fqn, name in weight_map.items()}


def companions(directory: Path) -> tuple[Mapping[str, Any] | None, dict[str, Tensor]]:
    """config.json, and the files to be carried byte for byte, by name.

    Only regular files count; links are followed, as the HuggingFace cache is made of them. Python files are carried
    when an `auto_map` names them (with what they import from beside them); they are never run.
    """
    if not directory.is_dir():
        raise NotFound(f"{directory}: no such directory")
    config = read_json(directory / CONFIG) if _is_file(directory / CONFIG) else None
    names = [n for n in tar.names(directory) if any(fnmatchcase(n, pattern) for pattern in COMPANIONS)]
    names += sorted(_code(directory))
    if (directory / TEMPLATES).is_dir():
        names += [f"{TEMPLATES}/{n}" for n in tar.names(directory / TEMPLATES) if n.endswith(".jinja")]
    return config, {name: asset(directory / name) for name in names if _is_file(directory / name)}


def read_json(path: Path) -> JsonFile:
    """A JSON object from a file of bounded size. Raises Corrupt when it is none."""
    raw = _read_small(path, Files())
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise Corrupt(f"{path}: not JSON: {error}", hint="copy the file again from where it comes") from error
    if not isinstance(value, dict):
        raise Corrupt(
            f"{path}: a JSON object was expected, not {type(value).__name__}", hint="copy it again from where it comes"
        )
    return JsonFile(value, raw)


def _read_small(path: Path, files: Files) -> bytes:
    nbytes = files.nbytes(str(path))
    if nbytes > JSON_LIMIT_NBYTES:
        raise Unsupported(f"{path}: {nbytes} bytes of JSON, at most {JSON_LIMIT_NBYTES} are read")
    return files.pread(str(path), 0, nbytes)


def _is_file(path: Path) -> bool:
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except OSError:
        return False


def asset(path: Path) -> Tensor:
    """A file to be carried byte for byte."""
    extent = file_extent(path)
    return Stored(dtype("U8"), (extent.nbytes,), extent)


def _code(directory: Path) -> set[str]:
    """The Python files that an auto_map names, and those beside them that they import."""
    waiting = {name for file in _CODE_NAMED_IN for name in _auto_map(directory / file)}
    found: set[str] = set()
    while waiting:
        name = waiting.pop()
        if name not in found and _is_file(directory / name):
            found.add(name)
            waiting |= _relative_imports(directory / name)
    return found


def _auto_map(path: Path) -> Iterator[str]:
    if not _is_file(path):
        return
    auto_map = read_json(path).get("auto_map")
    values = auto_map.values() if isinstance(auto_map, dict) else (auto_map,)
    for value in values:
        for reference in value if isinstance(value, list) else (value,):
            # "other/repository--module.Class" lies in another repository
            if isinstance(reference, str) and re.fullmatch(r"\w+\.\w+", reference):
                yield reference.partition(".")[0] + ".py"


def _relative_imports(path: Path) -> set[str]:
    try:
        tree = ast.parse(_read_small(path, Files()))
    except (SyntaxError, ValueError, RecursionError, InputError):
        return set()
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            names |= {node.module} if node.module else {alias.name for alias in node.names}
    return {f"{name}.py" for name in names if name.isidentifier()}


def plan(checkpoint: Checkpoint, *, max_shard_nbytes: int = MAX_SHARD_NBYTES) -> Plan:
    """The files of a model directory, or of an adapter's when the checkpoint holds an adapter only.

    Tensors fill shard files in the checkpoint's order. Raises Incomplete when there are none.
    """
    if not checkpoint.tensors:
        raise Incomplete(f"{checkpoint.origin.path}: no tensors to write")
    if is_adapter(checkpoint):
        return _plan_adapter(to_adapter(checkpoint))
    shards = fill_shards(checkpoint.tensors, max_shard_nbytes)
    files = [_weights_file(name, tensors) for name, tensors in shards.items()]
    if len(shards) > 1:
        files.append(FilePlan(INDEX, (Segment(_index_json(shards)),)))
    if checkpoint.config is not None:
        files.append(FilePlan(CONFIG, (Segment(json_bytes(checkpoint.config)),)))
    # transformers takes a directory with an adapter_config.json for an adapter
    files += _asset_files({n: t for n, t in checkpoint.assets.items() if n != ADAPTER_CONFIG})
    return Plan(tuple(files), {"format": NAME, "max_shard_nbytes": max_shard_nbytes})


def fill_shards(tensors: Mapping[str, Tensor], max_nbytes: int) -> dict[str, dict[str, Tensor]]:
    """Tensors by shard file, in order: a file is closed when the next tensor would make it larger than `max_nbytes`.

    A tensor that is larger by itself gets a file of its own, and the open one stays open.
    """
    if max_nbytes <= 0:
        raise Unsupported(f"shard files of {max_nbytes} bytes", hint="--max-shard-size takes a size such as 5GB")
    shards: list[dict[str, Tensor]] = []
    current: dict[str, Tensor] = {}
    nbytes = 0
    for fqn, tensor in tensors.items():
        if tensor.nbytes > max_nbytes:
            shards.append({fqn: tensor})
            continue
        if nbytes + tensor.nbytes > max_nbytes:
            shards.append(current)
            current, nbytes = {}, 0
        current[fqn] = tensor
        nbytes += tensor.nbytes
    if current:
        shards.append(current)
    if len(shards) == 1:
        return {WEIGHTS: shards[0]}
    return {f"model-{i:05d}-of-{len(shards):05d}.safetensors": shard for i, shard in enumerate(shards, 1)}


def json_bytes(value: Mapping[str, Any]) -> bytes:
    """A JSON object as transformers writes it, or as it was read when nothing was changed."""
    if isinstance(value, JsonFile):
        return value.raw
    return (json.dumps(dict(value), indent=2, sort_keys=True, default=_plain) + "\n").encode()


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"{type(value).__name__} in a JSON file")


def _weights_file(name: str, tensors: Mapping[str, Tensor]) -> FilePlan:
    """By name within a dtype, as the safetensors library lays tensors out, whatever their order in the state dict."""
    return safetensors.plan_file(name, dict(sorted(tensors.items())), {"format": "pt"})


def _index_json(shards: Mapping[str, Mapping[str, Tensor]]) -> bytes:
    tensors = [tensor for shard in shards.values() for tensor in shard.values()]
    sums = {"total_parameters": sum(t.size for t in tensors), "total_size": sum(t.nbytes for t in tensors)}
    return json_bytes({"metadata": sums, "weight_map": {fqn: name for name, shard in shards.items() for fqn in shard}})


def _asset_files(assets: Mapping[str, Tensor]) -> list[FilePlan]:
    return [FilePlan(name, (Segment(tensor),)) for name, tensor in sorted(assets.items())]


_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def parse_size(text: str) -> int:
    """Bytes from `5GB` (10^9, as the hub counts), `500MB`, `1.5GiB` (2^30) or a plain number. Raises Unsupported."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:([kmgt]i?)?b)?\s*", text, re.IGNORECASE | re.ASCII)
    nbytes = int(float(match[1]) * _UNITS[(match[2] or "").lower()]) if match else 0
    if nbytes <= 0:
        raise Unsupported(f"{text!r} is no size", hint="--max-shard-size and --memory take 5GB, 500MB or 1GiB")
    return nbytes


_ADAPTED = re.compile(
    r"(?P<before>.+\.)(?P<part>lora_(?:A|B|embedding_A|embedding_B|magnitude_vector))(?:\.(?P<name>\w+?))??"
    r"(?P<leaf>\.(?:weight|bias))?"
)
_SAVED_WHOLE = re.compile(r"(?P<before>.+\.)modules_to_save\.(?P<name>\w+)\.(?P<leaf>.+)")
_PEFT_PREFIX = "base_model.model."


def is_adapter(checkpoint: Checkpoint) -> bool:
    """Whether the tensors are those of an adapter only: LoRA's, and modules saved whole beside them."""
    has_lora = any(_ADAPTED.fullmatch(fqn) for fqn in checkpoint.tensors)
    return has_lora and all(_is_adapted(fqn) for fqn in checkpoint.tensors)


def _is_adapted(fqn: str) -> bool:
    if _adapted(fqn):
        return True
    # a module saved whole keeps its own name in PEFT's files; in a full model it lies beside the layers it wraps
    return fqn.startswith(_PEFT_PREFIX) and ".base_layer." not in fqn and ".original_module." not in fqn


def trained_with(checkpoint: Checkpoint) -> tuple[str, ...]:
    """The adapter's FQNs in a checkpoint that holds the model under it as well; none where it holds one of the two."""
    found = tuple(fqn for fqn in checkpoint.tensors if _ADAPTED.fullmatch(fqn))
    return () if is_adapter(checkpoint) else found


def without_peft(fqn: str) -> str:
    """The model's own name of a tensor that PEFT wrapped."""
    return fqn.removeprefix(_PEFT_PREFIX).replace(".base_layer.", ".") if fqn.startswith(_PEFT_PREFIX) else fqn


def to_adapter(checkpoint: Checkpoint) -> Checkpoint:
    """The adapter with the names that PEFT saves: the adapter's own name (`.default`) left out of each FQN.

    Raises Mismatch when it holds adapters of several names.
    """
    names = {m["name"] for fqn in checkpoint.tensors if (m := _adapted(fqn)) and m["name"]}
    if len(names) > 1:
        raise Mismatch(f"{checkpoint.origin.path}: adapters of several names: {listed(sorted(names))}")
    renamed = {fqn: _saved_name(fqn) for fqn in checkpoint.tensors}
    if all(fqn == name for fqn, name in renamed.items()):
        return checkpoint
    if len(set(renamed.values())) != len(renamed):
        raise Mismatch(f"{checkpoint.origin.path}: two tensors of the adapter have one name without `.default`")
    tensors = {renamed[fqn]: tensor for fqn, tensor in checkpoint.tensors.items()}
    changed = [(a, b) for a, b in renamed.items() if a != b]
    notice = f"{len(changed)} adapter names as PEFT saves them, such as {changed[0][0]} -> {changed[0][1]}"
    return replace(checkpoint, tensors=tensors, paths={}, notices=(*checkpoint.notices, notice))


def _adapted(fqn: str) -> re.Match[str] | None:
    return _ADAPTED.fullmatch(fqn) or _SAVED_WHOLE.fullmatch(fqn)


def _saved_name(fqn: str) -> str:
    if match := _ADAPTED.fullmatch(fqn):
        # PEFT keeps DoRA's vector as a parameter without `.weight`
        leaf = "" if match["part"] == "lora_magnitude_vector" else match["leaf"] or ""
        fqn = f"{match['before']}{match['part']}{leaf}"
    elif match := _SAVED_WHOLE.fullmatch(fqn):
        fqn = match["before"] + match["leaf"]
    return fqn if fqn.startswith(_PEFT_PREFIX) else _PEFT_PREFIX + fqn


def lacks_adapter_config(checkpoint: Checkpoint) -> bool:
    """Whether these are an adapter's tensors and nothing says how they were trained (rank, alpha, target modules)."""
    return is_adapter(checkpoint) and ADAPTER_CONFIG not in checkpoint.assets


def _plan_adapter(checkpoint: Checkpoint) -> Plan:
    weights = _weights_file(ADAPTER_WEIGHTS, checkpoint.tensors)
    return Plan((weights, *_asset_files(checkpoint.assets)), {"format": NAME})
