"""NeMo 1.0's settings in NeMo 2.0: every one is accounted for, and the program says only what NeMo 2 has."""

from __future__ import annotations

import ast
import builtins
import dataclasses
import json
import math
import os
import shutil
import subprocess
import sys
import tarfile
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from reshard.cli.main import main
from reshard.errors import Corrupt, InputError, NotFound, ReshardError
from reshard.ops.migrate import Finding, Migration, migrated, parse, program, read, report
from reshard.ops.migrate.row import Code, Row, same
from reshard.ops.migrate.tables import ROWS, TABLES
from reshard.ops.migrate.targets import MOCK_DATA, SCHEDULERS, TARGETS, Later

ROOT = Path(__file__).parent.parent
DATA = ROOT / "tests" / "data" / "nemo"
STOCK = sorted((DATA / "yaml").glob("*.yaml"))
GUIDE = ROOT / "docs" / "nemo.md"
SIGNATURES: dict[str, dict[str, list[Any]]] = json.loads((DATA / "signatures.json").read_text())
OF_CONFIG = ("ModelParallelConfig", "TransformerConfig", "GPTConfig", "Llama31Config")
BEYOND = {  # what Lightning's loggers hand on to TensorBoard and to Weights & Biases
    "TensorBoardLogger": {"comment", "flush_secs", "max_queue", "purge_step"},
    "WandbLogger": {"entity", "group", "tags", "notes", "config", "job_type", "mode", "resume"},
}
NOT_GPT = {  # what only Mamba's YAML has
    "model.hybrid_override_pattern", "model.mamba_ssm_ngroups", "model.activations_checkpoint_recurrent",
    "model.data.masked_lm_prob", "model.data.short_seq_prob", "model.data.ceil_to_power_2",
    "model.data.get_attention_mask_from_fusion", "model.data.pad_to_max_length",
}  # fmt: skip


def of(nested: Mapping[str, Any] | str) -> Migration:
    """The migration of nested settings, or of YAML text."""
    return migrated(parse(nested if isinstance(nested, str) else yaml.safe_dump(dict(nested))))


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """`{"model.fp8": True}` as mappings in mappings."""
    tree: dict[str, Any] = {}
    for key, value in flat.items():
        *above, last = key.split(".")
        at = tree
        for part in above:
            at = at.setdefault(part, {})
        at[last] = value
    return tree


def finding(migration: Migration, key: str) -> Finding:
    (found,) = [f for f in migration.findings if f.key == key]
    return found


def places(migration: Migration) -> dict[str, Any]:
    """`section.argument` to value, of all that is written; expressions as text."""
    return {
        f"{section}.{a.name}": a.value.text if isinstance(a.value, Code) else a.value
        for section, arguments in migration.calls.items()
        for a in arguments
    }


def leaves(tree: Mapping[Any, Any], above: tuple[str, ...] = ()) -> Iterator[str]:
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from leaves(value, (*above, str(key)))
        else:
            yield ".".join((*above, str(key)))


# --------------------------------------------------------------------------------------------------------------- stock


@pytest.mark.parametrize("path", STOCK, ids=lambda p: p.stem)
def test_a_stock_yaml_has_no_unknown_setting(path: Path) -> None:
    unknown = {f.key for f in migrated(read(path)).unknown}
    assert unknown == (NOT_GPT if path.stem.startswith("mamba") else set())


@pytest.mark.parametrize("path", STOCK, ids=lambda p: p.stem)
def test_every_leaf_of_a_stock_yaml_is_reported_once(path: Path) -> None:
    migration = migrated(read(path))
    prefix = "model." if migration.document.is_model_config else ""
    expected = [prefix + key for key in leaves(yaml.safe_load(path.read_text()))]
    assert [f.key for f in migration.findings] == expected
    assert [s["key"] for s in report(migration)["settings"]] == expected


@pytest.mark.parametrize("path", STOCK, ids=lambda p: p.stem)
def test_values_are_those_that_omegaconf_reads_and_resolves(path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the name is deprecated in the newest release, the other missing in 2.3
        OmegaConf.register_new_resolver("multiply", lambda x, y: x * y, replace=True)
        OmegaConf.register_new_resolver("sum", lambda x, y: x + y, replace=True)
    config = OmegaConf.load(path)
    document = read(path)
    skip = 1 if document.is_model_config else 0
    for setting in document.settings:
        if setting.unresolved or "." in "".join(setting.path) or setting.value == "???":
            continue
        expected = OmegaConf.select(config, ".".join(setting.path[skip:]))
        assert setting.value == (OmegaConf.to_container(expected) if OmegaConf.is_config(expected) else expected)


@pytest.mark.parametrize("path", STOCK, ids=lambda p: p.stem)
def test_the_program_of_a_stock_yaml_says_only_what_nemo_has(path: Path) -> None:
    holds(migrated(read(path)))


def holds(migration: Migration) -> None:
    """The program compiles, every name in it is bound, and every keyword is one of the release that it asks for."""
    text = program(migration)
    tree = ast.parse(text)
    compile(tree, "strategy.py", "exec")
    bound = set(dir(builtins)) | {"__name__"}
    for node in tree.body:
        loads = {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
        assert loads <= bound
        if isinstance(node, ast.Import | ast.ImportFrom):
            bound |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Assign):
            bound |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    needs = release(migration.needs)
    for call in (n for n in ast.walk(tree) if isinstance(n, ast.Call) and n.keywords):
        name = ast.unparse(call.func).rpartition(".")[2]
        if name in ("pretrain", "GPTModel", "LlamaModel"):
            continue
        known = taken(name)
        for keyword in call.keywords:
            assert keyword.arg in known or keyword.arg in BEYOND.get(name, ())
            assert release(known.get(keyword.arg or "", ["2.1"])[0]) <= needs


def release(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(".")))


def taken(name: str) -> dict[str, list[Any]]:
    """What a class takes in NeMo's own sources."""
    if name in ("GPTConfig", "Llama31Config"):
        merged: dict[str, list[Any]] = {}
        for part in OF_CONFIG[:3] if name == "GPTConfig" else OF_CONFIG:
            for field, (since, default) in SIGNATURES[part].items():
                merged[field] = [min(since, merged.get(field, [since])[0]), default]
        return merged
    return SIGNATURES[name]


def test_the_program_of_a_stock_yaml_is_as_it_was() -> None:
    """`python tests/test_migrate.py` writes it anew."""
    path = DATA / "yaml" / "gpt_v2.0.0rc0.yaml"
    assert program(migrated(read(path))) == (DATA / "gpt_v2.0.0rc0.migrated.txt").read_text()


# ------------------------------------------------------------------------------------------------------------- targets


