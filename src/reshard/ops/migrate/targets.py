"""The calls that a NeMo 2.0 program is made of, and the arguments that they take in each release.

MegatronStrategy swallows any keyword that it does not know, without an error, so nothing is written that is not here.
Read from NeMo v2.1.0 to v2.5.0rc0 and from the Megatron-Core releases 0.10 to 0.14 that go with them. NeMo 2.0.0 still
imports `pytorch_lightning`, so 2.1 is the first release that the programs run on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

FIRST = "2.1"
"""The release that has every argument without a later one beside it."""

_NL = "from nemo import lightning as nl"
_LLM = "from nemo.collections import llm"
_CALLBACKS = "from nemo.lightning.pytorch.callbacks import {}"
_SCHEDULERS = "nl.lr_scheduler.{}"


@dataclass(frozen=True, slots=True)
class Later:
    """An argument that came after the first release."""

    since: str
    """The first release that takes it."""
    default: Any = None
    """What it is when it is not given; a setting equal to it is then left out, so that older releases do as well."""


@dataclass(frozen=True, slots=True)
class Target:
    """One call of the new program."""

    variable: str
    """What its result is called."""
    call: str
    """The class, as the program spells it."""
    imports: tuple[str, ...]
    """The lines that make the name known."""
    names: frozenset[str] = frozenset()
    """Arguments that every release takes."""
    later: Mapping[str, Later] = field(default_factory=dict)
    """Arguments that came later."""
    on_demand: bool = False
    """Whether it is made only when a setting asks for it."""
    needs: frozenset[str] = frozenset()
    """Arguments without which it is not made."""

    @property
    def shown(self) -> str:
        """The class without its module, as people call it."""
        return self.call.rpartition(".")[2]

    def takes(self, argument: str) -> bool:
        """Whether some release takes it."""
        return argument in self.names or argument in self.later


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


_TRANSFORMER = _names("""
    num_layers hidden_size ffn_hidden_size num_attention_heads num_query_groups kv_channels hidden_dropout
    attention_dropout fp32_residual_connection apply_residual_connection_post_layernorm layernorm_epsilon
    layernorm_zero_centered_gamma add_bias_linear add_qkv_bias gated_linear_unit activation_func
    activation_func_fp8_input_store num_moe_experts rotary_interleaved window_size normalization qk_layernorm
    test_mode calculate_per_token_loss init_method output_layer_init_method init_method_std
    apply_query_key_layer_scaling attention_softmax_in_fp32 bias_activation_fusion masked_softmax_fusion
    persist_layer_norm memory_efficient_layer_norm bias_dropout_fusion apply_rope_fusion recompute_granularity
    recompute_method recompute_num_layers distribute_saved_activations fp8_interval moe_router_load_balancing_type
    moe_router_topk moe_router_pre_softmax moe_grouped_gemm moe_aux_loss_coeff moe_z_loss_coeff moe_input_jitter_eps
    moe_token_dropping moe_token_dispatcher_type moe_per_layer_logging moe_expert_capacity_factor
    moe_pad_expert_input_to_capacity moe_token_drop_policy moe_layer_recompute clone_scatter_output_in_embedding
    disable_parameter_transpose_cache enable_cuda_graph external_cuda_graph tp_only_amax_red multi_latent_attention
    moe_shared_expert_intermediate_size moe_shared_expert_overlap moe_layer_freq moe_ffn_hidden_size cp_comm_type
    flash_decode perform_initialization use_cpu_initialization deterministic_mode
    num_microbatches_with_partial_activation_checkpoints gradient_accumulation_fusion
    async_tensor_model_parallel_allreduce tp_comm_overlap tp_comm_bulk_wgrad tp_comm_bulk_dgrad tp_comm_overlap_ag
    tp_comm_overlap_rs tp_comm_overlap_rs_dgrad tp_comm_split_ag tp_comm_atomic_ag tp_comm_split_rs tp_comm_atomic_rs
    tp_comm_overlap_disable_qkv tp_comm_overlap_disable_fc1 tp_comm_bootstrap_backend cross_entropy_loss_fusion
    variable_seq_lengths overlap_p2p_comm batch_p2p_comm batch_p2p_sync use_ring_exchange_p2p
    deallocate_pipeline_outputs defer_embedding_wgrad_compute wgrad_deferral_limit cpu_offloading
    cpu_offloading_num_layers cpu_offloading_activations cpu_offloading_weights barrier_with_L1_time
    hierarchical_context_parallel_sizes
