"""One of two processes that train under DistributedDataParallel: ddp_rank.py RANK FOLDER; test_ddp.py starts both."""

import sys
from pathlib import Path

import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

import fastbn.torch

OPTIONS = {
    "default": {},
    "static_graph": {"static_graph": True},
    "gradient_as_bucket_view": {"gradient_as_bucket_view": True},
    "find_unused_parameters": {"find_unused_parameters": True},
    "no_broadcast_of_buffers": {"broadcast_buffers": False},
    "tiny_buckets": {"bucket_cap_mb": 1e-4},
}


def train(layers, rank, options):
    """Losses, and the state at the end."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, bias=False), layers.BatchNorm2d(8), torch.nn.Tanh(),
        torch.nn.Conv2d(8, 4, 3, bias=False), layers.BatchNorm2d(4),
    )  # fmt: skip
    ddp = DistributedDataParallel(model, **options)
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    images = torch.randn(5, 4, 3, 10, 10, generator=torch.Generator().manual_seed(rank))
    losses = []
    for x in images:
        optimizer.zero_grad()
        loss = (ddp(x) - x[:, :1, :6, :6]).square().mean()
        if "static_graph" not in options:  # which allows one call a step
            loss = (
                loss + (ddp(x.flip(0)) - x[:, :1, :6, :6]).square().mean()
            )  # while the first awaits its backward
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, dict(model.state_dict())


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
