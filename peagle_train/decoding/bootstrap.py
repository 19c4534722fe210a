"""Intervals by resampling prompts: tokens of one text depend on each other, prompts do not.

R: resamples, n: prompts.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

RESAMPLES, LEVEL = 2000, 0.95


def ratio_interval(tokens: Sequence[float], passes: Sequence[float], seed: int = 0) -> tuple[float, float] | None:
    """The 95 % percentile interval of sum(tokens) / sum(passes) over resampled prompts.

    Prompts without a pass say nothing and are left out; None for fewer than two others.
    """
    return _interval(_ratios([(tokens, passes)], seed))


def difference_interval(
    tokens: Sequence[float],
    passes: Sequence[float],
    other_tokens: Sequence[float],
    other_passes: Sequence[float],
    seed: int = 0,
) -> tuple[float, float] | None:
    """The same for the ratio of one drafter less that of another on the same prompts, resampled together."""
    both = _ratios([(tokens, passes), (other_tokens, other_passes)], seed)
    return None if both is None else _interval(both[0] - both[1])


def _ratios(pairs: Sequence[tuple[Sequence[float], Sequence[float]]], seed: int) -> Tensor | None:
    """[pairs, R], every pair over the same resamples."""
    kept = [i for i in range(len(pairs[0][0])) if all(passes[i] > 0 for _, passes in pairs)]
    if len(kept) < 2:
        return None
    generator = torch.Generator().manual_seed(seed)
    index_Rn = torch.randint(len(kept), (RESAMPLES, len(kept)), generator=generator)
    ratios = []
    for tokens, passes in pairs:
        t_n, p_n = (torch.tensor([float(values[i]) for i in kept], dtype=torch.float64) for values in (tokens, passes))
        ratios.append(t_n[index_Rn].sum(1) / p_n[index_Rn].sum(1))
    return torch.stack(ratios)


def _interval(values: Tensor | None) -> tuple[float, float] | None:
    if values is None:
        return None
    tails = torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=torch.float64)
    low, high = values.flatten().quantile(tails).tolist()
    return low, high
