"""Megatron's legacy checkpoints: one torch.save file for each rank of the model, put together again. Read only.

    mp_rank_TT/model_optim_rng.pt          TT the tensor rank; Megatron-LM's `--ckpt-format torch`
    mp_rank_TT_PPP/...                     and the pipeline rank, when there are stages
    mp_rank_TT_EEE/..., mp_rank_TT_PPP_EEE and the expert rank, when experts are spread
    mp_rank_TT[_PPP][_EEE]/model.pt        verl's
    tp_rank_TT_pp_rank_PPP/model_weights.ckpt, mp_rank_TT/model_weights.ckpt: NeMo 1's

    in the file    `args, checkpoint_version, iteration, model` and, with an interleaved pipeline, `model0, model1, ...`

A rank names its modules as it holds them: layers count from 0 in each stage and model chunk, experts in each expert
rank. What comes out has global numbers: virtual stage c*PP + p follows the one before, and each has the layers that its
files list, which is how every split (even, uneven, by layout) lays them out.

    tensor-parallel ranks hold                          merged
    rows of qkv, fc1, embedding, output layer, ...      one below the other
    columns of proj, fc2, out_proj                      side by side
    gate rows and up rows of a gated fc1                all gate rows, then all up rows
    parts of in_proj and conv1d (GDN, Mamba)            part by part
    norms, routers, row-parallel biases, ...            copies: compared, one is taken

Whether fc1 is gated, and how large the parts of a fused projection are, follows from the shapes of the tensors beside
it, so that no setting has to be believed.

Source: Megatron-LM `megatron/training/checkpointing.py`, `core/transformer/{mlp,attention,transformer_layer}.py`,
`core/transformer/moe/experts.py`, `core/ssm/{mamba_mixer,gated_delta_net}.py`, core 0.8 to 0.20.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

from reshard.core.checkpoint import Checkpoint, Origin, same_bytes
from reshard.core.tensor import Source, Tensor, concat, leaves
from reshard.errors import Corrupt, Incomplete, Unsupported, listed
from reshard.formats import nemo1, torch_save
from reshard.formats.megatron_directory import LEGACY, RANK_FILES, Located, rank_file
from reshard.formats.megatron_settings import Layout, Settings, of_args
from reshard.formats.torch_distributed import plain_tensor
from reshard.storage import tar
from reshard.storage.files import Files, LazySource
from reshard.storage.unpickle import Inert, QTensorRef, Rebuilt

NAME = LEGACY
_DIRECTORY = re.compile(r"mp_rank_(\d{2,6})(?:_(\d{3,6}))?(?:_(\d{3,6}))?|tp_rank_(\d{2,6})_pp_rank_(\d{3,6})")
_MAX_NUM_RANKS = 1 << 20


class Rank(NamedTuple):
    """A rank of the model."""

    tensor: int
    pipeline: int = 0
    expert: int = 0


Chunks = Sequence[Mapping[str, Tensor]]
"""The state dicts of a rank: one for each model chunk, one altogether without an interleaved pipeline."""


@dataclass(frozen=True, slots=True)
class Opened:
    """What the rank files of a directory hold, together."""

    checkpoint: Checkpoint
    settings: Settings
    optimizer: str
    left_out: Mapping[str, int]
    checkpoint_version: float | None


def open(located: Located, *, stated: Settings | None = None, verify: bool = False) -> Opened:
    """The rank files as one checkpoint, under module names with global numbers. Pickles are read, storages are not.

    `stated` are settings from a file beside the ranks'; otherwise they come from the arguments in them. With `verify`
    every copy of a replicated tensor is read and compared. Raises Incomplete naming the ranks that are missing,
    Unsupported for models from before Megatron-Core.
    """
    files = Files()
    directories = _directories(located.weights)
    read = {numbers: _RankFile.read(_file(located.weights / name), files) for numbers, name in directories.items()}
    first = next(iter(read.values()))
    settings = stated or first.stated or (of_args(first.args) if first.args is not None else Settings())
    ranks = {_rank(n, settings.layout, read): file for n, file in read.items()}
    _check_complete(located.weights, ranks, settings.layout)
    alike = _check_distinct(located.weights, {rank: file.chunks for rank, file in ranks.items()}, files)
    source = LazySource(files)
    merged = merge(located.weights, {r: f.chunks for r, f in ranks.items()}, settings, source if verify else None)
    paths = [_file(located.weights / name) for name in directories.values()]
    sizes = [max(rank[axis] for rank in ranks) + 1 for axis in range(3)]
    layout = Layout(sizes[0], sizes[1], expert=sizes[2])
    origin = Origin(
        located.weights,
        NAME,
        located.writer,
        step=located.iteration if isinstance(located.iteration, int) else first.iteration,
        world_size=len(ranks),
        placements=(str(layout),),
        files=tuple(paths),
    )
    checkpoint = Checkpoint(
        merged, origin, source, objects=first.objects, dialect="megatron", notices=(*located.notices, *alike)
    )
    left_out = {"extra_state": sum(f.num_extra_states for f in read.values()), "optimizer": first.num_states}
    return Opened(
        checkpoint,
        settings,
        _optimizer(paths, first),
        {what: count for what, count in left_out.items() if count},
        first.version,
    )


# ------------------------------------------------------------------------------------------------------- rank files


@dataclass(slots=True)
class _RankFile:
    """What one rank's file holds."""

    path: Path
    chunks: list[dict[str, Tensor]] = field(default_factory=list)
    args: Any = None
    stated: Settings | None = None
    """Where they are not arguments."""
    version: float | None = None
    iteration: int | None = None
    num_extra_states: int = 0
    num_states: int = 0
    """Entries of the optimizer's."""
    objects: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path, files: Files) -> _RankFile:
        file = torch_save.read(path, files)
        found = cls(path)
        for state in found._state_dicts(file.value):
            found.chunks.append(found._tensors(file, state))
        if not any(found.chunks):
            raise Corrupt(f"{path} holds no tensor of a model")
        return found

    def _state_dicts(self, value: Any) -> list[Any]:
        """The model's state dicts in whatever they are wrapped in; notes what lies beside them."""
        if isinstance(value, list):  # verl: one for each model chunk
            return value
        if not isinstance(value, Mapping):
            raise Corrupt(f"{self.path} holds a {type(value).__name__}, a dict was expected")
        numbered = sorted(
            (int(m[1]), k) for k in value if isinstance(k, str) and (m := re.fullmatch(r"model_?(\d+)", k))
        )
        wrapped = [value["model"]] if "model" in value else [value[key] for _, key in numbered]
        if isinstance(value.get("state_dict"), Mapping):  # a run of NeMo 1's, as Lightning saves it
            self.stated = nemo1.settings_among(value, str(self.path))
            self.iteration = value["global_step"] if type(value.get("global_step")) is int else None
            self.num_states = len(value["optimizer_states"]) if isinstance(value.get("optimizer_states"), list) else 0
            return [value["state_dict"]]
        if not wrapped:  # NeMo 1: the state dict itself
            return [value]
        args, version = value.get("args"), value.get("checkpoint_version")
        self.args = args if isinstance(args, Inert | Mapping) else None
        self.version = float(version) if isinstance(version, int | float) else None
        self.iteration = value["iteration"] if type(value.get("iteration")) is int else None
        state = value.get("optimizer")
        self.num_states = len(state) if isinstance(state, Mapping) else int(state is not None)
        kept = ("args", "checkpoint_version", "iteration", "content_metadata")
        self.objects = {key: value[key] for key in kept if key in value}
        return wrapped

    def _tensors(self, file: torch_save.File, state: Any) -> dict[str, Tensor]:
        if not isinstance(state, Mapping):
            raise Corrupt(f"{self.path}: the model is a {type(state).__name__}, a dict was expected")
        self._check_core(state)
        found: dict[str, Tensor] = {}
        for name, leaf in state.items():
            if not isinstance(name, str) or "_extra_state" in name:
                self.num_extra_states += 1
                continue
            ref = plain_tensor(leaf)
            if ref is not None:
                found[name] = file.tensor(ref)
            elif isinstance(leaf, Rebuilt | QTensorRef):
                kind = leaf.cls.name if isinstance(leaf, Rebuilt) else "quantized tensor"
                raise Unsupported(
                    f"{self.path}: {name} is a {kind}: the weights are stored quantized",
                    hint="save the checkpoint again with weights of 16 or 32 bits (without --fp8-param-gather)",
                )
        return nemo1.to_core(found, str(self.path)) if any(map(nemo1.is_before_core, found)) else found

    def _check_core(self, state: Mapping[Any, Any]) -> None:
        """Raise Unsupported for the models that Megatron-LM had before Megatron-Core."""
        nested = [key for key in state if isinstance(state[key], Mapping)]
        old = [key for key in state if isinstance(key, str) and re.search(r"query_key_value|dense_h_to_4h", key)]
        old = [key for key in old if not nemo1.is_before_core(key)]
        if old or "language_model" in nested or "encoder" in nested:
            raise Unsupported(
                f"{self.path} is a model from before Megatron-Core: {listed(map(str, old or nested), 3)}",
                hint="convert it first with Megatron-LM's tools/checkpoint/convert.py, --saver core",
            )


