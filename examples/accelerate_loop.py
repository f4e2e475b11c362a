"""Trains on handwritten digits in fixed point, in a loop with Hugging Face Accelerate.

python examples/accelerate_loop.py
python examples/accelerate_loop.py --resume runs/accelerate_loop/epoch-10
accelerate launch --cpu --num_processes 2 examples/accelerate_loop.py --batch-size 32
"""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

import handwriting
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

import cnmix
from cnmix import inference


def main(argv: Sequence[str] | None = None) -> None:
    """Trains, saves after each epoch, and evaluates in float and with the checkpoint's integers."""
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--opt-level", default="O1", help="O0 (float32), O1, O2 or O3")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=64, help="images in a micro-batch, in each process")
    parser.add_argument("--accumulate", type=int, default=1, help="micro-batches in a step of the optimizer")
    parser.add_argument("--clip", type=float, default=1.0, help="largest norm of the gradients")
    parser.add_argument("--lr", type=float, default=0.05)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("runs/accelerate_loop"))
    parser.add_argument("--resume", type=Path, metavar="FOLDER", help="a checkpoint to go on from")
    args = parser.parse_args(argv)

    accelerator = Accelerator(cpu=True, mixed_precision="no", gradient_accumulation_steps=args.accumulate)
    train_data, test_data = handwriting.load()
    torch.manual_seed(args.seed)
    model = handwriting.build_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=0.9, weight_decay=5e-4)
    loader = DataLoader(train_data, args.batch_size, shuffle=True)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    cnmix.initialize(model, optimizer, args.opt_level, steps_per_epoch=len(loader))
    accelerator.register_for_checkpointing(cnmix)
    start = 0
    if args.resume:
        accelerator.load_state(args.resume)
        start = int(args.resume.name.removeprefix("epoch-"))
        if start >= args.epochs:
            raise SystemExit(f"{args.resume} has trained {start} epochs: ask for more with --epochs")

    for epoch in range(start + 1, args.epochs + 1):
        for group in optimizer.param_groups:
            group["lr"] = args.lr * (1 + math.cos(math.pi * (epoch - 1) / args.epochs)) / 2
        model.train()
        for images, classes in loader:
            with accelerator.accumulate(model):
                loss = cross_entropy(model(images), classes)
                with cnmix.scale_loss(loss, optimizer) as scaled_loss:
                    accelerator.backward(scaled_loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), args.clip)
                optimizer.step()
                optimizer.zero_grad()
        accelerator.save_state(args.output / f"epoch-{epoch}")

    if accelerator.is_main_process:
        last = args.output / f"epoch-{args.epochs}"
        print(f"test accuracy {handwriting.accuracy(accelerator.unwrap_model(model), test_data):.2%}, {last}")
        if args.opt_level != "O0":
            checkpoint = {
                "state_dict": load_file(last / "model.safetensors"),
                "cnmix": torch.load(last / "custom_checkpoint_0.pkl", weights_only=True),
            }
            integers = inference.prepare(handwriting.build_model(), checkpoint)
            print(f"with the checkpoint's integers {handwriting.accuracy(integers, test_data):.2%}")
    accelerator.end_training()


if __name__ == "__main__":
    main()
