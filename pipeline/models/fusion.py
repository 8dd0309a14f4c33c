"""Batch normalisation folded into the convolution before it: the same numbers, a pass over memory less for each.

In evaluation both are linear, so that one convolution with other weights does the work of both. Whether a
network really sends the output of the one into the other its modules do not say: it is tried on a copy, and
believed when the outputs are the same. Not by tracing (`torch.fx`), which patches every module of the process
while another thread predicts.
"""

import copy
import itertools
from collections.abc import Mapping
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
        if are_close(network(pixels), other(pixels)):
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


def are_close(reference: Any, other: Any) -> bool:
    """Whether what two networks return is the same: tensors, or what holds them by name or in order."""
    if isinstance(reference, Tensor) and isinstance(other, Tensor):
        if reference.shape != other.shape or not reference.is_floating_point():
            return torch.equal(reference, other)
        scale = max(float(reference.abs().max()), torch.finfo(torch.float32).tiny) if reference.numel() else 0
        return bool(((reference - other).abs() <= TOLERANCE * scale).all())
    if type(reference) is not type(other):
        return False
    if isinstance(reference, Mapping):
        return reference.keys() == other.keys() and all(
            are_close(reference[key], other[key]) for key in reference
        )
    if isinstance(reference, (list, tuple)):
        return len(reference) == len(other) and all(map(are_close, reference, other))
    return isinstance(reference, (type(None), bool, int, float, str)) and reference == other
