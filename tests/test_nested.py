"""`--all` into a torch.save file gives the state dict that was saved, nesting and objects included."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

import reshard

STATE: dict[str, Any] = {
    "model": OrderedDict(
        [("a.weight", torch.arange(6.0).reshape(2, 3)), ("b.bias", torch.tensor(1, dtype=torch.int64))]
    ),
    "optimizer": {
        "state": {0: {"exp_avg": torch.ones(2, 3), "step": torch.tensor(3.0)}},
        "param_groups": [{"lr": 0.1}],
    },
    "epoch": 3,
    "pair": (torch.ones(2), 5, "text"),
    "mixed": [1, {"t": torch.zeros(2)}, None],
    "name": "run",
}


@pytest.mark.filterwarnings("ignore")
def test_all_into_pt_equals_what_torch_itself_makes_of_a_dcp(tmp_path: Path) -> None:
    dcp.save(STATE, checkpoint_id=str(tmp_path / "ckpt"))
    dcp_to_torch_save(str(tmp_path / "ckpt"), str(tmp_path / "torch.pt"))
    reshard.merge(tmp_path / "ckpt", tmp_path / "ours.pt", what="all")
    expected = torch.load(tmp_path / "torch.pt", weights_only=False)
    actual = torch.load(tmp_path / "ours.pt", weights_only=False)
    assert sorted(flat(actual), key=repr) == sorted(flat(expected), key=repr)


def flat(value: Any, path: tuple[Any, ...] = ()) -> list[Any]:
    """Paths, types and values; tensors as lists."""
    if isinstance(value, dict):
        return [(path, "dict", len(value)), *(x for k, v in value.items() for x in flat(v, (*path, k)))]
    if isinstance(value, list | tuple):
        return [
            (path, type(value).__name__, len(value)),
            *(x for k, v in enumerate(value) for x in flat(v, (*path, k))),
        ]
    if isinstance(value, torch.Tensor):
        return [(path, str(value.dtype), value.tolist())]
    return [(path, type(value).__name__, value)]


@pytest.mark.parametrize("name", ["ckpt.pt", "ckpt/model_world_size_1_rank_0.pt"])
def test_an_optimizer_that_counts_its_parameters_goes_on_from_what_all_wrote(tmp_path: Path, name: str) -> None:
    torch.manual_seed(0)
    module = torch.nn.Linear(3, 2)
    trained = torch.optim.AdamW(module.parameters())
    module(torch.randn(4, 3)).sum().backward()
    trained.step()
    (tmp_path / "ckpt").mkdir()
    torch.save({"model": module.state_dict(), "optimizer": trained.state_dict()}, tmp_path / name)
    reshard.merge(tmp_path / name, tmp_path / "all.pt", what="all")
    again = torch.optim.AdamW(module.parameters())
    again.load_state_dict(torch.load(tmp_path / "all.pt")["optimizer"])
    assert flat(again.state_dict()) == flat(trained.state_dict())


def test_an_optimizer_that_has_not_stepped_is_an_optimizer_too(tmp_path: Path) -> None:
    module = torch.nn.Linear(3, 2)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
    torch.save(module.state_dict(), tmp_path / "model_world_size_1_rank_0.pt")
    torch.save(optimizer.state_dict(), tmp_path / "optim_world_size_1_rank_0.pt")
    reshard.merge(tmp_path, tmp_path / "out/all.pt", what="all")
    found = torch.load(tmp_path / "out/all.pt")
    assert sorted(found) == ["bias", "optimizer", "weight"]
    assert found["optimizer"] == optimizer.state_dict()


def test_an_object_that_two_parts_have_is_told(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(1), "epoch": 1}, tmp_path / "model_world_size_1_rank_0.pt")
    torch.save({"epoch": 2, "seed": 3}, tmp_path / "extra_state_world_size_1_rank_0.pt")
    merged = reshard.merge(tmp_path, tmp_path / "out/all.pt", what="all")
    assert torch.load(tmp_path / "out/all.pt")["epoch"] == 2
    assert [n for n in merged.notices if "in several parts" in n and n.endswith("the last counts: epoch")] != []


def test_keys_that_are_no_text_are_what_they_were(tmp_path: Path) -> None:
    saved = {"by": {3: torch.ones(1), 0: torch.ones(2), 2.5: torch.ones(3), None: 1}, "list": [torch.ones(1), {1: 2}]}
    torch.save(saved, tmp_path / "saved.pt")
    reshard.merge(tmp_path / "saved.pt", tmp_path / "all.pt", what="all")
    assert sorted(flat(torch.load(tmp_path / "all.pt")), key=repr) == sorted(flat(saved), key=repr)
