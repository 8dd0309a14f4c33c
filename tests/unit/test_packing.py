"""Convolutions are packed for oneDNN where that changes nothing and is faster, and left alone elsewhere."""

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

from pipeline.imaging import View
from pipeline.models import LoadOptions, packing, ways
from pipeline.models.fusion import are_close, folded
from pipeline.models.modules import ModuleModel
from pipeline.models.packing import Packed, is_possible, packed_alike, sizes_in
from pipeline.models.preprocessing import Preprocessing
from pipeline.models.specification import Specification
from pipeline.models.tasks import Classify

CPU = torch.device("cpu")
PIXELS = torch.rand(5, 3, 32, 32, generator=torch.Generator().manual_seed(0)).to(
    memory_format=torch.channels_last
)


def count(network: nn.Module, kind: type[nn.Module] = Packed) -> int:
    return sum(type(layer) is kind for layer in network.modules())


def packed(network: nn.Module, pixels: Tensor = PIXELS) -> nn.Module:
    return packing.packed(network, sizes_in(network, pixels))


def fused(network: nn.Module) -> list[str]:
    return [layer._fused[0] for layer in network.modules() if isinstance(layer, Packed)]


def assert_same(plain: nn.Module, other: nn.Module, pixels: Tensor = PIXELS) -> None:
    """For batches of every size up to all of the pixels."""
    with torch.inference_mode():
        for size in range(1, len(pixels) + 1):
            assert are_close(plain(pixels[:size]), other(pixels[:size]))