@pytest.mark.parametrize("section", [s for s in TARGETS if s != "scheduler"])
def test_arguments_are_those_of_the_sources_and_of_the_releases_that_are_said(section: str) -> None:
    target = TARGETS[section]
    known = taken("Llama31Config" if section == "config" else target.shown)
    said = dict.fromkeys(target.names, "2.1") | {name: later.since for name, later in target.later.items()}
    beyond = BEYOND.get(target.shown, set())
    assert {name: known[name][0] for name in said if name not in beyond} == {
        name: since for name, since in said.items() if name not in beyond
    }


@pytest.mark.parametrize(
    ("name", "later", "default"),
    [
        (name, later, taken("Llama31Config" if section == "config" else target.shown)[name][1])
        for section, target in TARGETS.items()
        for name, later in target.later.items()
    ],
)
def test_defaults_of_later_arguments_are_those_of_the_sources(name: str, later: Later, default: str) -> None:
    assert repr(later.default) == default or (name == "fp8_param_gather" and default == "None")


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedules_take_what_the_sources_say(name: str) -> None:
    assert SCHEDULERS[name] == frozenset(SIGNATURES[f"{name}Scheduler"])


@pytest.mark.slow  # megatron-core takes its time to be imported
@pytest.mark.filterwarnings("ignore")  # Transformer Engine and apex are not there
@pytest.mark.parametrize("path", STOCK, ids=lambda p: p.stem)
def test_megatron_core_takes_the_arguments_of_a_stock_yaml(path: Path) -> None:
    pytest.importorskip("megatron.core", exc_type=ImportError)
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig
    from megatron.core.transformer import TransformerConfig

    calls = migrated(read(path)).calls
    here = {"apply_rope_fusion", "activation_func"}  # need Transformer Engine and NeMo
    for section, made in (
        ("config", TransformerConfig), ("optimizer", OptimizerConfig), ("ddp", DistributedDataParallelConfig)
    ):  # fmt: skip
        fields = {field.name for field in dataclasses.fields(made)} - here
        given = [a for a in calls.get(section, ()) if a.name in fields and not isinstance(a.value, Code)]
        assert not given or made(**{a.name: a.value for a in given})


def test_mock_data_take_what_the_sources_say() -> None:
    real = TARGETS["data"].names & SIGNATURES["MockDataModule"].keys()
    assert real - {"tokenizer", "num_train_samples", "num_val_samples", "num_test_samples"} == MOCK_DATA


# ---------------------------------------------------------------------------------------------------------------- rows

LAYERS = {"model.num_layers": 2}
OPTIM = {"model.optim.name": "fused_adam"}
COSINE = {"model.optim.sched.name": "CosineAnnealing", "trainer.max_steps": 1000}
NOTHING: dict[str, Any] = {}

