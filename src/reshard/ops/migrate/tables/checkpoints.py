"""How checkpoints are saved, found and loaded: dist_ckpt_*, checkpoint_callback_params, resuming and restoring."""

from __future__ import annotations

from typing import Any

from reshard.ops.migrate.row import Moved, Row, Settings, on, truthy

_STRICTNESS = (
    "assume_ok_unexpected", "log_unexpected", "log_all", "raise_unexpected", "raise_all", "return_unexpected",
    "return_all", "ignore_all",
)  # fmt: skip
_FREE = "MegatronStrategy takes it for a keyword of torch's DDP: no error, no effect"


def _format(value: Any, _: Settings) -> Moved:
    """torch_dist stays; anything else becomes torch_dist."""
    if value == "torch_dist":
        return Moved(value)
    if value == "zarr":
        return Moved(
            "torch_dist",
            attention=True,
            note="zarr is only read today: with ckpt_async_save=True, NeMo 2's default, saving it raises, and "
            "Megatron-Core 0.16 has neither reader nor writer; checkpoints that exist have to be converted",
        )
    return Moved("torch_dist", attention=True, note="NeMo 1 knows torch_dist and zarr")


def _constant_structure(value: Any, _: Settings) -> Moved:
    return Moved(value, attention=truthy(value), note="NeMo 1 never read it: True begins to cache plans only now")


def _strictness(value: Any, _: Settings) -> Moved:
    if value is None or isinstance(value, bool) or value in _STRICTNESS:
        return Moved(value)
    return Moved(value, attention=True, note=f"Megatron-Core knows {', '.join(_STRICTNESS)}")


def _async(value: Any, settings: Settings) -> Moved:
    zarr = truthy(value) and settings.get("model.dist_ckpt_format") == "zarr"
    return Moved(value, note="works because the format becomes torch_dist: zarr raises" if zarr else "")


def _switch(value: Any, _: Settings) -> Moved:
    """True makes the callback, False leaves it out."""
    return Moved(True) if truthy(value) else Moved(note="no callback is made", removed=True)


def _interval(value: Any, _: Settings) -> Moved:
    if value is None:
        return Moved(None)
    return Moved(removed=True, attention=True, note="NeMo 2 takes a datetime.timedelta: write it by hand")


def _epochs(value: Any, settings: Settings) -> Moved:
    """1 becomes None where steps or time already say when: Lightning refuses two of them."""
    params = "exp_manager.checkpoint_callback_params"
    other = truthy(settings.get(f"{params}.every_n_train_steps")) or settings.get(f"{params}.train_time_interval")
    return Moved(None, note="steps or time decide") if other and value == 1 else Moved(value)


def _nemo_file(value: Any, _: Settings) -> Moved:
    note = "no .nemo is written: take the weights/ and context/ directory of the checkpoint" if truthy(value) else ""
    return Moved(attention=truthy(value), note=note)


def _weights_from(value: Any, _: Settings) -> Moved:
    if value is None:
        return Moved(None)
    return Moved(
        value,
        {"restore.": True, "restore.load_optim_state": False},
        attention=True,
        note="convert the .nemo into a NeMo 2 directory first, and name that",
    )


def _all_from(value: Any, _: Settings) -> Moved:
    if value is None:
        return Moved(None)
    return Moved(
        value,
        {"restore.": True, "restore.load_optim_state": True},
        attention=True,
        note="name a converted directory; NeMo's own converter carries no optimizer state",
    )


def _resume(value: Any, _: Settings) -> Moved:
    if value is None:
        return Moved(None)
    return Moved(value, attention=True, note="has to be a NeMo 2 directory; NeMo 1's checkpoint must be converted")


DIST_CKPT = (
    Row("model.dist_ckpt_format", "strategy.save_ckpt_format", move=_format,
        note="what to save; zarr is read-only. The YAML said zarr until August 2024"),
    Row("model.dist_ckpt_load_on_device", "strategy.ckpt_load_directly_on_device",
        note="counts for zarr only. `ckpt_load_on_device`, as NeMo's guide spells it, is no parameter"),
    Row("model.dist_ckpt_parallel_save", "strategy.ckpt_parallel_save", absent=False,
        note="absent meant False, NeMo 2's default is True"),
    Row("model.dist_ckpt_parallel_save_within_dp", "strategy.ckpt_parallel_save_within_dp"),
    Row("model.dist_ckpt_parallel_load", "strategy.ckpt_parallel_load", absent=False,
        note="absent meant False, NeMo 2's default is True: more GPU memory while loading"),
    Row("model.dist_ckpt_torch_dist_multiproc", "strategy.ckpt_torch_dist_multiproc",
        note="None lets Megatron-Core take 2"),
    Row("model.dist_ckpt_assume_constant_structure", "strategy.ckpt_assume_constant_structure",
        move=_constant_structure, note="read by NeMo 2 only"),
    Row("model.dist_ckpt_parallel_dist_opt", "strategy.ckpt_parallel_save_optim",
        note="True: fully_sharded_model_space; False: dp_zero_gather_scatter, loads at the same parallelism only"),
    Row("model.dist_ckpt_load_strictness", "strategy.ckpt_load_strictness", move=_strictness,
        note="since 2.1; False loads checkpoints whose _extra_state differs"),
    Row("exp_manager.checkpoint_callback_params.async_save", "strategy.ckpt_async_save", move=_async, absent=False,
        when="model",
        note="moves from the callback to the strategy; absent meant False, NeMo 2's default is True; torch_dist only"),
    Row("model.ckpt_load_on_device", note=f"never a setting; the argument is ckpt_load_directly_on_device. {_FREE}"),
    Row("model.ckpt_type", note=f"in the docstring of MegatronStrategy, no parameter. {_FREE}"),
)  # fmt: skip

