"""What a program from a file may call: operators of torch that only compute.

None of them touches files, draws random numbers, writes to what it is given, or returns tensors whose size depends on
numbers in other tensors. Arguments are checked against the operator's own schema, and where an operator of torch trusts
what it is told, here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .names import STORED_WEIGHTS
from .product_checks import MAX_ELEMENTS, check_batches, check_product, need
from .program import Ref, find_operator

# Name and overloads of each.
_ATEN = """
abs default; absolute default; acos default; acosh default; asin default; asinh default; atan default; atanh default;
atan2 default; ceil default; cos default; cosh default; erf default; erfc default; exp default; exp2 default;
expm1 default; floor default; frac default; isfinite default; isinf default; isnan default; log default; log10 default;
log1p default; log2 default; logit default; neg default; negative default; positive default; reciprocal default;
round default decimals; rsqrt default; sgn default; sigmoid default; sign default; signbit default; sin default;
sinc default; sinh default; sqrt default; square default; tan default; tanh default; trunc default; xlogy Tensor;
nan_to_num default; logical_not default; bitwise_not default

add Tensor Scalar; sub Tensor Scalar; rsub Tensor Scalar; mul Tensor Scalar; div Tensor Scalar Tensor_mode Scalar_mode;
true_divide Tensor; floor_divide default Scalar; remainder Tensor Scalar; fmod Tensor Scalar;
pow Tensor_Tensor Tensor_Scalar Scalar; maximum default; minimum default; fmax default; fmin default; hypot default;
lerp Tensor Scalar; addcmul default; addcdiv default; logaddexp default; copysign Tensor Scalar
eq Tensor Scalar; ne Tensor Scalar; lt Tensor Scalar; le Tensor Scalar; gt Tensor Scalar; ge Tensor Scalar;
logical_and default; logical_or default; logical_xor default; bitwise_and Tensor Scalar; bitwise_or Tensor Scalar;
bitwise_xor Tensor Scalar; where self ScalarSelf ScalarOther Scalar; masked_fill Scalar Tensor;
clamp default Tensor; clamp_min default Tensor; clamp_max default Tensor; clip default

relu default; relu6 default; leaky_relu default; prelu default; elu default; selu default; celu default; gelu default;
silu default; mish default; hardtanh default; hardswish default; hardsigmoid default; hardshrink default;
softshrink default; softplus default; log_sigmoid default; threshold default; glu default; softmax int;
_softmax default; log_softmax int; _log_softmax default

sum default dim_IntList; mean default dim; prod default dim_int; amax default; amin default; max default dim;
min default dim; argmax default; argmin default; all default dim; any default dim; cumsum default; cumprod default;
logsumexp default; var default dim correction; std default dim correction; var_mean default dim correction;
std_mean default dim correction; norm Scalar ScalarOpt_dim; linalg_vector_norm default; topk default;
sort default stable; argsort default stable; median default dim; kthvalue default; cosine_similarity default

linear default; matmul default; mm default; bmm default; mv default; dot default; addmm default; baddbmm default;
einsum default; outer default; scaled_dot_product_attention default; embedding default
conv1d default padding; conv2d default padding; conv3d default padding; convolution default;
conv_transpose1d default; conv_transpose2d input; conv_transpose3d input
batch_norm default; _native_batch_norm_legit_no_training default; instance_norm default; layer_norm default;
group_norm default; rms_norm default

max_pool1d default; max_pool2d default; max_pool3d default; max_pool2d_with_indices default; avg_pool1d default;
avg_pool2d default; avg_pool3d default; adaptive_avg_pool1d default; adaptive_avg_pool2d default;
adaptive_avg_pool3d default; _adaptive_avg_pool2d default; adaptive_max_pool1d default; adaptive_max_pool2d default
upsample_nearest1d default vec; upsample_nearest2d default vec; upsample_nearest3d default vec;
upsample_linear1d default vec; upsample_bilinear2d default vec; upsample_bicubic2d default vec;
upsample_trilinear3d default vec; pad default; constant_pad_nd default; reflection_pad1d default;
reflection_pad2d default; replication_pad1d default; replication_pad2d default; pixel_shuffle default;
pixel_unshuffle default; channel_shuffle default; im2col default

