"""Trains on handwritten digits in fixed point, in a plain PyTorch loop.

python examples/plain_pytorch.py
python examples/plain_pytorch.py --resume runs/plain_pytorch/epoch-10.pt
torchrun --nproc-per-node 2 examples/plain_pytorch.py --batch-size 32
"""

import argparse
import contextlib
import math
import os
from collections.abc import Sequence
from pathlib import Path

import handwriting
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, DistributedSampler

import cnmix
from cnmix import inference


def save(state: dict[str, object], path: Path) -> None:
    """Writes under a temporary name and renames, so that an interruption leaves no broken file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    torch.save(state, temporary)
    os.replace(temporary, path)


def train(args: argparse.Namespace, rank: int, world: int) -> None:
    """Trains, saves after each epoch, and evaluates in float and with the checkpoint's integers."""
    train_data, test_data = handwriting.load()
    sampler = DistributedSampler(train_data, world, rank, seed=args.seed)  # shuffles by epoch; so it does for one
    loader = DataLoader(train_data, args.batch_size, sampler=sampler)

    torch.manual_seed(args.seed)
    net = handwriting.build_model()
    optimizer = torch.optim.SGD(net.parameters(), lr=args.lr, momentum=0.9, weight_decay=5e-4)
    cnmix.initialize(net, optimizer, args.opt_level, steps_per_epoch=len(loader))
    start = 0
    if args.resume:
        checkpoint = torch.load(args.resume, weights_only=True)
        net.load_state_dict(checkpoint["state_dict"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        cnmix.load_state_dict(checkpoint["cnmix"])
        start = checkpoint["epoch"]
        if start >= args.epochs:
            raise SystemExit(f"{args.resume} has trained {start} epochs: ask for more with --epochs")

    model = nn.parallel.DistributedDataParallel(net) if world > 1 else net
    forward = torch.compile(model, backend=args.compile) if args.compile else model
    for epoch in range(start + 1, args.epochs + 1):
        sampler.set_epoch(epoch)
        for group in optimizer.param_groups:
            group["lr"] = args.lr * (1 + math.cos(math.pi * (epoch - 1) / args.epochs)) / 2
        torch.manual_seed((args.seed * 10_000 + epoch) * world + rank)  # dropout, so that no state of it is saved
        net.train()
        for step, (images, classes) in enumerate(loader, 1):
            update = step % args.accumulate == 0 or step == len(loader)
            # Gradients of the ranks are averaged with the last micro-batch only.
            with contextlib.nullcontext() if update or world == 1 else model.no_sync():
                loss = cross_entropy(forward(images), classes) / args.accumulate
                with cnmix.scale_loss(loss, optimizer) as scaled_loss:
                    scaled_loss.backward()
            if update:
                nn.utils.clip_grad_norm_(net.parameters(), args.clip)
                optimizer.step()
                optimizer.zero_grad()
        path = args.output / f"epoch-{epoch}.pt"
        if rank == 0:
            state = {
                "state_dict": net.state_dict(),
                "optimizer": optimizer.state_dict(),
                "cnmix": cnmix.state_dict(),
                "epoch": epoch,
            }
            save(state, path)
        if world > 1:
            dist.barrier()  # no rank ends, or reads the file, before it is there

    if rank == 0:
        last = args.output / f"epoch-{args.epochs}.pt"
        print(f"test accuracy {handwriting.accuracy(net, test_data):.2%}, {last}")
        if args.opt_level != "O0":
            integers = inference.prepare(handwriting.build_model(), last)
            print(f"with the checkpoint's integers {handwriting.accuracy(integers, test_data):.2%}")


def main(argv: Sequence[str] | None = None) -> None:
    """Reads the command line and trains, under torchrun in as many processes as it started."""
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--opt-level", default="O1", help="O0 (float32), O1, O2 or O3")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=64, help="images in a micro-batch, in each process")
    parser.add_argument("--accumulate", type=int, default=1, help="micro-batches in a step of the optimizer")
    parser.add_argument("--clip", type=float, default=1.0, help="largest norm of the gradients")
    parser.add_argument("--lr", type=float, default=0.05)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", nargs="?", const="inductor", metavar="BACKEND", help="torch.compile the model")
    parser.add_argument("--output", type=Path, default=Path("runs/plain_pytorch"))
    parser.add_argument("--resume", type=Path, metavar="FILE", help="a checkpoint to go on from")
    args = parser.parse_args(argv)
    if "RANK" not in os.environ:
        return train(args, 0, 1)
    dist.init_process_group("gloo")
    try:
        return train(args, dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