def _directories(path: Path) -> dict[tuple[int, ...], str]:
    """Names of the ranks' directories by the numbers in them."""
    found: dict[tuple[int, ...], str] = {}
    for name in tar.names(path):
        match = _DIRECTORY.fullmatch(name)
        if match and (path / name).is_dir():
            found[tuple(int(n) for n in match.groups() if n is not None)] = name
    if len({len(numbers) for numbers in found}) > 1:
        raise Corrupt(f"{path}: the directories of several saves: {listed(found.values())}")
    return found or {(0,): ""}  # NeMo 1 has a single rank's file here


def _file(directory: Path) -> Path:
    there = rank_file(directory)
    if there is None:
        found = listed(tar.names(directory)) or "it is empty"
        raise Incomplete(
            f"{directory} holds none of {', '.join(RANK_FILES)}: {found}",
            hint="copy it from the node that wrote it",
        )
    return there


def _rank(numbers: tuple[int, ...], layout: Layout | None, read: Mapping[tuple[int, ...], _RankFile]) -> Rank:
    """Which rank the numbers of a directory mean: a second one may be the stage or the expert rank."""
    if len(numbers) != 2 or not _second_is_expert(layout, read):
        return Rank(*numbers)
    return Rank(numbers[0], 0, numbers[1])


