"""The parts of `python -m benchmarks.sass_model`: what a V100 should reach, from the sm_70 code of the CUDA kernels."""
