"""ResNet-50 and VGG-19 as torchvision names their parts, and images to run them on.

A ``state_dict`` of torchvision's ``resnet50`` or ``vgg19`` loads strictly into these, and ``read_image`` prepares
ImageNet's images for it. Nothing is downloaded: ``images`` draws patterns, and ``make_checkpoint`` makes a checkpoint
of a network that has hardly been trained.
"""

import math
import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import cnmix
from cnmix import checkpoint

SIDE = 224
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's pixels in [0, 1], red, green, blue
SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".webp")
CLASSES = 10  # of the images that are drawn
BATCH, IMAGES = 16, 96  # of settling
LOGIT = 10.0  # what a fitted class answers over the others

# Output channels of VGG-19's convolutions (configuration E); each part ends in a max pooling.
VGG19 = ((64, 64), (128, 128), (256,) * 4, (512,) * 4, (512,) * 4)


class Bottleneck(nn.Module):
    """ResNet's block of 1x1, 3x3 and 1x1 convolutions, the stride in the second one.

    Args:
        channels_in: channels of the input.
        channels: channels of the 3x3 convolution; the block has four times as many at its end.
        stride: of the 3x3 convolution, and of the shortcut where it has one.
    """

    def __init__(self, channels_in: int, channels: int, stride: int = 1) -> None:
        super().__init__()
        out = 4 * channels
        self.conv1 = nn.Conv2d(channels_in, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, out, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out)
        self.relu = nn.ReLU(inplace=True)
        self.downsample: nn.Module | None = None
        if stride != 1 or channels_in != out:
            self.downsample = nn.Sequential(nn.Conv2d(channels_in, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, channels_in, H, W) to (N, 4 * channels, H / stride, W / stride)."""
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        y += x if self.downsample is None else self.downsample(x)
        return self.relu(y)


class ResNet(nn.Module):
    """A residual network of bottlenecks (He et al., 2015).

    Args:
        blocks: bottlenecks in each of the four layers.
        num_classes: features of the answer.
    """

    def __init__(self, blocks: tuple[int, int, int, int], num_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, padding=1)
        channels_in = 64
        for number, count in enumerate(blocks, 1):
            channels = 32 * 2**number
            layer = [Bottleneck(channels_in, channels, stride=1 if number == 1 else 2)]
            channels_in = 4 * channels
            layer += [Bottleneck(channels_in, channels) for _ in range(count - 1)]
            self.add_module(f"layer{number}", nn.Sequential(*layer))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels_in, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Maps images (N, 3, H, W) to logits (N, num_classes)."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


class VGG(nn.Module):
    """VGG's network (Simonyan and Zisserman, 2014), without batch normalization.

    Args:
        parts: output channels of the 3x3 convolutions between two poolings.
        num_classes: features of the answer.
    """

    def __init__(self, parts: tuple[tuple[int, ...], ...], num_classes: int) -> None:
        super().__init__()
        features: list[nn.Module] = []
        channels_in = 3
        for part in parts:
            for channels in part:
                features += [nn.Conv2d(channels_in, channels, 3, padding=1), nn.ReLU(inplace=True)]
                channels_in = channels
            features.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*features)
        self.avgpool = nn.AdaptiveAvgPool2d(7)
        self.classifier = nn.Sequential(
            nn.Linear(49 * channels_in, 4096),
            nn.ReLU(inplace=True),
            nn.Dropout(),
            nn.Linear(4096, 4096),
            nn.ReLU(inplace=True),
            nn.Dropout(),
            nn.Linear(4096, num_classes),
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, 0, 0.01)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Maps images (N, 3, H, W) to logits (N, num_classes)."""
        return self.classifier(torch.flatten(self.avgpool(self.features(x)), 1))


def resnet50(num_classes: int = 1000) -> ResNet:
    """Returns ResNet-50; the weights follow torch's global seed."""
    return ResNet((3, 4, 6, 3), num_classes)


def vgg19(num_classes: int = 1000) -> VGG:
    """Returns VGG-19; the weights follow torch's global seed."""
    return VGG(VGG19, num_classes)


def images(count: int, seed: int = 0, side: int = SIDE, classes: int = CLASSES) -> tuple[Tensor, Tensor]:
    """Draws images of waves on a coloured ground, noise over them; direction, wavelength and colour are the class's.

    Args:
        count: images.
        seed: of the generator; the same seed draws the same images.
        side: height and width in pixels.
        classes: how many there are.

    Returns:
        Images, float32, shape (count, 3, side, side), each with mean 0 and standard deviation 1; classes, int64,
        shape (count,).
    """
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(classes, (count,), generator=generator)
    turn = targets * math.pi / classes
    wavelength = side / (4 + 4 * (targets % 3))
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    phase = 2 * math.pi * torch.rand(count, generator=generator)
    along = turn.cos()[:, None, None] * columns + turn.sin()[:, None, None] * rows
    wave = torch.sin(2 * math.pi * along / wavelength[:, None, None] + phase[:, None, None])
    colour = torch.stack([(2 * turn + shift).sin() for shift in (0.5, 2.6, 4.7)], 1)[:, :, None, None]
    noise = F.interpolate(torch.randn(count, 3, 8, 8, generator=generator), size=(side, side), mode="bilinear")
    drawn = (1 + wave[:, None]) * colour + noise + 0.3 * torch.randn(count, 3, side, side, generator=generator)
    deviation, mean = torch.std_mean(drawn, (1, 2, 3), keepdim=True)
    return (drawn - mean) / deviation, targets


def find_images(folder: Path) -> list[tuple[Path, int]]:
    """Lists images as torchvision's ``ImageFolder`` does: ``folder/<class>/x.jpg``, classes numbered by their names.

    Args:
        folder: ``val`` or ``train``. It must have a folder for every class, since those give the numbers.

    Returns:
        Files and their classes, class by class.

    Raises:
        FileNotFoundError: if there is no such folder, or no image in it.
    """
    names = sorted(each.name for each in folder.iterdir() if each.is_dir()) if folder.is_dir() else []
    files = [
        (file, number)
        for number, name in enumerate(names)
        for file in sorted((folder / name).rglob("*"))
        if file.suffix.lower() in SUFFIXES
    ]
    if not files:
        raise FileNotFoundError(f"{folder} has no images: it needs a folder for each class, with {', '.join(SUFFIXES)}")
    return files


def read_image(file: Path, side: int = SIDE) -> Tensor:
    """Reads an image as networks of torchvision are evaluated: shorter side 8/7 of ``side``, the centre, normalized.

    Args:
        file: in a format that Pillow reads.
        side: height and width of what is returned, in pixels.

    Returns:
        Float32, (3, side, side).

    Raises:
        ValueError: if it is damaged, or no image.
    """
    from PIL import Image

    try:
        with Image.open(file) as opened:
            image = opened.convert("RGB")
    except OSError as error:
        raise ValueError(f"{file} is damaged, or no image: {error}") from error
    shorter = side * 8 // 7
    width, height = (int(shorter * each / min(image.size)) for each in image.size)
    left, top = round((width - side) / 2), round((height - side) / 2)
    image = image.resize((width, height), Image.Resampling.BILINEAR).crop((left, top, left + side, top + side))
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255
    return (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(DEVIATION).view(3, 1, 1)


def settle(model: nn.Module, x: Tensor, targets: Tensor) -> nn.Module:
    """Brings a network of random weights to where training would have it, near enough to quantize it, in place.

    Batch normalization takes its statistics from ``x``. The last one of each residual branch is set to 0.2: at 1, which
    training starts from, random branches magnify any rounding of an activation on the way to the logits. The last
    Linear is fitted to the classes by least squares, since one of random weights answers nearly all images alike.

    Args:
        model: ``resnet50()`` or ``vgg19()``.
        x: images, (N, 3, H, W), more than one.
        targets: their classes, (N,).

    Returns:
        ``model``, in evaluation mode.
    """
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    last = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    kept: list[Tensor] = []
    with torch.no_grad(), last.register_forward_pre_hook(lambda _, inputs: kept.append(inputs[0])):
        for module in model.modules():
            if isinstance(module, Bottleneck):
                module.bn3.weight.fill_(0.2)
        momenta = [norm.momentum for norm in norms]
        model.eval()
        for norm in norms:
            norm.momentum = None  # the plain average over the batches
            norm.train()
        for batch in x.split(BATCH) if norms else ():
            model(batch)
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        model.eval()
        kept.clear()
        for batch in x.split(BATCH):
            model(batch)
        features = torch.cat(kept).double()
        mean = features.mean(0)
        centred = features - mean
        classes = int(targets.max()) + 1
        wanted = LOGIT * (F.one_hot(targets, classes).double() - 1 / classes)
        products = centred @ centred.T
        products += 0.1 * products.diagonal().mean() * torch.eye(len(x), dtype=torch.float64)
        weight = torch.linalg.solve(products, wanted).T @ centred
        last.weight.zero_()
        last.bias.fill_(-LOGIT)
        last.weight[:classes] = weight.float()
        last.bias[:classes] = -(weight @ mean).float()
    return model


def make_checkpoint(
    path: str | os.PathLike[str], model: nn.Module, steps: int = 3, batch_size: int = 4, side: int = SIDE
) -> None:
    """Settles the network, trains it for a few steps at O1 in int8, and writes a checkpoint of it.

    So that there is one to infer from: accuracy is not what these steps are for. The formats are those of training,
    measured on every step.

    Args:
        path: the file.
        model: ``resnet50()`` or ``vgg19()``, plain; it is plain again afterwards.
        steps: training steps.
        batch_size: images in each.
        side: height and width of the images in pixels.
    """
    settle(model, *images(IMAGES, side=side)).train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | nn.Dropout):
            module.eval()  # a few steps on small batches would know less than what was settled
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
    cnmix.initialize(model, optimizer, "O1", max_bitwidth=8, steps_per_epoch=steps, quantify_rate=1.0)
    x, targets = images(steps * batch_size, seed=1, side=side)
    for inputs, classes in zip(x.split(batch_size), targets.split(batch_size), strict=True):
        optimizer.zero_grad()
        with cnmix.scale_loss(F.cross_entropy(model(inputs), classes), optimizer) as loss:
            loss.backward()
        optimizer.step()
    checkpoint.save(path, model)
    cnmix.dequantize(model).eval()
