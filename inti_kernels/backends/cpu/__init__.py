"""The CPU backend: C++ kernels, and matrix products by PyTorch. A module an op."""
