"""Which operators the fused backend computes, and which of them the environment takes from it."""

from __future__ import annotations

import os

import torch

from ..inference.names import CONVOLUTION, LINEAR
from ..inference.program import Program, Step

INTEGER_PRODUCTS = frozenset({LINEAR, CONVOLUTION})
"""The products of quantized modules and integer models."""

_CONVOLUTIONS = "conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d convolution"
_PRODUCTS = f"{_CONVOLUTIONS} linear addmm matmul mm bmm baddbmm scaled_dot_product_attention"
_OTHERS = """
abs add celu clamp clamp_max clamp_min cos div elu erf exp gelu hardsigmoid hardswish hardtanh leaky_relu log
log_sigmoid maximum minimum mish mul neg pow prelu reciprocal relu relu6 rsqrt rsub selu sigmoid silu sin softplus sqrt
sub tanh

batch_norm _native_batch_norm_legit_no_training group_norm instance_norm layer_norm softmax log_softmax
amax amin mean sum

adaptive_avg_pool1d adaptive_avg_pool2d adaptive_max_pool2d avg_pool1d avg_pool2d avg_pool3d max_pool1d max_pool2d
max_pool3d constant_pad_nd pad reflection_pad2d replication_pad2d pixel_shuffle upsample_bilinear2d upsample_nearest2d

_to_copy _unsafe_view cat chunk clone dropout expand flatten permute repeat reshape select slice split split_with_sizes
squeeze stack t transpose unbind unflatten unsqueeze view
"""

SUPPORTED = frozenset(f"{_PRODUCTS} {_OTHERS}".split())
"""The operators of ATen that the fused backend computes, of float32 and float16, by the names of their packets."""

_DTYPES = (torch.float32, torch.float16, torch.uint8)  # bytes: of images that a first convolution takes

# A quantized product may be asked for by the name that the graph, the program or the operator backend has for it.
_SAME = {
    **dict.fromkeys(
        (*_CONVOLUTIONS.split(), "convolution_overrideable", "quantized_convolution"), "integer_convolution"
    ),
    "native_batch_norm_legit_no_training": "batch_norm",
    **dict.fromkeys(("linear", "quantized_linear"), "integer_linear"),
}


def forced_fallbacks() -> frozenset[str]:
    """Returns what ``DEBUG_FORCED_FALLBACK_OPS`` takes from the fused backend: comma-separated names of operators.

    ``aten::`` before a name, an overload behind it and underscores around it are of no matter. A convolution is meant
    by whatever name one has, and so is ``linear``, quantized or not.

    Raises:
        ValueError: if there is no operator of a name.
    """
    found = set()
    for given in os.environ.get("DEBUG_FORCED_FALLBACK_OPS", "").split(","):
        if not given.strip():
            continue
        name = given.strip().rpartition("::")[2].partition(".")[0]
        bare = name.strip("_")
        known = bare in SUPPORTED or bare in _SAME or bare in _SAME.values()
        if not known and not hasattr(torch.ops.aten, name):
            raise ValueError(
                f"DEBUG_FORCED_FALLBACK_OPS={os.environ['DEBUG_FORCED_FALLBACK_OPS']!r}: there is no operator "
                f"{name!r}; write names as 'aten::relu,max_pool2d'"
            )
        found.add(_SAME.get(bare, bare))
    return frozenset(found)


def is_supported(step: Step, program: Program, forced: frozenset[str], in_float: bool) -> bool:
    """Whether the fused backend computes a step.

    Args:
        step: of the program.
        program: which it is part of.
        forced: what ``forced_fallbacks`` returned.
        in_float: whether the card multiplies float tensors in float.
    """
    namespace, name = step.operator.split(".")[:2]
    bare = name.strip("_")
    if _SAME.get(bare, bare) in forced:
        return False
    if step.operator in INTEGER_PRODUCTS:
        return True
    if namespace != "aten" or name not in SUPPORTED or (name in _PRODUCTS.split() and not in_float):
        return False
    if step.keywords.get("device", torch.device("cpu")) != torch.device("cpu"):
        return False
    # Numbers may be of any dtype.
    of_constants = [program.constants[each] for each in step.inputs() if each in program.constants]
    dtypes = {each.dtype for each in of_constants if each.dim() > 0}
    dtypes |= {program.specs[each].dtype for each in (*step.inputs(), *step.outputs) if each in program.specs}
    return dtypes <= {*_DTYPES}
