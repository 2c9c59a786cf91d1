"""merge: shards in, a proven whole model out.

    find -> open -> the model's tensors under its own names -> hub names, ties, dtype -> plan -> run -> manifest

`prepare` is all of it up to the plan, which `verify --against` takes too; `merge` carries the plan out.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import msgspec

from reshard.core.checkpoint import Checkpoint, same_bytes
from reshard.core.compute import cast, lost_by
from reshard.core.dtypes import dtype
from reshard.core.tensor import Tensor, leaves
from reshard.errors import Corrupt, InputError, Mismatch, NotFound, OutputError, Unsupported, command, listed
from reshard.formats import open_found
from reshard.formats.detect import EMA, EXTRA, MODEL, OPTIMIZER, Found, find, shards_in
from reshard.ops import names, tie
from reshard.ops.tokens import is_of_tokenizer
from reshard.storage import manifest
from reshard.storage.launch import Spread
from reshard.storage.plan import Plan
from reshard.storage.run import BLOCK_NBYTES, Progress, Result, run
from reshard.version import __version__

What = Literal["model", "optimizer", "all"]
Kind = Literal["huggingface", "safetensors", "torch_save"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What a merge does besides merging. The defaults change nothing of the weights."""

    what: What = "model"
    dtype: str | None = None
    """Of floating-point tensors; None keeps each as it is."""
    max_shard_size: str | int | None = None
    """Of the files of a HuggingFace directory, such as `5GB`, or in bytes."""
    base: str | None = None
    """A model directory or hub id: config and tokenizer come from there when the checkpoint has none."""
    include: tuple[str, ...] = ()
    """FQN globs; only these tensors. Empty takes all."""
    exclude: tuple[str, ...] = ()
    """FQN globs; not these."""
    keep_names: bool = False
    """Every FQN as stored: no containers off, no hub names, no ties. What wrappers added goes unless names need it."""
    step: int | None = None
    state_dict_dirname: str | None = None
    cfg_key: str | None = None
    """Where the config is in Lightning's meta.pt, for `.ckpt` outputs."""
    save_tokenizer: bool = True
    verify: bool = False
    """Compare the copies of data that several ranks hold, and read the output again when it is written."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "base", self.base if self.base is None else os.fspath(self.base))
        for name in ("include", "exclude"):
            globs = getattr(self, name)
            object.__setattr__(self, name, (globs,) if isinstance(globs, str) else tuple(globs))
        if self.what not in get_args(What):
            raise Unsupported(f"what={self.what!r} is merged", hint=f"one of {listed(get_args(What))}")

    def record(self) -> dict[str, Any]:
        """What differs from the defaults, for the manifest."""
        default = Options()
        changed = {
            name: getattr(self, name) for name in self.__slots__ if getattr(self, name) != getattr(default, name)
        }
        return {name: list(value) if isinstance(value, tuple) else value for name, value in changed.items()}

    @classmethod
    def recorded(cls, record: Mapping[str, Any]) -> Options:
        """The options that a manifest holds."""
        return msgspec.convert(record, cls)


@dataclass(frozen=True, slots=True)
class Prepared:
    """A merge that is ready to be carried out: nothing is written yet, and every header has been checked."""

    root: Path
    """The directory that was found for what the user named."""
    opened: Checkpoint
    """All that was read."""
    checkpoint: Checkpoint
    """All that is written."""
    plan: Plan
    notices: tuple[str, ...]
    verify: bool = False
    """Whether the output is read again when it is written."""


@dataclass(frozen=True, slots=True)
class Merged:
    """What a merge did."""

    output: Path
    source: Path
    format: str
    step: int | None
    num_tensors: int
    nbytes: int
    read_nbytes: int
    num_checked: int
    """Records of the shards whose CRC-32 was confirmed."""
    kept_nbytes: int
    """Taken over from an interrupted run."""
    seconds: float
    notices: tuple[str, ...]
    removed: tuple[Path, ...] = ()
    """Shards that were removed afterwards."""


def merge(
    source: str | Path,
    output: str | Path,
    *,
    force: bool = False,
    remove_shards: bool = False,
    threads: int | None = None,
    block_nbytes: int | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> Merged:
    """Merge the checkpoint at `source` into `output` and prove it.

    The suffix of `output` says what is written: `.safetensors`, `.ckpt`, `.pt`, `.pth` or `.bin` a file, anything else
    a HuggingFace directory. `options` are the fields of `Options`. Raises InputError before anything is written when
    the source is incomplete or damaged as far as headers tell; whatever is raised later leaves no output.
    """
    prepared = prepare(Path(source), Path(output), Options(**options))
    return carry_out(
        prepared, Path(output), force=force, remove_shards=remove_shards, threads=threads,
        block_nbytes=block_nbytes, progress=progress,
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Ways:
    """Ways out that hints name, as a verb spells them."""

    base: str
    """The option that names a model for its config and tokenizer."""
    flat: str = ""
    """What else does for flattened parameters, after a comma."""
    partial: str = "is every shard there, and does the config belong to them?"
    """What does where parameters are missing."""
    stored: str = ""
    """What takes a Megatron model as it is stored; empty where the verb takes such models itself."""


_WAYS = Ways(
    "--base", ", --keep-names writes them flat", "--keep-names writes what is there",
    "--keep-names merges them as they are stored",
)  # fmt: skip


def whole_model(source: Path, options: Options, ways: Ways = _WAYS) -> tuple[Found, Checkpoint, Checkpoint]:
    """(what was found, all that was read, the model under the hub's names), from headers alone."""
    found = find(source, step=options.step, state_dict_dirname=options.state_dict_dirname)
    opened = _accompanied(open_found(found, (MODEL,), verify=options.verify), found, options, ways)
    shaped = _shaped(_chosen(opened, options), keep_names=False, ways=ways)
    return found, opened, _as_huggingface(shaped, whole=True, ways=ways).located()


def prepare(source: Path, output: Path, options: Options) -> Prepared:
    """Everything up to the plan, from headers alone."""
    from reshard.formats import huggingface

    roles = {"model": (MODEL,), "optimizer": (OPTIMIZER, MODEL), "all": (MODEL, OPTIMIZER, EMA, EXTRA)}[options.what]
    found = find(source, step=options.step, state_dict_dirname=options.state_dict_dirname)
    opened = open_found(found, roles, verify=options.verify)
    opened = _accompanied(opened, found, options)
    checkpoint = _chosen(opened, options)
    kind = kind_of(output)
    if options.what == "model":
        checkpoint = _shaped(checkpoint, options.keep_names)
        if not options.keep_names and kind != "torch_save":
            checkpoint = _as_huggingface(checkpoint, whole=not (options.include or options.exclude))
    else:
        _check_optimizer(checkpoint)
    if options.dtype is not None:
        to = dtype(options.dtype)
        checkpoint = replace(checkpoint, tensors={n: cast(t, to) for n, t in checkpoint.tensors.items()})
    if not checkpoint.tensors:
        raise NotFound(f"{found.root}: no tensor is left to write", hint="see `reshard inspect` for the names")
    is_model = options.what == "model" and not huggingface.is_adapter(checkpoint)
    if kind == "huggingface" and is_model and opened.config is None:
        said = "there is no config.json beside the checkpoint, so the output has none: --base brings it"
        checkpoint = replace(checkpoint, notices=(*checkpoint.notices, said))
    if kind == "huggingface" and options.what != "model":
        said = "a directory of more than a model: loaders will not know the other names; .pt holds them nested"
        checkpoint = replace(checkpoint, notices=(*checkpoint.notices, said))
    return planned(found.root, opened, checkpoint, output, options)


def planned(
    root: Path,
    opened: Checkpoint,
    checkpoint: Checkpoint,
    output: Path,
    options: Options,
    recipe: Mapping[str, Any] | None = None,
) -> Prepared:
    """The plan of a checkpoint that has its final tensors; `recipe` goes into the manifest, under `source`."""
    kind = kind_of(output)
    checkpoint, plan = _plan(root, checkpoint, output, options)
    origin = checkpoint.origin
    source_facts = {
        "path": str(origin.path), "format": origin.format, "writer": origin.writer, "step": origin.step,
        "files": [str(f.relative_to(origin.path) if f.is_relative_to(origin.path) else f) for f in origin.files],
    }  # fmt: skip
    facts = {"source": source_facts | dict(recipe or {}), "options": options.record(), "output": kind}
    plan = manifest.with_manifest(replace(plan, facts=facts), __version__)
    return Prepared(root, opened, checkpoint, plan, checkpoint.notices, options.verify)


def carry_out(
    prepared: Prepared,
    output: Path,
    *,
    force: bool = False,
    remove_shards: bool = False,
    threads: int | None = None,
    block_nbytes: int | None = None,
    progress: Progress | None = None,
    spread: Spread | None = None,
    tell: Callable[[], Sequence[str]] | None = None,
) -> Merged:
    """Write what was prepared; remove the shards afterwards, when that was asked for and all is proven.

    What `tell` says when all is read follows the notices.
    """
    _check_replaceable(output)
    if remove_shards:
        _check_removable(prepared)
    result = run(
        prepared.plan, output, threads=threads, block_nbytes=block_nbytes or BLOCK_NBYTES, force=force,
        progress=progress, spread=spread, tell=lambda: (*(tell() if tell else ()), *_overflows(prepared.plan)),
    )  # fmt: skip
    if result.is_first and (remove_shards or prepared.verify):
        _read_again(output, threads)
    removed = _remove_shards(prepared) if remove_shards and result.is_first else ()
    return _merged(prepared, result, removed)


def _overflows(plan: Plan) -> Iterator[str]:
    """A sentence for each tensor with numbers that its new dtype has no room for."""
    for _, _, _, fqn, tensor in plan.tensors():
        lost = lost_by(tensor)
        if lost:
            kind = tensor.dtype
            yield f"{fqn}: {lost} numbers are beyond the range of {kind.torch}, and became infinite or NaN in it"


_OTHER_FILES = (
    ".distcp", ".gguf", ".h5", ".index", ".json", ".nemo", ".npz", ".onnx", ".pkl", ".pt2", ".safetensor", ".tar",
    ".zip",
)  # fmt: skip
"""Suffixes that nobody gives to a directory of a model."""


def kind_of(output: Path) -> Kind:
    """What is written to an output of this name. Raises Unsupported for names of files that are none of ours."""
    suffix = output.suffix.lower()
    if suffix in _OTHER_FILES and not output.is_dir():
        raise Unsupported(
            f"{output}: merge writes no {suffix} files",
            hint=".safetensors, or .pt, .pth, .bin, .ckpt; any other name is that of a directory",
        )
    if suffix == ".safetensors":
        return "safetensors"
    return "torch_save" if suffix in (".ckpt", ".pt", ".pth", ".bin") else "huggingface"


# ------------------------------------------------------------------------------------------------- before the plan


def _accompanied(opened: Checkpoint, found: Found, options: Options, ways: Ways = _WAYS) -> Checkpoint:
    """With config and files to carry: from beside the checkpoint first, what is lacking then from --base."""
    from reshard.formats import huggingface
    from reshard.storage import hub

    config, assets = opened.config, dict(opened.assets)
    for place in found.companions:
        other, files = huggingface.companions(place)
        config, assets = config if config is not None else other, files | assets
    if options.base is not None:
        hint = f"{ways.base} DIR names a directory with config.json and the tokenizer files"
        other, files = huggingface.companions(hub.resolve(options.base, hint=hint))
        if other is None and not files:
            raise NotFound(f"{ways.base} {options.base} has neither config.json nor files of a tokenizer", hint=hint)
        if any(map(is_of_tokenizer, assets)):  # a tokenizer is all of its files, from one place
            files = {name: file for name, file in files.items() if not is_of_tokenizer(name)}
        config, assets = config if config is not None else other, files | assets
        if config is None and "adapter_config.json" not in assets:
            raise NotFound(f"{ways.base} {options.base} has no config.json", hint=hint)
    if not options.save_tokenizer:
        assets = {name: tensor for name, tensor in assets.items() if not is_of_tokenizer(name)}
    return replace(opened, config=config, assets=assets)


def _chosen(opened: Checkpoint, options: Options) -> Checkpoint:
    """The tensors that were asked for, located, under the names they will be worked on."""
    if options.keep_names or options.what != "model":
        checkpoint = names.optimizer_only(opened) if options.what == "optimizer" else opened
        if options.keep_names and options.what == "model":
            checkpoint = opened.select(names.model_fqns(opened))
        checkpoint = _filtered(checkpoint, options).located()
        try:
            return names.unwrapped(checkpoint)
        except Mismatch:  # names that only the wrappers' segments tell apart
            if options.keep_names:
                return checkpoint
            raise
    return _filtered(names.unwrapped(names.model_only(opened)), options).located()


def _filtered(checkpoint: Checkpoint, options: Options) -> Checkpoint:
    chosen = list(checkpoint)
    for patterns, wanted in ((options.include, True), (options.exclude, False)):
        unused = [p for p in patterns if not any(fnmatchcase(fqn, p) for fqn in checkpoint)]
        if unused:
            raise NotFound(f"no FQN matches {listed(unused)}", hint=f"the first FQNs are {listed(checkpoint, 4)}")
        if patterns:
            chosen = [fqn for fqn in chosen if any(fnmatchcase(fqn, p) for p in patterns) is wanted]
    return checkpoint.select(chosen) if len(chosen) < len(checkpoint) else checkpoint


def _shaped(checkpoint: Checkpoint, keep_names: bool, ways: Ways = _WAYS) -> Checkpoint:
    """FSDP1's LOCAL_STATE_DICT holds flattened parameters: give them the shapes that the config implies."""
    if checkpoint.origin.format != "rank_files":
        return checkpoint
    from reshard.dialects.shapes import parameter_shapes
    from reshard.formats import rank_files

    flat = rank_files.flat(checkpoint)
    if not flat:
        return checkpoint
    if checkpoint.config is None and keep_names:
        return checkpoint
    if checkpoint.config is None:
        raise NotFound(
            f"{checkpoint.origin.path}: FSDP1 local shards hold {len(flat)} flattened parameters and no shapes",
            hint=f"{ways.base} DIR_OR_HUB_ID names the model whose config.json gives them{ways.flat}",
        )
    return rank_files.shaped(checkpoint, parameter_shapes(checkpoint.config))


def _check_optimizer(checkpoint: Checkpoint) -> None:
    """Raise Corrupt where both moments of Adam are one storage: torch 2.13 on CPU writes FSDP1's full state so."""
    tensors = checkpoint.tensors
    alike = [
        fqn for fqn, tensor in tensors.items()
        if fqn.endswith(".exp_avg") and tensor.size and tensors.get(fqn + "_sq") is tensor
    ]  # fmt: skip
    if alike:
        raise Corrupt(
            f"{checkpoint.origin.path}: exp_avg and exp_avg_sq are one storage for {listed(alike)}",
            hint="torch saved the same buffer twice, so exp_avg is lost; the model itself is not affected",
        )


def _as_huggingface(checkpoint: Checkpoint, whole: bool, ways: Ways = _WAYS) -> Checkpoint:
    """Hub names, ties written once, and the config as training left it."""
    from reshard.dialects import torchtitan, transformers
    from reshard.ops.config import check_complete
    from reshard.ops.tie import tie

    if checkpoint.dialect == "megatron":
        path = checkpoint.origin.path
        converted = f"{command('convert', path, 'OUT', '--to', 'hf')} ({ways.stored})"
        raise Unsupported(
            f"{path} holds a Megatron model: its tensors are named and fused unlike the hub's",
            hint=converted if ways.stored else f"name {path} itself",
        )
    config = checkpoint.config
    checkpoint = names.without_peft(names.without_ddp(checkpoint))
    if whole and config is not None:
        _check_one_model(checkpoint)
    checkpoint = torchtitan.to_hub(names.without_attribute(checkpoint, config), config)
    config = checkpoint.config
    if config is None:
        return checkpoint
    checkpoint = tie(transformers.to_hub(checkpoint, config), config)
    if whole:
        check_complete(config, checkpoint, f"a loader would initialise them anew; {ways.partial}")
    return _with_strangers_said(checkpoint, config)


def _with_strangers_said(checkpoint: Checkpoint, config: Mapping[str, Any]) -> Checkpoint:
    """With a notice where most names are not those of the config's model, so that a loader would find little."""
    from reshard.dialects.shapes import parameter_shapes
    from reshard.formats import huggingface

    if huggingface.is_adapter(checkpoint):
        return checkpoint
    try:
        known = parameter_shapes(config)
    except InputError:
        return checkpoint
    strange = [fqn for fqn in checkpoint.tensors if fqn not in known]
    if 2 * len(strange) < len(checkpoint.tensors) or known.keys() <= checkpoint.tensors.keys():
        return checkpoint
    said = (
        f"{len(strange)} of {len(checkpoint.tensors)} tensors have names that the model of config.json has not, such as"
        f" {listed(strange, 2)}: it will not load from them (--include takes a part of a checkpoint)"
    )
    return replace(checkpoint, notices=(*checkpoint.notices, said))


def _check_one_model(checkpoint: Checkpoint) -> None:
    """Raise Unsupported for a model with an adapter in it: no loader takes both from one set of files."""
    from reshard.formats import huggingface

    adapter = huggingface.trained_with(checkpoint)
    if adapter:
        raise Unsupported(
            f"{checkpoint.origin.path} holds a model and the {len(adapter)} tensors of an adapter that was trained on"
            f" it: {listed(adapter, 2)}",
            hint="--include '*lora_*' writes the adapter, --exclude '*lora_*' the model without it",
        )


def _plan(root: Path, checkpoint: Checkpoint, output: Path, options: Options) -> tuple[Checkpoint, Plan]:
    from reshard.formats import huggingface, safetensors
    from reshard.ops.config import reconcile

    kind = kind_of(output)
    if kind == "torch_save":
        return _plan_torch_save(root, checkpoint, output, options)
    if kind == "safetensors":
        return checkpoint, Plan((safetensors.plan_file("", checkpoint.tensors, {"format": "pt"}),))
    if checkpoint.config is not None and options.what == "model":
        config, changes = reconcile(checkpoint.config, checkpoint.tensors)
        notices = checkpoint.notices + tuple(f"config.json: {change}" for change in changes)
        checkpoint = replace(checkpoint, config=config, notices=notices)
    if huggingface.is_adapter(checkpoint):
        checkpoint = huggingface.to_adapter(checkpoint)
    if huggingface.lacks_adapter_config(checkpoint):
        said = "an adapter without adapter_config.json: copy it from the training run, or name it with --base DIR"
        checkpoint = replace(checkpoint, notices=(*checkpoint.notices, said))
    size = options.max_shard_size
    limit = huggingface.MAX_SHARD_NBYTES if size is None else huggingface.parse_size(str(size))
    return checkpoint, huggingface.plan(checkpoint, max_shard_nbytes=limit)


def _plan_torch_save(root: Path, checkpoint: Checkpoint, output: Path, options: Options) -> tuple[Checkpoint, Plan]:
    """`.ckpt`: `{"state_dict": ..., "cfg": ...}`, the configuration from meta.pt; else the state dict alone."""
    from reshard.formats import lightning, torch_save

    if options.what == "all":
        nest = partial(names.nested, checkpoint)
        files = checkpoint.origin.files
        is_one = checkpoint.origin.format == torch_save.NAME and len(files) == 1
        carried = torch_save.read(files[0]) if is_one else None
        plan = torch_save.plan(checkpoint, "", wrap=nest, carried=carried, name=output.stem)
        return checkpoint, Plan((plan,))
    if output.suffix != ".ckpt":
        return checkpoint, Plan((torch_save.plan(checkpoint, "", name=output.stem),))
    config = lightning.find_config(root, options.cfg_key)
    if config is None:
        plan = torch_save.plan(checkpoint, "", wrap=lambda state: {"state_dict": state}, name=output.stem)
        notices = ("no configuration was found: the output has state_dict only",)
    else:
        value = config.value
        plan = torch_save.plan(
            checkpoint,
            "",
            wrap=lambda state: {"state_dict": state, "cfg": value},
            carried=config.file,
            name=output.stem,
        )
        notices = (f"cfg is {config.key!r} of {config.file.path.name}",)
    return replace(checkpoint, notices=checkpoint.notices + notices), Plan((plan,))


# -------------------------------------------------------------------------------------------------- after the run


def _check_replaceable(output: Path) -> None:
    """Raise OutputError when there are training checkpoints where the output goes, whatever --force says."""
    if not output.is_dir():
        return
    shards = shards_in(output)
    if shards:
        with suppress(NotFound, Corrupt):
            ours = {Path(file).parts[0] for file in manifest.read(output).files}
            shards = [name for name in shards if name not in ours]
    if shards:
        raise OutputError(
            f"{output} is not replaced: it holds the shards of a training run: {listed(shards, 3)}",
            hint="choose another output, such as a directory in it",
        )


def _check_removable(prepared: Prepared) -> None:
    """Raise OutputError when the shards hold anything that nothing of the output is made of."""
    kept = {place for tensor in prepared.checkpoint.tensors.values() for place in _places(tensor)}
    stored = prepared.opened.located().tensors
    left = [fqn for fqn, tensor in stored.items() if tensor.size and not kept.intersection(_places(tensor))]
    if len(left) <= len(tie.TIES):  # one tensor under two names is written once
        whole = [tensor for fqn, tensor in stored.items() if fqn not in left]
        source = prepared.opened.source
        left = [fqn for fqn in left if not any(same_bytes(stored[fqn], tensor, source) for tensor in whole)]
    left += () if _holds_objects(prepared) else prepared.opened.objects
    if left:
        raise OutputError(
            f"{prepared.opened.origin.path}: --remove-shards would lose what is not in the output: {listed(left)}",
            hint="--all into a .pt file takes it, unless each rank has its own; or remove the shards yourself",
        )


def _holds_objects(prepared: Prepared) -> bool:
    """Whether the output holds all that is no tensor. Of what each rank keeps for itself it has one rank's."""
    from reshard.formats import rank_files

    facts, origin = prepared.plan.facts, prepared.opened.origin
    files = frozenset(file.name for file in origin.files)
    is_one = origin.format == "torch_save" or (".metadata" in files and not rank_files.matches(files))
    return is_one and facts["output"] == "torch_save" and facts["options"].get("what") == "all"


def _places(tensor: Tensor) -> set[tuple[object, ...]]:
    """Where in which files a tensor lies, and which part of the storage there it is."""
    return {(leaf.extent.path, leaf.extent.offset, leaf.offset, leaf.shape, leaf.strides) for leaf in leaves(tensor)}


def _read_again(output: Path, threads: int | None) -> None:
    """Raise OutputError unless the output is what its manifest says."""
    verified = manifest.verify(output, threads)
    if verified.problems:
        raise OutputError(f"{output}: {listed(verified.problems)}", hint="the disk did not keep what was written")


def _remove_shards(prepared: Prepared) -> tuple[Path, ...]:
    files = prepared.checkpoint.origin.files
    for file in files:
        file.unlink()
    for directory in sorted({f.parent for f in files}, key=lambda p: -len(p.parts)):
        if directory.is_dir() and not any(directory.iterdir()):
            directory.rmdir()
    return files


def _merged(prepared: Prepared, result: Result, removed: Sequence[Path]) -> Merged:
    origin = prepared.checkpoint.origin
    return Merged(
        result.destination, origin.path, origin.format, origin.step, result.num_tensors, result.nbytes,
        prepared.plan.read_nbytes(), result.num_checked, result.kept_nbytes, result.seconds,
        prepared.notices + result.told, tuple(removed),
    )  # fmt: skip


def default_output(source: Path) -> Path:
    """Where a merge goes when no output is named: beside the checkpoint, under a name no trainer takes for its own."""
    source = source.resolve()
    return source.parent / f"merged-{source.name}"


__all__ = ["Merged", "Options", "Prepared", "carry_out", "default_output", "kind_of", "merge", "prepare"]
