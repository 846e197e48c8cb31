"""Drop-in modules on this package's ops."""

from .fused_inti import FusedInTI, fuse, unfuse

__all__ = ["FusedInTI", "fuse", "unfuse"]
