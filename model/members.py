"""Linear maps of ensemble members: each reads its own slice of a vector only."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class MemberLinear(nn.Module):
    """``members`` linear maps of [N, in_features]'s equal slices to [N, out_features]'s: a block-diagonal nn.Linear."""

    def __init__(self, members: int, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__()
        self.out_features = out_features
        like = nn.Linear(in_features // members, out_features, bias=bias)
        self.weight = nn.Parameter(like.weight.detach().view(members, -1, in_features // members))
        self.bias = nn.Parameter(like.bias.detach()) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        slices = x.view(len(x), len(self.weight), -1).transpose(0, 1)  # [members, N, in / members]
        y = torch.bmm(slices, self.weight.transpose(1, 2)).transpose(0, 1).reshape(len(x), -1)
        return y if self.bias is None else y + self.bias


def linear(members: int, in_features: int, out_features: int, bias: bool = True) -> nn.Linear | MemberLinear:
    """nn.Linear of one member, MemberLinear of several."""
    if members == 1:
        return nn.Linear(in_features, out_features, bias=bias)
    return MemberLinear(members, in_features, out_features, bias)
