"""Normalisation is folded into convolutions where that changes nothing, and left alone elsewhere."""

import pytest
import torch
from torch import Tensor, nn

from pipeline.models import fusion
from pipeline.models.fusion import fused

PIXELS = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


class Deciding(nn.Sequential):
    """Looks at its input to decide: it cannot be traced."""

    def forward(self, pixels: Tensor) -> Tensor:
        return super().forward(pixels if pixels.sum() > 0 else -pixels)  # type: ignore[no-any-return, no-untyped-call]


def network(kind: type[nn.Sequential] = nn.Sequential) -> nn.Module:
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(8)
    nn.init.uniform_(norm.weight, 0.5, 2)
    norm.running_mean, norm.running_var = torch.rand(8), torch.rand(8) + 0.5
    return kind(nn.Conv2d(3, 8, 3, padding=1), norm, nn.Hardswish(), nn.Conv2d(8, 4, 3)).eval()


def count(module: nn.Module) -> int:
    return sum(isinstance(layer, nn.BatchNorm2d) for layer in module.modules())


def test_folding_changes_no_output() -> None:
    """The folded network has no normalisation left and says the same."""
    plain = network()
    folded = fused(plain, PIXELS)
    assert (count(plain), count(folded)) == (1, 0)
    with torch.inference_mode():
        torch.testing.assert_close(folded(PIXELS), plain(PIXELS), rtol=1e-4, atol=1e-5)


def test_what_cannot_be_traced_is_left_alone() -> None:
    """A network that decides by its input runs as it is."""
    plain = network(Deciding)
    assert fused(plain, PIXELS) is plain


def test_what_would_say_something_else_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The folded network is compared before it is trusted."""

    def wrong(module: nn.Module) -> nn.Module:
        return nn.Sequential(module, nn.Threshold(0.1, 0.0))

    monkeypatch.setattr(fusion, "fuse", wrong)
    plain = network()
    assert fused(plain, PIXELS) is plain
