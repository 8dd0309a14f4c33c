"""Batch normalisation folded into the convolution before it: the same numbers, a pass over memory less for each.

In evaluation both are linear, so that one convolution with other weights does the work of both. Whether a
network really sends the output of the one into the other its modules do not say: it is tried on a copy, and
believed when the outputs are the same. Not by tracing (`torch.fx`), which patches every module of the process
while another thread predicts.
"""

import copy
import itertools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from pipeline import logs

# Of the largest output: float32 keeps 7 digits, a deep network adds up the last ones of each layer.
TOLERANCE = 1e-3

_log = logs.get(__name__)


def folded(network: nn.Module, pixels: Tensor) -> nn.Module:
    """Return the network with fewer operations, or itself; `pixels` (N, 3, H, W) float32 are to compare on."""
    other = copy.deepcopy(network)
    pairs = [_fold(module) for module in other.modules()]
    if not sum(pairs):
        return network
    with torch.inference_mode():
        if _are_close(network(pixels), other(pixels)):
            return other
    _log.info("normalisation is not folded: the outputs would differ", pairs=sum(pairs))
    return network


def _fold(module: nn.Module) -> int:
    """Fold the children of a module that follow each other, and return how many pairs that were."""
    pairs = 0
    for (name, convolution), (following, norm) in itertools.pairwise(list(module._modules.items())):
        # Exactly these classes: others may do more.
        if type(convolution) is not nn.Conv2d or type(norm) is not nn.BatchNorm2d:
            continue
        if norm.track_running_stats and norm.num_features == convolution.out_channels:
            module._modules[name] = fuse_conv_bn_eval(convolution, norm)
            module._modules[following] = nn.Identity()
            pairs += 1
    return pairs


def _are_close(reference: Any, other: Any) -> bool:
    if not isinstance(reference, Tensor) or not isinstance(other, Tensor):
        return False
    scale = float(reference.abs().max())
    return bool((reference - other).abs().max() <= TOLERANCE * max(scale, torch.finfo(torch.float32).tiny))
