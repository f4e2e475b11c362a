"""Trains on handwritten digits in fixed point with Lightning, in one process or several.

python examples/lightning_digits.py
python examples/lightning_digits.py --strategy ddp --devices 2
python examples/lightning_digits.py --strategy fsdp2 --devices 2 --resume runs/lightning_digits/epoch=9.ckpt
torchrun --nnodes 2 --node-rank 0 --nproc-per-node 1 --master-addr 127.0.0.1 --master-port 29500 \
    examples/lightning_digits.py --strategy ddp --nodes 2      # and on the second machine with --node-rank 1
"""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import handwriting
import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from cnmix.lightning import CnmixPlugin


class Digits(pl.LightningModule):
    """Classifies handwritten digits.

    Args:
        sharded: whether the processes share the parameters out among them (FSDP2).
        epochs: for the schedule of the learning rate.
        lr: learning rate at the start.
        seed: for dropout.
    """

    def __init__(self, sharded: bool, epochs: int, lr: float, seed: int) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = handwriting.build_model()

    def configure_model(self) -> None:
        """Is called in every process before training: here Lightning wants parameters shared out."""
        if self.hparams.sharded and not isinstance(self.net, FSDPModule):
            mesh = self.device_mesh["data_parallel"]
            for layer in self.net:
                if any(True for _ in layer.parameters()):
                    fully_shard(layer, mesh=mesh)
            fully_shard(self.net, mesh=mesh)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Seeds dropout, so that a resumed run draws what an uninterrupted one would, and each process its own."""
        torch.manual_seed((100_000 * self.hparams.seed + self.global_step) * self.trainer.world_size + self.global_rank)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        """Returns the loss."""
        images, classes = batch
        loss = cross_entropy(self.net(images), classes)
        self.log("train_loss", loss)
        return loss

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Logs the accuracy over all processes."""
        images, classes = batch
        correct = (self.net(images).argmax(1) == classes).float().mean()
        self.log("test_accuracy", correct, sync_dist=True, batch_size=len(classes))

    def configure_optimizers(self) -> Any:
        """Returns optimizer and schedule."""
        optimizer = torch.optim.SGD(self.parameters(), lr=self.hparams.lr, momentum=0.9, weight_decay=5e-4)
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=self.hparams.epochs)]


def main(argv: Sequence[str] | None = None) -> None:
    """Reads the command line, trains and tests."""
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--opt-level", default="O1", help="O0 (float32), O1, O2 or O3")
    parser.add_argument("--strategy", default="auto", help="auto, ddp, ddp_spawn, ddp_fork or fsdp2")
    parser.add_argument("--devices", type=int, default=1, help="processes on this machine")
    parser.add_argument("--nodes", type=int, default=1, help="machines")
    parser.add_argument("--shards", action="store_true", help="with fsdp2 every process saves its own part")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=64, help="images in a step, over all processes")
    parser.add_argument("--lr", type=float, default=0.05)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("runs/lightning_digits"))
    parser.add_argument("--resume", metavar="FILE", help="a checkpoint to go on from")
    args = parser.parse_args(argv)

    pl.seed_everything(args.seed)
    train_data, test_data = handwriting.load()
    processes = args.devices * args.nodes
    share = args.batch_size // processes
    strategy: Any = args.strategy
    if strategy == "fsdp2":
        strategy = ModelParallelStrategy(processes, tensor_parallel_size=1, save_distributed_checkpoint=args.shards)
    trainer = pl.Trainer(
        accelerator="cpu",
        strategy=strategy,
        devices=args.devices,
        num_nodes=args.nodes,
        plugins=[CnmixPlugin(args.opt_level)],
        max_epochs=args.epochs,
        # Saved under a new name, after which the one before is removed: there is always one that is whole.
        callbacks=[ModelCheckpoint(args.output, filename="{epoch}")],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    task = Digits(args.strategy == "fsdp2", args.epochs, args.lr, args.seed)
    loader = DataLoader(train_data, share, shuffle=True)
    trainer.fit(task, loader, ckpt_path=args.resume)
    # ddp_spawn and ddp_fork train in processes that are gone by now: the checkpoint has what the quantizers know.
    trainer.test(task, DataLoader(test_data, 50), ckpt_path="best", verbose=False)
    if trainer.is_global_zero:
        saved = trainer.checkpoint_callback.best_model_path
        print(f"test accuracy {trainer.callback_metrics['test_accuracy']:.2%}, {saved}")


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