view default; reshape default; _unsafe_view default; flatten using_ints; unflatten int; squeeze default dim dims;
unsqueeze default; permute default; transpose int; t default; movedim int intlist; swapaxes default; expand default;
expand_as default; broadcast_to default; repeat default; tile default; repeat_interleave self_int; cat default;
concat default; stack default; split Tensor sizes; split_with_sizes default; chunk default; tensor_split sections;
unbind int; slice Tensor; narrow default; select int; index Tensor; index_select default; gather default;
take_along_dim default; scatter src value; slice_scatter default; select_scatter default; flip default; roll default;
tril default; triu default; diagonal default; unfold default; clone default; alias default; detach default;
contiguous default; view_as default; reshape_as default; meshgrid default indexing; rot90 default
arange default start start_step; linspace default; full default; zeros default; ones default; eye default m;
scalar_tensor default; full_like default; zeros_like default; ones_like default; new_full default; new_zeros default;
new_ones default; _to_copy default; to dtype; type_as default
"""
ALLOWED = frozenset(
    f"aten.{entry.split()[0]}.{overload}"
    for line in _ATEN.strip().splitlines()
    for entry in line.split(";")
    if entry.strip()
    for overload in entry.split()[1:]
) | frozenset(STORED_WEIGHTS)


def bound_arguments(operator: str, arguments: list[Any], keywords: Mapping[str, Any]) -> dict[str, Any]:
    """Returns an operator's arguments by their names in its schema, if each is of the kind that stands there.

    Raises:
        ValueError: if the operator is not allowed, or an argument is missing, unknown or of another kind.
    """
    if operator not in ALLOWED:
        raise ValueError("this operator is not among those that offline models may call")
    schema = find_operator(operator)._schema  # type: ignore[attr-defined]
    positional = [each for each in schema.arguments if not each.kwarg_only]
    if len(arguments) > len(positional):
        raise ValueError(f"it takes at most {len(positional)} arguments, got {len(arguments)}")
    given = dict(zip((each.name for each in positional), arguments, strict=False))
    known = {each.name for each in schema.arguments}
    for name, value in keywords.items():
        if name not in known or name in given:
            raise ValueError(f"the keyword {ascii(name)[:80]} is unknown, or given twice")
        given[name] = value
    bound = {}
    for each in schema.arguments:
        if each.name in given:
            kind = str(each.real_type)
            # Torch makes a tensor of a number that is the second operand.
            fits_number = each.name == "other" and _fits(given[each.name], "number", False)
            if not fits_number and not _fits(given[each.name], kind, each.N is not None):
                raise ValueError(f"the argument {each.name} must be {kind}, got {_shown(given[each.name])}")
            bound[each.name] = given[each.name]
        elif each.has_default_value():
            bound[each.name] = each.default_value
        else:
            raise ValueError(f"the argument {each.name} is missing")
    return bound


def _shown(value: Any) -> str:
    return "a tensor" if isinstance(value, Ref) else ascii(value)[:80]


def _fits(value: Any, kind: str, one_for_all: bool) -> bool:
    if kind.startswith("Optional["):
        return value is None or _fits(value, kind[9:-1], one_for_all)
    if kind.startswith("List["):
        if isinstance(value, list):
            return all(_fits(each, kind[5:-1], False) for each in value)
        return one_for_all and _fits(value, kind[5:-1], False)
    if kind == "Tensor":
        return isinstance(value, Ref)
    if kind in ("int", "SymInt"):
        return isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63
    if kind == "number":
        return isinstance(value, float) or (isinstance(value, int) and -(2**63) <= value < 2**63)
    if kind == "float":
        return not isinstance(value, bool) and _fits(value, "number", False)
    kinds = {"bool": bool, "str": str, "ScalarType": torch.dtype, "MemoryFormat": torch.memory_format}
    return kind in kinds and isinstance(value, kinds[kind])


def check_call(operator: str, bound: Mapping[str, Any]) -> None:
    """Checks what an operator itself would not, or would only after it has taken memory.

    Args:
        operator: its name.
        bound: its arguments by name; tensors are on the meta device.

    Raises:
        ValueError: if they do not belong together.
    """
    if operator in STORED_WEIGHTS:
        check_product(operator, bound)
        return
    packet = operator.split(".")[1]
    rule = _RULES.get(packet) or (_check_upsample if packet.startswith("upsample_") else None)
    if rule is not None:
        rule(bound)


def _check_upsample(bound: Mapping[str, Any]) -> None:
    # Torch takes source places from a scale as it is: one that does not fit would read beside the tensor.
    size = bound.get("output_size")
    scales = [value for name, value in bound.items() if name in ("scales", "scales_d", "scales_h", "scales_w")]
    x = bound.get("self", bound.get("input"))
    need(isinstance(x, Tensor) and x.dim() >= 3, "it takes (N, C, *spatial)")
    if bound.get("scale_factors") is not None:
        scales = bound["scale_factors"]
        need(size is None and len(scales) == x.dim() - 2, "scales must fit the spatial dimensions")
    need(size is None or len(size) == x.dim() - 2, "output_size must fit the spatial dimensions")
    for index, scale in enumerate(scales):
        if scale is None:
            continue
        need(2.0**-20 < scale < 2.0**20, f"a scale of {scale} is out of range")
        if size is not None:
            n = x.shape[2 + index]
            need(abs(n * scale - size[index]) <= 1, f"a scale of {scale} does not turn {n} into {size[index]}")


def _check_norm(bound: Mapping[str, Any]) -> None:
    x = bound["input"]
    need(x.dim() >= 2, "it takes (N, C, *spatial)")
    statistics = [bound["running_mean"], bound["running_var"]]
    need(not bound.get("training", False), "it must not be in training")
    if "use_input_stats" in bound:
        need(not bound["use_input_stats"] or statistics == [None, None], "it must not move running statistics")
    for each in (bound["weight"], bound["bias"], *statistics):
        need(each is None or tuple(each.shape) == (x.shape[1],), "it takes one number for each channel")


def _check_attention(bound: Mapping[str, Any]) -> None:
    query, key = bound["query"], bound["key"]
    need(bound["dropout_p"] == 0, "it must have no dropout")
    need(query.dim() >= 2 and key.dim() >= 2, "it takes (..., length, features)")
    scores = math.prod(query.shape[:-1]) * key.shape[-2]
    need(scores <= MAX_ELEMENTS, f"its {scores} scores are more than {MAX_ELEMENTS}")


def _check_matmul(bound: Mapping[str, Any]) -> None:
    # Torch repeats each operand for the other's batch.
    a, b = bound["self"], bound["other"]
    if a.dim() > 2 or b.dim() > 2:
        check_batches(a, b)


def _check_einsum(bound: Mapping[str, Any]) -> None:
    # Of more there would be tensors between them whose size nothing says.
    need(len(bound["tensors"]) <= 2 and bound["path"] is None, "it may have two operands, and no path")


def _check_index(bound: Mapping[str, Any]) -> None:
    wrong = [each.dtype for each in bound["indices"] if each is not None and each.dtype in (torch.bool, torch.uint8)]
    need(not wrong, "a mask as an index gives a size that is not known beforehand")


_RULES: dict[str, Callable[[Mapping[str, Any]], None]] = {
    "batch_norm": _check_norm,
    "instance_norm": _check_norm,
    "_native_batch_norm_legit_no_training": _check_norm,
    "scaled_dot_product_attention": _check_attention,
    "index": _check_index,
    "matmul": _check_matmul,
    "einsum": _check_einsum,
}