def two(*layers: nn.Module) -> nn.Sequential:
    """As many convolutions as are worth a race, the layers after the first."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), *layers, nn.Conv2d(8, 4, 3)).eval().requires_grad_(False)


@pytest.fixture
def _packed_is_fastest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ways, "_raced", {})
    monkeypatch.setattr(ways, "_seconds", lambda _, way, *__: 0.5 if "packed" in way.name else 1.0)


@pytest.mark.parametrize(
    ("make", "least_fused"),
    [
        (torchvision.models.mobilenet_v3_small, 24),
        (torchvision.models.resnet18, 0),
        (lambda: torchvision.models.vgg11(num_classes=3, init_weights=False).features, 8),
        (lambda: timm.create_model("test_efficientnet"), 0),
    ],
)
def test_packing_changes_no_output(make: Callable[[], nn.Module], least_fused: int) -> None:
    """A packed network says the same, for batches of any size; the one it was made from is as it was."""
    torch.manual_seed(0)
    plain = folded(make().eval().requires_grad_(False), PIXELS)
    layers = count(plain, nn.Conv2d) + count(plain, nn.Linear)
    other = packed(plain)
    assert (count(plain, nn.Conv2d) + count(plain, nn.Linear), count(plain)) == (layers, 0)
    assert (count(other, nn.Conv2d) + count(other, nn.Linear), count(other)) == (0, layers)
    assert len([name for name in fused(other) if name != "none"]) >= least_fused
    assert_same(plain, other)


@pytest.mark.parametrize(
    "activation",
    [
        nn.ReLU(),
        nn.ReLU(inplace=True),
        nn.ReLU6(),
        nn.Hardtanh(-0.2, 0.3),
        nn.LeakyReLU(0.2),
        nn.Hardswish(),
        nn.Hardsigmoid(),
        nn.SiLU(),
        nn.Sigmoid(),
        nn.Tanh(),
        nn.GELU(),
        nn.GELU("tanh"),
    ],
    ids=repr,
)
def test_activations_are_fused(activation: nn.Module) -> None:
    """The activation after a convolution is computed with it, also behind what folding left."""
    plain = two(nn.Identity(), activation)
    with torch.inference_mode():
        next(plain.parameters()).mul_(20)  # to both ends of what they clamp
    other = packed(plain)
    assert type(other.get_submodule("2")) is nn.Identity
    assert fused(other)[0] != "none"
    assert_same(plain, other)


@pytest.mark.parametrize(
    "options",
    [
        {"groups": 4},
        {"groups": 8, "out_channels": 8},
        {"stride": 2, "bias": False},
        {"stride": (1, 2), "padding": (2, 1)},
        {"dilation": 2},
        {"kernel_size": 1},
        {"kernel_size": (5, 1)},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_convolutions_of_every_shape_are_packed(options: dict[str, Any], dtype: torch.dtype) -> None:
    """Groups, strides, paddings, dilations: what a convolution does with them the packed one does."""
    torch.manual_seed(0)
    plain = nn.Conv2d(**{"in_channels": 8, "out_channels": 16, "kernel_size": 3, "padding": 1, **options})
    pixels = torch.rand(5, 8, 11, 14)
    whole = nn.Sequential(plain.requires_grad_(False))
    sizes = sizes_in(whole, pixels[:1])
    other = packing.packed(whole.to(dtype), sizes)
    assert count(other) == 1
    with torch.inference_mode():
        expected = plain.float()(pixels)
        rounding = 1e-5 if dtype is torch.float32 else 2e-2
        for size in range(1, 6):
            for given in (pixels[:size], pixels[:size].to(memory_format=torch.channels_last)):
                found = other(given)
                assert found.dtype == dtype
                assert found.shape == expected[:size].shape
                assert (found.float() - expected[:size]).abs().max() <= rounding * expected.abs().max()
    assert other(pixels[:0]).shape == expected[:0].shape


def test_what_is_more_than_a_convolution_is_left_alone() -> None:
    """Paddings that are computed or not zero, subclasses, other numbers, and layers that somebody watches."""

    class Own(nn.Conv2d):
        pass

    seen: list[str] = []
    watched, before, replaced = (nn.Conv2d(3, 3, 3) for _ in range(3))
    watched.register_forward_hook(lambda *_: seen.append("after"))
    before.register_forward_pre_hook(lambda *_: seen.append("before"))
    replaced.forward = lambda pixels: pixels  # type: ignore[assignment,method-assign]
    plain = nn.Sequential(
        nn.Conv2d(3, 3, 3, padding="same"),
        nn.Conv2d(3, 3, 3, padding=1, padding_mode="reflect"),
        Own(3, 3, 3),
        watched,
        before,
        replaced,
    ).requires_grad_(False)
    half = nn.Sequential(nn.Conv2d(3, 3, 3, dtype=torch.float16), nn.Linear(3, 3, dtype=torch.float64))
    assert count(packing.packed(half, {"0": [1, 3, 9, 9], "1": [1, 3]})) == 0
    other = packed(plain)
    assert count(other) == 0
    seen.clear()
    assert_same(plain, other)
    assert seen == ["after", "before"] * 2 * len(PIXELS)


def test_linear_layers_are_packed() -> None:
    """Of tokens, vectors and maps, with and without a bias; subclasses may do more, and stay."""
    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Dropout(0.5), nn.Linear(16, 8, bias=False)).eval()
    for shape in ((5, 8), (5, 7, 8), (5, 3, 2, 8)):
        values = torch.rand(shape)
        other = packed(block.requires_grad_(False), values)
        assert (count(other), count(other, nn.GELU), fused(other)) == (2, 0, ["gelu", "none"])
        assert_same(block, other, values)
    attention = nn.MultiheadAttention(8, 2, batch_first=True).eval().requires_grad_(False)

    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.after = attention, nn.Linear(8, 8).requires_grad_(False)

        def forward(self, tokens: Tensor) -> Any:
            return self.after(self.attention(tokens, tokens, tokens, need_weights=False)[0])

    plain = Attends()
    other = packed(plain, torch.rand(5, 7, 8))
    assert (count(other), type(other.get_submodule("attention.out_proj"))) == (1, type(attention.out_proj))
    assert_same(plain, other, torch.rand(5, 7, 8))


def test_what_never_runs_is_left_alone() -> None:
    """A layer that a network keeps and does not use has no size to be packed for."""

    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 3)

        def forward(self, pixels: Tensor) -> Any:
            return self.used(pixels)

    other = packed(Unused().requires_grad_(False))
    assert (type(other.get_submodule("used")), type(other.get_submodule("unused"))) == (Packed, nn.Conv2d)


def test_an_activation_that_is_watched_runs() -> None:
    """Hooks on an activation, or between it and the convolution, still run."""
    for place in (1, 2):
        plain = two(nn.Identity(), nn.ReLU())
        seen: list[int] = []
        plain[place].register_forward_hook(lambda *_, seen=seen: seen.append(1))
        other = packed(plain)
        assert fused(other) == ["none", "none"]
        seen.clear()
        other(PIXELS)
        assert seen == [1]


def test_what_is_in_two_places_does_in_each_what_it_did() -> None:
    """A convolution with an activation after it in one place has none in the other; it is packed once."""
    torch.manual_seed(0)
    shared, activation = nn.Conv2d(3, 3, 3, padding=1), nn.ReLU(inplace=True)
    twice = nn.Sequential(nn.Sequential(shared, activation), nn.Sequential(shared, nn.Tanh()), shared)
    other = packed(twice.requires_grad_(False))
    assert other.get_submodule("0.0") is other.get_submodule("2")
    assert (count(other), fused(other)) == (1, ["none"])
    assert_same(twice, other)

    alone = nn.Conv2d(3, 3, 3)
    elsewhere = nn.Sequential(alone, activation, nn.BatchNorm2d(3), activation).eval().requires_grad_(False)
    other = packed(elsewhere)
    assert (fused(other), count(other, nn.ReLU)) == (["relu"], 1)
    assert_same(elsewhere, other)

    block = nn.Sequential(nn.Conv2d(3, 3, 3), nn.ReLU())
    same_place = nn.Sequential(block, block).requires_grad_(False)
    other = packed(same_place)
    assert (fused(other), count(other, nn.ReLU)) == (["relu"], 0)
    assert_same(same_place, other)


def test_what_another_tensor_shares_is_shared() -> None:
    """Only packed weights need memory for a second time while it is decided."""
    plain = nn.Sequential(two(nn.ReLU()), nn.Flatten(), nn.LazyLinear(2), nn.BatchNorm1d(2)).eval()
    plain(PIXELS)
    state, other = plain.state_dict(), packed(plain.requires_grad_(False)).state_dict()
    for name in ("0.0.bias", "2.bias", "3.weight", "3.running_mean"):
        assert state[name].data_ptr() == other[name].data_ptr()


class LooksBetween(nn.Module):
    """Takes a `Sequential` apart."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = two(nn.ReLU())

    def forward(self, pixels: Tensor) -> Any:
        return {"between": self.layers[0](pixels), "all": [self.layers(pixels)]}


