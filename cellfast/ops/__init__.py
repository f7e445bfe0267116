"""NT-Xent as registered C++ operators; imports torch only."""

from cellfast.ops.extension import backends
from cellfast.ops.ntxent import ntxent_cuda_kernel, ntxent_loss
from cellfast.ops.reference import ntxent_loss_reference

__all__ = ["backends", "ntxent_cuda_kernel", "ntxent_loss", "ntxent_loss_reference"]
