"""Experts single, packed and turned, into each other: held against transformers and numpy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.core_model_loading import revert_weight_conversion

import tiny_models
from reshard.core.dtypes import dtype
from reshard.core.tensor import Array, Filled, Literal, Tensor
from reshard.dialects import apply, match, packing
from reshard.dialects.facts import Facts
from reshard.dialects.fuse import GLU, SAME
from reshard.dialects.table import Family, Row, entries
from reshard.errors import Incomplete, Mismatch
from reshard.storage.files import LazySource

AT = "model.layers.0.mlp.experts"
FAMILY = Family(
    "packs",
    ("packs",),
    (),
    (
        Row("embed", "model.embed.weight"),
        Row(
            "layers.{layer}.experts.gate_up",
            ("layers.{layer}.{expert}.gate.weight", "layers.{layer}.{expert}.up.weight"),
            GLU,
            on=("moe",),
        ),
        Row("layers.{layer}.experts.down", "layers.{layer}.{expert}.down.weight", on=("moe",)),
        Row("layers.{layer}.experts.down_bias", "layers.{layer}.{expert}.down.bias", on=("moe",)),
        Row("layers.{layer}.w{expert}", "layers.{layer}.on_hub", on=("moe",)),
    ),
    lambda config: FACTS,
)
"""A family of which both sides pack experts."""
FACTS = Facts({}, (frozenset(("dense",)), frozenset(("moe",)), frozenset(("moe",))), counts={"expert": 3})


@dataclass(frozen=True)
class Experts:
    """The matrices of a layer's experts."""

    gate: list[Array]
    up: list[Array]
    down: list[Array]

    @classmethod
    def numbered(cls, experts: int, inner: int, hidden: int) -> Experts:
        """Elements that are all different."""
        numbers = iter(np.arange(1, 3 * experts * inner * hidden + 1, dtype="<u4").reshape(-1, inner, hidden))
        gate, up, down = ([next(numbers) for _ in range(experts)] for _ in range(3))
        return cls(gate, up, [matrix.reshape(hidden, inner) for matrix in down])

    def single(self) -> dict[str, Array]:
        kinds = {"gate_proj": self.gate, "up_proj": self.up, "down_proj": self.down}
        return {f"{AT}.{e}.{kind}.weight": m for kind, matrices in kinds.items() for e, m in enumerate(matrices)}

    def packed(self) -> dict[str, Array]:
        gate_up = np.stack([np.concatenate(pair) for pair in zip(self.gate, self.up, strict=True)])
        return {f"{AT}.gate_up_proj": gate_up, f"{AT}.down_proj": np.stack(self.down)}

    def turned(self) -> dict[str, Array]:
        return {name: array.transpose(0, 2, 1) for name, array in self.packed().items()}


def tensors(arrays: Mapping[str, Array]) -> dict[str, Tensor]:
    return {
        name: Literal(dtype("U32"), array.shape, np.ascontiguousarray(array).tobytes())
        for name, array in arrays.items()
    }


def blank(*shape: int) -> Tensor:
    return Filled(dtype("BF16"), shape, bytes(2))


def shapes(arrays: Mapping[str, Array]) -> dict[str, tuple[int, ...]]:
    return {name: array.shape for name, array in arrays.items()}


def assert_same(actual: Mapping[str, Tensor], expected: Mapping[str, Array]) -> None:
    assert set(actual) == set(expected)
    for name, tensor in actual.items():
        assert np.array_equal(tensor.read(LazySource()), expected[name]), name


EXPERTS = st.builds(Experts.numbered, st.integers(1, 4), st.integers(1, 4), st.integers(1, 4))


@given(EXPERTS)
@settings(max_examples=60, deadline=None)
def test_packed_and_turned_experts_become_single(experts: Experts) -> None:
    assert_same(packing.unpacked(tensors(experts.packed()), ()), experts.single())
    assert_same(packing.unpacked(tensors(experts.turned()), ()), experts.single())
    assert_same(packing.unpacked(tensors(experts.single()), ()), experts.single())


