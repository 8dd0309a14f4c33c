"""Which precisions a network could run in, and a network made ready for one.

Fewer bits means autocast: matrix products and convolutions in bfloat16 or float16, what needs more in float32.
The weights of those layers are converted once, where autocast alone converts them for every batch.
"""

import copy
from typing import Any

import torch
from torch import nn

from pipeline.models.specification import Precision

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
_CONVERTED = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


def dtype_of(precision: Precision, device: torch.device) -> torch.dtype | None:
    """Return what a network could run in beside float32 here; None: nothing that could be faster."""
    if precision in _DTYPES:
        return _DTYPES[precision]
    if precision == "fp32":
        return None
    if device.type == "cuda":
        has_bfloat16 = torch.cuda.get_device_capability(device) >= (8, 0)  # Ampere; emulated before
        return torch.bfloat16 if has_bfloat16 else torch.float16
    # Without instructions for it bfloat16 is slower on a CPU, float16 nearly everywhere.
    return torch.bfloat16 if _cpu_has_bfloat16() else None


def converted(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Return a copy whose convolutions and linear layers have their weights in `dtype`, for use under autocast."""
    module = copy.deepcopy(module)
    for layer in module.modules():
        if isinstance(layer, _CONVERTED):
            layer.to(dtype)
        if isinstance(layer, nn.MultiheadAttention) and layer.in_proj_weight is not None:
            layer.in_proj_weight.data = layer.in_proj_weight.data.to(dtype)
            if layer.in_proj_bias is not None:
                layer.in_proj_bias.data = layer.in_proj_bias.data.to(dtype)
    return module


def _cpu_has_bfloat16() -> bool:
    if not torch._C._has_mkldnn:
        return False
    ops: Any = torch.ops
    return bool(ops.mkldnn._is_mkldnn_bf16_supported())
