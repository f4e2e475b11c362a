"""A checkpoint of a network that has hardly been trained, so that there is one to infer from."""

import os

import imagenet
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import cnmix
from cnmix import checkpoint

BATCH, IMAGES = 16, 96  # of settling
LOGIT = 10.0  # what a fitted class answers over the others


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
            if isinstance(module, imagenet.Bottleneck):
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
    path: str | os.PathLike[str], model: nn.Module, steps: int = 3, batch_size: int = 4, side: int = imagenet.SIDE
) -> None:
    """Settles the network, trains it for a few steps at O1 in int8, and writes a checkpoint of it.

    Accuracy is not what these steps are for. The formats are those of training, measured on every step.

    Args:
        path: the file.
        model: ``resnet50()`` or ``vgg19()``, plain; it is plain again afterwards.
        steps: training steps.
        batch_size: images in each.
        side: height and width of the images in pixels.
    """
    settle(model, *imagenet.images(IMAGES, side=side)).train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | nn.Dropout):
            module.eval()  # a few steps on small batches would know less than what was settled
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
    cnmix.initialize(model, optimizer, "O1", max_bitwidth=8, steps_per_epoch=steps, quantify_rate=1.0)
    x, targets = imagenet.images(steps * batch_size, seed=1, side=side)
    for inputs, classes in zip(x.split(batch_size), targets.split(batch_size), strict=True):
        optimizer.zero_grad()
        with cnmix.scale_loss(F.cross_entropy(model(inputs), classes), optimizer) as loss:
            loss.backward()
        optimizer.step()
    checkpoint.save(path, model)
    cnmix.dequantize(model).eval()