def test_what_would_say_something_else_is_refused() -> None:
    """A network that looks between a convolution and its activation is not as its modules tell."""
    plain = LooksBetween().eval()
    with pytest.raises(ValueError, match="it says something else"):
        packed_alike(plain, PIXELS)
    assert count(packed_alike(plain.layers, PIXELS)[0]) == 2


def refuse(*_: Any) -> Tensor:
    raise RuntimeError("not this time")


@pytest.mark.usefixtures("_packed_is_fastest")
@pytest.mark.parametrize(
    "operators",
    [
        {},
        dict.fromkeys(packing._OPERATORS, refuse),
        dict.fromkeys(packing._OPERATORS, lambda weight, *_: weight),
        {name: getattr(torch.ops.mkldnn, name, None) for name in packing._OPERATORS[:-1]},
    ],
)
def test_a_torch_without_the_operators_runs_models_as_they_are(
    monkeypatch: pytest.MonkeyPatch, operators: dict[str, Any]
) -> None:
    """Operators that are gone or refuse are no reason for a model not to load."""
    network = two(nn.ReLU(), nn.AdaptiveAvgPool2d(8))
    expected = load(network).forward(PICTURES)
    monkeypatch.setattr(torch.ops, "mkldnn", SimpleNamespace(**operators))
    found = load(network)
    found.warm_up()
    assert count(found._network) == 0
    assert found.forward(PICTURES) == expected


