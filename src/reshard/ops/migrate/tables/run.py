"""The run around the model: parallelism, trainer, experiment manager, profiling, and what only launchers read."""

from __future__ import annotations

from typing import Any

from reshard.ops.migrate.row import Moved, Row, Settings, number, on, truthy

_BY_HAND = "no call is written for it"


def _virtual(value: Any, _: Settings) -> Moved:
    """1 becomes None, as NeMo 1 did itself."""
    return Moved(None, note="NeMo 1 took 1 for none") if value == 1 else Moved(value)


def _sequence(value: Any, settings: Settings) -> Moved:
    """False without tensor parallelism, as NeMo 1 did itself."""
    if truthy(value) and settings.get("model.tensor_model_parallel_size", 1) == 1:
        return Moved(False, note="NeMo 1 switched it off without tensor parallelism; Megatron-Core raises")
    return Moved(value)


def _clip(value: Any, _: Settings) -> Any:
    """None becomes 0.0: no clipping."""
    return 0.0 if value is None else value


def _switch(value: Any, _: Settings) -> Moved:
    """True makes it, False leaves it out."""
    return Moved(True) if truthy(value) else Moved(removed=True, note="is not made")


def _tensorboard(value: Any, settings: Settings) -> Moved:
    if not truthy(value):
        return Moved(removed=True, note="is not made")
    named = {"tensorboard.name": settings.get("exp_manager.name") or "default"}
    return Moved(True, {"tensorboard.save_dir": ".", **named}, note="NeMoLogger puts save_dir below log_dir")


def _garbage(value: Any, _: Settings) -> Moved:
    """0 leaves it to Python; n collects every n steps."""
    if not number(value) or value <= 0:
        return Moved(removed=True, note="Python decides when to collect")
    return Moved(value, {"garbage.": True, "garbage.gc_interval_val": value})


def _class(value: Any, _: Settings) -> Moved:
    told = "MegatronGPT" not in str(value)
    note = "no GPT: the config's class and what is particular to it have to be chosen by hand"
    return Moved(attention=told, note=note if told else "")


_WHEN_ON = on(attention_when=truthy, note=_BY_HAND)

PARALLEL = (
    Row("model.tensor_model_parallel_size", "strategy.tensor_model_parallel_size"),
    Row("model.pipeline_model_parallel_size", "strategy.pipeline_model_parallel_size"),
    Row("model.virtual_pipeline_model_parallel_size", "strategy.virtual_pipeline_model_parallel_size", move=_virtual),
    Row("model.context_parallel_size", "strategy.context_parallel_size"),
    Row("model.expert_model_parallel_size", "strategy.expert_model_parallel_size"),
    Row("model.expert_tensor_parallel_size", "strategy.expert_tensor_parallel_size"),
    Row("model.moe_extended_tp", "strategy.moe_extended_tp"),
    Row("model.sequence_parallel", "strategy.sequence_parallel", move=_sequence,
        note="without tensor parallelism NeMo 1 switched it off, Megatron-Core raises"),
    Row("model.microbatch_group_size_per_vp_stage", "strategy.microbatch_group_size_per_vp_stage"),
    Row("model.num_layers_in_first_pipeline_stage", "strategy.num_layers_in_first_pipeline_stage"),
    Row("model.num_layers_in_last_pipeline_stage", "strategy.num_layers_in_last_pipeline_stage"),
    Row("model.account_for_embedding_in_pipeline_split", "strategy.account_for_embedding_in_pipeline_split"),
    Row("model.account_for_loss_in_pipeline_split", "strategy.account_for_loss_in_pipeline_split"),
    Row("model.use_te_rng_tracker", "strategy.use_te_rng_tracker"),
    Row("model.encoder_tensor_model_parallel_size", "strategy.encoder_tensor_model_parallel_size"),
    Row("model.encoder_pipeline_model_parallel_size", "strategy.encoder_pipeline_model_parallel_size"),
    Row("model.use_tp_pp_dp_mapping", "strategy.use_tp_pp_dp_mapping"),
    Row("model.num_distributed_optimizer_instances", "strategy.num_distributed_optimizer_instances"),
    Row("model.nccl_communicator_config_path", "strategy.nccl_communicator_config_path"),
    Row("model.sharp", "strategy.use_sharp"),
    Row("model.pipeline_model_parallel_split_rank",
        move=on(attention_when=lambda n: n not in (None, 0), note="use encoder_pipeline_model_parallel_size"),
        note="of encoder-decoder models: encoder_pipeline_model_parallel_size"),
    Row("model.gradient_as_bucket_view",
        note="of torch's DDP; Megatron's keeps gradients in one buffer. NeMo 2's recipes pass it, to no effect"),
    Row("model.sync_batch_comm", note="read by no NeMo 2 code"),
    Row("model.fsdp", move=on(attention_when=truthy, note="MegatronStrategy(fsdp='megatron'), since 2.3, shards with "
        "Megatron's own FSDP and the distributed optimizer: write it by hand"),
        note="torch's FSDP under Megatron models is gone; since 2.3 MegatronStrategy(fsdp='megatron')"),
    Row("model.fsdp_sharding_strategy", note="DistributedDataParallelConfig(data_parallel_sharding_strategy=...)"),
    Row("model.fsdp_grad_reduce_dtype", note="MegatronMixedPrecision(grad_reduce_in_fp32=...)"),
    Row("model.fsdp_sharded_checkpoint", note="Megatron's FSDP always shards its checkpoints"),
    Row("model.fsdp_use_orig_params", note="of torch's FSDP"),
    Row("model.fsdp_limit_all_gathers", note="of torch's FSDP"),
    Row("model.fsdp_cpu_offload", move=_WHEN_ON, note="of torch's FSDP"),
)  # fmt: skip

