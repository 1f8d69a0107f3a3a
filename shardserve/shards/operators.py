"""The operators that a shard's graph may call, by the names that the graph file uses. Anything else is refused.

`aten.NAME.OVERLOAD`   functional PyTorch operators from the list below
`shardserve.NAME`      our own kernels
`sym.NAME`             arithmetic on sizes that isn't integer (scale factors such as length ** -0.5)
`getitem`              one element of an operator's several results
`collective.NAME`      handled by the program itself
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from shardserve.errors import ShardError

COLLECTIVES = frozenset({"all_reduce", "all_gather", "reduce_scatter"})
REDUCTIONS = frozenset({"sum", "avg", "max", "min", "product"})

# No operator that writes to its arguments, draws random numbers, reads files, gives uninitialized memory or
# belongs to one kind of device: one graph runs on CPU and on CUDA, and a graph file can do nothing but compute.
_ATEN = """
    abs acos acosh adaptive_avg_pool1d _adaptive_avg_pool2d adaptive_avg_pool2d adaptive_avg_pool3d
    adaptive_max_pool1d adaptive_max_pool2d add addbmm addcdiv addcmul addmm addmv addr alias all amax amin
    aminmax __and__ angle any arange argmax argmin argsort asin asinh atan atan2 atanh avg_pool1d avg_pool2d
    avg_pool3d baddbmm batch_norm bilinear bitwise_and bitwise_left_shift bitwise_not bitwise_or
    bitwise_right_shift bitwise_xor bmm broadcast_to bucketize cat cdist ceil celu channel_shuffle
    cholesky_solve chunk clamp clamp_max clamp_min clone col2im complex constant_pad_nd contiguous conv1d
    conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d convolution copy copysign cos cosh
    cosine_similarity count_nonzero cross cummax cummin cumprod cumsum deg2rad detach diag diag_embed
    diagonal diagonal_scatter diff digamma dist div dot einsum elu embedding embedding_bag eq erf erfc
    erfinv exp exp2 expand expand_as expm1 eye fft_fft fft_fft2 fft_fftfreq fft_fftn fft_fftshift fft_hfft
    fft_hfft2 fft_hfftn fft_ifft fft_ifft2 fft_ifftn fft_ifftshift fft_ihfft fft_ihfft2 fft_ihfftn fft_irfft
    fft_irfft2 fft_irfftn fft_rfft fft_rfft2 fft_rfftfreq fft_rfftn fill flatten flip floor floor_divide
    fmax fmin fmod frac full full_like gather ge gelu glu grid_sampler grid_sampler_2d grid_sampler_3d
    group_norm gru gru_cell gt hann_window hardsigmoid hardswish hardtanh heaviside histc hstack hypot i0
    igamma igammac im2col imag index index_add index_copy index_put index_select inner instance_norm
    isfinite isin isinf isnan isneginf isposinf istft kron kthvalue layer_norm le leaky_relu lerp lgamma
    lift_fresh_copy linalg_cholesky linalg_cholesky_ex linalg_det linalg_eigvalsh linalg_householder_product
    linalg_inv linalg_inv_ex linalg_lu_solve linalg_matrix_exp linalg_norm linalg_pinv linalg_qr
    linalg_slogdet linalg_solve linalg_solve_triangular linalg_svdvals linalg_vecdot linalg_vector_norm
    linear linspace log log10 log1p log2 log_sigmoid _log_softmax log_softmax logaddexp logcumsumexp
    logical_and logical_not logical_or logical_xor logit logsumexp lstm lstm_cell lt masked_fill
    masked_scatter matmul max max_pool1d max_pool2d max_pool2d_with_indices max_pool3d maximum mean median
    meshgrid min minimum mish mm mode movedim mse_loss mul multiply mv nan_to_num nanmean nanmedian
    nanquantile nansum narrow _native_batch_norm_legit _native_batch_norm_legit_functional
    _native_batch_norm_legit_no_training native_channel_shuffle native_group_norm native_layer_norm ne neg
    new_full new_ones new_zeros norm one_hot ones ones_like __or__ outer pad pairwise_distance
    permute pixel_shuffle pixel_unshuffle polar polygamma pow prelu prod quantile rad2deg
    ravel real reciprocal reflection_pad1d reflection_pad2d relu relu6 remainder repeat repeat_interleave
    replication_pad1d replication_pad2d reshape rms_norm rnn_relu rnn_tanh roll rot90 round rsqrt rsub
    scalar_tensor scaled_dot_product_attention scatter scatter_add scatter_reduce searchsorted select
    select_scatter selu sgn sigmoid sign signbit silu sin sinc sinh slice slice_scatter _softmax softmax
    softplus softshrink sort special_erfcx special_i0e special_i1 special_i1e special_ndtri special_zeta
    split split_with_sizes sqrt square squeeze stack std std_mean stft sub sum swapaxes swapdims t take
    take_along_dim tan tanh tensor_split threshold tile to _to_copy topk trace transpose tril tril_indices
    triu triu_indices true_divide trunc type_as unbind unflatten unfold _unsafe_view unsqueeze
    upsample_bicubic2d _upsample_bicubic2d_aa upsample_bilinear2d _upsample_bilinear2d_aa upsample_linear1d
    upsample_nearest1d upsample_nearest2d upsample_nearest3d _upsample_nearest_exact1d
    _upsample_nearest_exact2d upsample_trilinear3d var var_mean vdot view view_as view_as_complex
    view_as_real vstack _weight_norm where xlogy __xor__ zeros zeros_like
