"""Global motion aggregation: pixels that look alike in frame1 share their motion features (GMA, arXiv 2104.02409)."""

from collections.abc import Callable
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fleetflow.types import FleetflowError

LARGEST_SIDE = 160  # pixels of stride 8 that the position embeddings cover


class PositionEmbedding(nn.Module):
    """Scores of the pixel at row u, column v for the query at (y, x): <query, height[u - y] + width[v - x]>."""

    rel_ind: Tensor

    def __init__(self, channels: int):
        super().__init__()
        places = torch.arange(LARGEST_SIDE)
        self.register_buffer("rel_ind", places - places[:, None] + LARGEST_SIDE - 1)
        self.rel_height = nn.Embedding(2 * LARGEST_SIDE - 1, channels)
        self.rel_width = nn.Embedding(2 * LARGEST_SIDE - 1, channels)

    def forward(self, queries: Tensor, top: int, height: int) -> Tensor:
        """Returns [N, heads, rows, w, height, w] for the queries [N, heads, rows, w, d] of the rows from `top` on."""
        rows, width = queries.shape[2:4]
        if max(height, width) > LARGEST_SIDE:
            raise FleetflowError(
                f"frames are up to {8 * max(height, width)} pixels wide or high; the position embeddings cover "
                f"{8 * LARGEST_SIDE}: use gma, or smaller frames"
            )
        vertical = self.rel_height(self.rel_ind[top : top + rows, :height]).to(queries.dtype)
        horizontal = self.rel_width(self.rel_ind[:width, :width]).to(queries.dtype)
        vertical = torch.einsum("nhyxd,yud->nhyxu", queries, vertical)
        horizontal = torch.einsum("nhyxd,xvd->nhyxv", queries, horizontal)
        return vertical[..., None] + horizontal[..., None, :]


class Attended(NamedTuple):
    """What an attention knows of a context."""

    queries: Tensor  # [N, heads, h, w, d]
    keys: Tensor  # [N, heads, h, w, d]
    stored: Tensor | None = None  # [N, heads, h * w, h * w], the weights


class Attention(nn.Module):
    """Which pixels of the context are alike, in content or relative position or both (section 3.1, eqs. 3 to 5).

    Args:
        channels: of the context and of each head.
        embedded: whether there are position embeddings; without use (`position` False) they are not trained, but GMA's
            checkpoints hold them.
    """

    def __init__(self, heads: int, content: bool, position: bool, *, channels: int = 128, embedded: bool = True):
        super().__init__()
        self.heads, self.content, self.position, self.channels = heads, content, position, channels
        self.to_qk = nn.Conv2d(channels, 2 * heads * channels, 1, bias=False)
        self.pos_emb = PositionEmbedding(channels).requires_grad_(position) if embedded else None

    def weights(self, queries: Tensor, keys: Tensor, top: int, bottom: int) -> Tensor:
        """Returns [N, heads, rows * w, h * w], of sum 1, for the rows from `top` to `bottom` of [N, heads, h, w, d]."""
        part = queries[:, :, top:bottom]
        scores = []
        if self.content:
            scores.append(part.flatten(2, 3) @ keys.flatten(2, 3).mT)
        if self.position and self.pos_emb is not None:
            scores.append(self.pos_emb(part, top, keys.shape[2]).flatten(4).flatten(2, 3))
        return reduce(torch.add, scores).softmax(-1)

    def forward(self, context: Tensor, memory_limit: int) -> Attended:
        """Returns what `mix` needs to know of the context [N, channels, h, w].

        The matrix of heads * (h w)^2 weights is stored, or, where it would take more than `memory_limit` bytes,
        computed anew a few rows at a time whenever it is used.
        """
        both = self.to_qk(context).unflatten(1, (2, self.heads, self.channels)).permute(1, 0, 2, 4, 5, 3)
        queries, keys = both[0] * self.channels**-0.5, both[1]
        height = keys.shape[2]
        line = keys[..., 0].numel() * keys.shape[3] * keys.element_size()  # bytes of one row's weights
        if line * height <= memory_limit:
            return Attended(queries, keys, self.weights(queries, keys, 0, height))
        return Attended(queries, keys)

    def mix(self, attended: Attended, memory_limit: int, values: Tensor) -> Tensor:
        """Returns values [N, heads, h * w, d], mixed by the attention; the limit is that of `forward`."""
        queries, keys, stored = attended
        if stored is not None:
            return stored.to(values.dtype) @ values
        height = keys.shape[2]
        line = keys[..., 0].numel() * keys.shape[3] * keys.element_size()
        rows = max(memory_limit // (4 * line), 1)  # scores, their sum and the softmax exist together
        parts = (
            self.weights(queries, keys, top, min(top + rows, height)).to(values.dtype) @ values
            for top in range(0, height, rows)
        )
        return torch.cat(tuple(parts), 2)


class Aggregate(nn.Module):
    """Motion features [N, channels, h, w] plus gamma times their mixture by the attention (eq. 2)."""

    def __init__(self, heads: int, channels: int = 128):
        super().__init__()
        self.heads = heads
        self.gamma = nn.Parameter(torch.zeros(1))
        self.to_v = nn.Conv2d(channels, heads * channels, 1, bias=False)
        self.project = nn.Conv2d(heads * channels, channels, 1, bias=False) if heads > 1 else nn.Sequential()

    def forward(self, motion: Tensor, mix: Callable[[Tensor], Tensor]) -> Tensor:
        values = self.to_v(motion).unflatten(1, (self.heads, motion.shape[1])).flatten(3).mT
        mixed = mix(values).mT.flatten(1, 2).unflatten(2, motion.shape[-2:])
        return motion + self.gamma * self.project(mixed)