_TRAINER_SAME = (
    "accelerator", "devices", "num_nodes", "max_epochs", "min_epochs", "max_steps", "min_steps", "max_time",
    "limit_train_batches", "limit_val_batches", "limit_test_batches", "limit_predict_batches", "overfit_batches",
    "val_check_interval", "check_val_every_n_epoch", "num_sanity_val_steps", "log_every_n_steps",
    "accumulate_grad_batches", "enable_progress_bar",
    "enable_model_summary", "deterministic", "benchmark", "inference_mode", "fast_dev_run",
    "detect_anomaly", "barebones", "sync_batchnorm", "reload_dataloaders_every_n_epochs", "default_root_dir",
)  # fmt: skip

TRAINER = (
    *(Row(f"trainer.{name}", f"trainer.{name}") for name in _TRAINER_SAME),
    Row("trainer.use_distributed_sampler", "trainer.use_distributed_sampler",
        note="stays False: MegatronDataSampler does it"),
    Row("trainer.replace_sampler_ddp", "trainer.use_distributed_sampler", note="Lightning 2's name"),
    Row("trainer.logger", "trainer.logger", note="stays False: NeMoLogger brings the loggers"),
    Row("trainer.enable_checkpointing", "trainer.enable_checkpointing",
        note="stays False: NeMoLogger brings the ModelCheckpoint"),
    Row("trainer.gpus", "trainer.devices", note="Lightning 2's name"),
    Row("trainer.gradient_clip_val", "optimizer.clip_grad", move=_clip, absent=None, when="trainer",
        note="in the Trainer it raises; absent meant no clipping, OptimizerConfig's default is 1.0"),
    Row("trainer.gradient_clip_algorithm",
        move=on(attention_when=lambda v: v not in (None, "norm"), note="it clips by norm"), note="always by norm"),
    Row("trainer.strategy", note="MegatronStrategy"),
    Row("trainer.plugins", move=_WHEN_ON, note="MegatronMixedPrecision"),
    Row("trainer.callbacks", move=_WHEN_ON, note="write them by hand"),
    Row("trainer.profiler", move=_WHEN_ON, note="write it by hand"),
    Row("trainer.checkpoint_callback", note="of Lightning 1; NeMoLogger brings the ModelCheckpoint"),
    Row("trainer.amp_backend", note="of Lightning 1"),
    Row("trainer.amp_level", note="of Lightning 1"),
    Row("trainer.track_grad_norm", note="of Lightning 1; Megatron's optimizer logs grad_norm"),
    Row("trainer.move_metrics_to_cpu", note="of Lightning 1"),
)  # fmt: skip

_EARLY = (
    "monitor", "mode", "min_delta", "patience", "verbose", "strict", "check_finite", "stopping_threshold",
    "divergence_threshold", "check_on_train_epoch_end", "log_rank_zero_only",
)  # fmt: skip
_TENSORBOARD = (
    "log_graph",
    "default_hp_metric",
    "prefix",
    "sub_dir",
    "comment",
    "flush_secs",
    "max_queue",
    "purge_step",
)
_WANDB = (
    "project", "name", "save_dir", "version", "offline", "dir", "id", "anonymous", "log_model", "prefix",
    "checkpoint_name", "entity", "group", "tags", "notes", "config", "job_type", "mode", "resume",
)  # fmt: skip
_LOGGER_SAME = (
    "explicit_log_dir", "name", "version", "use_datetime_version", "log_local_rank_0_only", "log_global_rank_0_only",
    "files_to_copy",
)  # fmt: skip

