"""The whole module: InTI as in the paper (all three levels, separate fusion, softmax head) against FusedInTI."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..modules import FusedInTI
from ..ops._flops import frame_level_macs, global_level_macs
from ..testing import Rows, Upstream, collect, module_case
from . import depthwise_conv3d, interpolation_head, token_features
from .workload import Outputs, Sizes, Workload


def forward_macs(sizes: Sizes) -> int:
    """The four ops' and those of the frame and the global level."""
    c = sizes.dim
    x = (sizes.batch, sizes.frames, sizes.prefix + sizes.grid[0] * sizes.grid[1], c)
    class_levels = frame_level_macs(x, (c // 2, c), (c, 2 * (c // 2))) + global_level_macs(x)
    levels = depthwise_conv3d.forward_macs(sizes) + class_levels
    return token_features.forward_macs(sizes) + interpolation_head.forward_macs(sizes) + levels


def workload(sizes: Sizes, dtype: torch.dtype, device: torch.device, backend: str | None) -> Workload:
    """InTI with random parameters; x and all of them require grad.

    bfloat16 and float16 mean what training does: autocast of that dtype over float32 parameters and tokens.
    """
    autocast = dtype in (torch.bfloat16, torch.float16)
    inti, x = module_case(
        dim=sizes.dim,
        frames=sizes.frames,
        grid=sizes.grid,
        batch=sizes.batch,
        prefix=sizes.prefix,
        dtype=torch.float32 if autocast else dtype,
        device=device,
    )
    x.requires_grad_()

    def bind(function: Callable[..., Outputs]) -> Callable[[], Outputs]:
        def call() -> Outputs:
            with torch.autocast(device.type, dtype=dtype if autocast else torch.bfloat16, enabled=autocast):
                return function(x, return_weights=True)

        return call

    def exact(upstream: Upstream) -> Rows:
        wide = {"x": x, **dict(inti.named_parameters())}
        wide = {name: tensor.detach().double().requires_grad_() for name, tensor in wide.items()}
        parameters = {name: tensor for name, tensor in wide.items() if name != "x"}
        outputs = torch.func.functional_call(inti, parameters, (wide["x"],), {"return_weights": True})
        return collect(outputs, wide, upstream)

    kernels = {
        name: FusedInTI.from_reference(inti, backend=backend, recompute=name == "recompute")
        for name in ("fused", "recompute")
    }
    return Workload(
        name="inti",
        leaves={"x": x, **dict(inti.named_parameters())},
        reference=inti,
        kernels=kernels,
        bind=bind,
        exact=exact,
        compute_dtype=dtype,
        autocast=autocast,
        forward_macs=forward_macs(sizes),
    )
