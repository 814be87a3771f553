"""Members of an ensemble side by side in one model: each sees its own slice of a vector and no other's."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from model.CompGCN import CompGCN, Encoded
from model.relational_graph import RelationalGraph


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


class MemberCompGCN(nn.Module):
    """A CompGCN for each member, with weights of its own."""

    def __init__(self, members: Sequence[CompGCN]) -> None:
        super().__init__()
        self.members: Iterable[CompGCN] = nn.ModuleList(members)  # type: ignore[assignment]
        self.size = len(members)

    def forward(self, x: Tensor, v: Tensor, graph: RelationalGraph) -> Encoded:
        """``x`` [M, in_dim], ``v`` [2R, in_dim] -> x [M, out_dim], v [2R, out_dim], widths of all members together."""
        slices = zip(self.members, x.chunk(self.size, dim=1), v.chunk(self.size, dim=1), strict=True)
        found = [member(own_x.contiguous(), own_v.contiguous(), graph) for member, own_x, own_v in slices]
        return Encoded(torch.cat([own.x for own in found], dim=1), torch.cat([own.v for own in found], dim=1))

    def relations(self, v: Tensor) -> Tensor:
        """v [2R, in_dim] after all layers, [2R, out_dim]; no entity takes part."""
        slices = zip(self.members, v.chunk(self.size, dim=1), strict=True)
        return torch.cat([member.relations(own) for member, own in slices], dim=1)

    def relation_weights(self) -> list[Tensor]:
        """The parameters of ``relations``."""
        return [weight for member in self.members for weight in member.relation_weights()]