""")
"""Fields of Megatron-Core's TransformerConfig and ModelParallelConfig, less those that the strategy and the precision
plugin write over."""

_GPT = _names("""
    fp16_lm_cross_entropy parallel_output share_embeddings_and_output_weights make_vocab_size_divisible_by
    position_embedding_type rotary_base rotary_percent seq_len_interpolation_factor seq_length
    use_transformer_engine_full_layer_spec scale_factor low_freq_factor high_freq_factor old_context_len
""")
"""What NeMo's GPTConfig adds; the last line only as Llama31Config."""

_CONFIG_LATER = {
    "vocab_size": Later("2.3"),
    "scatter_embedding_sequence_parallel": Later("2.2", True),
    "softmax_scale": Later("2.2"),
    "moe_router_topk_limited_devices": Later("2.2"),
    "moe_router_num_groups": Later("2.2"),
    "moe_router_group_topk": Later("2.2"),
    "moe_router_topk_scaling_factor": Later("2.2"),
    "moe_router_score_function": Later("2.2", "softmax"),
    "moe_router_enable_expert_bias": Later("2.2", False),
    "moe_router_bias_update_rate": Later("2.2", 1e-3),
    "moe_use_legacy_grouped_gemm": Later("2.2", False),
    "moe_permute_fusion": Later("2.2", False),
    "cuda_graph_use_single_mempool": Later("2.2", False),
    "cuda_graph_retain_backward_graph": Later("2.2", False),
    "cuda_graph_warmup_steps": Later("2.2", 3),
    "moe_router_dtype": Later("2.3"),
    "moe_enable_deepep": Later("2.3", False),
    "recompute_modules": Later("2.3"),
    "mtp_num_layers": Later("2.3"),
}

_SCHEDULED = {
    "CosineAnnealing": "warmup_steps constant_steps",
    "WarmupPolicy": "warmup_steps warmup_ratio",
    "WarmupHoldPolicy": "warmup_steps warmup_ratio hold_steps hold_ratio",
    "WarmupAnnealing": "warmup_steps warmup_ratio",
    "NoamAnnealing": "d_model warmup_steps warmup_ratio",
    "NoamHoldAnnealing": "decay_rate",
    "SquareAnnealing": "",
    "SquareRootAnnealing": "",
    "InverseSquareRootAnnealing": "",
    "T5InverseSquareRootAnnealing": "",
    "PolynomialDecayAnnealing": "power cycle",
    "PolynomialHoldDecayAnnealing": "power cycle",
}
SCHEDULERS = {name: _names(f"{own} max_steps min_lr interval frequency monitor") for name, own in _SCHEDULED.items()}
"""NeMo 1's names of schedules, and what NeMo 2's class `<name>Scheduler` takes. Most take no warmup."""

MOCK_DATA = _names("""
    seq_length micro_batch_size global_batch_size rampup_batch_size num_workers pin_memory persistent_workers
    create_attention_mask
""")
"""What MockDataModule takes of PreTrainingDataModule's arguments."""

