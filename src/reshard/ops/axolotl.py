"""axolotl's configuration: where its checkpoints are and which model they were trained from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from reshard.errors import InputError, NotFound
from reshard.formats.yaml_bounds import loaded
from reshard.ops.merge import Merged, merge

_LIMIT_NBYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class AxolotlConfig:
    """The two settings that a merge needs."""

    output_dir: Path
    base_model: str | None


def read(path: Path) -> AxolotlConfig:
    """The settings of a YAML file. Raises InputError with line and column when it is none."""
    if not path.is_file():
        raise NotFound(f"{path}: no such file")
    if path.stat().st_size > _LIMIT_NBYTES:
        raise InputError(f"{path} has {path.stat().st_size} bytes")
    try:
        document = loaded(path.read_bytes())
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # a date that is none is a ValueError
        raise InputError(f"{path}: {error}") from error
    if not isinstance(document, Mapping):
        raise InputError(f"{path}: settings are expected, it holds a {type(document).__name__}")
    return of(document, path)


def of(cfg: Any, path: Path | None = None) -> AxolotlConfig:
    """The settings of axolotl's own config object, or of a mapping."""
    output_dir, base = (
        cfg.get(name) if isinstance(cfg, Mapping) else getattr(cfg, name, None) for name in ("output_dir", "base_model")
    )
    where = path or "the config"
    if not isinstance(output_dir, str | Path):
        raise InputError(f"{where} has no output_dir, so there is nowhere to look for checkpoints")
    if base is not None and not isinstance(base, str | Path):
        raise InputError(f"{where}: base_model is a {type(base).__name__}")
    directory = Path(output_dir).expanduser()
    if path is not None and not directory.exists() and (path.parent / directory).exists():
        directory = path.parent / directory
    if isinstance(base, str) and path is not None and not Path(base).exists() and (path.parent / base).is_dir():
        base = path.parent / base
    return AxolotlConfig(directory, None if base is None else str(base))


def merge_fsdp_weights(
    cfg: Any, output_path: str | Path | None = None, save_tokenizer: bool = True, **options: Any
) -> Merged:
    """Merge the newest complete checkpoint of an axolotl run into a HuggingFace directory.

    `cfg` is axolotl's config, a mapping, or the path of its YAML file; the output is `output_dir/merged` by default.
    """
    config = read(Path(cfg)) if isinstance(cfg, str | Path) else of(cfg)
    return merge(
        config.output_dir,
        output_path or config.output_dir / "merged",
        base=config.base_model,
        save_tokenizer=save_tokenizer,
        **options,
    )
