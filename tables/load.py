"""load.py of an exported folder: codes -> vectors -> scores. Needs torch, safetensors and the files beside it there.

python load.py HEAD RELATION    prints the ten best tails with their scores; with "~RELATION", the ten best heads
"""

import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor


class Decoder(dict[str, Tensor]):
    """Its weights by name, and (q_h [B, D], v_r [B, D]) -> query [B, D]; the score of t is the query times q_t."""

    def norm(self, x: Tensor, name: str) -> Tensor:
        weight, bias, mean, var = (self[f"{name}.{y}"] for y in ("weight", "bias", "running_mean", "running_var"))
        return F.batch_norm(x, mean, var, weight, bias)

    def distmult(self, h: Tensor, r: Tensor) -> Tensor:
        return h * r

    def complex(self, h: Tensor, r: Tensor) -> Tensor:
        (h_re, h_im), (r_re, r_im) = h.chunk(2, dim=-1), r.chunk(2, dim=-1)
        return torch.cat([h_re * r_re - h_im * r_im, h_re * r_im + h_im * r_re], dim=-1)

    def conve(self, h: Tensor, r: Tensor) -> Tensor:
        x = self.norm(torch.cat([h, r], dim=1).view(len(h), 1, 2 * int(self["height"]), -1), "input_norm")
        x = torch.relu(self.norm(F.conv2d(x, self["conv.weight"], self["conv.bias"]), "feature_norm")).flatten(1)
        return torch.relu(self.norm(F.linear(x, self["project.weight"], self["project.bias"]), "hidden_norm"))


class Codes:
    """codes int64 [M, L, Q], codebooks [Q, K, code_dim], vectors [M, D], relations [2R, D] (r + R: inverse of r)."""

    def __init__(self, folder: str | Path = Path(__file__).parent) -> None:
        self.config, self.names = (json.loads(Path(folder, f"{x}.json").read_text("utf8")) for x in ("config", "names"))
        self.codes, self.codebooks = (load_file(Path(folder, f"{x}.safetensors"))[x] for x in ("codes", "codebooks"))
        weights = load_file(Path(folder, "scorer.safetensors"))
        self.relations, self.W_q = weights.pop("relations"), weights.pop("W_q", None)
        self.members = [Decoder() for _ in range(self.config["members"])]
        for (member, name), value in ((key.split(".", 1), value) for key, value in weights.items()):
            self.members[int(member)][name] = value
        self.vectors = self.decode(self.codes)

    def decode(self, codes: Tensor) -> Tensor:
        """codes [N, L, Q] -> vectors [N, D]: the codes of a position are added, the positions joined, mapped by W_q."""
        rows = (codes + self.codebooks.shape[1] * torch.arange(len(self.codebooks))).flatten(0, 1)
        z = F.embedding_bag(rows, self.codebooks.flatten(0, 1), mode="sum").view(len(codes), len(self.members), -1)
        return (z if self.W_q is None else torch.einsum("nmi,moi->nmo", z, self.W_q)).flatten(1)

    def scores(self, heads: Tensor, relations: Tensor) -> Tensor:
        """Ids [B] in 0..M-1 and 0..2R-1 -> [B, M]: the score of every entity as tail, the sum over the members."""
        h, r = (x.chunk(len(self.members), dim=-1) for x in (self.vectors[heads], self.relations[relations]))
        queries = [getattr(member, self.config["decoder"])(h[i], r[i]) for i, member in enumerate(self.members)]
        return torch.cat(queries, dim=-1) @ self.vectors.T

    def rank(self, head: str, relation: str, top: int = 10) -> list[tuple[str, float]]:
        """(name, score) of the best entities; names and ids are those of names.json. KeyError where one is not."""
        h, r = self.names["entity_rows"][head], self.names["relation_rows"][relation]
        best = self.scores(torch.tensor([h]), torch.tensor([r]))[0].topk(min(top, len(self.codes)))
        return [(self.names["entities"][row], float(best.values[i])) for i, row in enumerate(best.indices.tolist())]


if __name__ == "__main__":
    kg, words = Codes(), sys.argv[1:]
    if len(words) != 2 or words[0] not in kg.names["entity_rows"] or words[1] not in kg.names["relation_rows"]:
        sys.exit(f"{__doc__}\nHEAD and RELATION are names or ids of names.json; found {' '.join(words) or 'none'}")
    print("\n".join(f"{score:9.4f}  {name}" for name, score in kg.rank(words[0], words[1])))