def _second_is_expert(layout: Layout | None, read: Mapping[tuple[int, ...], _RankFile]) -> bool:
    """By the settings; without them by the final norm, which just the last stage has, and every expert rank."""
    if layout is not None:
        return layout.pipeline == 1 and layout.expert > 1
    ends = [any("final_" in name for chunk in file.chunks for name in chunk) for file in read.values()]
    return len(ends) > 1 and all(ends)


def _check_complete(path: Path, ranks: Mapping[Rank, _RankFile], layout: Layout | None) -> None:
    """Raise Incomplete, naming the directories, when a rank of the grid is missing."""
    has = {axis: max(rank[axis] for rank in ranks) + 1 for axis in range(3)}
    if layout is not None:
        said = dict(enumerate((layout.tensor, layout.pipeline, layout.expert)))
        has = {axis: max(n, said[axis]) for axis, n in has.items()}
    if has[0] * has[1] * has[2] > _MAX_NUM_RANKS:
        raise Corrupt(f"{path}: ranks up to tensor {has[0]}, pipeline {has[1]}, expert {has[2]}")
    grid = [Rank(t, p, e) for e in range(has[2]) for p in range(has[1]) for t in range(has[0])]
    missing = [_name(rank, has) for rank in grid if rank not in ranks]
    if missing:
        raise Incomplete(
            f"{path}: {len(missing)} of {len(grid)} ranks are missing: {listed(missing)}",
            hint="copy them from the nodes that wrote them",
        )


