"""Which part of a tensor a rank holds: held against torch's own DTensor, on every rank of many meshes."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from itertools import product

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from reshard.core.mesh import Mesh, Placement, Replicate, Shard, StridedShard, local_shape, shard

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from torch.distributed import tensor as dtensor
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.placement_types import _StridedShard
    from torch.testing._internal.distributed.fake_pg import FakeStore


def held(array: np.ndarray, mesh: Mesh, placements: Sequence[Placement], coordinate: Sequence[int], **how: bool):
    """The local array that `shard` describes."""
    pieces = shard(array.shape, mesh, placements, coordinate, **how)
    local = np.full(local_shape(pieces, array.shape), -1)
    for there, here in pieces:
        local[here.slices] = array[there.slices]
    return local


def to_torch(placement: Placement) -> dtensor.placement_types.Placement:
    match placement:
        case Shard(dim):
            return dtensor.Shard(dim)
        case StridedShard(dim, split):
            return _StridedShard(dim, split_factor=split)
        case Replicate():
            return dtensor.Replicate()


def ranks(sizes: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], dtensor.DeviceMesh]]:
    """Be each rank of a mesh in turn: its coordinate, and torch's mesh."""
    for rank, coordinate in enumerate(np.ndindex(*sizes)):
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=int(np.prod(sizes)))
        try:
            yield coordinate, init_device_mesh("cpu", sizes)
        finally:
            dist.destroy_process_group()


ONE_AXIS = (Replicate(), Shard(0), Shard(1))
SHAPES = [(8, 6), (7, 5), (1, 9), (3, 1), (0, 4), (17, 2)]


@pytest.mark.parametrize("sizes", [(3,), (2, 2), (4, 2), (2, 3, 2)])
@pytest.mark.filterwarnings("ignore")
def test_a_rank_holds_what_torch_gives_it(sizes: tuple[int, ...]) -> None:
    for coordinate, mesh in ranks(sizes):
        for placements, shape in product(product(ONE_AXIS, repeat=len(sizes)), SHAPES):
            whole = torch.arange(shape[0] * shape[1]).reshape(shape)
            local = dtensor.distribute_tensor(whole, mesh, [*map(to_torch, placements)], src_data_rank=None).to_local()
            mine = held(whole.numpy(), Mesh(sizes), placements, coordinate)
            assert mine.tolist() == local.tolist() or mine.size == local.numel() == 0, (shape, placements, coordinate)


@pytest.mark.parametrize("sizes", [(2, 2), (4, 2), (3, 2)])
@pytest.mark.filterwarnings("ignore")
def test_strided_placements_read_literally_are_torchs(sizes: tuple[int, ...]) -> None:
    families = [
        (StridedShard(0, 2), Shard(0)),
        (StridedShard(0, 2), Shard(1)),
        (StridedShard(0, 3), Replicate()),
        (StridedShard(1, 2), Shard(1)),
        (Replicate(), StridedShard(0, 4)),
    ]
    for coordinate, mesh in ranks(sizes):
        for placements, shape in product(families, SHAPES):
            whole = torch.arange(shape[0] * shape[1]).reshape(shape)
            local = dtensor.distribute_tensor(whole, mesh, [*map(to_torch, placements)], src_data_rank=None).to_local()
            mine = held(whole.numpy(), Mesh(sizes), placements, coordinate, literal=True)
            assert mine.tolist() == local.tolist() or mine.size == local.numel() == 0, (shape, placements, coordinate)


@pytest.mark.parametrize("rows", range(1, 21))
@pytest.mark.parametrize("dp, tp", [(2, 2), (4, 2), (2, 3)])
def test_fsdp_over_tensor_parallel_cuts_for_tensor_parallel_first(dp: int, tp: int, rows: int) -> None:
    whole = torch.arange(rows)
    for i, j in np.ndindex(dp, tp):
        by_tp = [*whole.chunk(tp), *[whole[:0]] * tp][j]
        by_dp = [*by_tp.chunk(dp), *[whole[:0]] * dp][i]
        mine = held(whole.numpy(), Mesh((dp, tp)), (StridedShard(0, tp), Shard(0)), (i, j))
        assert mine.tolist() == by_dp.tolist()


@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=3),
    st.lists(st.integers(1, 3), min_size=1, max_size=3),
    st.booleans(),
    st.data(),
)
def test_the_ranks_of_a_mesh_hold_every_element_as_often_as_it_is_replicated(
    shape: list[int], sizes: list[int], literal: bool, data: st.DataObject
) -> None:
    dims = st.integers(0, len(shape) - 1)
    one = st.one_of(st.builds(Replicate), st.builds(Shard, dims), st.builds(StridedShard, dims, st.integers(1, 4)))
    placements = [data.draw(one) for _ in sizes]
    replicas = int(np.prod([n for n, p in zip(sizes, placements, strict=True) if isinstance(p, Replicate)]))
    seen = np.zeros(shape, int)
    for coordinate in np.ndindex(*sizes):
        for there, here in shard(tuple(shape), Mesh(tuple(sizes)), placements, coordinate, literal=literal):
            assert there.shape == here.shape
            seen[there.slices] += 1
    assert (seen == replicas).all()


def test_a_mesh_says_its_axes() -> None:
    assert str(Mesh((4, 2), ("dp", "tp"))) == "dp=4 x tp=2"
    assert Mesh((4, 2)).num_ranks == 8
    with pytest.raises(ValueError):
        Mesh((0,))