CASES: list[tuple[str, Any, dict[str, Any], str, dict[str, Any], bool]] = [
    # row, value, settings beside it, status, what is written, whether somebody has to look
    ("model.dist_ckpt_format", "torch_dist", {}, "renamed", {"strategy.save_ckpt_format": "torch_dist"}, False),
    ("model.dist_ckpt_format", "zarr", {}, "changed", {"strategy.save_ckpt_format": "torch_dist"}, True),
    ("model.dist_ckpt_format", "tar", {}, "changed", {"strategy.save_ckpt_format": "torch_dist"}, True),
    ("model.dist_ckpt_assume_constant_structure", True, {}, "renamed",
     {"strategy.ckpt_assume_constant_structure": True}, True),
    ("model.dist_ckpt_load_strictness", "log_all", {}, "renamed", {"strategy.ckpt_load_strictness": "log_all"}, False),
    ("model.dist_ckpt_load_strictness", "lax", {}, "renamed", {"strategy.ckpt_load_strictness": "lax"}, True),
    ("exp_manager.checkpoint_callback_params.async_save", True, {"model.dist_ckpt_format": "zarr"}, "renamed",
     {"strategy.ckpt_async_save": True, "strategy.save_ckpt_format": "torch_dist"}, False),
    ("exp_manager.create_checkpoint_callback", True, {}, "changed", {"checkpoint.": True}, False),
    ("exp_manager.create_checkpoint_callback", False, {"exp_manager.checkpoint_callback_params.mode": "min"}, "removed",
     NOTHING, False),
    ("exp_manager.checkpoint_callback_params.every_n_epochs", 2, {}, "kept", {"checkpoint.every_n_epochs": 2}, False),
    ("exp_manager.checkpoint_callback_params.every_n_epochs", 1,
     {"exp_manager.checkpoint_callback_params.every_n_train_steps": 100}, "changed",
     {"checkpoint.every_n_epochs": None, "checkpoint.every_n_train_steps": 100}, False),
    ("exp_manager.checkpoint_callback_params.train_time_interval", None, {}, "kept",
     {"checkpoint.train_time_interval": None}, False),
    ("exp_manager.checkpoint_callback_params.train_time_interval", "00:30:00", {}, "removed", NOTHING, True),
    ("exp_manager.resume_from_checkpoint", "/ckpt", {}, "renamed", {"resume.resume_from_path": "/ckpt"}, True),
    ("model.resume_from_checkpoint", None, {}, "renamed", {"resume.resume_from_path": None}, False),
    ("model.resume_from_checkpoint", "/a", {"exp_manager.resume_from_checkpoint": "/b"}, "renamed",
     {"resume.resume_from_path": "/b"}, True),
    ("trainer.resume_from_checkpoint", "/ckpt", {}, "renamed", {"resume.resume_from_path": "/ckpt"}, True),
    ("model.restore_from_path", "/a.nemo", {}, "renamed",
     {"restore.": True, "restore.path": "/a.nemo", "restore.load_optim_state": False}, True),
    ("model.restore_from_path", None, {}, "renamed", NOTHING, False),
    ("restore_from_path", "/a.nemo", {"model.seed": 1234}, "renamed", {"restore.path": "/a.nemo"}, True),
    ("model.restore_from_ckpt", "/ckpt", {}, "renamed",
     {"restore.path": "/ckpt", "restore.load_optim_state": True}, True),
    ("model.virtual_pipeline_model_parallel_size", 1, {}, "changed",
     {"strategy.virtual_pipeline_model_parallel_size": None}, False),
    ("model.virtual_pipeline_model_parallel_size", 3, {}, "kept",
     {"strategy.virtual_pipeline_model_parallel_size": 3}, False),
    ("model.sequence_parallel", True, {}, "changed", {"strategy.sequence_parallel": False}, False),
    ("model.sequence_parallel", True, {"model.tensor_model_parallel_size": 2}, "kept",
     {"strategy.sequence_parallel": True}, False),
    ("trainer.gradient_clip_val", None, OPTIM, "changed", {"optimizer.clip_grad": 0.0}, False),
    ("trainer.gradient_clip_val", 0.5, OPTIM, "renamed", {"optimizer.clip_grad": 0.5}, False),
    ("trainer.precision", "bf16", OPTIM, "changed",
     {"precision.precision": "bf16-mixed", "precision.params_dtype": "torch.bfloat16",
      "precision.pipeline_dtype": "torch.bfloat16", "precision.autocast_enabled": False, "optimizer.bf16": True},
     False),
    ("trainer.precision", "bf16-mixed", {}, "kept", {"precision.precision": "bf16-mixed"}, False),
    ("trainer.precision", 16, OPTIM, "changed",
     {"precision.precision": "16-mixed", "precision.params_dtype": "torch.float16", "optimizer.fp16": True}, False),
    ("trainer.precision", 32, {}, "changed", {"precision.precision": "32", "precision.params_dtype": "torch.float32"},
     False),
    ("trainer.precision", 64, {}, "removed", NOTHING, True),
    ("model.precision", "bf16", {}, "changed", {"precision.precision": "bf16-mixed"}, False),
    ("model.precision", "bf16", {"trainer.precision": 16}, "changed", {"precision.precision": "16-mixed"}, False),
    ("model.megatron_amp_O2", True, {"trainer.precision": "bf16"}, "changed", {"precision.precision": "bf16-mixed"},
     False),
    ("model.megatron_amp_O2", False, {"trainer.precision": "bf16"}, "changed", {"precision.precision": "bf16-mixed"},
     True),
    ("model.megatron_amp_O2", False, {"trainer.precision": 32}, "changed", {"precision.precision": "32"}, False),
    ("model.fp8", False, {"trainer.precision": "bf16"}, "changed", {"precision.fp8": None}, False),
    ("model.fp8", True, {"trainer.precision": "bf16", "model.fp8_e4m3": True, "model.fp8_hybrid": True}, "changed",
     {"precision.fp8": "e4m3", "precision.fp8_amax_history_len": 1024, "precision.fp8_amax_compute_algo": "max"},
     False),
    ("model.fp8", True, {"trainer.precision": "bf16"}, "removed", {"precision.precision": "bf16-mixed"}, True),
    ("model.fp8_hybrid", True, {"trainer.precision": "bf16", "model.fp8": True}, "changed", {"precision.fp8": "hybrid"},
     False),
    ("model.fp8_e4m3", False, {"trainer.precision": "bf16", "model.fp8": True, "model.fp8_hybrid": True}, "changed",
     {"precision.fp8": "hybrid"}, False),
    ("model.optim.grad_sync_dtype", "bf16", {"trainer.precision": "bf16"}, "changed",
     {"precision.grad_reduce_in_fp32": False}, False),
    ("model.optim.grad_sync_dtype", "fp32", {"trainer.precision": "bf16"}, "changed",
     {"precision.grad_reduce_in_fp32": True}, False),
    ("exp_manager.create_tensorboard_logger", True, {"exp_manager.name": "run"}, "changed",
     {"tensorboard.": True, "tensorboard.save_dir": ".", "tensorboard.name": "run"}, False),
    ("exp_manager.create_tensorboard_logger", False, {}, "removed", NOTHING, False),
    ("exp_manager.create_wandb_logger", True, {"exp_manager.wandb_logger_kwargs.project": "p"}, "changed",
     {"wandb.": True, "wandb.project": "p"}, False),
    ("exp_manager.create_early_stopping_callback", True, {"exp_manager.early_stopping_callback_params.patience": 3},
     "changed", {"early_stopping.": True, "early_stopping.patience": 3}, False),
    ("exp_manager.create_preemption_callback", False, {}, "removed", NOTHING, False),
    ("exp_manager.create_preemption_callback", True, {}, "changed", {"preemption.": True}, False),
    ("exp_manager.log_step_timing", True, {}, "changed", {"timing.": True}, False),
    ("model.nsys_profile.enabled", True, {"model.nsys_profile.start_step": 5}, "changed",
     {"nsys.": True, "nsys.start_step": 5}, False),
    ("model.gc_interval", 0, {}, "removed", NOTHING, False),
    ("model.gc_interval", 100, {}, "renamed",
     {"garbage.": True, "garbage.gc_interval_train": 100, "garbage.gc_interval_val": 100}, False),
    ("model.optim.name", "fused_adam", {}, "changed",
     {"optimizer.optimizer": "adam", "optimizer.use_distributed_optimizer": False, "optimizer.weight_decay": 0.0},
     False),
    ("model.optim.name", "distributed_fused_adam", {}, "changed",
     {"optimizer.optimizer": "adam", "optimizer.use_distributed_optimizer": True,
      "ddp.use_distributed_optimizer": True},
     False),
    ("model.optim.name", "adam", {}, "renamed", {"optimizer.optimizer": "adam"}, True),
    ("model.optim.name", "sgd", {}, "renamed", {"optimizer.optimizer": "sgd"}, False),
    ("model.optim.name", "novograd", {}, "removed", NOTHING, True),
    ("model.optim.betas", [0.9, 0.98], OPTIM, "changed",
     {"optimizer.adam_beta1": 0.9, "optimizer.adam_beta2": 0.98}, False),
    ("model.optim.betas", 0.9, OPTIM, "removed", {"optimizer.optimizer": "adam"}, True),
    ("model.optim.average_in_collective", None, {"model.optim.name": "mcore_distributed_optim"}, "changed",
     {"ddp.average_in_collective": True}, False),
    ("model.optim.average_in_collective", False, {"model.optim.name": "mcore_distributed_optim"}, "kept",
     {"ddp.average_in_collective": False}, False),
    ("model.optim.sched.name", "WarmupPolicy", {"trainer.max_steps": 9}, "changed",
     {"scheduler.": "WarmupPolicy", "scheduler.max_steps": 9, "scheduler.warmup_steps": 0, "scheduler.min_lr": 0.0},
     False),
    ("model.optim.sched.name", "CosineAnnealing", {"trainer.max_steps": 9}, "changed",
     {"scheduler.": "CosineAnnealing", "scheduler.max_steps": 9, "scheduler.warmup_steps": 0,
      "scheduler.constant_steps": 0, "scheduler.min_lr": 0.0}, False),
    ("model.optim.sched.name", "StepLR", {}, "removed", NOTHING, True),
    ("model.optim.sched.max_steps", 50, COSINE, "kept", {"scheduler.max_steps": 50}, False),
    ("model.optim.sched.max_steps", None, COSINE, "changed", {"scheduler.max_steps": 1000}, False),
    ("model.optim.sched.max_steps", None, {"model.optim.sched.name": "CosineAnnealing"}, "removed", NOTHING, True),
    ("model.optim.sched.warmup_steps", 7, COSINE, "kept", {"scheduler.warmup_steps": 7}, False),
    ("model.optim.sched.warmup_steps", 7, {**COSINE, "model.optim.sched.name": "SquareAnnealing"}, "removed",
     {"scheduler.": "SquareAnnealing", "scheduler.min_lr": 1e-5}, True),
    ("model.optim.sched.warmup_ratio", 0.1, COSINE, "changed", {"scheduler.warmup_steps": 100}, False),
    ("model.optim.sched.warmup_ratio", 0.1, {**COSINE, "model.optim.sched.name": "WarmupPolicy"}, "changed",
     {"scheduler.warmup_ratio": 0.1}, False),
    ("model.optim.sched.warmup_ratio", 0.1, {"model.optim.sched.name": "CosineAnnealing"}, "removed", NOTHING, True),
    ("model.optim.sched.constant_steps", 5, COSINE, "kept", {"scheduler.constant_steps": 5}, False),
    ("model.optim.sched.constant_ratio", 0.5, COSINE, "changed", {"scheduler.constant_steps": 500}, False),
    ("model.optim.sched.hold_steps", 5, {"model.optim.sched.name": "WarmupHoldPolicy"}, "kept",
     {"scheduler.hold_steps": 5}, False),
    ("model.optim.sched.hold_ratio", 0.5, {"model.optim.sched.name": "WarmupHoldPolicy"}, "kept",
     {"scheduler.hold_ratio": 0.5}, False),
    ("model.optim.sched.decay_rate", 0.5, {"model.optim.sched.name": "NoamHoldAnnealing"}, "kept",
     {"scheduler.decay_rate": 0.5}, False),
    ("model.optim.sched.power", 2.0, {"model.optim.sched.name": "PolynomialDecayAnnealing"}, "kept",
     {"scheduler.power": 2.0}, False),
    ("model.optim.sched.cycle", True, {"model.optim.sched.name": "PolynomialDecayAnnealing"}, "kept",
     {"scheduler.cycle": True}, False),
    ("model.optim.sched.d_model", 64, {"model.optim.sched.name": "NoamAnnealing"}, "kept", {"scheduler.d_model": 64},
     False),
    ("model.optim.sched.min_lr", 1e-5, COSINE, "kept", {"scheduler.min_lr": 1e-5}, False),
    ("model.optim.sched.min_lr", None, COSINE, "changed", {"scheduler.min_lr": 0.0}, False),
    ("model.optim.sched.monitor", "loss", COSINE, "kept", {"scheduler.monitor": "loss"}, False),
    ("model.position_embedding_type", "rope", LAYERS, "kept", {"config.position_embedding_type": "rope"}, False),
    ("model.position_embedding_type", "alibi", LAYERS, "kept", {"config.position_embedding_type": "alibi"}, True),
    ("model.rotary_base", 500000.0, LAYERS, "kept", {"config.rotary_base": 500000}, False),
    ("model.scale_positional_embedding", True, LAYERS, "changed",
     {"config.": "Llama31Config", "config.normalization": "LayerNorm", "config.add_bias_linear": True,
      "config.gated_linear_unit": False, "config.num_query_groups": None}, True),
    ("model.scale_positional_embedding", False, LAYERS, "removed", {"config.num_layers": 2}, False),
    *((f"model.{name}", 4, {**LAYERS, "model.scale_positional_embedding": True}, "kept", {f"config.{name}": 4}, False)
      for name in ("scale_factor", "low_freq_factor", "high_freq_factor", "old_context_len")),
    ("model.scale_factor", 8, LAYERS, "removed", {"config.num_layers": 2}, False),
    ("model.normalization", "rmsnorm", LAYERS, "changed", {"config.normalization": "RMSNorm"}, False),
    ("model.normalization", "layernorm1p", LAYERS, "changed",
     {"config.normalization": "LayerNorm", "config.layernorm_zero_centered_gamma": True}, False),
    ("model.normalization", "batchnorm", LAYERS, "removed", {"config.num_layers": 2}, True),
    ("model.activation", "fast-swiglu", LAYERS, "changed",
     {"config.activation_func": "functional.silu", "config.gated_linear_unit": True}, False),
    ("model.activation", "squared-relu", LAYERS, "changed",
     {"config.activation_func": "squared_relu", "config.gated_linear_unit": False}, False),
    ("model.activation", "geglu", {**LAYERS, "model.openai_gelu": True}, "changed",
     {"config.activation_func": "openai_gelu", "config.gated_linear_unit": True}, False),
    ("model.activation", "tanh", LAYERS, "removed", {"config.num_layers": 2}, True),
    ("model.openai_gelu", True, LAYERS, "changed", {"config.activation_func": "openai_gelu"}, False),
    ("model.use_scaled_init_method", True, LAYERS, "removed", {"config.num_layers": 2}, False),
    ("model.use_scaled_init_method", False, {**LAYERS, "model.init_method_std": 0.01}, "changed",
     {"config.output_layer_init_method": "init_method_normal(0.01)"}, False),
    ("model.override_vocab_size", 151936, LAYERS, "renamed", {"config.vocab_size": 151936}, False),
    ("model.window_size", [4096, 0], LAYERS, "kept", {"config.window_size": (4096, 0)}, False),
    ("model.apply_query_key_layer_scaling", True, {**LAYERS, "trainer.precision": "bf16"}, "changed",
     {"config.apply_query_key_layer_scaling": False}, False),
    ("model.apply_query_key_layer_scaling", True, {**LAYERS, "trainer.precision": 16}, "kept",
     {"config.apply_query_key_layer_scaling": True, "config.attention_softmax_in_fp32": True}, True),
    ("model.ub_tp_comm_overlap", True, {}, "renamed", {"overlap.": True, "overlap.tp_comm_overlap": True}, False),
    ("model.ub_tp_comm_overlap", False, {}, "removed", NOTHING, False),
    ("model.tokenizer.model", "nemo:0a_tokenizer.model", {}, "changed",
     {"tokenizer.tokenizer_model": "0a_tokenizer.model"}, True),
    ("model.tokenizer.vocab_file", "v.json", {}, "kept", {"tokenizer.vocab_file": "v.json"}, False),
    ("model.tokenizer.merge_file", "m.txt", {}, "renamed", {"tokenizer.merges_file": "m.txt"}, False),
    ("model.tokenizer.sentencepiece_legacy", None, {"model.tokenizer.library": "sentencepiece"}, "changed",
     {"tokenizer.legacy": True}, False),
    ("model.seed", 1234, {"model.data.data_prefix": "/d"}, "kept", {"data.seed": 1234}, False),
    ("model.seed", 42, {"model.data.data_prefix": "/d"}, "kept", {"data.seed": 42}, True),
    ("model.data.data_prefix", [0.5, "/a", 0.5, "/b"], {}, "renamed", {"data.paths": [0.5, "/a", 0.5, "/b"]}, False),
    ("model.data.data_prefix", None, {"model.micro_batch_size": 1}, "removed", NOTHING, False),
    ("model.data.mock_dataset", True, {"model.micro_batch_size": 1}, "changed",
     {"data.": "MockDataModule", "data.micro_batch_size": 1}, False),
    ("model.data.mock_dataset", False, {"model.data.data_prefix": "/d"}, "removed", {"data.paths": "/d"}, False),
    ("model.data.data_impl", "mock", {}, "changed", {"data.": "MockDataModule"}, False),
    ("model.data.data_impl", "lazy", {"model.data.data_prefix": "/d"}, "removed", {"data.paths": "/d"}, True),
    ("model.data.splits_string", "1,0,0", {"model.data.data_prefix": "/d"}, "renamed", {"data.split": "1,0,0"}, False),
    *((f"model.data.{name}", value, {"model.data.data_prefix": "/d"}, "kept", {f"data.{name}": value}, False)
      for name, value in {
          "seq_length": 512, "num_workers": 3, "reset_position_ids": True, "reset_attention_mask": True,
          "eod_mask_loss": True, "index_mapping_dir": "/i", "num_dataset_builder_threads": 2,
          "dataloader_type": "cyclic", "mmap_bin_files": False,
      }.items()),
    ("model.data.eod_mask_loss", True, {"model.data.mock_dataset": True}, "removed", {"data.": "MockDataModule"},
     False),
]  # fmt: skip

