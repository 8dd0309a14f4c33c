"""Batch normalisation folded into the convolution before it: the same numbers with a fifth less work.

In evaluation both are linear, so that one convolution with other weights does the work of both (torch's own
`fuse`). It needs a network that can be traced; where it cannot, or where the outputs are not the same, the network
stays as it is.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse

from pipeline import logs

# Of the largest output: float32 keeps 7 digits, a deep network adds up the last ones of each layer.
TOLERANCE = 1e-3

_log = logs.get(__name__)


def fused(network: nn.Module, pixels: Tensor) -> nn.Module:
    """Return the network with fewer operations, or itself; `pixels` (N, 3, H, W) float32 are to compare on."""
    if not any(isinstance(layer, nn.BatchNorm2d) for layer in network.modules()):
        return network
    try:
        other: nn.Module = fuse(network)
        with torch.inference_mode():
            same = _are_close(network(pixels), other(pixels))
    except Exception as error:  # tracing runs the network's code on what is no tensor: it raises anything
        _log.debug("normalisation cannot be folded", reason=f"{type(error).__name__}: {error}")
        return network
    if not same:
        _log.warning("normalisation is not folded: the outputs would differ")
        return network
    return other


def _are_close(reference: Any, other: Any) -> bool:
    if not isinstance(reference, Tensor) or not isinstance(other, Tensor):
        return False
    scale = float(reference.abs().max())
    return bool((reference - other).abs().max() <= TOLERANCE * max(scale, torch.finfo(torch.float32).tiny))
