"""Optimizer and learning-rate schedule."""

from __future__ import annotations

from typing import Any

from reshard.ops.migrate.row import Moved, Row, Settings, number, on, truthy
from reshard.ops.migrate.targets import SCHEDULERS

_DISTRIBUTED = ("distributed_fused_adam", "mcore_distributed_optim")
_ADAM = ("fused_adam", "megatron_fused_adam", "adamw", "adam")
_SCHED = "model.optim.sched"


def _name(value: Any, _: Settings) -> Moved:
    """Adam in all its spellings is "adam"; the distributed ones set use_distributed_optimizer."""
    if value in _DISTRIBUTED:
        return Moved("adam", {"optimizer.use_distributed_optimizer": True, "ddp.use_distributed_optimizer": True})
    if value in _ADAM:
        note = "NeMo 1's adam added weight decay to the gradient; Megatron's decouples it" if value == "adam" else ""
        return Moved("adam", {"optimizer.use_distributed_optimizer": False}, note=note, attention=bool(note))
    if value == "sgd":
        return Moved("sgd", {"optimizer.use_distributed_optimizer": False})
    return Moved(removed=True, attention=True, note="Megatron-Core has adam and sgd: write another optimizer by hand")


def _betas(value: Any, _: Settings) -> Moved:
    """Two arguments instead of a list."""
    if isinstance(value, list) and len(value) == 2:
        return Moved(value[0], {"optimizer.adam_beta2": value[1]})
    return Moved(removed=True, attention=True, note="two numbers are expected")


def _average(value: Any, settings: Settings) -> Moved:
    """None and absence become True for mcore_distributed_optim."""
    if value is not None:
        return Moved(value)
    return Moved(True) if settings.get("model.optim.name") == "mcore_distributed_optim" else Moved()


def _schedule(value: Any, settings: Settings) -> Moved:
    """`<name>Scheduler`, where NeMo 2 has one."""
    if isinstance(value, str) and value in SCHEDULERS:
        return Moved(value)
    return Moved(removed=True, attention=True, note=f"NeMo 2 has {', '.join(SCHEDULERS)}; others by hand")


def _taken(settings: Settings, argument: str) -> bool:
    name = settings.get(f"{_SCHED}.name")
    return argument in SCHEDULERS.get(name if isinstance(name, str) else "", frozenset())


def scheduled(argument: str) -> Any:
    """Kept where the schedule's class takes it."""

    def move(value: Any, settings: Settings) -> Moved:
        """Where the schedule's class takes it."""
        if _taken(settings, argument):
            return Moved(value)
        lost = value not in (None, 0, 0.0)
        note = f"the schedule's class in NeMo 2 takes no {argument}" if lost else ""
        return Moved(removed=True, attention=lost, note=note)

    return move


def _share(argument: str) -> Any:
    """A ratio becomes steps where the class takes only steps and max_steps is known."""

    def move(value: Any, settings: Settings) -> Moved:
        """Of max_steps, where the class takes only steps."""
        if value is None or _taken(settings, f"{argument}_ratio"):
            return Moved(removed=value is None) if value is None else Moved(also={f"scheduler.{argument}_ratio": value})
        steps = settings.get(f"{_SCHED}.max_steps", settings.get("trainer.max_steps"))
        if _taken(settings, f"{argument}_steps") and number(value) and number(steps) and 0 <= value <= 1 and steps > 0:
            return Moved(int(value * steps), note=f"{value} of {steps} steps")
        return Moved(removed=True, attention=True, note=f"needs max_steps, and a class that takes {argument}_steps")

    return move


def _max_steps(value: Any, settings: Settings) -> Moved:
    """Of the trainer, where the schedule has none of its own."""
    steps = settings.get("trainer.max_steps") if value is None else value
    if not _taken(settings, "max_steps"):
        return Moved(removed=True)
    if number(steps) and steps > 0:
        return Moved(steps)
    return Moved(removed=True, attention=True, note="NeMo 2's default is 10 steps: give the trainer's max_steps")


def _min_lr(value: Any, settings: Settings) -> Moved:
    """None and absence become what NeMo 1's class takes."""
    if not _taken(settings, "min_lr"):
        return Moved(removed=True)
    lowest = 1e-5 if settings.get(f"{_SCHED}.name") == "SquareAnnealing" else 0.0
    return Moved(lowest if value is None else value)


