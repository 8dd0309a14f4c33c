"""Convolutions and linear layers with their weights packed once, and the activation after them, on CPUs.

torch has oneDNN reorder the weights whenever a layer runs, and passes over its output again for the activation.
The operators that its compiler emits on CPUs do neither. They are private to torch, so nothing depends on them:
they are tried on a copy, and believed when outputs are the same and it is faster. A network that cannot be packed,
for whatever reason, runs as it is.
"""

import copy
import itertools
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from pipeline.models.fusion import are_close

# Fewer are not worth a race.
_FEWEST_LAYERS = 2
# In float32, of what fewer bits may change: 0.001 of a probability, as much as folding may.
TOLERANCE = 0.05
PACKABLE = (torch.float32, torch.bfloat16)
_OPERATORS = (
    "_reorder_convolution_weight",
    "_convolution_pointwise",
    "_reorder_linear_weight",
    "_linear_pointwise",
)

_Layer = nn.Conv2d | nn.Linear

_Fused = tuple[str, list[float], str]  # the operator's names for an activation, its numbers and its algorithm

# What torch's Inductor fuses, by these names (torch/_inductor/fx_passes/mkldnn_fusion.py).
_NOTHING: _Fused = ("none", [], "")
_FUSED: dict[type[nn.Module], Callable[[Any], _Fused]] = {
    nn.ReLU: lambda _: ("relu", [], ""),
    nn.ReLU6: lambda layer: ("hardtanh", [layer.min_val, layer.max_val], ""),
    nn.Hardtanh: lambda layer: ("hardtanh", [layer.min_val, layer.max_val], ""),
    nn.LeakyReLU: lambda layer: ("leaky_relu", [layer.negative_slope], ""),
    nn.Hardswish: lambda _: ("hardswish", [], ""),
    nn.Hardsigmoid: lambda _: ("hardsigmoid", [], ""),
    nn.SiLU: lambda _: ("swish", [], ""),
    nn.Sigmoid: lambda _: ("sigmoid", [], ""),
    nn.Tanh: lambda _: ("tanh", [], ""),
    nn.GELU: lambda layer: ("gelu", [], layer.approximate),
}


class Packed(nn.Module):
    """A layer and what follows it; its weights are in the order in which oneDNN reads them."""

    def __init__(self, layer: _Layer, size: list[int], fused: _Fused = _NOTHING) -> None:
        super().__init__()
        weight, operators = layer.weight.detach(), torch.ops.mkldnn
        self._fused = fused
        self._geometry: tuple[list[int] | int, ...] = ()
        if isinstance(layer, nn.Conv2d):
            numbers: Any = (layer.padding, layer.stride, layer.dilation)
            self._geometry = (*map(list, numbers), layer.groups)
            # Without a size oneDNN packs for a picture of a few pixels, which made resnet50 three times as slow.
            weight = operators._reorder_convolution_weight(weight, *self._geometry, size)
        else:
            weight = operators._reorder_linear_weight(weight, None)
        # Still parameters: they count as the network's, and tell their dtype to who asks.
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = layer.bias

    def forward(self, inputs: Tensor) -> Tensor:
        """Compute; autocast does not know the operators, so that the input is converted here."""
        operators = torch.ops.mkldnn
        compute = operators._convolution_pointwise if self._geometry else operators._linear_pointwise
        out: Tensor = compute(
            inputs.to(self.weight.dtype), self.weight, self.bias, *self._geometry, *self._fused
        )
        return out


def is_possible(network: nn.Module, device: torch.device) -> bool:
    """Whether this torch has the operators, and the network enough of what they could speed up."""
    if device.type != "cpu" or not torch._C._has_mkldnn:
        return False
    if not all(hasattr(torch.ops.mkldnn, operator) for operator in _OPERATORS):
        return False
    return sum(map(_is_packable, network.modules())) >= _FEWEST_LAYERS


