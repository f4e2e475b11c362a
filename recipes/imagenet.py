"""ResNet-50 and VGG-19 as torchvision names their parts, and images to train them on.

A ``state_dict`` of torchvision's ``resnet50`` or ``vgg19`` loads strictly into these. Images are read from ImageNet's
folders, and prepared as torchvision's references do it. Nothing is downloaded: ``images`` draws patterns where there
are none.
"""

import math
import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset, TensorDataset

SIDE = 224
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's pixels in [0, 1], red, green, blue
PARTS = ("train", "val")
SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".webp")
CLASSES = 10  # of the images that are drawn

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
        width: channels of the first convolution; the others have them in proportion.
    """

    def __init__(self, blocks: tuple[int, int, int, int], num_classes: int, width: int = 64) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 7, 2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, padding=1)
        channels_in = width
        for number, count in enumerate(blocks, 1):
            channels = width * 2 ** (number - 1)
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
        features: of the two hidden layers behind the convolutions.
        dropout: share of these zeroed in training.
    """

    def __init__(
        self, parts: tuple[tuple[int, ...], ...], num_classes: int, features: int = 4096, dropout: float = 0.5
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels_in = 3
        for part in parts:
            for channels in part:
                layers += [nn.Conv2d(channels_in, channels, 3, padding=1), nn.ReLU(inplace=True)]
                channels_in = channels
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d(7)
        self.classifier = nn.Sequential(
            nn.Linear(49 * channels_in, features),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
            nn.Linear(features, features),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
            nn.Linear(features, num_classes),
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, 0, 0.01 * math.sqrt(4096 / features))  # as published at 4096
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Maps images (N, 3, H, W) to logits (N, num_classes)."""
        return self.classifier(torch.flatten(self.avgpool(self.features(x)), 1))


def resnet50(num_classes: int = 1000, width: int = 64) -> ResNet:
    """Returns ResNet-50; the weights follow torch's global seed.

    Args:
        num_classes: features of the answer.
        width: channels of the first convolution, at least 1; the others have them in proportion. 64 is the network.

    Raises:
        ValueError: for a width below 1.
    """
    if width < 1:
        raise ValueError(f"width must be at least 1, got {width}")
    return ResNet((3, 4, 6, 3), num_classes, width)


def vgg19(num_classes: int = 1000, width: int = 64, dropout: float = 0.5) -> VGG:
    """Returns VGG-19; the weights follow torch's global seed.

    Args:
        num_classes: features of the answer.
        width: as for ``resnet50``; the hidden layers, 4096 wide at 64, too.
        dropout: share of the hidden layers' features zeroed in training.

    Raises:
        ValueError: for a width below 1.
    """
    if width < 1:
        raise ValueError(f"width must be at least 1, got {width}")
    parts = tuple(tuple(channels * width // 64 for channels in part) for part in VGG19)
    return VGG(parts, num_classes, 64 * width, dropout)


def images(
    count: int, seed: int = 0, side: int = SIDE, classes: int = CLASSES, noise: float = 0.3
) -> tuple[Tensor, Tensor]:
    """Draws images of waves on a coloured ground, noise over them; direction, wavelength and colour are the class's.

    Args:
        count: images.
        seed: of the generator; the same seed draws the same images.
        side: height and width in pixels.
        classes: how many there are.
        noise: standard deviation of what is added to each pixel; the waves have an amplitude of 1.

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
    blobs = F.interpolate(torch.randn(count, 3, 8, 8, generator=generator), size=(side, side), mode="bilinear")
    drawn = (1 + wave[:, None]) * colour + blobs + noise * torch.randn(count, 3, side, side, generator=generator)
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


def read_image(file: Path, side: int = SIDE, augment: bool = False) -> Tensor:
    """Reads an image as torchvision's references do, normalized.

    Args:
        file: in a format that Pillow reads; a camera's mark of how to turn it counts nothing, as there.
        side: height and width of what is returned, in pixels.
        augment: as for training: a random part of the image, flipped as often as not, from torch's random state. Else
            the shorter side becomes 8/7 of ``side``, of which the centre is taken.

    Returns:
        Float32, (3, side, side).

    Raises:
        ValueError: if it is damaged, no image, or has more than 8 bits in a pixel.
    """
    from PIL import Image

    try:
        with Image.open(file) as opened:
            if opened.mode.startswith(("I", "F")):  # which Pillow cuts off at 255
                raise ValueError(f"{file} has more than 8 bits in a pixel: convert it to 8")
            image = opened.convert("RGB")
    except (OSError, Image.DecompressionBombError) as error:
        raise ValueError(f"{file} is damaged, or no image: {error}") from error
    if augment:
        image = image.resize((side, side), Image.Resampling.BILINEAR, box=random_part(*image.size))
        if torch.rand(()) < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    else:
        shorter = side * 8 // 7
        width, height = (int(shorter * each / min(image.size)) for each in image.size)
        left, top = round((width - side) / 2), round((height - side) / 2)
        image = image.resize((width, height), Image.Resampling.BILINEAR).crop((left, top, left + side, top + side))
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255
    return (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(DEVIATION).view(3, 1, 1)


def random_part(width: int, height: int) -> tuple[int, int, int, int]:
    """Draws a part of an image: 8 to 100 % of its area, from 3:4 to 4:3.

    Args:
        width: of the image in pixels.
        height: likewise.

    Returns:
        Left, top, right and bottom; the whole image where ten draws of a shape did not fit into it.
    """
    for _ in range(10):
        area = width * height * float(torch.empty(()).uniform_(0.08, 1))
        ratio = math.exp(float(torch.empty(()).uniform_(math.log(3 / 4), math.log(4 / 3))))
        across, down = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < across <= width and 0 < down <= height:
            left = int(torch.randint(width - across + 1, ()))
            top = int(torch.randint(height - down + 1, ()))
            return left, top, left + across, top + down
    return 0, 0, width, height


class ImageFolder(Dataset[tuple[Tensor, int]]):
    """Images in a folder for each class.

    Args:
        folder: as ``find_images`` takes it.
        side: height and width of the images in pixels.
        augment: as ``read_image`` takes it.

    Raises:
        FileNotFoundError: if there is no such folder, or no image in it or in that of a class.
    """

    def __init__(self, folder: Path, side: int, augment: bool) -> None:
        self.files = find_images(folder)
        names = [each.name for each in folder.iterdir() if each.is_dir()]
        empty = sorted(set(names) - {file.relative_to(folder).parts[0] for file, _ in self.files})
        if empty:
            raise FileNotFoundError(f"{folder} has no images of {', '.join(empty[:5])}")
        self.side = side
        self.augment = augment

    def __len__(self) -> int:
        """Returns the number of images."""
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Returns an image, (3, side, side), and its class."""
        file, target = self.files[index]
        return read_image(file, self.side, self.augment), target


def load(folder: str | os.PathLike[str], side: int = SIDE, classes: int = 1000) -> tuple[ImageFolder, ImageFolder]:
    """Returns the images of training and of the test.

    Args:
        folder: has ``train/<class>/x.jpg`` and ``val/<class>/x.jpg``, with the same classes; ``~`` is the home folder.
        side: height and width in pixels.
        classes: how many the network tells apart.

    Raises:
        FileNotFoundError: if images are missing, of one class also; the message says where they belong.
        ValueError: if the folders have other classes than each other, or another number of them than ``classes``.
    """
    root = Path(folder).expanduser().absolute()
    try:
        read = ImageFolder(root / "train", side, augment=True), ImageFolder(root / "val", side, augment=False)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{error}. Put the images into {root}, as train/<class>/x.jpg and val/<class>/x.jpg, or name "
            "their folder with data.args.folder=; nothing is downloaded"
        ) from None
    train_names, test_names = ({each.name for each in (root / part).iterdir() if each.is_dir()} for part in PARTS)
    if train_names != test_names:
        names = ", ".join(sorted(train_names ^ test_names)[:5])
        raise ValueError(f"train and val in {root} must have the same classes, only one of them has {names}")
    if len(train_names) != classes:
        raise ValueError(
            f"{root / 'train'} has {len(train_names)} classes, and the network tells {classes} apart: give "
            f"model.args.num_classes={len(train_names)}"
        )
    return read


def drawn(
    train_images: int, test_images: int, side: int = 32, classes: int = CLASSES, noise: float = 0.3
) -> tuple[TensorDataset, TensorDataset]:
    """Draws images for training and others for the test; the other arguments are those of ``images``."""
    parts = ((train_images, 1), (test_images, 2))
    train, test = (TensorDataset(*images(count, seed, side, classes, noise)) for count, seed in parts)
    return train, test