OPTIMIZER = (
    Row("model.optim.name", "optimizer.optimizer", move=_name, note="OptimizerConfig of Megatron-Core"),
    Row("model.optim.lr", "optimizer.lr"),
    Row("model.optim.weight_decay", "optimizer.weight_decay", absent=0.0, when="model.optim",
        note="absent meant 0, OptimizerConfig's default is 0.01"),
    Row("model.optim.betas", "optimizer.adam_beta1", move=_betas, note="adam_beta1 and adam_beta2"),
    Row("model.optim.eps", "optimizer.adam_eps"),
    Row("model.optim.momentum", "optimizer.sgd_momentum"),
    Row("model.optim.overlap_grad_sync", "ddp.overlap_grad_reduce"),
    Row("model.optim.overlap_param_sync", "ddp.overlap_param_gather",
        note="from 2.5 on in OptimizerConfig too"),
    Row("model.optim.overlap_param_gather", "ddp.overlap_param_gather",
        note="from 2.5 on in OptimizerConfig too"),
    Row("model.optim.overlap_param_gather_with_optimizer_step", "optimizer.overlap_param_gather_with_optimizer_step"),
    Row("model.optim.align_param_gather", "ddp.align_param_gather"),
    Row("model.optim.average_in_collective", "ddp.average_in_collective", move=_average, absent=None,
        when="model.optim", note="absent meant True for mcore_distributed_optim, the config's default is False"),
    Row("model.optim.check_for_nan_in_grad", "ddp.check_for_nan_in_grad",
        note='without a DistributedDataParallelConfig of its own ("megatron") NeMo 2 checks'),
    Row("model.optim.ddp_bucket_size", "ddp.bucket_size", note="counts parameters"),
    Row("model.optim.bucket_cap_mb", note="of apex's optimizer, in MiB; Megatron's bucket_size counts parameters"),
    Row("model.optim.contiguous_grad_buffer", note="always contiguous"),
    Row("model.optim.contiguous_param_buffer", note="always contiguous"),
    Row("model.optim.param_sync_dtype", note="of apex's optimizer; parameters are gathered in their own dtype"),
    Row("model.optim.dtype", move=on(attention_when=lambda v: v not in (None, "fp32", 32, "32"),
        note="use_precision_aware_optimizer and exp_avg_dtype, by hand"), note="of apex's optimizer"),
    Row("model.optim.store_params", note="of apex's optimizer"),
    Row("model.optim.store_param_remainders", note="of apex's optimizer"),
    Row("model.optim.capturable", note="of apex's optimizer"),
    Row("model.optim.nccl_ub", note="of apex's optimizer"),
    Row("model.optim.lock_timeout", note="of apex's optimizer"),
    Row("model.optim.master_weights", note="Megatron's optimizer keeps float32 weights always"),
    Row("model.grad_div_ar_fusion", note="of NeMo 1's own gradient reduction; Megatron's DDP has it"),
    Row("model.grad_allreduce_chunk_size_mb", note="of NeMo 1's own gradient reduction; Megatron's DDP has buckets"),
    Row("model.async_grad_allreduce", note="of NeMo 1's own gradient reduction: overlap_grad_reduce"),
    Row("model.distributed_adam_bucket_merge_size", note="of apex's optimizer"),
    Row("model.with_fp32_embedding_grads", note="of apex's optimizer"),
    Row("model.validation_param_sync_overlap", note="of apex's optimizer"),
    Row("model.do_layer_norm_weight_decay",
        move=on(attention_when=truthy, note="MegatronOptimizerModule(no_weight_decay_cond=...), by hand"),
        note="norms and biases have no weight decay unless no_weight_decay_cond says so"),
    Row("model.reset_lr", move=on(attention_when=truthy, note="no counterpart"), note="no counterpart"),
    Row("model.reset_lr_steps", move=on(attention_when=truthy, note="no counterpart"), note="no counterpart"),
)  # fmt: skip

SCHEDULE = (
    Row(f"{_SCHED}.name", "scheduler.", move=_schedule, note="lr_scheduler.<name>Scheduler"),
    Row(f"{_SCHED}.max_steps", "scheduler.max_steps", move=_max_steps, absent=None, when=_SCHED,
        note="absent meant the trainer's max_steps, NeMo 2's default is 10"),
    Row(f"{_SCHED}.warmup_steps", "scheduler.warmup_steps", move=scheduled("warmup_steps"), absent=0, when=_SCHED,
        note="absent meant 0, NeMo 2's default is 750; half of the classes take none"),
    Row(f"{_SCHED}.warmup_ratio", "scheduler.warmup_steps", move=_share("warmup"),
        note="stays warmup_ratio where the class has it"),
    Row(f"{_SCHED}.constant_steps", "scheduler.constant_steps", move=scheduled("constant_steps"), absent=0, when=_SCHED,
        note="absent meant 0, NeMo 2's default is 80000"),
    Row(f"{_SCHED}.constant_ratio", "scheduler.constant_steps", move=_share("constant"),),
    Row(f"{_SCHED}.hold_steps", "scheduler.hold_steps", move=scheduled("hold_steps")),
    Row(f"{_SCHED}.hold_ratio", "scheduler.hold_ratio", move=scheduled("hold_ratio")),
    Row(f"{_SCHED}.decay_rate", "scheduler.decay_rate", move=scheduled("decay_rate")),
    Row(f"{_SCHED}.power", "scheduler.power", move=scheduled("power")),
    Row(f"{_SCHED}.cycle", "scheduler.cycle", move=scheduled("cycle")),
    Row(f"{_SCHED}.d_model", "scheduler.d_model", move=scheduled("d_model")),
    Row(f"{_SCHED}.min_lr", "scheduler.min_lr", move=_min_lr, absent=None, when=_SCHED,
        note="absent meant 0, CosineAnnealingScheduler's default is 6e-05"),
    Row(f"{_SCHED}.monitor", "scheduler.monitor", move=scheduled("monitor")),
    Row(f"{_SCHED}.reduce_on_plateau", move=on(attention_when=truthy, note="no counterpart"), note="no counterpart"),
    Row(f"{_SCHED}.last_epoch", note="comes from the checkpoint"),
)  # fmt: skip

ROWS = (*OPTIMIZER, *SCHEDULE)
