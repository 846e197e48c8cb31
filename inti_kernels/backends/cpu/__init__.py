"""The CPU backend: C++ kernels, and matrix products by PyTorch or, where that is faster, of its own. A module an op."""
