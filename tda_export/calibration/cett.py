"""The mathematics of CETT curves: pure functions, tensors in and out.

Notation (docs/architecture.md): h [T, F] activations of T tokens, W_down stored neuron-major [F, M],
magnitude m_i(t) = |h_i(t)| * ||W_down[:, i]||, relative magnitude r_i(t) = m_i(t) / ||m(t)||, neuron score
s_i = sqrt(mean over tokens of r_i(t)^2). CETT of a tail D is the mean over tokens of
|| sum_{i in D} h_i(t) W_down[:, i] || / || FFN(x_t) ||, without the output bias.
Sources: TDA, arXiv 2408.11393; CETT, arXiv 2402.03804.
"""

from __future__ import annotations

import torch

GRID_SMALLEST = 1e-6
GRID_POINTS = 13_819  # consecutive thresholds differ by 0.1 %, so that a step moves density by under 0.5 point
BLOCK_NEURONS = 64


def threshold_grid(points: int = GRID_POINTS) -> torch.Tensor:
    """Make the fixed grid of thresholds that all curves share, so that they can be added.

    Scores lie in [0, 1]. The grid is logarithmic from 1e-6 to 1, with both ends closed: threshold 0 keeps every
    neuron, and 2 keeps none.

    Args:
        points: K, at least 4.

    Returns:
        float32 [K], ascending.
    """
    inner = torch.logspace(torch.log10(torch.tensor(GRID_SMALLEST)).item(), 0.0, points - 2, dtype=torch.float64)
    return torch.cat([torch.zeros(1, dtype=torch.float64), inner, torch.full((1,), 2.0, dtype=torch.float64)]).float()


def relative_magnitudes(h: torch.Tensor, down_norms: torch.Tensor) -> torch.Tensor:
    """Compute r_i(t), each token's neuron magnitudes divided by their norm.

    Args:
        h: Activations, float [T, F].
        down_norms: ||W_down[:, i]||, float32 [F].

    Returns:
        float32 [T, F]; rows of squares sum to 1, or are zero where every activation is zero.
    """
    magnitudes = h.float().abs() * down_norms  # [T, F]
    # Scale to 1 first: squares of very small or large activations leave float32.
    largest = magnitudes.amax(dim=1, keepdim=True)
    scaled = magnitudes / torch.where(largest > 0, largest, 1.0)
    return scaled / scaled.norm(dim=1, keepdim=True).clamp_min(1.0)


def neuron_scores(relative: torch.Tensor) -> torch.Tensor:
    """Compute s_i, the root mean square over tokens of relative magnitudes [T, F]. Returns float32 [F]."""
    return relative.square().mean(dim=0).sqrt()


def grid_bins(scores: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
    """Find for each score how many grid thresholds it reaches.

    A neuron with bin b is dropped by the thresholds grid[b:] (its score is below them) and kept by grid[:b].

    Args:
        scores: float32, any shape, within [0, 2).
        grid: float32 [K], ascending, grid[0] = 0.

    Returns:
        int64 in [1, K - 1], the shape of `scores`.
    """
    return torch.searchsorted(grid, scores.contiguous(), right=True)


def kept_share(bins: torch.Tensor, points: int) -> torch.Tensor:
    """Compute density(tau_k), the share of neurons with a score of at least tau_k, from bins of any shape.

    Returns:
        float64 [K], descending from 1 to 0.
    """
    counts = torch.bincount(bins.reshape(-1), minlength=points).double()  # [K]
    return 1.0 - counts.cumsum(0) / bins.numel()


def tail_ratio_sums_by_neuron(
    h: torch.Tensor, down: torch.Tensor, bins: torch.Tensor, points: int
) -> tuple[torch.Tensor, int]:
    """Sum || tail || / || FFN(x_t) || over tokens that all drop the same neurons (the prompt estimator).

    Accumulated from the smallest score up, the partial down-projections of the bins are the tails of all thresholds.
    Tokens whose FFN output is zero are left out.

    Args:
        h: Activations, float32 [T, F].
        down: W_down neuron-major, float32 [F, M].
        bins: From `grid_bins`, int64 [F].
        points: K.

    Returns:
        The sums for every threshold, float64 [K], and how many tokens they hold; CETT(tau_k) is their quotient.
    """
    order = bins.argsort(stable=True)
    norms = tail_norms(h[:, order], down[order])  # [F + 1, T]
    used = norms[-1] > 0
    ratios = (norms[:, used] / norms[-1, used]).sum(dim=1)  # [F + 1]
    dropped = torch.bincount(bins, minlength=points).cumsum(0)  # [K]: threshold k drops the first dropped[k] neurons
    return ratios[dropped], int(used.sum())


def tail_norms(h: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """Compute || sum_{j < i} h_j(t) W_j || for every i: the norm of every tail of neurons in the given order.

    Neurons are added block by block. With P the tail before a block and q_i the block's own partial sum,
    ||P + q_i||^2 grows by h_i (2 W_i·P + 2 sum_{j < i in block} G_ij h_j + G_ii h_i), G = W W^T of the block: matrix
    products of the block instead of a vector sum per neuron, which would write [F, T, M] numbers. In float64, since
    the terms may cancel.

    Args:
        h: Activations, float [T, F], neurons in order.
        down: W_down neuron-major, float [F, M], in the same order.

    Returns:
        float64 [F + 1, T]; row 0 is zero, the last is || FFN(x_t) ||.
    """
    neurons, tokens = down.shape[0], h.shape[0]
    squares = torch.zeros(neurons + 1, tokens, dtype=torch.float64, device=h.device)
    tail = torch.zeros(tokens, down.shape[1], dtype=torch.float64, device=h.device)  # [T, M]
    for start in range(0, neurons, BLOCK_NEURONS):
        block = slice(start, start + BLOCK_NEURONS)
        rows, values = down[block].double(), h[:, block].T.double()  # [B, M], [B, T]
        gram = rows @ rows.T  # [B, B]
        inner = rows @ tail.T + gram.tril(-1) @ values  # [B, T]
        growth = values * (2 * inner + gram.diagonal()[:, None] * values)
        squares[start + 1 : start + 1 + len(rows)] = tail.square().sum(dim=1) + growth.cumsum(0)
        tail += values.T @ rows
    squares[-1] = tail.square().sum(dim=1)
    return squares.clamp_min(0).sqrt()


def tail_ratio_sums_by_token(
    h: torch.Tensor, down: torch.Tensor, bins: torch.Tensor, points: int
) -> tuple[torch.Tensor, int]:
    """Sum || tail || / || FFN(x_t) || over tokens that each drop their own neurons (the token estimator).

    Args:
        h: Activations, float32 [T, F].
        down: W_down neuron-major, float32 [F, M].
        bins: From `grid_bins`, int64 [T, F].
        points: K.

    Returns:
        As `tail_ratio_sums_by_neuron`.
    """
    sums = torch.zeros(points, dtype=torch.float64, device=h.device)
    count = 0
    thresholds = torch.arange(points, device=h.device)
    for token in range(h.shape[0]):
        occupied, place = torch.unique(bins[token], return_inverse=True)  # [B], [F]
        partial = torch.zeros(len(occupied) + 1, down.shape[1], dtype=h.dtype, device=h.device)  # [B + 1, M]
        partial.index_add_(0, place + 1, h[token, :, None] * down)
        norms = partial.cumsum(0).norm(dim=1).double()  # [B + 1]
        if norms[-1] > 0:
            # Thresholds between two occupied bins share the tail of the lower one.
            sums += (norms / norms[-1])[torch.searchsorted(occupied, thresholds, right=True)]
            count += 1
    return sums, count