_PARAMS = "exp_manager.checkpoint_callback_params"

CALLBACK = (
    Row("exp_manager.create_checkpoint_callback", "checkpoint.", move=_switch, absent=True,
        note="made when absent; passed to NeMoLogger as ckpt"),
    Row(f"{_PARAMS}.dirpath", "checkpoint.dirpath", note="None: <log_dir>/<name>/<version>/checkpoints"),
    Row(f"{_PARAMS}.filename", "checkpoint.filename", note="names directories now"),
    Row(f"{_PARAMS}.monitor", "checkpoint.monitor"),
    Row(f"{_PARAMS}.verbose", "checkpoint.verbose"),
    Row(f"{_PARAMS}.save_last", "checkpoint.save_last", note="takes 'link' too, which copies nothing"),
    Row(f"{_PARAMS}.save_top_k", "checkpoint.save_top_k"),
    Row(f"{_PARAMS}.save_weights_only", "checkpoint.save_weights_only"),
    Row(f"{_PARAMS}.mode", "checkpoint.mode"),
    Row(f"{_PARAMS}.every_n_epochs", "checkpoint.every_n_epochs", move=_epochs,
        note="the default was 1 and is None, which is 1 where neither steps nor time are given"),
    Row(f"{_PARAMS}.every_n_train_steps", "checkpoint.every_n_train_steps"),
    Row(f"{_PARAMS}.train_time_interval", "checkpoint.train_time_interval", move=_interval,
        note="a datetime.timedelta"),
    Row(f"{_PARAMS}.save_on_train_epoch_end", "checkpoint.save_on_train_epoch_end"),
    Row(f"{_PARAMS}.auto_insert_metric_name", "checkpoint.auto_insert_metric_name"),
    Row(f"{_PARAMS}.always_save_nemo", move=_nemo_file, note="NeMo 2 has no .nemo: every checkpoint is a directory"),
    Row(f"{_PARAMS}.save_nemo_on_train_end", move=_nemo_file,
        note="NeMo 2 has no .nemo: every checkpoint is a directory"),
    Row(f"{_PARAMS}.postfix", note="of .nemo files, which NeMo 2 does not write"),
    Row(f"{_PARAMS}.prefix", move=on(attention_when=truthy, note="put it into filename"), note="part of filename now"),
    Row(f"{_PARAMS}.filepath", move=on(attention_when=truthy, note="set dirpath and filename"),
        note="was deprecated in NeMo 1: dirpath and filename"),
    Row(f"{_PARAMS}.save_best_model", move=on(attention_when=truthy, note="the best checkpoint stays where it is"),
        note="of .nemo files; save_top_k keeps the best"),
    Row(f"{_PARAMS}.model_parallel_size", note="NeMo 2 asks the strategy"),
    Row(f"{_PARAMS}.save_last_n_optim_states",
        move=on(attention_when=lambda n: n not in (None, -1), note="every checkpoint keeps its optimizer state"),
        note="no counterpart; ModelCheckpoint(save_optim_on_train_end=...) decides on the last one"),
)  # fmt: skip

RESUME = (
    Row("exp_manager.resume_if_exists", "resume.resume_if_exists"),
    Row("exp_manager.resume_past_end", "resume.resume_past_end"),
    Row("exp_manager.resume_ignore_no_checkpoint", "resume.resume_ignore_no_checkpoint"),
    Row("exp_manager.resume_from_checkpoint", "resume.resume_from_path", move=_resume, note="a directory now"),
    Row("model.resume_from_checkpoint", "resume.resume_from_path", move=_resume, note="a directory now"),
    Row("trainer.resume_from_checkpoint", "resume.resume_from_path", move=_resume,
        note="of Lightning 1; a directory now"),
    Row("model.restore_from_path", "restore.path", move=_weights_from,
        note="weights only: load_optim_state=False; a NeMo 2 directory, no .nemo"),
    Row("restore_from_path", "restore.path", move=_weights_from,
        note="of older YAMLs; weights only; a NeMo 2 directory, no .nemo"),
    Row("model.restore_from_ckpt", "restore.path", move=_all_from, note="weights and optimizer: load_optim_state=True"),
)  # fmt: skip

ROWS = (*DIST_CKPT, *CALLBACK, *RESUME)
