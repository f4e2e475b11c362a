"""The vendor's MNIST guide in one script: train on the card, save, quantize, load, infer on the card with integers.

It knows nothing of cnmix: with the vendor's package it runs on a card, and here with the emulated one,

    cnmix run examples/mlu_mnist.py

on scikit-learn's handwritten digits at MNIST's size, or with --folder on MNIST's own four files (see
recipes/mnist.py).
"""

import argparse
import copy
import importlib.util
from pathlib import Path

import torch
import torch_mlu.core.mlu_model as ct
import torch_mlu.core.mlu_quantize as mlu_quantize
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn, optim
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

MEAN, STD = 0.1307, 0.3081


class Net(nn.Module):
    """The guide's network."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 3, 1)
        self.conv2 = nn.Conv2d(32, 64, 3, 1)
        self.dropout1 = nn.Dropout2d(0.25)
        self.dropout2 = nn.Dropout(0.5)
        self.fc1 = nn.Linear(9216, 128)
        self.fc2 = nn.Linear(128, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns log-probabilities (N, 10) for images (N, 1, 28, 28)."""
        x = F.relu(self.conv1(x))
        x = F.relu(self.conv2(x))
        x = self.dropout1(F.max_pool2d(x, 2))
        x = F.relu(self.fc1(torch.flatten(x, 1)))
        return F.log_softmax(self.fc2(self.dropout2(x)), dim=1)


def load(folder: str | None) -> tuple[TensorDataset, TensorDataset]:
    """Returns normalized training and test images (N, 1, 28, 28), float32, with their digits."""
    if folder is not None:
        path = Path(__file__).parent.parent / "recipes" / "mnist.py"
        spec = importlib.util.spec_from_file_location("mnist", path)
        recipe = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(recipe)
        return recipe.load(folder)
    digits = load_digits()
    images = torch.as_tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    images = (F.interpolate(images, size=28, mode="bilinear") - MEAN) / STD
    classes = torch.as_tensor(digits.target)
    train, test = train_test_split(torch.arange(len(images)), test_size=450, random_state=0, stratify=classes)
    return TensorDataset(images[train], classes[train]), TensorDataset(images[test], classes[test])


def train(model: nn.Module, data: DataLoader, optimizer: optim.Optimizer) -> None:
    """Trains one epoch on the card."""
    model.train()
    for image, label in data:
        image, label = image.to(ct.mlu_device()), label.to(ct.mlu_device())
        optimizer.zero_grad()
        F.nll_loss(model(image), label).backward()
        optimizer.step()


@torch.no_grad()
def validate(model: nn.Module, data: DataLoader, device: torch.device, raw: bool = False) -> float:
    """Returns the share of test images that the model classifies right; raw are images of 0 to 255."""
    model.eval()
    right = 0
    for image, label in data:
        if raw:
            image = (image * STD + MEAN) * 255
        right += (model(image.to(device)).argmax(1).cpu() == label).sum().item()
    return right / len(data.dataset)


def main() -> None:
    """Runs the guide."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", help="of MNIST's four files")
    parser.add_argument("--save", type=Path, default=Path("runs/mlu_mnist"))
    args = parser.parse_args()
    args.save.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    ct.set_cnml_enabled(False)
    train_set, test_set = load(args.folder)
    train_data = DataLoader(train_set, batch_size=64, shuffle=True)
    test_data = DataLoader(test_set, batch_size=64)

    net = Net()
    net = mlu_quantize.adaptive_quantize(model=net, steps_per_epoch=len(train_data), bitwidth=8)
    net = net.to(ct.mlu_device())
    optimizer = ct.to(optim.SGD(net.parameters(), 1e-1), torch.device("mlu"))
    for _ in range(args.epochs):
        train(net, train_data, optimizer)
    print(f"{ct.get_device_name()}, trained in adaptive fixed point: {validate(net, test_data, ct.mlu_device()):.2%}")
    torch.save({"state_dict": net.state_dict(), "optimizer": optimizer.state_dict()}, args.save / "model.pth")

    plain = Net()
    plain.load_state_dict(torch.load(args.save / "model.pth", map_location="cpu")["state_dict"])
    print(f"host, the checkpoint in float32: {validate(plain, test_data, torch.device('cpu')):.2%}")

    calibration = train_set.tensors[0][:64]
    for dtype, per_channel, firstconv in [
        ("int8", False, False),
        ("int8", True, False),
        ("int16", False, False),
        ("int8", False, True),
    ]:
        qconfig = {"per_channel": per_channel, "firstconv": firstconv}
        if firstconv:
            qconfig |= {"mean": [MEAN], "std": [STD]}
        quantized = mlu_quantize.quantize_dynamic_mlu(copy.deepcopy(plain), qconfig, dtype=dtype, gen_quant=True)
        quantized(calibration)
        torch.save(quantized.state_dict(), args.save / "quantized.pth")
        net = mlu_quantize.quantize_dynamic_mlu(Net())
        net.load_state_dict(torch.load(args.save / "quantized.pth"))
        share = validate(net.to(ct.mlu_device()), test_data, ct.mlu_device(), raw=firstconv)
        how = "per channel" if per_channel else "per tensor"
        how += ", images of 0 to 255 normalized by the first convolution" if firstconv else ""
        print(f"{ct.get_device_name()}, quantized for inference, {dtype} {how}: {share:.2%}")


if __name__ == "__main__":
    main()
