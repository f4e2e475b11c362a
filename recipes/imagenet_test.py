"""The vendor's way of ResNet-50 and VGG-19 to the card: quantize, infer, measure; with the vendor's flags.

cnmix run recipes/imagenet_test.py --network vgg19 --quantization true --image_number 8
cnmix run recipes/imagenet_test.py --network vgg19 --mlu true --compute_accuracy true
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

import imagenet
import imagenet_checkpoint
import torch
import vendor_flow
from torch import Tensor, nn

from cnmix import checkpoint

FOLDER = "runs/imagenet"
CALIBRATION_SEED, TEST_SEED = 0, 7  # of drawn images; the network was settled on those of 0
FIRST = {"firstconv": False}  # images are normalized before the model


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    flags = vendor_flow.Flags(__doc__, FOLDER, images=48)
    flags.add_argument("--network", choices=("resnet50", "vgg19"), default="resnet50", help="(default: resnet50)")
    flags.flag("data", Path, None, "folder with val/<class>/x.jpg, and train/ to quantize on; drawn images where none")
    flags.flag("compute_accuracy", vendor_flow.truth, False, "print the share of images whose best class is right")
    options = flags.read(arguments)
    if options.quantization and options.compute_accuracy:
        flags.error("--compute_accuracy is for a model that infers: leave it out with --quantization")
    return options


def load_trained(options: argparse.Namespace) -> nn.Module:
    """Returns the network with the weights of ``--model_path``, or those that ``make_checkpoint`` makes of none.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is of another network.
    """
    path = options.model_path
    build = getattr(imagenet, options.network)
    if path is None:
        path = Path(FOLDER) / f"{options.network}.pt"
        if not path.is_file():
            print(f"there is no {path}: making one, of random weights with the last layer fitted to drawn images")
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.manual_seed(0)
            with torch.enable_grad():
                imagenet_checkpoint.make_checkpoint(path, build(), batch_size=2)
    saved = checkpoint.read_plain(path)
    state = saved.get("state_dict", saved)
    classes = next(reversed(state.values())).numel()  # the last bias
    model = build(classes)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"{path} is no {options.network}: {str(error).splitlines()[1].strip()}") from error
    return model.eval()


def load_images(options: argparse.Namespace) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields batches of images, (N, 3, 224, 224), and their classes, (N,)."""
    number = options.image_number
    if options.data is None:
        seed = CALIBRATION_SEED if options.quantization else TEST_SEED
        images, targets = imagenet.images(number, seed)
        yield from zip(images.split(options.batch_size), targets.split(options.batch_size), strict=True)
        return
    of_training = options.quantization and (options.data / "train").is_dir()
    files = imagenet.find_images(options.data / ("train" if of_training else "val"))
    step = max(1, len(files) // number)  # some of every class, as they stand class by class
    chosen = files[::step][:number]
    for start in range(0, len(chosen) - options.batch_size + 1, options.batch_size):
        batch = chosen[start : start + options.batch_size]
        yield torch.stack([imagenet.read_image(file) for file, _ in batch]), torch.tensor([each for _, each in batch])


@torch.no_grad()
def run(options: argparse.Namespace) -> Tensor:
    """Does what the options say; returns the logits, (images, classes)."""
    if options.offline is not None:
        runner = vendor_flow.offline(options, FIRST)
    else:
        shape = (3, imagenet.SIDE, imagenet.SIDE)
        runner = vendor_flow.online(options, options.network, load_trained(options), shape, FIRST)
    logits: list[Tensor] = []
    targets: list[Tensor] = []
    for images, classes in load_images(options):
        logits.append(runner.run(images, lambda output: output.float().cpu()))
        targets.append(classes)
    if not logits:
        raise ValueError(f"{options.data} has fewer than {options.batch_size} images")
    if options.quantization:
        vendor_flow.save_quantized(options, options.network, runner)
    if options.compute_accuracy:
        print("Accuracy: " + str((torch.cat(logits).argmax(1) == torch.cat(targets)).float().mean().item()))
    runner.end()
    return torch.cat(logits)


if __name__ == "__main__":
    vendor_flow.main(lambda: run(parse()))
