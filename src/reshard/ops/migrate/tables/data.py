"""Batches and data sets."""

from __future__ import annotations

from typing import Any

from reshard.ops.migrate.row import Moved, Row, Settings, on, truthy
from reshard.ops.migrate.targets import MOCK_DATA

_DATA = "model.data"
_FINE_TUNING = (
    "FineTuningDataModule(dataset_root=..., seq_length=..., micro_batch_size=..., global_batch_size=...), by hand"
)


def _is_mock(settings: Settings) -> bool:
    return truthy(settings.get(f"{_DATA}.mock_dataset")) or settings.get(f"{_DATA}.data_impl") == "mock"


def taken(argument: str) -> Any:
    """Kept, unless the data are mock and MockDataModule does not take it."""

    def move(value: Any, settings: Settings) -> Moved:
        """Not with mock data."""
        if _is_mock(settings) and argument not in MOCK_DATA:
            return Moved(removed=True, note="MockDataModule does not take it")
        return Moved(value)

    return move


def _paths(value: Any, settings: Settings) -> Moved:
    if _is_mock(settings) or value is None:
        return Moved(removed=True, note="no files are read" if _is_mock(settings) else "no files are named")
    return Moved(value)


def _mock(value: Any, _: Settings) -> Moved:
    """True takes MockDataModule."""
    return Moved("MockDataModule") if truthy(value) else Moved(removed=True, note="PreTrainingDataModule")


def _storage(value: Any, _: Settings) -> Moved:
    """mmap is the only one left; mock takes MockDataModule."""
    if value == "mock":
        return Moved("MockDataModule")
    told = value not in (None, "mmap")
    return Moved(removed=True, attention=told, note="data are read by mmap: preprocess them anew" if told else "")


def _seed(value: Any, settings: Settings) -> Moved:
    moved = taken("seed")(value, settings)
    if value in (None, 1234):
        return Moved(moved.value, note=moved.note, removed=moved.removed)
    note = "the order of the data; MegatronStrategy seeds weights and dropout with 1234, whatever this says"
    return Moved(moved.value, removed=moved.removed, attention=True, note=note)


_SAME = (
    "seq_length", "num_workers", "reset_position_ids", "reset_attention_mask", "eod_mask_loss", "index_mapping_dir",
    "num_dataset_builder_threads", "dataloader_type", "mmap_bin_files",
)  # fmt: skip
_WHEN_ON = on(attention_when=truthy, note="no counterpart")

ROWS = (
    Row("model.micro_batch_size", "data.micro_batch_size"),
    Row("model.global_batch_size", "data.global_batch_size"),
    Row("model.rampup_batch_size", "data.rampup_batch_size"),
    Row("model.seed", "data.seed", move=_seed, note="of the data alone; MegatronStrategy's own is 1234"),
    Row(f"{_DATA}.data_prefix", "data.paths", move=_paths, note="a path, or a list with weights"),
    Row(f"{_DATA}.data_prefix.*", move=on(attention_when=lambda _: True, note="paths={...}, by hand"),
        note='paths={"train": [...], "validation": [...], "test": [...]}'),
    Row(f"{_DATA}.splits_string", "data.split", move=taken("split")),
    *(Row(f"{_DATA}.{name}", f"data.{name}", move=taken(name)) for name in _SAME),
    Row(f"{_DATA}.mock_dataset", "data.", move=_mock, note="the class MockDataModule instead of a flag"),
    Row(f"{_DATA}.data_impl", "data.", move=_storage, note="always mmap"),
    Row(f"{_DATA}.skip_warmup", note="no counterpart"),
    Row(f"{_DATA}.shuffle_documents", move=on(attention_when=lambda v: v is False, note="documents are shuffled"),
        note="always shuffled"),
    Row(f"{_DATA}.validation_drop_last", move=on(attention_when=lambda v: v is False, note="the last one is dropped"),
        note="GPTDatasetConfig(drop_last_partial_validation_sequence=...), which the data module does not pass"),
    Row(f"{_DATA}.no_seqlen_plus_one_input_tokens", move=_WHEN_ON,
        note="GPTDatasetConfig(add_extra_token_to_sequence=...), which the data module does not pass"),
    Row(f"{_DATA}.pad_samples_to_global_batch_size", move=_WHEN_ON, note="no counterpart"),
    Row(f"{_DATA}.exchange_indices_distributed", move=_WHEN_ON, note="no counterpart"),
    Row(f"{_DATA}.data_cache_generation_only", move=_WHEN_ON, note="no counterpart"),
    Row(f"{_DATA}.delay_data_init", note="no counterpart"),
    Row(f"{_DATA}.delay_data_mmap", note="no counterpart"),
    Row(f"{_DATA}.add_fim", move=_WHEN_ON, note="no counterpart"),
    Row(f"{_DATA}.fim.*", note="of add_fim"),
    Row(f"{_DATA}.chat", move=on(attention_when=truthy, note="ChatDataModule, by hand"), note="ChatDataModule"),
    Row(f"{_DATA}.chat_prompt_tokens.*", note="arguments of ChatDataModule"),
    *(Row(f"{_DATA}.{name}_ds.*", note=_FINE_TUNING) for name in ("train", "validation", "test")),
    Row("model.peft.peft_scheme", move=on(attention_when=lambda v: v not in (None, "none"), note="write it by hand"),
        note="llm.finetune(peft=llm.peft.LoRA(...)): LoRA, DoRA and, of others, none"),
    Row("model.peft.lora_tuning.*", note="LoRA(dim=adapter_dim, alpha=, dropout=adapter_dropout, target_modules=): "
        "attention_qkv is linear_qkv, attention_dense linear_proj, mlp_fc1 linear_fc1, mlp_fc2 linear_fc2"),
    Row("model.peft.*", note="NeMo 2 has LoRA and DoRA"),
    Row("model.answer_only_loss", note="FineTuningDataModule(dataset_kwargs={...}), by hand"),
    Row("model.save_nemo_on_validation_end", note="NeMo 2 has no .nemo"),
    Row("model.skip_train", move=on(attention_when=truthy, note="call llm.validate instead of llm.pretrain"),
        note="llm.validate(model, data, trainer)"),
)  # fmt: skip