TARGETS: dict[str, Target] = {
    "precision": Target(
        "precision",
        "nl.MegatronMixedPrecision",
        (_NL,),
        _names("""
            precision params_dtype pipeline_dtype autocast_dtype autocast_enabled grad_reduce_in_fp32 fp8 fp8_margin
            fp8_amax_history_len fp8_amax_compute_algo fp8_wgrad fp8_dot_product_attention fp8_multi_head_attention
            fp16_loss_scale fp16_initial_loss_scale fp16_min_loss_scale fp16_loss_scale_window fp16_hysteresis
        """),
        {
            "fp8_recipe": Later("2.3", "delayed"),
            "fp8_param_gather": Later("2.3", False),
            "first_last_layers_bf16": Later("2.3", False),
        },
        needs=frozenset({"precision"}),
    ),
    "ddp": Target(
        "ddp",
        "DistributedDataParallelConfig",
        ("from megatron.core.distributed import DistributedDataParallelConfig",),
        _names("""
            grad_reduce_in_fp32 overlap_grad_reduce use_distributed_optimizer check_for_nan_in_grad bucket_size
            average_in_collective overlap_param_gather align_param_gather fp8_param_gather
        """),
    ),
    "strategy": Target(
        "strategy",
        "nl.MegatronStrategy",
        (_NL,),
        _names("""
            tensor_model_parallel_size pipeline_model_parallel_size virtual_pipeline_model_parallel_size
            microbatch_group_size_per_vp_stage context_parallel_size sequence_parallel expert_model_parallel_size
            moe_extended_tp encoder_tensor_model_parallel_size encoder_pipeline_model_parallel_size data_sampler
            parallel_devices cluster_environment checkpoint_io find_unused_parameters ckpt_load_optimizer
            ckpt_save_optimizer ddp lazy_init pipeline_dtype save_ckpt_format ckpt_async_save
            ckpt_torch_dist_multiproc ckpt_assume_constant_structure ckpt_parallel_save ckpt_parallel_save_within_dp
            ckpt_parallel_load ckpt_parallel_save_optim ckpt_load_directly_on_device ckpt_load_strictness
            setup_optimizers init_model_parallel replace_progress_bar progress_interval restore_config
        """),
        {
            "expert_tensor_parallel_size": Later("2.2"),
            "account_for_embedding_in_pipeline_split": Later("2.2", False),
            "account_for_loss_in_pipeline_split": Later("2.2", False),
            "use_te_rng_tracker": Later("2.2", False),
            "megatron_log_level": Later("2.2", 0),
            "use_tp_pp_dp_mapping": Later("2.2", False),
            "pipeline_model_parallel_comm_backend": Later("2.3"),
            "num_layers_in_first_pipeline_stage": Later("2.3"),
            "num_layers_in_last_pipeline_stage": Later("2.3"),
            "fsdp": Later("2.3"),
            "use_sharp": Later("2.4", False),
            "num_distributed_optimizer_instances": Later("2.4", 1),
            "nccl_communicator_config_path": Later("2.4"),
            "use_gloo_process_groups": Later("2.4", True),
        },
    ),
    "early_stopping": Target(
        "early_stopping",
        "EarlyStopping",
        ("from lightning.pytorch.callbacks import EarlyStopping",),
        _names("""
            monitor min_delta patience verbose mode strict check_finite stopping_threshold divergence_threshold
            check_on_train_epoch_end log_rank_zero_only
        """),
        on_demand=True,
    ),
    "preemption": Target(
        "preemption",
        "PreemptionCallback",
        (_CALLBACKS.format("PreemptionCallback"),),
        on_demand=True,
    ),
    "timing": Target(
        "timing",
        "TimingCallback",
        ("from nemo.utils.exp_manager import TimingCallback",),
        _names("timer_kwargs"),
        on_demand=True,
    ),
    "nsys": Target(
        "nsys",
        "NsysCallback",
        (_CALLBACKS.format("NsysCallback"),),
        _names("start_step end_step ranks gen_shape"),
        on_demand=True,
    ),
    "garbage": Target(
        "garbage",
        "GarbageCollectionCallback",
        (_CALLBACKS.format("GarbageCollectionCallback"),),
        _names("gc_interval_train gc_interval_val"),
        on_demand=True,
    ),
    "overlap": Target(
        "overlap",
        "MegatronCommOverlapCallback",
        ("from nemo.lightning.pytorch.callbacks.megatron_comm_overlap import MegatronCommOverlapCallback",),
        _names("tp_comm_overlap tp_comm_overlap_cfg tp_comm_bootstrap_backend"),
        on_demand=True,
    ),
    "trainer": Target(
        "trainer",
        "nl.Trainer",
        (_NL,),
        _names("""
            accelerator strategy devices num_nodes precision logger callbacks fast_dev_run max_epochs min_epochs
            max_steps min_steps max_time limit_train_batches limit_val_batches limit_test_batches
            limit_predict_batches overfit_batches val_check_interval check_val_every_n_epoch num_sanity_val_steps
            log_every_n_steps enable_checkpointing enable_progress_bar enable_model_summary accumulate_grad_batches
            deterministic benchmark inference_mode use_distributed_sampler profiler detect_anomaly barebones plugins
            sync_batchnorm reload_dataloaders_every_n_epochs default_root_dir
        """),
    ),
    "checkpoint": Target(
        "checkpoint",
        "nl.ModelCheckpoint",
        (_NL,),
        _names("""
            dirpath filename monitor verbose save_last save_top_k save_weights_only mode every_n_epochs
            every_n_train_steps train_time_interval save_on_train_epoch_end auto_insert_metric_name
            save_optim_on_train_end always_save_context save_context_on_train_end enable_version_counter
        """),
        on_demand=True,
    ),
    "tensorboard": Target(
        "tensorboard",
        "TensorBoardLogger",
        ("from lightning.pytorch.loggers import TensorBoardLogger",),
        _names(
            "save_dir name version log_graph default_hp_metric prefix sub_dir comment flush_secs max_queue purge_step"
        ),
        on_demand=True,
    ),
    "wandb": Target(
        "wandb",
        "WandbLogger",
        ("from lightning.pytorch.loggers import WandbLogger",),
        _names("""
            name save_dir version offline dir id anonymous project log_model prefix checkpoint_name entity group tags
            notes config job_type mode resume
        """),
        on_demand=True,
    ),
    "logger": Target(
        "logger",
        "nl.NeMoLogger",
        (_NL,),
        _names("""
            name log_dir explicit_log_dir version use_datetime_version log_local_rank_0_only log_global_rank_0_only
            files_to_copy update_logger_directory ckpt tensorboard wandb extra_loggers
        """),
    ),
    "restore": Target(
        "restore",
        "nl.RestoreConfig",
        (_NL,),
        _names("path load_model_state load_optim_state load_artifacts"),
        on_demand=True,
    ),
    "resume": Target(
        "resume",
        "nl.AutoResume",
        (_NL,),
        _names("""
            restore_config resume_from_directory resume_from_path resume_if_exists resume_past_end
            resume_ignore_no_checkpoint
        """),
    ),
    "scheduler": Target(
        "scheduler",
        _SCHEDULERS.format("CosineAnnealingScheduler"),
        (_NL,),
        frozenset().union(*SCHEDULERS.values()),
        on_demand=True,
    ),
    "optimizer": Target(
        "optimizer",
        "OptimizerConfig",
        ("from megatron.core.optimizer import OptimizerConfig",),
        _names("""
            optimizer lr min_lr weight_decay fp16 bf16 params_dtype adam_beta1 adam_beta2 adam_eps sgd_momentum
            use_distributed_optimizer overlap_param_gather_with_optimizer_step clip_grad
            log_num_zeros_in_grad
        """),
        needs=frozenset({"optimizer"}),
    ),
    "tokenizer": Target(
        "tokenizer",
        "get_nmt_tokenizer",
        ("from nemo.collections.nlp.modules.common.tokenizer_utils import get_nmt_tokenizer",),
        _names("""
            library model_name tokenizer_model vocab_file merges_file special_tokens use_fast bpe_dropout r2l legacy
            delimiter trust_remote_code chat_template
        """),
        {"vocab_size": Later("2.2")},
    ),
    "config": Target(
        "config", "llm.GPTConfig", (_LLM,), _TRANSFORMER | _GPT, _CONFIG_LATER, needs=frozenset({"num_layers"})
    ),
    "data": Target(
        "data",
        "llm.PreTrainingDataModule",
        (_LLM,),
        _names("""
            paths seq_length tokenizer micro_batch_size global_batch_size rampup_batch_size num_workers pin_memory
            persistent_workers reset_position_ids create_attention_mask reset_attention_mask eod_mask_loss seed split
            index_mapping_dir num_dataset_builder_threads num_train_samples num_val_samples num_test_samples
        """),
        {"dataloader_type": Later("2.5", "single"), "mmap_bin_files": Later("2.5", True)},
        needs=frozenset({"paths"}),
    ),
}
"""In the order in which a program makes them: each uses those before it."""

CLASSES: dict[str, tuple[str, str]] = {
    **{name: (_SCHEDULERS.format(f"{name}Scheduler"), _NL) for name in SCHEDULERS},
    "GPTConfig": ("llm.GPTConfig", _LLM),
    "Llama31Config": ("Llama31Config", "from nemo.collections.llm.gpt.model.llama import Llama31Config"),
    "PreTrainingDataModule": ("llm.PreTrainingDataModule", _LLM),
    "MockDataModule": ("llm.MockDataModule", _LLM),
}
"""Classes that settings choose: how the program spells them, and the import line."""