EXPERIMENT = (
    Row("exp_manager.exp_dir", "logger.log_dir"),
    *(Row(f"exp_manager.{name}", f"logger.{name}") for name in _LOGGER_SAME),
    Row("exp_manager.create_tensorboard_logger", "tensorboard.", move=_tensorboard, absent=True,
        note="made when absent, with exp_manager's name; passed to NeMoLogger"),
    *(Row(f"exp_manager.summary_writer_kwargs.{name}", f"tensorboard.{name}") for name in _TENSORBOARD),
    Row("exp_manager.create_wandb_logger", "wandb.", move=_switch, note="passed to NeMoLogger"),
    *(Row(f"exp_manager.wandb_logger_kwargs.{name}", f"wandb.{name}") for name in _WANDB),
    *(row for name in ("mlflow", "clearml", "dllogger", "neptune") for row in (
        Row(f"exp_manager.create_{name}_logger", move=_WHEN_ON, note="NeMoLogger(extra_loggers=[...]), by hand"),
        Row(f"exp_manager.{name}_logger_kwargs.*", note="arguments of the logger in extra_loggers"))),
    Row("exp_manager.create_early_stopping_callback", "early_stopping.", move=_switch,
        note="a callback of the Trainer"),
    *(Row(f"exp_manager.early_stopping_callback_params.{name}", f"early_stopping.{name}") for name in _EARLY),
    Row("exp_manager.create_preemption_callback", "preemption.", move=_switch, absent=True,
        note="made when absent; a callback of the Trainer"),
    Row("exp_manager.log_step_timing", "timing.", move=_switch, absent=True,
        note="made when absent; a callback of the Trainer"),
    Row("exp_manager.step_timing_kwargs.*", note="TimingCallback(timer_kwargs={...}), by hand"),
    Row("exp_manager.log_delta_step_timing", move=_WHEN_ON, note="nemo.utils.exp_manager.DeltaTimingCallback"),
    Row("exp_manager.log_tflops_per_sec_per_gpu",
        note="FLOPsMeasurementCallback(model_config, data, model_name), by hand"),
    Row("exp_manager.max_time_per_run", "trainer.max_time",
        note="same DD:HH:MM:SS; Lightning counts on after a resume, NeMo 1 started anew"),
    Row("exp_manager.disable_validation_on_resume",
        note="call nl.configure_no_restart_validation_training_loop(trainer); NeMo 1 did when absent"),
    Row("exp_manager.seconds_to_sleep", note="ranks wait at a barrier"),
    Row("exp_manager.ema.*", move=on(attention_when=lambda v: v is True, note=_BY_HAND),
        note="no EMA under Megatron's optimizer"),
    Row("exp_manager.create_straggler_detection_callback", move=_WHEN_ON,
        note="nvidia_resiliency_ext's StragglerDetectionCallback, by hand"),
    Row("exp_manager.straggler_detection_params.*", note="arguments of StragglerDetectionCallback"),
    Row("exp_manager.create_fault_tolerance_callback", move=_WHEN_ON, note="NeMo-Run's FaultTolerancePlugin, by hand"),
    Row("exp_manager.fault_tolerance.*", note="arguments of FaultTolerancePlugin"),
)  # fmt: skip

PROFILING = (
    Row("model.nsys_profile.enabled", "nsys.", move=_switch, note="a callback of the Trainer"),
    Row("model.nsys_profile.start_step", "nsys.start_step"),
    Row("model.nsys_profile.end_step", "nsys.end_step"),
    Row("model.nsys_profile.ranks", "nsys.ranks"),
    Row("model.nsys_profile.gen_shape", "nsys.gen_shape"),
    Row("model.nsys_profile.trace", note="of the launcher: nsys profile --trace"),
    Row("model.memory_profile.*", note="MemoryProfileCallback of nemo.lightning.pytorch.callbacks, by hand"),
    Row("model.gc_interval", "garbage.gc_interval_train", move=_garbage,
        note="a callback of the Trainer, for validation too; 0 makes none"),
    Row("model.enable_megatron_timers", move=_WHEN_ON, note="MegatronStrategy(megatron_log_level=...), since 2.2"),
    Row("model.megatron_timer_kwargs.*", note="the strategy's timers take no arguments"),
    Row("model.apex_transformer_log_level", note="NeMo 2 does not use apex's transformer"),
)  # fmt: skip

AROUND = (
    Row("name", note="of Hydra; the experiment's name is NeMoLogger's"),
    Row("defaults", note="of Hydra: a Python program imports what it shares"),
    Row("hydra.*", note="of Hydra"),
    Row("run.*", note="of the launcher: NeMo-Run's executor has it"),
    Row("env_vars.*", note="of the launcher: NeMo-Run's executor has it"),
    Row("cluster_type", note="of the launcher: NeMo-Run's executor has it"),
    Row("s3_checkpointing.*", note="no counterpart; checkpoint paths of a MultiStorageClient instead"),
    Row("model.target", move=_class, note="the class of the model is named in Python"),
    Row("model.nemo_version", note="written by NeMo 1"),
)  # fmt: skip

ROWS = (*PARALLEL, *TRAINER, *EXPERIMENT, *PROFILING, *AROUND)
