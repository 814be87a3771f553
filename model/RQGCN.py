"""RQGCN: graph -> entity vectors -> L x Q codes -> scores (Eq. 3-9 of the paper, residual levels in place of one).

Two halves with the integers between them. The encoder (graph, text, every entity-indexed parameter) only chooses
codes; ``CodeScorer`` sees nothing but codes and holds nothing that is indexed by an entity, so the scores that train
the model are the scores that the dumped integers give.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from common.config import Config
from model.CompGCN import CompGCN
from model.decoders import JointDecoder, make_decoder
from model.entity_inputs import LEARNED, TEXT, EntityInputs, sources_of
from model.members import MemberLinear, linear
from model.quantizers import QUANTIZERS, Quantizer
from model.relational_graph import RelationalGraph

TABLE_STD = 1e-3  # initial entries of tables that are scored without a map, as in ComplEx-N3 (Lacroix et al. 2018)


class Encoded(NamedTuple):
    """What the encoder makes of the graph."""

    z: Tensor  # [M, L, code_dim], to be quantized
    relations: Tensor  # [2R, D], for the decoder


def model_arguments(config: Config, text_dim: int | None) -> dict[str, Any]:
    """The arguments of RQGCN, by name, for these settings; ``text_dim``: T, None without text embeddings."""
    names = ["init_dim", "inputs", "gcn_dim", "gcn_layers", "gcn_drop", "act", "seq_len", "num_code", "num_quantizers",
             "code_dim", "tf_layers", "att_head", "decoder", "decoder_drop", "graph_backend", "ensemble"]  # fmt: skip
    quantizer = config.quantizer if config.quantizer in QUANTIZERS else "rq"  # of the baselines posthoc and none
    return {name: getattr(config, name) for name in names} | {
        "quantizer": quantizer, "composition": config.opn, "text_dim": text_dim,
    }  # fmt: skip


def scorer_of(
    args: Mapping[str, Any], best: Mapping[str, Any], device: torch.device | str
) -> tuple[CodeScorer, Tensor]:
    """(CodeScorer, relations [2R, D]) of a checkpoint's best epoch: all that ranking from integers needs.

    ``args``: the model's arguments. Raises KeyError or RuntimeError where the entries are not there or do not fit.
    """
    dim = args["gcn_dim"] if args["gcn_layers"] else args["init_dim"]
    names = ("seq_len", "num_code", "num_quantizers", "code_dim", "decoder", "decoder_drop", "ensemble", "quantizer")
    scorer = CodeScorer(dim=dim, **{name: args[name] for name in names})
    prefix = "scorer."
    scorer.load_state_dict(
        {name.removeprefix(prefix): value for name, value in best["model"].items() if name.startswith(prefix)}
    )
    return scorer.to(device).eval(), best["relations"].to(device)


class CodeScorer(nn.Module):
    """Codes [*, L, Q] -> entity vectors q_e (Eq. 4) -> scores (Eq. 6). No parameter of it is indexed by an entity.

    ``dim``: D, the width of q_e and of the relations; ``decoder``, ``quantizer``: keys of DECODERS and QUANTIZERS;
    ``ensemble``: members, each of which decodes its own part of the L * code_dim numbers to its own D / members numbers
    and scores by these; the score is the sum of theirs. The parts are equal runs of these numbers: whole positions
    where the number of members divides L; else several members read one position.
    """

    def __init__(
        self,
        seq_len: int,
        num_code: int,
        num_quantizers: int,
        code_dim: int,
        dim: int,
        decoder: str = "conve",
        decoder_drop: float | None = None,
        ensemble: int = 1,
        quantizer: str = "rq",
    ) -> None:
        super().__init__()
        if ensemble < 1 or seq_len * code_dim % ensemble or dim % ensemble:
            raise ValueError(
                f"{ensemble} members cannot share L x code_dim = {seq_len} x {code_dim} and D = {dim} equally"
            )
        self.dim = dim
        self.rq_codebook = QUANTIZERS[quantizer](num_code, code_dim, num_quantizers)
        # the code vectors are learned; a learned map after them moves all entities at once, which costs accuracy
        self.W_q: nn.Identity | nn.Linear | MemberLinear = nn.Identity()
        if seq_len * code_dim != dim:
            self.W_q = linear(ensemble, seq_len * code_dim, dim, bias=False)
            # z has unit variance: entries of q_e near 0.1 keep the first scores small, whatever the decoder's queries
            nn.init.normal_(self.W_q.weight, std=0.1 / (seq_len * code_dim // ensemble) ** 0.5)
        decoders = [make_decoder(decoder, dim // ensemble, dropout=decoder_drop) for _ in range(ensemble)]
        self.decoder = decoders[0] if ensemble == 1 else JointDecoder(decoders)

    def entity_vectors(self, z_q: Tensor) -> Tensor:
        """q_e = W_q [x_q1 ... x_qL] (Eq. 4), W_q the identity if L * code_dim = D: [N, L, code_dim] -> [N, D]."""
        vectors: Tensor = self.W_q(z_q.flatten(1))
        return vectors

    def entity_vectors_from_codes(self, codes: Tensor, levels: int | None = None) -> Tensor:
        """The same from integers [N, L, Q] alone; ``levels`` decodes only the first levels."""
        return self.entity_vectors(self.rq_codebook.decode_from_codes(codes, levels))

    def scores(self, q_head: Tensor, relation: Tensor, q_all: Tensor) -> Tensor:
        """s(h, r, t) of every tail (Eq. 6): q_head [B, D], relation [B, D], q_all [M, D] -> [B, M]."""
        return self.decoder.query(q_head, relation) @ q_all.T


class RQGCN(nn.Module):
    """CompGCN encoder, expansion to L positions, residual codebooks, decoder.

    ``init_dim``: width of the learned inputs; ``inputs``: what the encoder (each ensemble member) starts from, see
    ``entity_inputs.sources_of``; ``gcn_dim``: D; ``gcn_layers`` 0 leaves the graph out (the ablation "w/o GCN") and
    D is ``init_dim``; ``code_dim``: width of a code vector; ``tf_layers`` transformer blocks over the L positions with
    ``att_head`` heads; ``text_dim``: T of the text embeddings for Eq. 8 and ``inputs``, None without; ``ensemble``:
    members that share all widths and the L positions' vectors (``CodeScorer``), without graph layers; codebooks and
    transformer blocks are common to all. Raises ValueError for sizes that do not fit together.
    """

    members_of_loss: Tensor

    def __init__(
        self,
        num_entities: int,
        num_relations: int,
        *,
        init_dim: int = 200,
        inputs: str = LEARNED,
        gcn_dim: int = 200,
        gcn_layers: int = 2,
        composition: str = "mult",
        gcn_drop: float = 0.2,
        act: str = "tanh",
        graph_backend: str = "auto",
        seq_len: int = 16,
        num_code: int = 1024,
        num_quantizers: int = 4,
        code_dim: int = 32,
        tf_layers: int = 1,
        att_head: int = 4,
        decoder: str = "conve",
        decoder_drop: float | None = None,
        text_dim: int | None = None,
        ensemble: int = 1,
        quantizer: str = "rq",
    ) -> None:
        super().__init__()
        width = gcn_dim if gcn_layers else init_dim
        _check_sharing(ensemble, seq_len, code_dim, init_dim, gcn_layers, tf_layers)
        self.seq_len, self.code_dim, self.members = seq_len, code_dim, ensemble
        self.entity_embedding = nn.Parameter(torch.empty(num_entities, init_dim))
        self.relation_embedding = nn.Parameter(torch.empty(2 * num_relations, init_dim))
        mapped = width != seq_len * code_dim  # the expansion to L positions needs a map only if it changes the width
        # then z is the inputs plus what the layers add, which is nothing at first
        self.layers_add = not mapped and init_dim == width
        for table in (self.entity_embedding, self.relation_embedding):
            if self.layers_add:
                nn.init.normal_(table, std=TABLE_STD)
            else:
                nn.init.xavier_normal_(table)
        sources = sources_of(inputs, ensemble)
        with_text = [member for member, own in enumerate(sources) if own != {LEARNED}]
        if with_text and not text_dim:
            raise ValueError(f"inputs {inputs} need text embeddings: give text_dim")
        self.inputs = EntityInputs(sources, init_dim)
        self.text_projection = (
            nn.Linear(text_dim or 0, init_dim, bias=False) if any(TEXT in own for own in sources) else None
        )
        # a member without text beside one with text is there to learn other things: Eq. 8 does not train it
        members_of_loss = with_text or list(range(ensemble))
        self.register_buffer("members_of_loss", torch.tensor(members_of_loss), persistent=False)
        self.encoder = CompGCN(
            gcn_layers, init_dim // ensemble, gcn_dim // ensemble, width // ensemble, num_relations,
            composition=composition, dropout=gcn_drop, act=act, backend=graph_backend,
        )  # fmt: skip
        self.ffn: nn.Module = linear(ensemble, width, seq_len * code_dim) if mapped else nn.Identity()
        self.position = nn.Parameter(torch.zeros(seq_len, code_dim))
        self.transformer = nn.ModuleList(_transformer_block(code_dim, att_head) for _ in range(tf_layers))
        # all entities pass at once, so their own statistics are the population's, in training and after
        self.norm: nn.Module = nn.Identity()
        if mapped:
            self.norm = nn.BatchNorm1d(seq_len * code_dim, track_running_stats=False)
        self.scorer = CodeScorer(
            seq_len, num_code, num_quantizers, code_dim, width, decoder, decoder_drop, ensemble, quantizer
        )
        self.W_s = linear(ensemble, width, ensemble * text_dim) if text_dim else None

    @property
    def rq_codebook(self) -> Quantizer:
        """The residual codebooks: part of the scorer, which needs no encoder."""
        return self.scorer.rq_codebook

    def tables(self) -> list[Tensor]:
        """Parameters with one row per entity, relation or code; all others act on every entity at once."""
        return [self.entity_embedding, self.relation_embedding, *self.rq_codebook.parameters()]

    def relation_parameters(self) -> list[Tensor]:
        """The parameters that ``relation_vectors`` depends on."""
        return [self.relation_embedding, *self.encoder.relation_weights()]

    def relation_vectors(self) -> Tensor:
        """[2R, D]: the relations after the encoder's layers (v' = W_rel v); no entity takes part."""
        return self.encoder.relations(self.relation_embedding)

    def encode(self, g: RelationalGraph, text: Tensor | None = None, masked: Tensor | None = None) -> Encoded:
        """Eq. 1-2, then the expansion of e^L to L different positions of width code_dim.

        text [M, T]: needed where a member starts from it; masked, bool [M]: entities without their learned input.
        """
        e, relations = self.encoder(self.start(self._learned(masked), text), self.relation_embedding, g)
        return Encoded(self.expand(e), relations)

    def _learned(self, masked: Tensor | None) -> Tensor:
        return self.entity_embedding if masked is None else self.entity_embedding.masked_fill(masked[:, None], 0)

    def without_layers(self, text: Tensor | None = None, masked: Tensor | None = None) -> Tensor:
        """The inputs in the form of z, [M, L, code_dim]; arguments as of ``encode``. Only where ``layers_add``."""
        return self.start(self._learned(masked), text).view(-1, self.seq_len, self.code_dim)

    def start(self, learned: Tensor, text: Tensor | None) -> Tensor:
        """What the graph layers start from, [M, init_dim]."""
        projection = None if self.text_projection is None else self.text_projection.weight
        found: Tensor = self.inputs(learned, text, projection)
        return found

    def expand(self, e: Tensor) -> Tensor:
        """e^L [M, D] -> z [M, L, code_dim]."""
        z = self.ffn(e).view(-1, self.seq_len, self.code_dim)  # (M, L, code_dim)
        if len(self.transformer):
            z = (z + self.position).view(-1, self.seq_len // self.members, self.code_dim)  # a member's positions meet
            for block in self.transformer:
                z = block(z)
        normed: Tensor = self.norm(z.reshape(len(e), -1))
        return normed.view(-1, self.seq_len, self.code_dim)

    def semantic_loss(self, q: Tensor, text: Tensor) -> Tensor:
        """Eq. 8 over some entities: q [N, D], their text embeddings [N, T]; squared distance, mean over entities and
        ensemble members (where some members start from text, over these alone)."""
        if self.W_s is None:
            raise ValueError("the model was built without text_dim, so it has no W_s for the semantic loss")
        predicted = self.W_s(q).view(len(q), self.members, -1)  # [N, members, T]
        if len(self.members_of_loss) < self.members:
            predicted = predicted.index_select(1, self.members_of_loss)
        return (predicted - text.unsqueeze(1)).square().sum(dim=2).mean()

    @torch.no_grad()
    def clean_z(self, g: RelationalGraph, text: Tensor | None = None, masked: Tensor | None = None) -> Tensor:
        """z [M, L, code_dim] without dropout: the one path that codes come from."""
        training = self.training
        self.eval()
        z = self.encode(g, text, masked).z
        self.train(training)
        return z

    @torch.no_grad()
    def cal_allent_codes(self, g: RelationalGraph, text: Tensor | None = None) -> Tensor:
        """Codes of all entities, int64 [M, L, Q]."""
        return self.rq_codebook.cal_codes(self.clean_z(g, text))

    @torch.no_grad()
    def cal_allent_codes_emds(self, g: RelationalGraph, text: Tensor | None = None) -> Tensor:
        """Vectors that those codes stand for, [M, L, code_dim]."""
        return self.rq_codebook.decode_from_codes(self.cal_allent_codes(g, text))


def _transformer_block(width: int, heads: int) -> nn.TransformerEncoderLayer:
    """A transformer block over positions that starts as the identity."""
    block = nn.TransformerEncoderLayer(
        width, heads, 4 * width, dropout=0.0, batch_first=True, norm_first=True, activation="gelu"
    )
    for weight in (block.self_attn.out_proj.weight, block.linear2.weight, block.linear2.bias):
        nn.init.zeros_(weight)
    return block


def _check_sharing(ensemble: int, seq_len: int, code_dim: int, init_dim: int, gcn_layers: int, tf_layers: int) -> None:
    """ValueError where ensemble members cannot share the widths equally."""
    if ensemble < 1 or any(size % ensemble for size in (seq_len * code_dim, init_dim)):
        raise ValueError(
            f"{ensemble} members cannot share L x code_dim = {seq_len} x {code_dim} and the width {init_dim} equally"
        )
    if ensemble > 1 and gcn_layers:
        raise ValueError(f"an ensemble of {ensemble} has no graph layers, but gcn_layers is {gcn_layers}")
    if tf_layers and seq_len % ensemble:
        raise ValueError(
            f"{ensemble} members cannot share L = {seq_len} positions equally, as transformer blocks need it "
            "(--tf_layers 0 does not)"
        )
