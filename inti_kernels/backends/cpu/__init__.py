"""The CPU backend: C++ kernels, and matrix products by PyTorch or, where those are slow, of its own. A module an op."""