@given(EXPERTS)
@settings(max_examples=60, deadline=None)
def test_single_experts_become_what_the_reference_has(experts: Experts) -> None:
    single = tensors(experts.single())
    for wanted in (experts.single(), experts.packed(), experts.turned()):
        assert_same(packing.packed(single, shapes(wanted)), wanted)
    assert_same(packing.packed(single, {}), experts.single())


def test_single_experts_are_those_that_transformers_saves() -> None:
    model = tiny_models.make("qwen3_moe")
    expected = revert_weight_conversion(model, dict(model.state_dict()))
    arrays = {name: t.numpy().view("<u4") for name, t in model.state_dict().items()}
    single = packing.unpacked(tensors(arrays), ())
    assert_same(single, {name: t.contiguous().numpy().view("<u4") for name, t in expected.items()})
    assert_same(packing.packed(single, shapes(arrays)), arrays)


def test_names_of_the_familys_own_table_stay() -> None:
    packed = tensors(Experts.numbered(2, 3, 4).packed())
    assert packing.unpacked(packed, set(packed)) == packed


def test_what_is_no_expert_stays() -> None:
    others = {"model.norm.weight": blank(4), f"{AT}.gate_up_proj_bias": blank(2, 6), f"{AT}.gate_up_proj": blank(6, 4)}
    assert packing.unpacked(others, ()) == others


@pytest.mark.parametrize(
    ("gate_up", "down"),
    [
        ((2, 6, 4), (3, 4, 3)),  # another number of experts
        ((2, 6, 4), (2, 5, 3)),
        ((2, 5, 4), (2, 4, 2)),  # gate and up unlike
        ((0, 6, 4), (0, 4, 3)),
        ((2, 0, 0), (2, 0, 0)),
        ((10**9, 2, 0), (10**9, 0, 1)),
        ((2, 6, 4), (2, 4)),
        ((2, 6, 4), None),
    ],
)
def test_shapes_that_are_not_those_of_experts_are_a_mismatch(gate_up: Any, down: Any) -> None:
    found = {f"{AT}.gate_up_proj": blank(*gate_up)} | ({} if down is None else {f"{AT}.down_proj": blank(*down)})
    with pytest.raises(Mismatch, match=r"model\.layers\.0\.mlp\.experts: gate_up_proj"):
        packing.unpacked(found, ())


def test_experts_that_are_there_packed_and_single_are_a_mismatch() -> None:
    experts = Experts.numbered(2, 3, 4)
    both = tensors(experts.packed() | {f"{AT}.1.up_proj.weight": experts.up[1]})
    with pytest.raises(Mismatch, match=r"experts are there packed and single: .*experts\.1\.up_proj\.weight"):
        packing.unpacked(both, ())


def test_missing_experts_are_named() -> None:
    experts = Experts.numbered(3, 2, 4)
    some = tensors({name: array for name, array in experts.single().items() if ".1." not in name})
    with pytest.raises(Incomplete) as caught:
        packing.packed(some, shapes(experts.packed()))
    assert f"{AT}.gate_up_proj: 2 of 6 matrices of its experts are missing" in str(caught.value)
    assert f"{AT}.1.gate_proj.weight, {AT}.1.up_proj.weight" in str(caught.value)


def test_an_expert_of_a_high_number_costs_nothing() -> None:
    far = {f"{AT}.{number}.down_proj.weight": blank(4, 3) for number in (0, 9999999)}
    reference = {f"{AT}.gate_up_proj": (2, 6, 4), f"{AT}.down_proj": (2, 4, 3)}
    with pytest.raises(Incomplete, match="9999998 of 10000000 matrices of its experts are missing"):
        packing.packed(far, reference)


@pytest.mark.parametrize("number", ["01", "1" * 5000, "٣", "-1", "10000000"])
def test_numbers_that_no_writer_writes_are_no_experts(number: str) -> None:
    strange = {f"{AT}.{number}.down_proj.weight": blank(4, 3)}
    assert packing.packed(strange, {f"{AT}.down_proj": (1, 4, 3)}) == strange
    assert match.natural(f"{AT}.{number}") > match.natural("a")


