"""Tied weights are written once, and only where the config says that they are tied."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers

import tiny_models
from reshard.core.checkpoint import Checkpoint, Origin
from reshard.core.dtypes import dtype
from reshard.core.tensor import Literal, Tensor
from reshard.errors import Mismatch
from reshard.formats import huggingface
from reshard.ops import tie as ties
from reshard.ops.tie import tie
from reshard.storage.files import LazySource
from reshard.storage.run import run

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def literal(values: Any, kind: str = "float32") -> Tensor:
    array = np.ascontiguousarray(values, kind)
    return Literal(dtype(kind), array.shape, array.tobytes())


def checkpoint(**tensors: Tensor) -> Checkpoint:
    return Checkpoint(tensors, Origin(Path("run"), "test"), LazySource())


def pair(head: Any, embeddings: Any = ((1, 2), (3, 4))) -> Checkpoint:
    return checkpoint(**{EMBEDDINGS: literal(embeddings), "model.norm.weight": literal([1, 1]), HEAD: literal(head)})


def test_equal_copies_are_written_once_under_the_name_of_the_source() -> None:
    result = tie(pair([[1, 2], [3, 4]]), {"tie_word_embeddings": True})
    assert list(result) == [EMBEDDINGS, "model.norm.weight"]
    assert result.notices == (f"{HEAD} is tied to {EMBEDDINGS} and holds the same bytes: written once",)


def test_of_copies_that_differ_the_source_is_taken_and_said() -> None:
    result = tie(pair([[1, 2], [3, 5]]), {"tie_word_embeddings": True})
    assert list(result) == [EMBEDDINGS, "model.norm.weight"]
    assert result[EMBEDDINGS].numpy().tolist() == [[1, 2], [3, 4]]
    assert result.notices[0].startswith(
        f"{HEAD} is tied to {EMBEDDINGS} but holds other values: {EMBEDDINGS} was taken"
    )


def test_bytes_are_compared_not_numbers() -> None:
    zeros = pair([[-0.0, 0.0], [3, 4]], [[0.0, 0.0], [3, 4]])
    assert "holds other values" in tie(zeros, {"tie_word_embeddings": True}).notices[0]
    nans = pair([[np.nan, 0.0], [3, 4]], [[np.nan, 0.0], [3, 4]])
    assert "holds the same bytes" in tie(nans, {"tie_word_embeddings": True}).notices[0]


@pytest.mark.parametrize("config", [None, {}, {"model_type": "llama"}, {"tie_word_embeddings": False}])
def test_without_a_config_that_says_so_nothing_is_left_out(config: dict[str, Any] | None) -> None:
    both = pair([[1, 2], [3, 4]])
    assert tie(both, config) is both


def test_a_model_type_that_is_tied_by_default_needs_no_word_in_its_config() -> None:
    assert HEAD not in tie(pair([[1, 2], [3, 4]]), {"model_type": "gemma"})


def test_the_whole_config_rules_over_its_text_part() -> None:
    tied, untied = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}
    assert ties.says_tied(tied | {"text_config": untied}) is True
    assert ties.says_tied(untied | {"text_config": tied}) is False
    assert ties.says_tied({"text_config": tied}) is True
    assert ties.says_tied({"model_type": "llama"}) is None


def test_tied_weights_of_two_shapes_are_an_error() -> None:
    with pytest.raises(Mismatch, match=r"lm_head\.weight is \[3, 2\] and model\.embed_tokens\.weight is \[2, 2\]"):
        tie(pair([[1, 2], [3, 4], [5, 6]]), {"tie_word_embeddings": True})


def test_encoder_and_decoder_repeat_the_shared_embeddings() -> None:
    one = literal([[1, 2]])
    names = ("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight", HEAD)
    result = tie(checkpoint(**dict.fromkeys(names, one)), {"model_type": "t5", "tie_word_embeddings": True})
    assert list(result) == ["shared.weight"]
    assert len(result.notices) == 3


def test_the_decoder_of_masked_models_repeats_word_embeddings_and_bias() -> None:
    words, bias = literal([[1, 2]]), literal([3])
    tensors = {
        "bert.embeddings.word_embeddings.weight": words,
        "cls.predictions.bias": bias,
        "cls.predictions.decoder.weight": words,
        "cls.predictions.decoder.bias": bias,
    }
    result = tie(checkpoint(**tensors), {"model_type": "bert"})
    assert list(result) == ["bert.embeddings.word_embeddings.weight", "cls.predictions.bias"]


def test_a_source_that_is_missing_leaves_its_alias() -> None:
    head = checkpoint(**{HEAD: literal([[1, 2]])})
    assert tie(head, {"tie_word_embeddings": True}) is head


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3", "gemma3"])
def test_a_tied_model_loads_with_its_head_left_out(model_type: str, tmp_path: Path) -> None:
    model = tiny_models.make(model_type)
    opened = huggingface.open(tiny_models.save_modules(model, tmp_path / "run"))
    result = tie(opened, opened.config)
    assert set(opened) - set(result) == {HEAD}
    run(huggingface.plan(result), tmp_path / "whole")
    loaded = tiny_models.load(model, tmp_path / "whole")
    assert tiny_models.logits(loaded).equal(tiny_models.logits(model))


def test_model_types_are_tied_by_default_where_transformers_says_so() -> None:
    configs = {m: transformers.CONFIG_MAPPING[m] for m in ties.TIED_BY_DEFAULT if m in transformers.CONFIG_MAPPING}
    assert len(configs) > 50
    for model_type in ("bert", "bloom", "cohere", "gemma", "gemma2", "gpt2", "opt", "smollm3", "starcoder2", "t5"):
        assert configs[model_type]().tie_word_embeddings is True, model_type


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "mixtral", "phimoe", "gpt_neox", "qwen2_5_vl", "gemma3"])
def test_the_table_knows_what_transformers_ties(model_type: str) -> None:
    model = tiny_models.make(model_type)
    expected = dict(model._tied_weights_keys)
    assert dict(ties.pairs(model.state_dict())) == expected
