"""Number formats: trainer.precision, O2 and fp8 meet in one MegatronMixedPrecision."""

from __future__ import annotations

from typing import Any

from reshard.ops.migrate.row import Code, Moved, Row, Settings, truthy

_HALF = (16, "16", "fp16", "16-mixed")
_BFLOAT16 = ("bf16", "bf16-mixed")
_SINGLE = (32, "32", "fp32", "32-true")


def _dtype(name: str) -> Code:
    return Code(f"torch.{name}", ("import torch",))


def precision(value: Any, settings: Settings) -> Moved:
    """bf16 becomes "bf16-mixed", 16 "16-mixed", 32 "32"; weights are kept in that dtype, the optimizer's in float32."""
    if isinstance(value, list | dict):
        return Moved(removed=True, attention=True, note="no precision")
    for given, name, dtype in (
        (_BFLOAT16, "bf16-mixed", "bfloat16"),
        (_HALF, "16-mixed", "float16"),
        (_SINGLE, "32", "float32"),
    ):
        if value in given and not isinstance(value, bool):
            return Moved(name, _decided(dtype, settings))
    return Moved(removed=True, attention=True, note="MegatronMixedPrecision takes bf16, 16 and 32")


def _decided(dtype: str, settings: Settings) -> dict[str, Any]:
    """What else a precision settles."""
    places: dict[str, Any] = {
        "precision.params_dtype": _dtype(dtype),
        "precision.pipeline_dtype": _dtype(dtype),
        "precision.autocast_enabled": False,
    }
    if settings.get("model.optim.name") is not None and dtype != "float32":
        places["optimizer.bf16" if dtype == "bfloat16" else "optimizer.fp16"] = True
    return places


def _of_model(value: Any, settings: Settings) -> Moved:
    """Counts where no trainer says otherwise, as in the YAML of a `.nemo`."""
    if settings.get("trainer.precision") is not None:
        return Moved(note="trainer.precision decides")
    return precision(value, settings)


def _o2(value: Any, settings: Settings) -> Moved:
    """Always on."""
    given = settings.get("trainer.precision", settings.get("model.precision"))
    told = not truthy(value) and given is not None and given not in _SINGLE
    note = "NeMo 1 kept float32 weights under autocast; NeMo 2 keeps half-precision weights, float32 in the optimizer"
    return Moved(attention=told, note=note if told else "")


def _fp8(value: Any, settings: Settings) -> Moved:
    """False becomes None, True "e4m3" or "hybrid", as fp8_e4m3 and fp8_hybrid say."""
    if not truthy(value):
        return Moved(None)
    for key, name in (("model.fp8_e4m3", "e4m3"), ("model.fp8_hybrid", "hybrid")):
        if truthy(settings.get(key)):
            return Moved(name)
    return Moved(removed=True, attention=True, note="neither fp8_e4m3 nor fp8_hybrid is set, which NeMo 1 refused")


def _folded(_: Any, settings: Settings) -> Moved:
    """Folded into fp8."""
    return Moved(note="part of fp8" if truthy(settings.get("model.fp8")) else "fp8 is off")


def _grad_sync(value: Any, _: Settings) -> Any:
    """ "fp32" becomes True, anything else False."""
    return value in _SINGLE if isinstance(value, str | int) else True


ROWS = (
    Row("trainer.precision", "precision.precision", move=precision,
        note="a plugin of the Trainer, which also sets the dtypes of model, optimizer and DDP"),
    Row("model.precision", "precision.precision", move=_of_model, note="trainer.precision, in .nemo archives"),
    Row("model.megatron_amp_O2", "precision.params_dtype", move=_o2, note="NeMo 2 always trains as O2 did"),
    Row("model.native_amp_init_scale", "precision.fp16_initial_loss_scale", note="fp16 only"),
    Row("model.native_amp_growth_interval", "precision.fp16_loss_scale_window", note="fp16 only"),
    Row("model.hysteresis", "precision.fp16_hysteresis", note="fp16 only"),
    Row("model.fp8", "precision.fp8", move=_fp8, note="a format instead of three truth values"),
    Row("model.fp8_e4m3", "precision.fp8", move=_folded, note='fp8="e4m3"'),
    Row("model.fp8_hybrid", "precision.fp8", move=_folded, note='fp8="hybrid"'),
    Row("model.fp8_margin", "precision.fp8_margin"),
    Row("model.fp8_interval", "config.fp8_interval", note="deprecated by Transformer Engine"),
    Row("model.fp8_amax_history_len", "precision.fp8_amax_history_len", absent=1024, when="model.fp8",
        note="absent meant 1024, NeMo 2's default is 1"),
    Row("model.fp8_amax_compute_algo", "precision.fp8_amax_compute_algo", absent="max", when="model.fp8",
        note='absent meant "max", NeMo 2\'s default is "most_recent"'),
    Row("model.fp8_params", "precision.fp8_param_gather", note="fp8_params before 2.3"),
    Row("model.fp8_wgrad", "precision.fp8_wgrad"),
    Row("model.fp8_dot_product_attention", "precision.fp8_dot_product_attention"),
    Row("model.fp8_multi_head_attention", "precision.fp8_multi_head_attention"),
    Row("model.reduce_amax", note="Megatron-Core always reduces; tp_only_amax_red limits it to tensor parallel ranks"),
    Row("model.skip_fp8_attention_checkpoint_load", note="ckpt_load_strictness decides"),
    Row("model.fp32_residual_connection", "config.fp32_residual_connection"),
    Row("model.fp16_lm_cross_entropy", "config.fp16_lm_cross_entropy"),
    Row("model.optim.grad_sync_dtype", "precision.grad_reduce_in_fp32", move=_grad_sync,
        note="the plugin writes over DistributedDataParallelConfig"),
)  # fmt: skip