ASKING: dict[str, Any] = {
    # of removed settings that matter for some values only: one of those values
    **dict.fromkeys(
        (row.old for row in ROWS if row.new is None and row.move is not same), True
    ),
    "exp_manager.checkpoint_callback_params.save_last_n_optim_states": 3,
    "trainer.gradient_clip_algorithm": "value",
    "model.pipeline_model_parallel_split_rank": 2,
    "model.optim.dtype": "bf16",
    "model.max_position_embeddings": 999,
    "model.mcore_gpt": False,
    "model.normalize_attention_scores": False,
    "model.data.shuffle_documents": False,
    "model.data.validation_drop_last": False,
}  # fmt: skip
LEFT_ALONE: dict[str, Any] = {
    # and one that asks nothing of anybody
    **dict.fromkeys(ASKING, False),
    "exp_manager.checkpoint_callback_params.save_last_n_optim_states": -1,
    "trainer.gradient_clip_algorithm": "norm",
    "model.pipeline_model_parallel_split_rank": 0,
    "model.optim.dtype": "fp32",
    "model.max_position_embeddings": 512,
    "model.mcore_gpt": True,
    "model.transformer_block_type": "pre_ln",
    "model.attention_type": "multihead",
    "model.activations_checkpoint_layers_per_pipeline": None,
    "model.hyena.*": None,
    "model.peft.peft_scheme": None,
    "model.normalize_attention_scores": True,
    "model.ffn_dropout": 0.0,
    "model.data.shuffle_documents": True,
    "model.data.validation_drop_last": True,
    "model.target": "nemo.collections.nlp.models.language_modeling.megatron_gpt_model.MegatronGPTModel",
}


