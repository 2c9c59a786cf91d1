"""config.json is set right where training changed the model, and every change is said."""

from __future__ import annotations

from typing import Any

import pytest

from reshard.core.dtypes import dtype
from reshard.core.tensor import Filled, Tensor
from reshard.errors import Mismatch
from reshard.ops.config import reconcile


def tensor(kind: str, *shape: int) -> Tensor:
    return Filled(dtype(kind), shape, bytes(dtype(kind).itemsize))


def weights(kind: str = "bfloat16", head: bool = True, rows: int = 32) -> dict[str, Tensor]:
    tensors = {"model.embed_tokens.weight": tensor(kind, rows, 8), "model.norm.weight": tensor("float32", 8)}
    return tensors | ({"lm_head.weight": tensor(kind, rows, 8)} if head else {})


def config(**changes: Any) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "tie_word_embeddings": False,
        "vocab_size": 32,
    } | changes


def test_a_config_that_fits_comes_back_as_it_is() -> None:
    fitting = config()
    result, changes = reconcile(fitting, weights())
    assert result is fitting
    assert changes == []


def test_the_prefix_of_fsdp_is_taken_off_classes() -> None:
    result, changes = reconcile(config(architectures=["FSDPLlamaForCausalLM"]), weights())
    assert result["architectures"] == ["LlamaForCausalLM"]
    assert changes == [
        "architectures: ['FSDPLlamaForCausalLM'] -> ['LlamaForCausalLM']: FSDP had renamed the class",
    ]


def test_only_the_prefix_is_taken_off() -> None:
    for name in ("PSDFModel", "FSDP", "FSDPx", "DPSFormerForCausalLM"):
        assert reconcile(config(architectures=[name]), weights())[1] == []


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_the_dtype_is_that_of_most_weights_under_the_key_that_is_there(key: str) -> None:
    given = {k: v for k, v in config().items() if k != "dtype"} | {key: "float32"}
    result, changes = reconcile(given, weights("bfloat16"))
    assert dict(result) == given | {key: "bfloat16"}
    assert changes == [f"{key}: float32 -> bfloat16: what the weights are"]


def test_a_config_without_a_dtype_gets_none() -> None:
    given = {k: v for k, v in config().items() if k != "dtype"}
    assert reconcile(given, weights("float16"))[0] is given


def test_the_dtype_of_a_part_changes_when_no_weight_has_it() -> None:
    given = config(dtype="float16", text_config={"dtype": "float16"}, vision_config={"dtype": "float32"})
    result, changes = reconcile(given, weights("bfloat16"))
    assert result["text_config"] == {"dtype": "bfloat16"}
    assert result["vision_config"] == {"dtype": "float32"}
    assert changes == [
        "dtype: float16 -> bfloat16: what the weights are",
        "text_config.dtype: float16 -> bfloat16: what the weights are",
    ]


def test_quantized_models_keep_their_dtype() -> None:
    given = config(dtype="float16", quantization_config={"quant_method": "fp8"})
    assert reconcile(given, weights("bfloat16"))[0] is given


def test_a_missing_head_of_an_untied_model_is_an_error() -> None:
    with pytest.raises(Mismatch, match="tie_word_embeddings: false") as caught:
        reconcile(config(), weights(head=False))
    assert "set tie_word_embeddings to true" in str(caught.value.hint)


def test_a_missing_head_says_that_weights_are_tied_where_the_config_does_not() -> None:
    given = {k: v for k, v in config().items() if k != "tie_word_embeddings"}
    result, changes = reconcile(given, weights(head=False))
    assert result["tie_word_embeddings"] is True
    assert changes == [
        "tie_word_embeddings: true was added: there is model.embed_tokens.weight and no head of its own",
    ]


def test_a_tie_that_only_the_text_part_states_is_stated_for_the_whole() -> None:
    given = {"architectures": ["XForConditionalGeneration"], "text_config": {"tie_word_embeddings": True}}
    result, changes = reconcile(given, weights(head=False))
    assert result["tie_word_embeddings"] is True
    assert len(changes) == 1


@pytest.mark.parametrize("architectures", [["LlamaModel"], ["LlamaForSequenceClassification"], None])
def test_models_without_a_head_need_none(architectures: list[str] | None) -> None:
    given = config(architectures=architectures)
    assert reconcile(given, weights(head=False))[0] is given


@pytest.mark.parametrize("head", ["lm_head.out_proj.weight", "language_model.lm_head.weight", "embed_out.weight"])
def test_a_head_of_another_name_is_a_head(head: str) -> None:
    given = config(architectures=["XForConditionalGeneration"])
    tensors = weights(head=False) | {head: tensor("bfloat16", 32, 8)}
    assert reconcile(given, tensors)[0] is given


def test_a_tied_model_needs_no_head() -> None:
    given = config(tie_word_embeddings=True)
    assert reconcile(given, weights(head=False))[0] is given


def test_the_vocabulary_is_as_large_as_the_embeddings() -> None:
    result, changes = reconcile(config(), weights(rows=40))
    assert result["vocab_size"] == 40
    assert changes == ["vocab_size: 32 -> 40: the rows of model.embed_tokens.weight"]
    nested = {"text_config": {"vocab_size": 32, "hidden_size": 8}}
    result, changes = reconcile(nested, weights(rows=40))
    assert result["text_config"] == {"vocab_size": 40, "hidden_size": 8}
    assert changes == ["text_config.vocab_size: 32 -> 40: the rows of model.embed_tokens.weight"]


def test_fewer_rows_than_the_config_says_are_lost_rows() -> None:
    with pytest.raises(Mismatch, match=r"vocab_size is 32 in config\.json, model\.embed_tokens\.weight has 16 rows"):
        reconcile({"vocab_size": 32}, weights(rows=16))


def test_embeddings_and_a_head_of_two_sizes_fit_no_config() -> None:
    tensors = weights(rows=40) | {"lm_head.weight": tensor("bfloat16", 36, 8)}
    with pytest.raises(
        Mismatch, match=r"vocab_size is 32 in config\.json, model\.embed_tokens\.weight has 40 rows, the head 36"
    ):
        reconcile(config(), tensors)


@pytest.mark.parametrize("part", [{"model_type": "mllama"}, {"text_config": {"model_type": "mllama_text_model"}}])
def test_embeddings_that_have_more_rows_than_the_head_by_design_change_nothing(part: dict[str, Any]) -> None:
    said = {"vocab_size": 32} | part
    if "text_config" in part:
        said = {"text_config": {"vocab_size": 32} | part["text_config"]}
    tensors = weights(rows=40) | {"lm_head.weight": tensor("bfloat16", 32, 8)}
    assert reconcile(said, tensors) == (said, [])


def test_the_embeddings_of_a_decoder_with_a_vocabulary_of_its_own_do_not_count() -> None:
    said = {"model_type": "marian", "vocab_size": 32, "decoder_vocab_size": 40}
    tensors = {
        "model.encoder.embed_tokens.weight": tensor("float32", 32, 8),
        "model.decoder.embed_tokens.weight": tensor("float32", 40, 8),
        "lm_head.weight": tensor("float32", 40, 8),
    }
    assert reconcile(said, tensors) == (said, [])


def test_the_given_config_is_not_touched() -> None:
    given = config(dtype="float32", text_config={"dtype": "float32"})
    reconcile(given, weights("bfloat16"))
    assert given == config(dtype="float32", text_config={"dtype": "float32"})
