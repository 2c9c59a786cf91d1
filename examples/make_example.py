"""Train a very small Llama on four processes and keep its sharded checkpoint: what `examples/` and its truth hold.

    base/                                     a config and a tokenizer, as a model on the hub has them
    run/checkpoint-10/pytorch_model_fsdp_0/   the weights after ten steps of FSDP2, a quarter in each file
    ../tests/data/example_truth.safetensors   the same weights whole, gathered by torch in the same run

Needs torch, transformers and safetensors; no GPU. The text it learns is the license.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from safetensors.torch import save_file
from tokenizers import ByteLevelBPETokenizer
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

HERE = Path(__file__).resolve().parent
BASE = HERE / "base"
SHARDS = Path("run", "checkpoint-10", "pytorch_model_fsdp_0")  # relative, as DCP writes down where it saved
TRUTH = HERE.parent / "tests" / "data" / "example_truth.safetensors"
TEXT = HERE.parent / "LICENSE"
NUM_RANKS, NUM_STEPS, WINDOW = 4, 10, 64


def main() -> None:
    os.chdir(HERE)
    for directory in (BASE, HERE / "run"):
        shutil.rmtree(directory, ignore_errors=True)
    make_base()
    SHARDS.mkdir(parents=True)
    mp.spawn(train, nprocs=NUM_RANKS)


def make_base() -> None:
    """A tokenizer of 300 tokens, and a config that fits it."""
    trained = ByteLevelBPETokenizer()
    trained.train([str(TEXT)], vocab_size=299, special_tokens=["<s>", "</s>"], show_progress=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=trained._tokenizer, bos_token="<s>", eos_token="</s>")
    tokenizer.save_pretrained(BASE)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=40, intermediate_size=72, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=False, dtype="float32",
        architectures=["LlamaForCausalLM"], bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    config.save_pretrained(BASE)
    LlamaForCausalLM(config).generation_config.save_pretrained(BASE)


def train(rank: int) -> None:
    """What one process does: shard, take ten steps, save its quarter."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29641", "RANK": str(rank), "WORLD_SIZE": str(NUM_RANKS)}
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig.from_pretrained(BASE))
    mesh = init_device_mesh("cpu", (NUM_RANKS,), mesh_dim_names=("fsdp",))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    tokens = torch.tensor(AutoTokenizer.from_pretrained(BASE)(TEXT.read_text())["input_ids"])
    shuffled = torch.Generator().manual_seed(rank)
    for step in range(NUM_STEPS):
        begins = torch.randint(len(tokens) - WINDOW, (4,), generator=shuffled)
        batch = torch.stack([tokens[begin : begin + WINDOW] for begin in begins.tolist()])
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if rank == 0:
            print(f"step {step + 1}: loss {loss.item():.3f}")
    # as accelerate's save_fsdp_model does, and with it the Trainer of transformers and axolotl
    shards = {"model": get_model_state_dict(model)}
    dcp.save(shards, storage_writer=dcp.FileSystemWriter(SHARDS), planner=dcp.DefaultSavePlanner())
    whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank == 0:
        save_file({fqn: tensor.contiguous() for fqn, tensor in whole.items()}, TRUTH)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