def _check_distinct(path: Path, ranks: Mapping[Rank, Chunks], files: Files) -> list[str]:
    """Raise Corrupt when one rank's file is a copy of another's: the same bytes of tensors that all ranks share out,
    and not of one value throughout, as what was set to zeros or ones has.

    Expert ranks may hold the same, where a dense model was made into one of experts: that is a sentence for the user.
    """
    alike: list[str] = []
    first: dict[tuple[tuple[str, int | None], ...], Rank] = {}
    for rank, chunks in ranks.items():
        own = [
            (name, leaf) for chunk in chunks for name, t in chunk.items() if not _is_copy(name) for leaf in leaves(t)
        ]
        looks = tuple((name, leaf.extent.crc32) for name, leaf in own)
        if not looks or any(crc is None for _, crc in looks):
            continue
        other = first.setdefault(looks, rank)
        largest = max((leaf.extent for _, leaf in own), key=lambda extent: extent.nbytes)
        data = files.pread(largest.path, largest.offset, min(largest.nbytes, 1 << 16))
        if other == rank or data[16:] == data[:-16]:
            continue
        if other._replace(expert=rank.expert) == rank:
            said = f"{_words(other)} and {_words(rank)} hold the same experts: copies of one, or a file over another"
            alike.append(said)
        else:
            raise Corrupt(
                f"{path}: the files of {_words(other)} and {_words(rank)} hold the same weights: one was copied over"
                " the other",
                hint="copy both again from the ranks that wrote them",
            )
    return alike


def _is_copy(name: str) -> bool:
    """Whether ranks of one stage hold the same under a name: by its own rule, and no other."""
    return _COPIES.fullmatch(name) is not None and _ROWS.fullmatch(name) is None


def _words(rank: Rank) -> str:
    return ", ".join(f"{axis} rank {n}" for axis, n in zip(rank._fields, rank, strict=True))


def _name(rank: Rank, has: Mapping[int, int]) -> str:
    pipeline = f"_{rank.pipeline:03d}" if has[1] > 1 else ""
    return f"mp_rank_{rank.tensor:02d}{pipeline}" + (f"_{rank.expert:03d}" if has[2] > 1 else "")


def _optimizer(paths: Sequence[Path], first: _RankFile) -> str:
    if any((path.parent / "distrib_optim.pt").is_file() for path in paths):
        return "distrib_optim.pt"
    return "plain" if first.num_states else "none"


# ------------------------------------------------------------------------------------------------------------ merge


def merge(
    where: Path, ranks: Mapping[Rank, Chunks], settings: Settings, source: Source | None = None
) -> dict[str, Tensor]:
    """The tensors of all ranks as whole ones, by module names with global numbers.

    The ranks are a full grid. With a `source` every copy of a replicated tensor is read and compared; otherwise their
    checksums are, where the files have them. Raises Corrupt when copies differ or shapes do not fit together,
    Unsupported for tensors that no rule says how to merge.
    """
    _check_expert_tensor(where, ranks, settings)
    _check_interleaved(where, settings)
    offsets = _layer_offsets(where, ranks, settings)
    num_experts = {rank.expert for rank in ranks}
    held: dict[str, dict[Rank, Tensor]] = defaultdict(dict)
    for rank, chunks in sorted(ranks.items()):
        for number, chunk in enumerate(chunks):
            named = _numbered(where, chunk, offsets[rank.pipeline, number], rank.expert, len(num_experts), settings)
            for name, tensor in named.items():
                if rank in held[name]:
                    raise Corrupt(f"{where}: {name} is in two model chunks of one rank")
                held[name][rank] = tensor
    merger = _Merger(where, source)
    for name, by_rank in held.items():
        merger.over_tensor_ranks(name, by_rank, held)
    return _without_tied_copy(where, merger.copies(), settings, source)


def _check_expert_tensor(where: Path, ranks: Mapping[Rank, Chunks], settings: Settings) -> None:
    layout = settings.layout
    if layout is None or layout.expert_tensor in (None, layout.tensor):
        return
    if any(".experts." in name for chunks in ranks.values() for chunk in chunks for name in chunk):
        raise Unsupported(
            f"{where}: experts are cut over {layout.expert_tensor} ranks and the rest over {layout.tensor}:"
            " the names of the files do not tell which rank has which expert",
            hint="load it with Megatron-LM and save it with --ckpt-format torch_dist",
        )


def _check_interleaved(where: Path, settings: Settings) -> None:
    if settings.values.get("moe_mlp_glu_interleave_size"):
        raise Unsupported(f"{where}: gate and up rows are interleaved in memory (moe_mlp_glu_interleave_size)")


