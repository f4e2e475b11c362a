"""What the functions of torch that multiply become on the core.

Each takes the call that it is in and the arguments of its function, and returns the result; or ``NotImplemented`` for
the function itself to compute: where an operand is no plain float tensor, where ``out`` is given, where nothing is
summed or no gradients flow (``Call.quantizers``), and where the arguments are wrong, which torch is to say.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention import scaled_dot_product_attention
from .einsum import einsum, tensordot
from .function_calls import Call, is_broadcast_to, is_multiplied
from .grouped import grouped_mm
from .multihead import multi_head_attention
from .products import ConvolutionGeometry


def _matmul(call: Call, input: Tensor, other: Tensor, *rest: Any, **others: Any) -> Any:
    return NotImplemented if rest or others else call.matmul(input, other)


def _reversed_matmul(call: Call, input: Tensor, other: Tensor) -> Any:
    return call.matmul(other, input)


def _mm(call: Call, input: Tensor, mat2: Tensor, *rest: Any, **others: Any) -> Any:
    fits = is_multiplied(input, mat2) and input.dim() == mat2.dim() == 2
    return NotImplemented if rest or others or not fits else call.matmul(input, mat2)


def _bmm(call: Call, input: Tensor, mat2: Tensor, *rest: Any, **others: Any) -> Any:
    fits = is_multiplied(input, mat2) and input.dim() == mat2.dim() == 3 and input.shape[0] == mat2.shape[0]
    return NotImplemented if rest or others or not fits else call.matmul(input, mat2)


def _mv(call: Call, input: Tensor, vec: Tensor, *rest: Any, **others: Any) -> Any:
    fits = is_multiplied(input, vec) and input.dim() == 2 and vec.dim() == 1
    return NotImplemented if rest or others or not fits else call.matmul(input, vec)


def _addmm(
    call: Call, input: Tensor, mat1: Tensor, mat2: Tensor, *rest: Any, beta: float = 1, alpha: float = 1, **others: Any
) -> Any:
    fits = is_multiplied(mat1, mat2) and mat1.dim() == mat2.dim() == 2
    if rest or others or not fits or not _is_added(input, (mat1.shape[0], mat2.shape[1])):
        return NotImplemented
    if beta == alpha == 1 and input.shape == mat2.shape[1:]:
        return call.matmul(mat1, mat2, input)
    return _add(call.matmul(mat1, mat2), input, beta, alpha)


def _baddbmm(
    call: Call,
    input: Tensor,
    batch1: Tensor,
    batch2: Tensor,
    *rest: Any,
    beta: float = 1,
    alpha: float = 1,
    **others: Any,
) -> Any:
    fits = is_multiplied(batch1, batch2) and batch1.dim() == batch2.dim() == 3 and batch1.shape[0] == batch2.shape[0]
    if rest or others or not fits or not _is_added(input, (*batch1.shape[:2], batch2.shape[2])):
        return NotImplemented
    return _add(call.matmul(batch1, batch2), input, beta, alpha)


def _is_added(x: Any, shape: Sequence[int]) -> bool:
    """Whether this is a plain float tensor that is broadcast to a product of this shape."""
    return is_multiplied(x) and is_broadcast_to(x.shape, shape)


def _add(product: Any, input: Tensor, beta: float, alpha: float) -> Any:
    """Returns ``beta * input + alpha * product``, without looking at ``input`` where ``beta`` is 0, as torch does."""
    if product is NotImplemented:
        return product
    scaled = product if alpha == 1 else product * alpha
    return scaled if beta == 0 else torch.add(scaled, input, alpha=beta)


def _linear(call: Call, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    fits = is_multiplied(input, weight) and weight.dim() == 2 and input.dim() > 0
    if not fits or input.shape[-1] != weight.shape[1]:
        return NotImplemented
    if bias is None or _is_bias(bias, weight.shape[0]):
        return call.multiply(input, weight, bias)
    if not _is_added(bias, (*input.shape[:-1], weight.shape[0])):
        return NotImplemented
    return _add(call.multiply(input, weight, None), bias, 1, 1)


def _is_bias(bias: Any, channels: int) -> bool:
    return bias is None or (is_multiplied(bias) and bias.shape == (channels,))


def _bilinear(call: Call, input1: Tensor, input2: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    fits = is_multiplied(input1, input2, weight) and weight.dim() == 3 and input1.shape[:-1] == input2.shape[:-1]
    if not fits or (input1.shape[-1], input2.shape[-1]) != weight.shape[1:] or not _is_bias(bias, weight.shape[0]):
        return NotImplemented
    outer = (input1.unsqueeze(-1) * input2.unsqueeze(-2)).flatten(-2)  # see QuantizedBilinear
    return call.multiply(outer, weight, bias)


def _convolution(spatial: int) -> Callable[..., Any]:
    def convolve(
        call: Call,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] | str = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
    ) -> Any:
        if not _is_convolved(input, weight, spatial) or input.shape[-spatial - 1] != weight.shape[1] * groups:
            return NotImplemented
        stride, dilation = _each(stride, spatial), _each(dilation, spatial)
        if isinstance(padding, str) and (padding not in ("same", "valid") or (padding == "same" and {*stride} != {1})):
            return NotImplemented
        if padding == "same":  # which may need one more on the far side
            total = [d * (n - 1) for d, n in zip(dilation, weight.shape[2:], strict=True)]
            sides = [side for each in reversed(total) for side in (each // 2, each - each // 2)]
            input, padding = F.pad(input, sides), 0
        amount = 0 if isinstance(padding, str) else padding
        geometry = ConvolutionGeometry(stride, _each(amount, spatial), dilation, groups)
        return _batched(call, input, weight, bias, geometry)

    return convolve


def _transposed_convolution(spatial: int) -> Callable[..., Any]:
    def convolve(
        call: Call,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] = 0,
        output_padding: int | Sequence[int] = 0,
        groups: int = 1,
        dilation: int | Sequence[int] = 1,
    ) -> Any:
        if not _is_convolved(input, weight, spatial) or input.shape[-spatial - 1] != weight.shape[0]:
            return NotImplemented
        each = (_each(value, spatial) for value in (stride, padding, dilation, output_padding))
        stride, padding, dilation, output_padding = each
        geometry = ConvolutionGeometry(stride, padding, dilation, groups, True, output_padding)
        return _batched(call, input, weight, bias, geometry)

    return convolve


def _is_convolved(input: Tensor, weight: Tensor, spatial: int) -> bool:
    return is_multiplied(input, weight) and input.dim() in (spatial + 1, spatial + 2) and weight.dim() == spatial + 2


def _batched(call: Call, input: Tensor, weight: Tensor, bias: Tensor | None, geometry: ConvolutionGeometry) -> Any:
    """Convolves with or without the batch."""
    images = input if input.dim() == weight.dim() else input.unsqueeze(0)
    channels = weight.shape[1] * geometry.groups if geometry.transposed else weight.shape[0]
    if not _is_bias(bias, channels) or not _is_possible(geometry, images, weight):
        return NotImplemented
    y = call.multiply(images, weight, bias, geometry)
    return y if y is NotImplemented or images is input else y.squeeze(0)


def _is_possible(geometry: ConvolutionGeometry, images: Tensor, weight: Tensor) -> bool:
    stride, padding, dilation, groups, _, output_padding = geometry
    spatial = weight.dim() - 2
    if not all(len(each) == spatial for each in (stride, padding, dilation, output_padding or stride)):
        return False
    if min(stride + dilation) < 1 or min(padding + output_padding) < 0 or groups < 1 or weight.shape[0] % groups:
        return False
    try:
        return min(geometry.output_shape(images.shape, weight.shape)) > 0
    except ValueError:  # as too large a kernel
        return False


def _each(value: int | Sequence[int], spatial: int) -> tuple[int, ...]:
    """Returns a number for each spatial dimension."""
    if isinstance(value, int):
        return (value,) * spatial
    return tuple(value) * spatial if len(value) == 1 else tuple(value)


FUNCTIONS: dict[Any, Callable[..., Any]] = {
    torch.matmul: _matmul,
    Tensor.matmul: _matmul,
    Tensor.__matmul__: _matmul,
    Tensor.__rmatmul__: _reversed_matmul,
    torch.linalg.matmul: _matmul,
    torch.mm: _mm,
    Tensor.mm: _mm,
    torch.bmm: _bmm,
    Tensor.bmm: _bmm,
    torch.mv: _mv,
    Tensor.mv: _mv,
    torch.addmm: _addmm,
    Tensor.addmm: _addmm,
    torch.baddbmm: _baddbmm,
    Tensor.baddbmm: _baddbmm,
    torch.einsum: einsum,
    torch.tensordot: tensordot,
    F.linear: _linear,
    F.bilinear: _bilinear,
    F.conv1d: _convolution(1),
    F.conv2d: _convolution(2),
    F.conv3d: _convolution(3),
    F.conv_transpose1d: _transposed_convolution(1),
    F.conv_transpose2d: _transposed_convolution(2),
    F.conv_transpose3d: _transposed_convolution(3),
    F.scaled_dot_product_attention: scaled_dot_product_attention,
    F.multi_head_attention_forward: multi_head_attention,
}
for _function in (getattr(torch, "_grouped_mm", None), getattr(F, "grouped_mm", None)):
    if _function is not None:  # since torch 2.8, and 2.10
        FUNCTIONS[_function] = grouped_mm