@pytest.mark.parametrize(("old", "value", "beside", "status", "written", "attention"), CASES)
def test_a_value_changes_as_its_row_says(
    old: str, value: Any, beside: dict[str, Any], status: str, written: dict[str, Any], attention: bool
) -> None:
    migration = of(nested({**beside, old: value}))
    found = finding(migration, old)
    assert (found.status, found.attention or _clashes(migration)) == (status, attention)
    assert {place: places(migration).get(place, "not there") for place in written} == written
    if not written:
        assert not found.written
    holds(migration)


def _clashes(migration: Migration) -> bool:
    return any("says otherwise" in f.note for f in migration.findings)


def test_every_row_that_changes_values_has_a_case() -> None:
    covered = {case[0] for case in CASES} | ASKING.keys()
    assert {row.old for row in ROWS if row.move is not same} <= covered
    assert {case[0] for case in CASES} <= {row.old for row in ROWS}


@pytest.mark.parametrize("row", [r for r in ROWS if r.move is same and r.new is not None], ids=lambda r: r.old)
@pytest.mark.parametrize("value", ["x", 7])
def test_a_value_arrives_where_its_row_says(row: Row, value: Any) -> None:
    assert row.new is not None
    section, _, argument = row.new.partition(".")
    migration = of(nested({**_made(section), row.old: value}))
    found = finding(migration, row.old)
    assert places(migration)[row.new] == value
    assert (found.new, found.value, found.written) == (f"{TARGETS[section].shown}.{argument}", value, True)
    assert found.status == ("kept" if row.old.rpartition(".")[2] == argument else "renamed")
    holds(migration)


def _made(section: str) -> dict[str, Any]:
    """Settings that let a section be made."""
    return {
        "precision": {"trainer.precision": "bf16"},
        "optimizer": {"model.optim.name": "fused_adam"},
        "ddp": {"model.optim.name": "mcore_distributed_optim"},
        "config": {"model.num_layers": 2},
        "data": {"model.data.data_prefix": "/d"},
        "checkpoint": {"exp_manager.create_checkpoint_callback": True},
        "tensorboard": {"exp_manager.create_tensorboard_logger": True},
        "wandb": {"exp_manager.create_wandb_logger": True},
        "early_stopping": {"exp_manager.create_early_stopping_callback": True},
        "nsys": {"model.nsys_profile.enabled": True},
    }.get(section, {})


@pytest.mark.parametrize("row", [r for r in ROWS if r.new is None], ids=lambda r: r.old)
def test_a_removed_setting_says_why_and_writes_nothing(row: Row) -> None:
    key = row.old.replace("*", "anything")
    migration = of(nested({key: ASKING.get(row.old, "x"), "model.encoder_seq_length": 512}))
    found = finding(migration, key)
    assert (found.status, found.new, found.written) == ("removed", None, False)
    assert found.note
    assert key in program(migration)