_LAYER = re.compile(r"((?:module\.|model\.|language_model\.)*decoder\.layers\.)(\d{1,6})(\..*)")
"""Layers that stages share out. Those of a vision model or of MTP are all on one stage."""


def _layer_offsets(where: Path, ranks: Mapping[Rank, Chunks], settings: Settings) -> dict[tuple[int, int], int]:
    """The number of the first layer of each (stage, model chunk). Raises Incomplete unless all add up."""
    num_stages = max(rank.pipeline for rank in ranks) + 1
    counts = {
        (rank.pipeline, number): 1 + max((int(m[2]) for m in map(_LAYER.fullmatch, chunk) if m), default=-1)
        for rank, chunks in ranks.items()
        for number, chunk in enumerate(chunks)
    }
    num_chunks = {len(chunks) for chunks in ranks.values()}
    if len(num_chunks) > 1:
        raise Corrupt(f"{where}: ranks with {sorted(num_chunks)} model chunks")
    offsets, at = {}, 0
    for number in range(num_chunks.pop()):
        for stage in range(num_stages):
            offsets[stage, number] = at
            at += counts[stage, number]
    num_layers = settings.size("num_layers")
    if num_layers is not None and at != num_layers:
        stages = "; ".join(f"stage {p}, chunk {c}: {n}" for (p, c), n in sorted(counts.items()))
        raise Incomplete(f"{where}: {at} layers in the files ({stages}), {num_layers} in the settings")
    return offsets


_EXPERT = re.compile(r"(.*\.experts\.(?:local_experts\.(?=\d+\.)|linear_fc[12]\.(?:weight|bias)(?=\d+$)))(\d{1,6})(.*)")
_GROUPED = re.compile(r"(.*\.experts\.)weight([12])")


def _numbered(
    where: Path, chunk: Mapping[str, Tensor], offset: int, expert: int, num_expert_ranks: int, settings: Settings
) -> dict[str, Tensor]:
    """The tensors of one state dict under names with global numbers."""
    split = _experts_apart(where, chunk, settings, num_expert_ranks)
    counts: dict[str, int] = defaultdict(int)
    for name in split:
        match = _EXPERT.fullmatch(name)
        if match:
            counts[match[1]] = max(counts[match[1]], int(match[2]) + 1)
    found: dict[str, Tensor] = {}
    for name, tensor in split.items():
        match = _EXPERT.fullmatch(name)
        if match:
            name = f"{match[1]}{expert * counts[match[1]] + int(match[2])}{match[3]}"
        layer = _LAYER.fullmatch(name)
        if layer:
            name = f"{layer[1]}{int(layer[2]) + offset}{layer[3]}"
        found[name] = tensor
    return found


