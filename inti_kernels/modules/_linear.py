"""A linear layer by the faster of torch's own two float32 products on the CPU."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backends.cpu._products import BY_ONEDNN as _BY_ONEDNN


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """torch.nn.functional.linear, as a 1×1 convolution over channels-last pixels where that is faster.

    Args:
        x: [..., a]; its rows are the pixels, without a copy if it is contiguous.
        weight, bias: [b, a] and [b].

    Returns:
        [..., b].
    """
    if (
        not _BY_ONEDNN
        or not x.dtype == weight.dtype == torch.float32
        or x.device.type != "cpu"
        or torch.is_autocast_enabled("cpu")
        or torch.compiler.is_exporting()  # the program may run elsewhere
        or not x.numel()
    ):
        return F.linear(x, weight, bias)
    pixels = x.reshape(1, 1, -1, x.shape[-1]).permute(0, 3, 1, 2)  # [1, a, 1, rows]
    y = F.conv2d(pixels, weight[:, :, None, None])
    # The bias apart: oneDNN's gradient of it is one long float32 sum, and misses the bounds.
    return y.permute(0, 2, 3, 1).reshape(*x.shape[:-1], -1) + bias