@pytest.mark.parametrize("old", ASKING)
def test_a_removed_setting_asks_for_attention_only_where_it_matters(old: str) -> None:
    key = old.replace("*", "anything")
    beside = {"model.encoder_seq_length": 512}
    assert finding(of(nested({**beside, key: ASKING[old]})), key).attention
    assert not finding(of(nested({**beside, key: LEFT_ALONE[old]})), key).attention or old == "model.data.data_prefix.*"


def test_old_names_are_given_once_and_places_exist() -> None:
    assert len({row.old for row in ROWS}) == len(ROWS)
    for row in ROWS:
        if row.new is not None:
            section, _, argument = row.new.partition(".")
            assert not argument or TARGETS[section].takes(argument)


# --------------------------------------------------------------------------------------------------- particular facts


def test_what_nemo_1_took_when_silent_is_spelled_out_where_nemo_2_takes_something_else() -> None:
    migration = of("model: {num_layers: 2, optim: {name: fused_adam}}\ntrainer: {devices: 1}\n")
    implied = {f.key: f.value for f in migration.implied}
    assert implied == {
        "model.dist_ckpt_parallel_save": False,
        "model.dist_ckpt_parallel_load": False,
        "exp_manager.checkpoint_callback_params.async_save": False,
        "trainer.gradient_clip_val": 0.0,
        "model.optim.weight_decay": 0.0,
        "model.bias_activation_fusion": True,
        "model.bias_dropout_add_fusion": True,
        "model.masked_softmax_fusion": False,
        "model.cross_entropy_loss_fusion": False,
        "model.gradient_accumulation_fusion": False,
    }
    assert all(place in places(migration) for place in ("strategy.ckpt_async_save", "optimizer.clip_grad"))


def test_experts_without_a_word_on_softmax_are_not_normalised_twice() -> None:
    assert places(of("model: {num_layers: 2, num_moe_experts: 8}"))["config.moe_router_pre_softmax"] is False


def test_an_unknown_checkpoint_option_is_not_handed_to_a_strategy_that_would_swallow_it() -> None:
    migration = of("model: {num_layers: 2, dist_ckpt_load_directly: true, ckpt_parallel: 1}")
    assert [f.status for f in migration.unknown] == ["unknown", "unknown"]
    assert all("swallows" in f.note for f in migration.unknown)
    assert "dist_ckpt_load_directly=" not in program(migration)


def test_a_dead_option_is_named_with_the_one_that_works() -> None:
    migration = of("model: {num_layers: 2, ckpt_load_on_device: true}")
    assert "ckpt_load_directly_on_device" in finding(migration, "model.ckpt_load_on_device").note
    assert "ckpt_load_on_device=" not in program(migration).replace("ckpt_load_directly_on_device=", "")


def test_zarr_is_flagged_as_read_only() -> None:
    found = finding(of("model: {dist_ckpt_format: zarr}"), "model.dist_ckpt_format")
    assert found.attention
    assert "only read today" in found.note


def test_a_default_of_a_later_release_is_left_out_and_another_value_asks_for_that_release() -> None:
    plain, sharp = of("model: {sharp: false}"), of("model: {sharp: true}")
    assert (plain.needs, sharp.needs) == ("2.1", "2.4")
    assert "2.4 and later" in finding(plain, "model.sharp").note
    assert places(sharp)["strategy.use_sharp"] is True


def test_a_field_of_the_transformer_config_is_taken_by_its_name() -> None:
    migration = of("model: {num_layers: 2, qk_layernorm: true, mcore_customization_config: {moe_layer_freq: 2}}")
    assert places(migration)["config.qk_layernorm"] is True
    assert places(migration)["config.moe_layer_freq"] == 2


def test_interpolations_are_resolved_where_the_document_can_and_said_where_it_cannot() -> None:
    migration = of(
        "model: {encoder_seq_length: 512, num_layers: 2, hidden_size: '${multiply:${.num_layers},32}',\n"
        "  data: {seq_length: '${model.encoder_seq_length}', data_prefix: '${oc.env:DATA}/x', num_workers: '${.n}'}}\n"
        "exp_manager: {name: 'run-${model.num_layers}'}\n"
    )
    written = places(migration)
    assert (written["config.hidden_size"], written["data.seq_length"], written["logger.name"]) == (64, 512, "run-2")
    left = finding(migration, "model.data.data_prefix")
    assert (left.attention, left.value) == (True, "${oc.env:DATA}/x")
    assert "interpolation" in left.note
    assert finding(migration, "model.data.num_workers").attention
    assert finding(migration, "model.hidden_size").interpolation == "${multiply:${.num_layers},32}"


@pytest.mark.parametrize("stage", ["training", "fine_tuning", "peft"])
def test_a_yaml_of_the_launcher_calls_itself_by_its_stage(stage: str) -> None:
    text = (
        f"model: {{num_layers: 4, hidden_size: '${{multiply:${{{stage}.model.num_layers}},16}}'}}\n"
        f"exp_manager: {{name: '${{{stage}.run.name}}'}}\nrun: {{name: gpt}}\n"
    )
    written = places(of(text))
    assert (written["config.hidden_size"], written["logger.name"]) == (64, "gpt")
    assert places(of(f"{text}{stage}: {{x: 1}}\n"))["logger.name"] == f"${{{stage}.run.name}}"


@pytest.mark.parametrize(
    "text",
    [
        "model: {num_layers: '${model.hidden_size}', hidden_size: '${model.num_layers}'}",
        "model: {num_layers: '${', hidden_size: '${}'}",
        "model: {num_layers: '${model.optim}', optim: {name: '${...........x}'}}",
        "model: {num_layers: '" + "${" * 500 + "}" * 500 + "'}",
        "a0: [1, 1]\nmodel:\n  num_layers: 2\n"
        + "".join(f"  a{n}: ['${{model.a{n - 1}}}', '${{model.a{n - 1}}}']\n" for n in range(1, 30)),
        "model:\n  a0: xxxxxxxxxxxxxxxx\n" + "".join(f"  a{n}: '${{.a{n - 1}}}${{.a{n - 1}}}'\n" for n in range(1, 40)),
        "model:\n  a0: 99999999\n"
        + "".join(f"  a{n}: '${{multiply:${{.a{n - 1}}},${{.a{n - 1}}}}}'\n" for n in range(1, 40)),
    ],
)
def test_interpolations_that_turn_in_circles_or_grow_are_left_as_they_are(text: str) -> None:
    migration = of(text)
    assert any(f.attention for f in migration.findings)
    assert len(program(migration)) < 1 << 20


def test_the_yaml_of_a_nemo_archive_is_taken_for_the_model_section() -> None:
    migration = migrated(read(DATA / "yaml" / "model_config.yaml"))
    assert migration.document.is_model_config
    assert places(migration)["config.num_moe_experts"] == 4
    assert places(migration)["precision.precision"] == "bf16-mixed"