def _experts_apart(
    where: Path, chunk: Mapping[str, Tensor], settings: Settings, num_expert_ranks: int
) -> dict[str, Tensor]:
    """With the two tensors of the old GroupedMLP cut into one for each expert, as Transformer Engine's has them.

    weight1 is (experts, hidden, fc1 rows) and weight2 (experts, fc2 columns, hidden), in other shapes and transposed.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in chunk.items():
        match = _GROUPED.fullmatch(name)
        if match is None:
            found[name] = tensor
            continue
        total, hidden = settings.size("num_moe_experts"), settings.size("hidden_size")
        count = total // num_expert_ranks if total else 0
        if not count or not hidden or tensor.size % (count * hidden):
            raise Unsupported(f"{where}: {name} of shape {list(tensor.shape)}: {total} experts of width {hidden}")
        inner = tensor.size // (count * hidden)
        apart = tensor.reshape((count, hidden, inner) if match[2] == "1" else (count, inner, hidden))
        for number in range(count):
            found[f"{match[1]}linear_fc{match[2]}.weight{number}"] = apart[number].permute(1, 0)
    return found


# ------------------------------------------------------------------------------------------------- over tensor ranks

_ROWS = re.compile(
    r"(?:.*\.)?(?:word_embeddings|output_layer|linear_qkv|linear_q|linear_kv|linear_q_proj|linear_q_up_proj"
    r"|linear_kv_up_proj|linear_qgkv|eh_proj)\.(?:weight|bias)"
    r"|.*\.(?:mixer|self_attention)\.(?:A_log|dt_bias|D)|.*\.mixer\.norm\.weight|.*\.core_attention\.softmax_offset"
)
_COLUMNS = re.compile(r".*\.(?:linear_proj|linear_fc2|out_proj)\.weight\d*")
_FC1 = re.compile(r"(.*\.)linear_fc1\.(?:weight|bias)(\d*)")
_PARTS = re.compile(r"(.*\.(?:mixer|self_attention)\.)(?:in_proj\.(?:weight|bias)|conv1d[._](?:weight|bias))")
_COPIES = re.compile(
    r".*(?:norm|layer_norm)(?:_weight|_bias|\.weight|\.bias)|.*\.router\..*|.*\.gate_weight|.*\.position_embeddings\.weight"
    r"|.*\.linear_(?:q|kv|qkv)_down_proj\.(?:weight|bias)|.*\.(?:linear_proj|linear_fc2|out_proj)\.bias\d*"
)


class _Merger:
    """Puts the tensors of one name together, over tensor ranks and then over the rest."""

    def __init__(self, where: Path, source: Source | None) -> None:
        self.where = where
        self.source = source
        self._merged: dict[str, dict[tuple[int, int], Tensor]] = defaultdict(dict)
        """By name, then by (stage, expert rank)."""

    def over_tensor_ranks(self, name: str, by_rank: Mapping[Rank, Tensor], held: Mapping[str, Any]) -> None:
        groups: dict[tuple[int, int], list[tuple[Rank, Tensor]]] = defaultdict(list)
        for rank, tensor in sorted(by_rank.items()):
            groups[rank.pipeline, rank.expert].append((rank, tensor))
        for place, group in groups.items():
            tensors = [tensor for _, tensor in group]
            self._merged[name][place] = tensors[0] if len(group) == 1 else self._merge(name, group[0][0], tensors, held)

    def copies(self) -> dict[str, Tensor]:
        """One of each name; several stages or expert ranks that have it hold the same."""
        found: dict[str, Tensor] = {}
        for name, by_place in self._merged.items():
            places = list(by_place.items())
            for place, tensor in places[1:]:
                what = f"stage {places[0][0][0]}, expert rank {places[0][0][1]}", f"{place[0]}, {place[1]}"
                self._check_same(name, places[0][1], tensor, *what)
            found[name] = places[0][1]
        return found

    def _merge(self, name: str, rank: Rank, tensors: list[Tensor], held: Mapping[str, Any]) -> Tensor:
        self._check_alike(name, tensors)
        if _ROWS.fullmatch(name):
            return concat(tensors, 0)
        if _COLUMNS.fullmatch(name):
            return concat(tensors, 1)
        fc1 = _FC1.fullmatch(name)
        if fc1:
            return self._fc1(name, tensors, self._beside(held, f"{fc1[1]}linear_fc2.weight{fc1[2]}", rank))
        parts = _PARTS.fullmatch(name)
        if parts:
            return by_parts(tensors, self._part_sizes(name, parts[1], tensors[0].shape[0], rank, held))
        for number, tensor in enumerate(tensors[1:], 1):
            self._check_same(name, tensors[0], tensor, "tensor rank 0", str(number))
        return tensors[0]

    def _fc1(self, name: str, tensors: list[Tensor], fc2: Tensor | None) -> Tensor:
        """Gated when there are two rows for a column of fc2."""
        rows, columns = tensors[0].shape[0], fc2.shape[1] if fc2 is not None and len(fc2.shape) == 2 else 0
        if rows == 2 * columns:
            return by_parts(tensors, [columns, columns])
        if rows == columns:
            return concat(tensors, 0)
        raise Corrupt(f"{self.where}: {name} has {rows} rows on a rank, its linear_fc2 {columns} columns")

    def _part_sizes(self, name: str, module: str, rows: int, rank: Rank, held: Mapping[str, Any]) -> list[int]:
        """Rows of the parts of a fused projection or convolution on one rank, by the shapes beside it."""
        heads = self._beside(held, f"{module}A_log", rank)
        out = self._beside(held, f"{module}out_proj.weight", rank)
        conv = self._beside(held, f"{module}conv1d.weight", rank) or self._beside(held, f"{module}conv1d_weight", rank)
        if heads is None or out is None or conv is None or len(out.shape) != 2:
            raise Unsupported(f"{self.where}: {name} cannot be cut: there is no A_log, out_proj and conv1d beside it")
        inner, each, odd = out.shape[1], *divmod(conv.shape[0] - out.shape[1], 2)
        if module.endswith("mixer."):  # Mamba: z, x, B, C, dt
            convolved, whole = [inner, each, each], [inner, inner, each, each, heads.size]
        else:  # gated delta net: query, key, value, z, beta, alpha
            convolved, whole = [each, each, inner], [each, each, inner, inner, heads.size, heads.size]
        sizes = convolved if "conv1d" in name else whole
        if odd or each <= 0 or sum(sizes) != rows:
            raise Corrupt(f"{self.where}: {name} has {rows} rows on a rank, its parts {sizes}")
        return sizes

    def _beside(self, held: Mapping[str, Any], name: str, rank: Rank) -> Tensor | None:
        """What the same rank has under another name."""
        found: Tensor | None = held.get(name, {}).get(rank)
        return found

    def _check_alike(self, name: str, tensors: Sequence[Tensor]) -> None:
        kinds = {(t.dtype.name, t.shape) for t in tensors}
        if len(kinds) > 1:
            shown = listed(f"{dtype} {list(shape)}" for dtype, shape in sorted(kinds))
            raise Corrupt(f"{self.where}: {name} differs between tensor ranks: {shown}")

    def _check_same(self, name: str, a: Tensor, b: Tensor, first: str, second: str) -> None:
        """Copies are compared by checksum, or byte by byte when asked for or when no rule says that they are copies."""
        is_same = _same_checksum(a, b)
        if is_same is None and (self.source is not None or not _COPIES.fullmatch(name)):
            is_same = same_bytes(a, b, self.source or LazySource())
        if is_same is not False and (a.dtype, a.shape) == (b.dtype, b.shape):
            return
        if _COPIES.fullmatch(name) or _ROWS.fullmatch(name):
            raise Corrupt(f"{self.where}: {name} should be the same on all ranks; {first} and {second} differ")
        raise Unsupported(
            f"{self.where}: {name} differs between {first} and {second}, and no rule says how to merge it"
        )


def by_parts(tensors: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
    """Rows of every rank cut into parts of `sizes`, and put together part by part."""
    found, at = [], 0
    for size in sizes:
        found += [tensor[at : at + size] for tensor in tensors]
        at += size
    return concat([part for part in found if part.shape[0]], 0)


def _same_checksum(a: Tensor, b: Tensor) -> bool | None:
    """Whether the files' checksums of two tensors agree; None when they have none of just these bytes."""
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    pairs = list(zip_longest(leaves(a), leaves(b)))
    for one, other in pairs:
        if one is None or other is None or not (one.dense and other.dense) or one.shape != other.shape:
            return None
        if one.extent.crc32 is None or other.extent.crc32 is None:
            return None
    return all(one.extent.crc32 == other.extent.crc32 for one, other in pairs)


def _without_tied_copy(
    where: Path, tensors: dict[str, Tensor], settings: Settings, source: Source | None
) -> dict[str, Tensor]:
    """Without the copy of the embedding that the last stage of a tied model keeps as its output layer."""
    if settings.values.get("share_embeddings_and_output_weights") is not True:
        return tensors
    names = [name for name in tensors if re.fullmatch(r"(?:.*\.)?output_layer\.weight", name)]
    for name in names:
        embedding = tensors.get(name.removesuffix("output_layer.weight") + "embedding.word_embeddings.weight")
        is_same = None if embedding is None else _same_checksum(tensors[name], embedding)
        if is_same is None and embedding is not None and source is not None:
            is_same = same_bytes(tensors[name], embedding, source)
        if embedding is None or is_same is False:
            raise Corrupt(f"{where}: {name} differs from the embedding, which the settings say it shares")
    return {name: tensor for name, tensor in tensors.items() if name not in names}