def test_this_torch_has_the_operators() -> None:
    """A torch that lost them, or calls them otherwise, is noticed here: elsewhere models only get slower."""
    if not torch._C._has_mkldnn:
        pytest.skip("this torch is built without oneDNN")
    assert is_possible(two(), CPU)
    assert not is_possible(two(), torch.device("cuda"))
    assert not is_possible(nn.Sequential(nn.Conv2d(3, 8, 3)), CPU)
    operators = torch.ops.mkldnn
    assert str(operators._convolution_pointwise.default._schema) == (
        "mkldnn::_convolution_pointwise(Tensor X, Tensor W, Tensor? B, int[] padding, int[] stride, int[] dilation,"
        " int groups, str attr, Scalar?[] scalars, str? algorithm) -> Tensor Y"
    )
    assert str(operators._reorder_convolution_weight.default._schema) == (
        "mkldnn::_reorder_convolution_weight(Tensor self, int[2] padding=0, int[2] stride=1, int[2] dilation=1,"
        " int groups=1, int[]? input_size=None) -> Tensor Y"
    )
    assert str(operators._linear_pointwise.default._schema) == (
        "mkldnn::_linear_pointwise(Tensor X, Tensor W, Tensor? B, str attr, Scalar?[] scalars, str? algorithm) ->"
        " Tensor Y"
    )
    assert str(operators._reorder_linear_weight.default._schema) == (
        "mkldnn::_reorder_linear_weight(Tensor self, int? batch_size=None) -> Tensor Y"
    )


PICTURES = torch.randint(
    0, 256, (3, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
)


class Classifier(nn.Module):
    def __init__(self, layers: nn.Module) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, pixels: Tensor) -> Tensor:
        logits: Tensor = self.layers(pixels).mean((2, 3))
        return logits


def load(layers: nn.Module, fit: str = "cover", **options: Any) -> ModuleModel:
    preprocessing = Preprocessing(View(32, 32, fit))  # type: ignore[arg-type]
    given = LoadOptions(Path("nowhere"), **{"precision": "fp32", "max_batch_size": 2, **options})
    specification, reader = Specification.parse("test:network"), Classify(("a", "b", "c", "d"))
    return ModuleModel(specification, Classifier(layers), preprocessing, reader, {}, CPU, given)


@pytest.mark.usefixtures("_packed_is_fastest")
def test_a_packed_model_is_the_same_model() -> None:
    """Version, size and outputs stay, and the weights that it was packed from are let go."""
    layers = two(nn.ReLU())
    plain, found = load(two(nn.ReLU())), load(layers)
    parameters = sum(parameter.numel() for parameter in layers.parameters())
    before = weakref.ref(layers[0])
    del layers
    found.warm_up()
    found.warm_up()
    gc.collect()
    assert before() is None
    assert count(found._network) == 2
    assert sum(parameter.numel() for parameter in found._network.parameters()) == parameters
    assert (found.digest, found.version) == (plain.digest, plain.version)
    expected = plain.forward(PICTURES)
    for output, reference in zip(found.forward(PICTURES), expected, strict=True):
        assert output.scores == pytest.approx(reference.scores, abs=1e-5)


@pytest.mark.usefixtures("_packed_is_fastest")
def test_fewer_bits_are_packed_too() -> None:
    """What runs under autocast is packed in its precision and stays within what that may change."""
    plain, found = load(two(nn.Hardswish())), load(two(nn.Hardswish()), precision="bf16")
    found.warm_up()
    assert found.precision == "bfloat16"
    assert (count(found._network), fused(found._network)) == (2, ["hardswish", "none"])
    expected = plain.forward(PICTURES)
    for output, reference in zip(found.forward(PICTURES), expected, strict=True):
        assert output.scores == pytest.approx(reference.scores, abs=0.02)


@pytest.mark.usefixtures("_packed_is_fastest")
@pytest.mark.parametrize("options", [{"compile": True}, {"fit": "inside"}, {"precision": "fp16"}])
def test_models_that_run_in_another_way_are_not_packed(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    """What is compiled, varies in size or runs in float16 is left alone."""
    monkeypatch.setattr(torch, "compile", lambda network, **_: network)
    found = load(two(nn.ReLU()), **options)
    monkeypatch.setattr(found, "forward", lambda _: [])
    found.warm_up()
    assert count(found._network) == 0