def test_experts_of_unlike_shapes_are_not_packed() -> None:
    unlike = {f"{AT}.0.down_proj.weight": blank(4, 3), f"{AT}.1.down_proj.weight": blank(4, 2)}
    with pytest.raises(Mismatch, match=r"down_proj: parts BF16 \[4, 3\], BF16 \[4, 2\] are not alike"):
        packing.packed(unlike, {f"{AT}.down_proj": (2, 4, 3), f"{AT}.gate_up_proj": (2, 6, 4)})


# ------------------------------------------------------------------------- tables of which our tensors pack experts


def test_a_placeholder_that_only_the_hub_has_is_packed_in_our_tensor() -> None:
    table = {entry.name: entry for entry in entries(FAMILY, FACTS)}
    assert table["layers.1.experts.gate_up"].hub == (
        *(f"layers.1.{e}.gate.weight" for e in range(3)), *(f"layers.1.{e}.up.weight" for e in range(3)),
    )  # fmt: skip
    assert "layers.0.experts.gate_up" not in table


def model() -> dict[str, Array]:
    """The hub's tensors of a model of `FAMILY`."""
    numbers, result = np.arange(10**4, dtype="<u4"), {"model.embed.weight": np.ones((5, 4), "<u4")}
    for layer in (1, 2):
        for expert in range(3):
            at = f"layers.{layer}.{expert}"
            for kind, shape in (
                ("gate.weight", (6, 4)),
                ("up.weight", (6, 4)),
                ("down.weight", (4, 6)),
                ("down.bias", (4,)),
            ):
                size = int(np.prod(shape))
                result[f"{at}.{kind}"], numbers = numbers[:size].reshape(shape), numbers[size:]
        result[f"layers.{layer}.on_hub"], numbers = numbers[:36].reshape(3, 12), numbers[36:]
    return result


def test_facts_and_patterns_find_the_same_rows() -> None:
    hub = model()
    named = apply.to_megatron(tensors(hub), FAMILY, FACTS)
    ours = {name: one.tensor for name, one in named.items()}
    gate_up = ours["layers.2.experts.gate_up"].read(LazySource())
    expected = [np.concatenate([hub[f"layers.2.{e}.gate.weight"], hub[f"layers.2.{e}.up.weight"]]) for e in range(3)]
    assert np.array_equal(gate_up, np.stack(expected))
    assert ours["layers.1.experts.down_bias"].shape == (3, 4)
    assert_same(apply.to_hub(ours, FAMILY, FACTS), hub)

    rows = [row for row in FAMILY.rows if row.packed is None]
    by_pattern = match.joined(tensors({n: a for n, a in hub.items() if "on_hub" not in n}), rows, {})
    assert_same(by_pattern, {n: t.read(LazySource()) for n, t in ours.items() if ".w" not in n})
    for name, tensor in by_pattern.items():
        found = match.by_name(name, rows)
        assert found is not None
        assert_same(match.split(tensor, *found, {}), {n: hub[n] for n in match.split(tensor, *found, {})})


def test_packed_tensors_of_another_number_than_the_facts_say_are_a_mismatch() -> None:
    ours = {name: one.tensor for name, one in apply.to_megatron(tensors(model()), FAMILY, FACTS).items()}
    ours["layers.1.experts.down"] = ours["layers.1.experts.down"][:2]
    with pytest.raises(Mismatch, match=r"layers\.1\.experts\.down: 2 tensors of the hub in it, 3 expected"):
        apply.to_hub(ours, FAMILY, FACTS)


def test_two_tensors_for_one_place_are_a_mismatch() -> None:
    rows = [Row("{rest}.new", "{rest}.old"), Row("a.new", "other", SAME)]
    with pytest.raises(Mismatch, match=r"a\.new: there are two tensors for"):
        match.joined({"a.old": blank(1), "other": blank(1)}, rows, {})
    with pytest.raises(Mismatch, match=r"a\.new: there are tensors of these names, and others that make them"):
        match.joined({"a.old": blank(1), "a.new": blank(1)}, rows, {})
