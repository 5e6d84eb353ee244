"""One of two processes that train a model together, by DDP or FSDP: python -m ddp_rank RANK FOLDER."""

import sys
from pathlib import Path

import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import fastbn.torch

OPTIONS = {
    "default": {},
    "static_graph": {"static_graph": True},
    "gradient_as_bucket_view": {"gradient_as_bucket_view": True},
    "find_unused_parameters": {"find_unused_parameters": True},
    "no_broadcast_of_buffers": {"broadcast_buffers": False},
    "tiny_buckets": {"bucket_cap_mb": 1e-4},
    "fully_shard": None,  # FSDP, which frees and fills the memory of parameters all the time
}


def train(layers, rank, options):
    """Losses, and the state at the end."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, bias=False), layers.BatchNorm2d(8), torch.nn.Tanh(),
        torch.nn.Conv2d(8, 4, 3, bias=False), layers.BatchNorm2d(4),
    )  # fmt: skip
    if options is None:
        mesh = init_device_mesh("cpu", (2,))
        for module in model[1], model[4], model:
            together = fully_shard(module, mesh=mesh)
    else:
        together = DistributedDataParallel(model, **options)
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    images = torch.randn(5, 4, 3, 10, 10, generator=torch.Generator().manual_seed(rank))
    losses = []
    for x in images:
        optimizer.zero_grad()
        loss = (together(x) - x[:, :1, :6, :6]).square().mean()
        if options is not None and "static_graph" not in options:  # which allow one call a step
            loss = loss + (together(x.flip(0)) - x[:, :1, :6, :6]).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    state = {key: getattr(t, "full_tensor", t.clone)() for key, t in model.state_dict().items()}
    return losses, state


def main(rank, folder):
    torch.set_num_threads(1)
    store = distributed.FileStore(str(folder / "store"), 2)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    results = {
        name: [train(layers, rank, options) for layers in (fastbn.torch, torch.nn)]
        for name, options in OPTIONS.items()
    }
    torch.save(results, folder / f"rank{rank}.pt")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
