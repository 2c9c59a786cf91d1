"""Gloo processes that fill what they hold with random numbers and save it together."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from math import prod

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.multiprocessing import start_processes

NUM_RANKS = 8
TILE_NUMEL = 4_000_037
"""Weights repeat a random tile of this many elements: no divisor of a width, so rows and shards differ."""


class Random:
    """Fast filler: slices of one tile of small normal numbers."""

    def __init__(self, dtype: torch.dtype, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self._tile = (torch.randn(TILE_NUMEL, generator=generator) * 0.02).to(dtype)
        self._at = 0

    def fill(self, tensor: torch.Tensor) -> None:
        flat, done = tensor.detach().view(-1), 0
        while done < flat.numel():
            piece = self._tile[self._at : self._at + flat.numel() - done]
            flat[done : done + piece.numel()] = piece
            done += piece.numel()
            self._at = (self._at + piece.numel()) % TILE_NUMEL


def on_ranks(save: Callable[[DeviceMesh], None], mesh_shape: tuple[int, int]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        start_processes(_rank, (save, mesh_shape, f"file://{folder}/store"), prod(mesh_shape), start_method="fork")


def _rank(rank: int, save: Callable[[DeviceMesh], None], mesh_shape: tuple[int, int], store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=prod(mesh_shape))
    save(init_device_mesh("cpu", mesh_shape, mesh_dim_names=("dp", "tp")))
    dist.destroy_process_group()
