"""fastbn for PyTorch on CPUs: batch norm layers and functions in place of torch.nn's."""

try:
    import torch as _torch
except ImportError as _error:
    raise ImportError("fastbn.torch needs PyTorch: pip install 'fastbn[torch]'") from _error

from fastbn.torch.functional import batch_norm
from fastbn.torch.modules import BatchNorm1d, BatchNorm2d, BatchNorm3d
from fastbn.torch.population import adapt, recalibrate

__all__ = ["BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "adapt", "batch_norm", "recalibrate"]
