"""fastbn for PyTorch on CPUs: batch norm layers and functions in place of torch.nn's."""

try:
    import torch as _torch
except ImportError as _error:
    raise ImportError("fastbn.torch needs PyTorch: pip install 'fastbn[torch]'") from _error

try:  # what PyTorch must not notice is decided by names of its inside, which another version may not have
    from fastbn.torch.functional import batch_norm
    from fastbn.torch.fusion import accelerate, record, restore
    from fastbn.torch.modules import BatchNorm1d, BatchNorm2d, BatchNorm3d
    from fastbn.torch.population import adapt, recalibrate
    from fastbn.torch.sync import SyncBatchNorm, convert_sync_batchnorm, revert_sync_batchnorm
except ImportError as _error:
    raise ImportError(
        f"fastbn.torch is made for PyTorch 2.13, and PyTorch {_torch.__version__} is not like it: {_error}; "
        f"pip install 'fastbn[torch]'"
    ) from _error

__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "SyncBatchNorm",
    "accelerate",
    "adapt",
    "batch_norm",
    "convert_sync_batchnorm",
    "recalibrate",
    "record",
    "restore",
    "revert_sync_batchnorm",
]