@pytest.mark.parametrize("prefix", ["./", "", "llama/"])
@pytest.mark.parametrize("mode", ["w:", "w:gz"])
def test_an_archive_is_opened_for_its_yaml(prefix: str, mode: str, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "llama.nemo", mode) as archive:  # type: ignore[call-overload]
        archive.add(DATA / "yaml" / "model_config.yaml", f"{prefix}model_config.yaml")
    expected = migrated(read(DATA / "yaml" / "model_config.yaml"))
    found = migrated(read(tmp_path / "llama.nemo"))
    assert [(f.key, f.new, f.value) for f in found.findings] == [(f.key, f.new, f.value) for f in expected.findings]


def test_an_extracted_folder_is_looked_into_for_its_yaml(tmp_path: Path) -> None:
    shutil.copy(DATA / "yaml" / "model_config.yaml", tmp_path)
    assert read(tmp_path).is_model_config
    with pytest.raises(NotFound, match="is a directory"):
        read(DATA)


def test_keys_and_values_stay_inside_literals_and_comments() -> None:
    hostile = 'x"\n"""\nimport os\nos.system("touch /tmp/pwned")\n#'
    text = yaml.safe_dump(
        {
            "model": {"num_layers": hostile, hostile: hostile, "rotary_base": float("inf"), "optim": {"lr": [hostile]}},
            "exp_manager": {"name": hostile, "wandb_logger_kwargs": {hostile: 1}, "create_wandb_logger": True},
            hostile: {hostile: {}},
        }
    )  # fmt: skip
    tree = ast.parse(program(migrated(parse(text, 'a"""\nimport os\n.yaml'))))
    modules = {alias.name for n in ast.walk(tree) if isinstance(n, ast.Import) for alias in n.names}
    assert modules <= {"torch"}
    assert {type(node) for node in tree.body} <= {ast.Expr, ast.Import, ast.ImportFrom, ast.Assign, ast.If}


scalars = st.none() | st.booleans() | st.integers(-(2**61), 2**61) | st.floats() | st.text(max_size=12)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=2)
)
known = st.sampled_from([row.old.replace("*", "anything") for row in ROWS])
told = st.sampled_from(["torch_dist", "zarr", "bf16", "CosineAnnealing", "fused_adam", True, 16, 0.1, "???", "${x}"])


@given(st.dictionaries(known, values | told, max_size=12), st.dictionaries(st.text(max_size=8), values, max_size=3))
@settings(max_examples=150)
def test_any_settings_are_each_reported_once_and_the_program_compiles(
    flat: dict[str, Any], strange: dict[str, Any]
) -> None:
    tree: dict[str, Any] = {}
    for key, value in flat.items():
        *above, last = key.split(".")
        at: Any = tree
        for part in above:
            at = at.setdefault(part, {}) if isinstance(at, dict) else None
        if isinstance(at, dict):
            at.setdefault(last, value)
    for key, value in strange.items():
        tree.setdefault(key, value)
    if not tree:
        return
    text = yaml.safe_dump(tree, allow_unicode=True)
    try:
        migration = of(text)
    except InputError:  # a number that text makes, or half a character
        return
    keys = [f.key for f in migration.findings]
    assert len(keys) == len(set(keys)) == len(list(leaves(tree)))
    compile(program(migration), "strategy.py", "exec")
    json.dumps(report(migration), allow_nan=False)


# ------------------------------------------------------------------------------------------------------------- hostile

BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{chr(98 + n)}: &{chr(98 + n)} [{', '.join([f'*{chr(97 + n)}'] * 10)}]\n" for n in range(8)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: !!python/object/apply:os.system ['touch /tmp/pwned']", "line 1: the tag .* is refused"),
        ("model: {a: !mine x}", "line 1: the tag '!mine' is refused"),
        ("model: {a: !!binary aGk=}", "line 1: the tag .* is refused"),
        ("model:\n  a: !!set {x}\n", "line 2: the tag .* is refused"),
        (BOMB, "aliases make more than 50000 values"),
        ("model: &m\n  a: *m\n", "nests it deeper than 32"),
        ("model: {a: &m [1, *m]}", "nests it deeper than 32"),
        ("a: " + "[" * 4000 + "]" * 4000, "nested deeper than 32 levels"),
        ("{a: " * 4000 + "1" + "}" * 4000, "nested deeper than 32 levels"),
        ("a: [" + "1, " * 200_000 + "1]", "more than 50000 values"),
        ("model:\n  fp8: true\n  fp8: false\n", "line 3: model.fp8 is set twice, first in line 2"),
        ("model: {<<: {a: 1}}", "merge key << is not read"),
        ("model: {[a]: 1}", "cannot be the name of a setting"),
        ("model: [1", "is not YAML"),
        ("model: {a: *nothing}", "is not YAML"),
        ("- 1\n- 2\n", "holds no settings"),
        ("", "holds no settings"),
        ("just text", "holds no settings"),
        ("a: 1\n---\nb: 2\n", "is not YAML"),
        ("a: 0x" + "f" * 9000, "is no int"),
        ("a: " + "9" * 9000, "is no int"),
        ("a: !!int x", "is no int"),
        (b"\xff\xfe\x00\xd8", "is not YAML"),
        (b"a: \x00", "is not YAML"),
        ('a: "\\ud800"', "half a character|is not YAML"),
    ],
)
def test_hostile_yaml_is_refused_with_the_line(text: str | bytes, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse(text)


def test_a_huge_file_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "huge.yaml"
    with path.open("wb") as file:
        os.truncate(file.fileno(), 1 << 40)
    with pytest.raises(InputError, match="a configuration has at most"):
        read(path)


def test_a_missing_file_is_said(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="no such file"):
        read(tmp_path / "none.yaml")


def test_text_that_is_no_yaml_is_corrupt() -> None:
    with pytest.raises(Corrupt):
        parse("a: [1")


# -------------------------------------------------------------------------------------------------------- command line


def test_the_program_goes_to_stdout_and_talk_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    path = DATA / "yaml" / "gpt_v2.0.0rc0.yaml"
    assert main(["migrate-config", str(path)]) == 0
    out, err = capsys.readouterr()
    assert out == (DATA / "gpt_v2.0.0rc0.migrated.txt").read_text()
    assert "look at" in err
    assert "zarr is only read today" in err
    assert err.splitlines()[-1].startswith(f"{path}: ")


@pytest.mark.parametrize("form", ["json", "yaml"])
def test_machines_get_each_setting_with_its_status(form: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["migrate-config", str(DATA / "yaml" / "gpt_v2.4.0.yaml"), "--format", form, "--quiet"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    value = json.loads(out) if form == "json" else yaml.safe_load(out)
    assert value == json.loads(json.dumps(report(migrated(read(DATA / "yaml" / "gpt_v2.4.0.yaml")))))
    by_key = {s["key"]: s for s in value["settings"]}
    load = by_key["model.dist_ckpt_load_on_device"]
    assert (load["status"], load["new"]) == ("renamed", "MegatronStrategy.ckpt_load_directly_on_device")
    assert value["calls"]["strategy"]["arguments"]["save_ckpt_format"] == "torch_dist"
    assert value["counts"]["unknown"] == 0


@pytest.mark.parametrize(("name", "start"), [("s.py", '"""'), ("s.json", "{"), ("s.yaml", "source:")])
def test_the_output_is_a_file_when_asked_in_the_form_of_its_name(name: str, start: str, tmp_path: Path) -> None:
    source = str(DATA / "yaml" / "llama_v2.0.0.yaml")
    assert main(["migrate-config", source, "-o", str(tmp_path / name)]) == 0
    assert (tmp_path / name).read_text().startswith(start)
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_an_output_that_exists_is_replaced_only_by_force(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, output = str(DATA / "yaml" / "llama_v2.0.0.yaml"), tmp_path / "s.py"
    output.write_text("mine")
    assert main(["migrate-config", source, "-o", str(output)]) == 1
    assert output.read_text() == "mine"
    assert "--force" in capsys.readouterr().err
    assert main(["migrate-config", source, "-o", str(output), "--force"]) == 0
    assert output.read_text() != "mine"


def test_unknown_settings_are_listed_and_fail_only_where_that_is_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("model:\n  num_layers: 2\n  my_own: 3\n")
    assert main(["migrate-config", str(path)]) == 0
    out, err = capsys.readouterr()
    assert "# model.my_own = 3: in no table" in out
    assert f"unknown: {path}:3: model.my_own" in err
    assert main(["migrate-config", str(path), "--strict"]) == 1


def test_a_yaml_that_cannot_be_read_is_an_error_with_a_hint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "c.yaml").write_text("- 1\n")
    assert main(["migrate-config", str(tmp_path / "c.yaml")]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert "hint:" in err


def test_nothing_of_nemo_or_torch_is_imported() -> None:
    code = (
        "import sys; from reshard.cli.main import main; "
        f"assert main(['migrate-config', {str(DATA / 'yaml' / 'gpt_v2.4.0.yaml')!r}, '-q']) == 0; "
        "assert not {'torch', 'nemo', 'megatron', 'omegaconf', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_errors_are_ours() -> None:
    assert issubclass(InputError, ReshardError)


# --------------------------------------------------------------------------------------------------------------- guide


def guide_table(title: str) -> str:
    """The rows of a table as the guide shows them. `python tests/test_migrate.py` writes them there."""
    lines = ["| NeMo 1.0 | NeMo 2.0 | |", "|---|---|---|"]
    for row in TABLES[title]:
        note = row.note.replace("|", "\\|").replace("<", "&lt;")
        move = (row.move.__doc__ or "").strip() if row.move is not same and row.new is not None else ""
        what = "; ".join(filter(None, (move.rstrip("."), note)))
        lines.append(f"| `{row.old}` | {_place(row)} | {what} |")
    return "\n".join(lines)


def _place(row: Row) -> str:
    if row.new is None:
        return "gone"
    section, _, argument = row.new.partition(".")
    target = TARGETS[section]
    later = target.later.get(argument)
    return f"`{target.shown}{f'.{argument}' if argument else ''}`" + (f", since {later.since}" if later else "")


@pytest.mark.parametrize("title", TABLES)
def test_the_guide_has_every_setting_as_the_tables_have_it(title: str) -> None:
    assert f"### {title}\n\n{guide_table(title)}\n" in GUIDE.read_text()


def _write_guide() -> None:
    text = GUIDE.read_text()
    head, mark, _ = text.partition("<!-- tables -->\n")
    tables = "\n".join(f"### {title}\n\n{guide_table(title)}\n" for title in TABLES)
    GUIDE.write_text(f"{head}{mark}\n{tables}")
    path = DATA / "yaml" / "gpt_v2.0.0rc0.yaml"
    (DATA / "gpt_v2.0.0rc0.migrated.txt").write_text(program(migrated(read(path))))


if __name__ == "__main__":
    _write_guide()


@pytest.mark.parametrize(
    ("old", "value", "said"),
    [
        ("trainer.devices", -1, "all GPUs that are visible; the launcher has to start as many"),
        ("trainer.devices", "auto", "all GPUs that are visible"),
        ("trainer.max_steps", -1, "PreTrainingDataModule makes as many samples as the steps need"),
        ("trainer.num_nodes", math.inf, "not a finite number"),
        ("trainer.val_check_interval", math.inf, "not a finite number"),
        ("model.optim.lr", math.nan, "not a finite number"),
        ("model.optim.lr", None, "null, where NeMo 2 needs a value"),
        ("model.data.data_prefix", [0.5, "a", math.inf, "b"], "not a finite number"),
        ("model.tensor_model_parallel_size", -1, "a size begins at 1"),
        ("model.global_batch_size", 0, "a size begins at 1"),
        ("model.num_layers", -2, "a size begins at 1"),
        ("model.data.seq_length", None, "null, where NeMo 2 needs a value"),
    ],
)
def test_values_that_mean_something_else_in_nemo_2_are_to_be_looked_at(old: str, value: Any, said: str) -> None:
    found = finding(of(nested({old: value})), old)
    assert found.attention
    assert said in found.note


@pytest.mark.parametrize(
    ("old", "value"),
    [("trainer.devices", 8), ("trainer.max_epochs", -1), ("model.ffn_hidden_size", None), ("trainer.num_nodes", 2),
     ("exp_manager.checkpoint_callback_params.save_top_k", -1), ("model.tensor_model_parallel_size", True)],
)  # fmt: skip
def test_values_that_go_as_they_are_are_not_remarked(old: str, value: Any) -> None:
    assert not finding(of(nested({old: value})), old).attention


def test_an_output_that_cannot_be_a_file_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "gpt.yaml").write_text("model: {num_layers: 2}\n")
    words = ["migrate-config", str(tmp_path / "gpt.yaml"), "--force", "--output"]
    assert main([*words, str(tmp_path)]) == 1
    assert f"{tmp_path} is a directory, and the output is a file" in capsys.readouterr().err
    assert main([*words, str(tmp_path / "gone" / "gpt.py")]) == 1
    assert f"there is no directory {tmp_path / 'gone'}" in capsys.readouterr().err
