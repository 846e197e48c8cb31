"""The exact GELU, x·Φ(x), and its slope, in Triton."""

import triton
import triton.language as tl


@triton.jit
def normal_cdf(x):
    """Φ, the normal distribution's cumulative."""
    return 0.5 + 0.5 * tl.erf(x * 0.70710678118654752440)


@triton.jit
def gelu(x):
    return x * normal_cdf(x)


@triton.jit
def gelu_and_slope(x):
    """The function and its slope Φ(x) + x·φ(x), which share Φ."""
    cdf = normal_cdf(x)
    return x * cdf, cdf + x * (0.39894228040143267794 * tl.exp(-0.5 * x * x))
