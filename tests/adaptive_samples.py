import math

import torch

from cnmix import kernels
from cnmix.adaptive import OperandQuantizer
from cnmix.fixed_point import FixedPoint, absmax, choose_position


def gaussian(n=1024, seed=0):
    return torch.randn(n, generator=torch.Generator().manual_seed(seed))


def laplace(n, seed=0):
    uniform = torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) - 0.5
    return (-uniform.sign() * torch.log1p(-2 * uniform.abs())).float()


def log_normal(n, sigma, seed=0):
    return torch.exp(sigma * gaussian(n, seed).double()).float()


def student_t(n, freedom, seed=0):
    g = torch.randn(freedom + 1, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (g[0] / (g[1:] ** 2).mean(0).sqrt()).float()


def mostly_zero(n, seed=0):
    keep = torch.rand(n, generator=torch.Generator().manual_seed(seed + 1)) < 0.1
    return gaussian(n, seed) * keep


def quantize(x, bits):
    position = choose_position(absmax(x), bits)
    return FixedPoint(kernels.quantize(x, bits, position), bits, position)


def plain_error(x, bits, measure):
    """The equations of the algorithm, in float64."""
    x = x.double()
    step = 2.0 ** (math.floor(math.log2(x.abs().max().item())) - (bits - 2))
    xq = (x / step).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * step
    mean = x.abs().mean()
    difference = (x - xq).abs().mean() if measure == "l1" else (mean - xq.abs().mean()).abs()
    return torch.log2(difference / mean + 1).item()


def trained(config, tensors, product="convolution"):
    quantizer = OperandQuantizer(config, product, "input of 'layer'")
    for x in tensors:
        quantizer(x, training=True)
    return quantizer


TAIL_16 = torch.cat([gaussian(1 << 14), torch.tensor([600.0])])


TAIL_31 = torch.cat([gaussian(1 << 14), torch.tensor([2.0**18])])


SAMPLES = {
    "gaussian": gaussian(5000),
    "laplace": laplace(5000),
    "log-normal": log_normal(5000, 2.0),
    "mostly zero": mostly_zero(5000),
    "tiny": gaussian(5000) * 1e-30,
    "one value": torch.full((3, 5), -1.7),
    "transposed": gaussian(6000).view(60, 100).t(),
}
