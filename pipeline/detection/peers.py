"""How far each GPU is from the others: medians and deviations of groups, all groups in a few tensors."""

from dataclasses import dataclass

import torch

Tensor = torch.Tensor
# Of a normal distribution the median absolute deviation is this share of the standard deviation (Iglewicz and
# Hoaglin 1993, "How to Detect and Handle Outliers", the modified z-score).
MAD_SHARE = 0.6745


@dataclass(frozen=True)
class Peers:
    """Of N GPUs and P compared fields; NaN where a GPU has no value or too few peers have."""

    count: Tensor  # (N, P) others with a value
    median: Tensor  # (N, P)
    deviation: Tensor  # (N, P) not below its floor
    score: Tensor  # (N, P)


def compare(
    values: Tensor, groups: Tensor, absolute: Tensor, relative: Tensor, min_peers: int
) -> Peers:  # values (N, P) float64, groups (N,) int64
    """Compare the GPUs of each group with the middle of their group."""
    used = torch.nonzero(~values.isnan().all(dim=0)).squeeze(1)
    known = values[:, used]  # (N, U): what nobody measures needs no sorting
    parts = [torch.full_like(known, torch.nan) for _ in range(3)]
    for rows, members in _blocks(groups):
        block = known[rows.clamp(min=0)]  # (G, M, U)
        if not members.all():
            block = torch.where(members.unsqueeze(-1), block, torch.nan)
        block = block.transpose(1, 2).contiguous()  # (G, U, M)
        number = (~block.isnan()).sum(-1)  # (G, U)
        middle = _median(block, number)
        spread = _median((block - middle.unsqueeze(-1)).abs(), number)
        for target, found in zip(parts, (middle, spread, number.to(values.dtype) - 1), strict=True):
            spread_out = found.unsqueeze(1).expand(-1, rows.shape[1], -1)  # (G, M, U)
            target[rows[members]] = spread_out[members]
    median, deviation, count = parts
    deviation = torch.maximum(deviation, torch.maximum(absolute[used], relative[used] * median.abs()))
    enough = (count >= min_peers) & ~known.isnan()
    score = torch.where(enough, MAD_SHARE * (known - median) / deviation, torch.nan)
    whole = []
    for part in (count, median, deviation, score):
        found = torch.full_like(values, torch.nan)
        found[:, used] = part
        whole.append(found)
    return Peers(*whole)


def _blocks(groups: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Return row numbers of groups of similar size as (G, M), -1 beyond a group's end, and which are rows.

    By powers of two: padding at most doubles the work, however unlike the groups are.
    """
    if not len(groups):
        return []
    order = torch.argsort(groups, stable=True)
    _, sizes = torch.unique_consecutive(groups[order], return_counts=True)
    starts = sizes.cumsum(0) - sizes
    blocks = []
    classes = torch.ceil(torch.log2(sizes.to(torch.float64))).to(torch.int64)
    for size_class in torch.unique(classes):
        chosen = classes == size_class
        widest = int(sizes[chosen].max())
        offsets = torch.arange(widest, device=groups.device)
        members = offsets < sizes[chosen].unsqueeze(1)
        places = torch.where(members, starts[chosen].unsqueeze(1) + offsets, 0)
        blocks.append((torch.where(members, order[places], -1), members))
    return blocks


def _median(block: Tensor, number: Tensor) -> Tensor:
    """Return the median of what is not NaN along the last dimension; NaN of nothing."""
    ordered = torch.where(block.isnan(), torch.inf, block).sort(dim=-1).values
    low = ((number - 1) // 2).clamp(min=0).unsqueeze(-1)
    high = (number // 2).clamp(max=block.shape[-1] - 1).unsqueeze(-1)
    middle = (ordered.gather(-1, low) + ordered.gather(-1, high)).squeeze(-1) / 2
    return torch.where(number > 0, middle, torch.nan)