"""
ATEN = frozenset(_ATEN.split())


def embedding(weight: Tensor, ids: Tensor, start: int, total: int) -> Tensor:
    """Look up `ids` in rows start … start + len(weight) of a table of `total` rows; zeros for ids of other ranks' rows.

    weight [rows, width]; ids integer, any shape; gives [*ids.shape, width]: this rank's part of a sum over ranks. An id
    outside 0 … total - 1 raises IndexError on every rank, as the whole table would: masked away, it would give finite,
    wrong values. The check also spares a CUDA device the assertion that would end its process.
    """
    rows = weight.shape[0]
    if rows == total and ids.device.type == "cpu":
        return F.embedding(ids, weight)  # checks the range itself
    if ids.numel():
        low, high = (int(end) for end in torch.aminmax(ids))
        if low < 0 or high >= total:
            raise IndexError(f"index out of range: {low if low < 0 else high} isn't in 0 to {total - 1}")
    if rows == total:
        return F.embedding(ids, weight)
    local = ids - start
    elsewhere = (local < 0) | (local >= rows)
    return F.embedding(local.masked_fill(elsewhere, 0), weight).masked_fill(elsewhere.unsqueeze(-1), 0)


KERNELS: Mapping[str, Callable[..., Any]] = {"embedding": embedding}
"""Each takes its arguments by position."""

SYMBOLIC: Mapping[str, Callable[..., Any]] = {
    "float": float,
    "int": int,
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "truediv": operator.truediv,
    "floordiv": operator.floordiv,
    "neg": operator.neg,
    "pow": operator.pow,
    "sqrt": math.sqrt,
    "log": math.log,
    "exp": math.exp,
    "floor": math.floor,
    "ceil": math.ceil,
    "min": min,
    "max": max,
}


# PyTorch neither adds nor compares these on the CPU.
_UNREDUCED = frozenset({torch.uint16, torch.uint32, torch.uint64})


def can_reduce(op: str, dtype: torch.dtype) -> bool:
    """Whether a collective can reduce tensors of this dtype: an average of integers is none, and complex numbers have
    no order.
    """
    if dtype in _UNREDUCED or (dtype.is_complex and op in ("max", "min")):
        return False
    return op != "avg" or dtype.is_floating_point or dtype.is_complex


def is_allowed(op: torch._ops.OpOverload) -> bool:
    """Whether a graph may call this PyTorch operator."""
    return op.namespace == "aten" and op._opname in ATEN and not op._schema.is_mutable


@lru_cache(maxsize=4096)
def resolve(name: str) -> Callable[..., Any]:
    """The callable of an operator's name; ShardError for one that a graph may not call."""
    kind, _, rest = name.partition(".")
    if name == "getitem":
        return operator.getitem
    if kind == "shardserve" and rest in KERNELS:
        return KERNELS[rest]
    if kind == "sym" and rest in SYMBOLIC:
        return SYMBOLIC[rest]
    if kind == "aten":
        packet, _, overload = rest.partition(".")
        if packet in ATEN:
            operators = getattr(torch.ops.aten, packet)
            if overload in operators.overloads():
                op = getattr(operators, overload)
                if is_allowed(op):
                    return op  # type: ignore[no-any-return]
    raise ShardError(f"operator '{name}' is not one that a shard may call")