def packed_alike(full: nn.Module, pixels: Tensor) -> tuple[nn.Module, dict[str, list[int]]]:
    """Return a float32 network packed, and the sizes to pack it in fewer bits; compares on `pixels` (N, 3, H, W).

    Raises:
        ValueError: its modules do not tell how it computes.
        Exception: whatever private operators raise.
    """
    sizes = sizes_in(full, pixels)
    other = packed(full, sizes)
    # In float32, where nothing but a wrong guess about the network makes a difference.
    with torch.inference_mode():
        if not are_close(full(pixels), other(pixels)):
            raise ValueError("packed, it says something else")
    return other, sizes


def sizes_in(network: nn.Module, pixels: Tensor) -> dict[str, list[int]]:
    """Return what size of input each layer gets that could be packed, by its names; nobody else may run it now."""
    sizes: dict[str, list[int]] = {}

    def note(names: list[str]) -> Callable[[nn.Module, Any], None]:
        return lambda _, inputs: sizes.update((name, list(inputs[0].shape)) for name in names)

    names: dict[nn.Module, list[str]] = {}
    for name, layer in network.named_modules(remove_duplicate=False):
        if _is_packable(layer):
            names.setdefault(layer, []).append(name)
    hooks = [layer.register_forward_pre_hook(note(of)) for layer, of in names.items()]
    try:
        with torch.inference_mode():
            network(pixels)
    finally:
        for hook in hooks:
            hook.remove()
    return sizes


def packed(network: nn.Module, sizes: Mapping[str, list[int]]) -> nn.Module:
    """Return a copy with those layers packed that get an input, which shares all other tensors with the network."""
    tensors = itertools.chain(network.parameters(), network.buffers())
    other = copy.deepcopy(network, {id(tensor): tensor for tensor in tensors})
    modules = dict(other.named_modules())
    places = Counter(id(child) for module in modules.values() for child in module._modules.values())
    done: dict[int, nn.Module] = {}  # one that is in several places stays one
    for path, module in modules.items():
        followed = _followed(module, places)
        for name, layer in list(module._modules.items()):
            size = sizes.get(f"{path}.{name}" if path else name)
            if size is None or not _is_packable(layer):
                continue
            fused = _NOTHING
            if name in followed:
                following = followed[name]
                activation = module.get_submodule(following)
                fused = _FUSED[type(activation)](activation)
                module._modules[following] = nn.Identity()
            if id(layer) not in done:
                done[id(layer)] = Packed(layer, size, fused)
            module._modules[name] = done[id(layer)]
    return other


def _followed(module: nn.Module, places: Counter[int]) -> dict[str, str]:
    """Return which children are layers followed by nothing but an activation, and that: names to names.

    Only of a `Sequential`, which runs its children in their order, and where the layer has no other place.
    """
    if type(module).forward is not nn.Sequential.forward or "forward" in module.__dict__:
        return {}
    layers = [
        (name, layer)
        for name, layer in module._modules.items()
        if layer is not None and not _is_nothing(layer)
    ]
    return {
        name: following
        for (name, layer), (following, activation) in itertools.pairwise(layers)
        if _is_packable(layer)
        and places[id(layer)] == 1
        and type(activation) in _FUSED
        and not _is_watched(activation)
    }


def _is_nothing(layer: nn.Module) -> bool:
    return type(layer) is nn.Identity and not _is_watched(layer)


def _is_packable(layer: nn.Module | None) -> TypeGuard[_Layer]:
    # Exactly these classes: others may do more.
    return (
        (type(layer) is nn.Linear or (type(layer) is nn.Conv2d and _is_plain(layer)))
        and layer.weight.dtype in PACKABLE
        and not _is_watched(layer)
    )


def _is_plain(convolution: nn.Conv2d) -> bool:
    return isinstance(convolution.padding, tuple) and convolution.padding_mode == "zeros"


def _is_watched(layer: nn.Module) -> bool:
    """Whether something else happens when the layer runs: hooks, or another `forward` of its own."""
    hooks = (layer._forward_hooks, layer._forward_pre_hooks)
    return any(hooks) or "forward" in layer.__dict__
