"""The commands of `python -m inti_kernels`, a file each: ``add_arguments(parser)`` and ``run(args) -> exit status``."""
