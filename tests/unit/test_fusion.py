"""Normalisation is folded into convolutions where that changes nothing, and left alone elsewhere."""

import torch
import torchvision
from torch import Tensor, nn

from pipeline.models.fusion import folded

PIXELS = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    """A convolution and a normalisation, side by side; `looks_between` uses what is between them too."""

    def __init__(self, *, looks_between: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.looks_between = looks_between
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        nn.init.uniform_(self.norm.weight, 0.5, 2)
        self.norm.running_mean, self.norm.running_var = torch.rand(8), torch.rand(8) + 0.5

    def forward(self, pixels: Tensor) -> Tensor:
        between = self.conv(pixels)
        out: Tensor = self.norm(between)
        return out + between.mean() if self.looks_between else out


def count(module: nn.Module) -> int:
    return sum(isinstance(layer, nn.BatchNorm2d) for layer in module.modules())


def test_folding_changes_no_output() -> None:
    """The folded network has no normalisation left and says the same; the one it was made from is as it was."""
    for plain in (
        Block().eval(),
        nn.Sequential(Block(), nn.Hardswish()).eval(),
        torchvision.models.mobilenet_v3_small().eval(),
        torchvision.models.resnet18().eval(),
    ):
        before = count(plain)
        other = folded(plain, PIXELS)
        assert before > 0
        assert (count(plain), count(other)) == (before, 0)
        with torch.inference_mode():
            expected = plain(PIXELS)
            assert (other(PIXELS) - expected).abs().max() <= 1e-3 * expected.abs().max()


def test_what_would_say_something_else_is_left_alone() -> None:
    """A network that looks between the two runs as it is."""
    plain = Block(looks_between=True).eval()
    assert folded(plain, PIXELS) is plain
    assert count(plain) == 1
