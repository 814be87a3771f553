"""RQGCN: graph -> entity vectors -> L x Q codes -> scores (Eq. 3-9 of the paper, residual levels in place of one).

Two halves with the integers between them. The encoder (graph, text, every entity-indexed parameter) only chooses
codes; ``CodeScorer`` sees nothing but codes and holds nothing that is indexed by an entity, so the scores that train
the model are the scores that the dumped integers give.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from model.CompGCN import CompGCN
from model.decoders import JointDecoder, make_decoder
from model.entity_inputs import LEARNED, MEANT, TEXT, EntityInputs, sources_of
from model.members import MemberCompGCN, linear
from model.relational_graph import RelationalGraph
from model.RQCodebook import RQCodebook


class Encoded(NamedTuple):
    """What the encoder makes of the graph."""

    z: Tensor  # [M, L, code_dim], to be quantized
    relations: Tensor  # [2R, D], for the decoder


def scorer_of(config: dict[str, Any], best: dict[str, Any], device: torch.device | str) -> tuple[CodeScorer, Tensor]:
    """(CodeScorer, relations [2R, D]) of a checkpoint's best epoch: all that ranking from integers needs.

    ``config``: the model's arguments. Raises KeyError or RuntimeError where the entries are not there or do not fit.
    """
    dim = config["gcn_dim"] if config["gcn_layers"] else config["init_dim"]
    names = ("seq_len", "num_code", "num_quantizers", "code_dim", "decoder", "decoder_drop", "codebook")
    members = config.get("ensemble", 1)  # checkpoints of before have no such entry
    scorer = CodeScorer(dim=dim, ensemble=members, **{name: config[name] for name in names})
    prefix = "scorer."
    scorer.load_state_dict(
        {name.removeprefix(prefix): value for name, value in best["model"].items() if name.startswith(prefix)}
    )
    return scorer.to(device).eval(), best["relations"].to(device)


class CodeScorer(nn.Module):
    """Codes [*, L, Q] -> entity vectors q_e (Eq. 4) -> scores (Eq. 6). No parameter of it is indexed by an entity.

    ``dim``: D, the width of q_e and of the relations; ``decoder``: a name of ``model.decoders.DECODERS``;
    ``ensemble``: members, each of which decodes its own part of the L * code_dim numbers to its own D / members numbers
    and scores by these; the score is the sum of theirs. The parts are equal runs of these numbers: whole positions
    where members divide L; else a part begins or ends within a position, whose codes then speak to several members.
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
        codebook: dict[str, Any] | None = None,
        ensemble: int = 1,
    ) -> None:
        super().__init__()
        if ensemble < 1 or seq_len * code_dim % ensemble or dim % ensemble:
            raise ValueError(
                f"{ensemble} members cannot share L x code_dim = {seq_len} x {code_dim} and D = {dim} equally"
            )
        self.rq_codebook = RQCodebook(num_code, code_dim, num_quantizers, **(codebook or {}))
        self.W_q = linear(ensemble, seq_len * code_dim, dim, bias=False)
        # z has unit variance: entries of q_e near 0.1 keep the first scores small, whatever the decoder's queries
        nn.init.normal_(self.W_q.weight, std=0.1 / (seq_len * code_dim // ensemble) ** 0.5)
        decoders = [make_decoder(decoder, dim // ensemble, dropout=decoder_drop) for _ in range(ensemble)]
        self.decoder = decoders[0] if ensemble == 1 else JointDecoder(decoders)

    def entity_vectors(self, z_q: Tensor) -> Tensor:
        """q_e = W_q [x_q1 ... x_qL] (Eq. 4): quantized vectors [N, L, code_dim] -> [N, D]."""
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

    ``init_dim``: width of the learned inputs; ``gcn_dim``: D; ``gcn_layers`` 0 leaves the graph out (the ablation
    "w/o GCN"); ``code_dim``: width of a code vector; ``tf_layers`` transformer blocks over the L positions with
    ``att_head`` heads; ``text_dim``: T of the text embeddings for Eq. 8, None without; ``codebook``: further arguments
    of RQCodebook; ``text_init`` adds projected text embeddings to the learned inputs (``encode`` then takes them);
    ``ensemble``: members that share all widths and the L positions' vectors out among them (``CodeScorer``); codebooks
    and transformer blocks are common to all; ``inputs``: what each member starts from, as ``entity_inputs.sources_of``
    reads it, in place of ``text_init``; ``text_neighbours``: entities that the source "neighbours" means (None: 10).
    """

    def __init__(
        self,
        num_entities: int,
        num_relations: int,
        *,
        init_dim: int = 200,
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
        codebook: dict[str, Any] | None = None,
        text_init: bool = False,
        ensemble: int = 1,
        inputs: str | None = None,
        text_neighbours: int | None = None,
    ) -> None:
        super().__init__()
        width = gcn_dim if gcn_layers else init_dim
        if ensemble < 1 or any(size % ensemble for size in (seq_len * code_dim, init_dim, width)):
            raise ValueError(
                f"{ensemble} members cannot share L x code_dim = {seq_len} x {code_dim} and the widths {init_dim} and "
                f"{width} equally"
            )
        if tf_layers and seq_len % ensemble:
            raise ValueError(
                f"{ensemble} members cannot share L = {seq_len} positions equally, which transformer blocks ask for "
                "(--tf_layers 0 does not)"
            )
        self.seq_len, self.code_dim, self.members = seq_len, code_dim, ensemble
        self.entity_embedding = nn.Parameter(torch.empty(num_entities, init_dim))
        self.relation_embedding = nn.Parameter(torch.empty(2 * num_relations, init_dim))
        nn.init.xavier_normal_(self.entity_embedding)
        nn.init.xavier_normal_(self.relation_embedding)
        sources = sources_of(inputs or (f"{LEARNED}+{TEXT}" if text_init else LEARNED), ensemble)
        with_text = [member for member, own in enumerate(sources) if own != {LEARNED}]
        if with_text and not text_dim:
            raise ValueError(
                f"inputs {'+'.join(sorted(sources[with_text[0]]))} start from text embeddings: give text_dim"
            )
        self.inputs = EntityInputs(sources, init_dim, text_neighbours or MEANT)
        self.text_projection = (
            nn.Linear(text_dim or 0, init_dim, bias=False) if any(TEXT in own for own in sources) else None
        )
        # a member without text beside one with text is there to know other things: Eq. 8 leaves it alone
        self.told = with_text or list(range(ensemble))
        encoders = [
            CompGCN(
                gcn_layers, init_dim // ensemble, gcn_dim // ensemble, width // ensemble, num_relations,
                composition=composition, dropout=gcn_drop, act=act, backend=graph_backend,
            )
            for _ in range(ensemble)
        ]  # fmt: skip
        self.encoder = encoders[0] if ensemble == 1 else MemberCompGCN(encoders)
        self.ffn = linear(ensemble, width, seq_len * code_dim)
        self.position = nn.Parameter(torch.zeros(seq_len, code_dim))
        self.transformer = nn.ModuleList(
            nn.TransformerEncoderLayer(
                code_dim, att_head, 4 * code_dim, dropout=0.0, batch_first=True, norm_first=True, activation="gelu"
            )
            for _ in range(tf_layers)
        )
        # all entities pass at once, so their own statistics are the population's, in training and after
        self.norm = nn.BatchNorm1d(seq_len * code_dim, track_running_stats=False)
        self.scorer = CodeScorer(
            seq_len, num_code, num_quantizers, code_dim, width, decoder, decoder_drop, codebook, ensemble
        )  # fmt: skip
        self.W_s = linear(ensemble, width, ensemble * text_dim) if text_dim else None

    @property
    def rq_codebook(self) -> RQCodebook:
        """The residual codebooks (they live in the half that survives without the encoder)."""
        return self.scorer.rq_codebook

    def relation_parameters(self) -> list[Tensor]:
        """The parameters that ``relation_vectors`` depends on."""
        return [self.relation_embedding, *self.encoder.relation_weights()]

    def relation_vectors(self) -> Tensor:
        """[2R, D]: the relations after the encoder's layers (v' = W_rel v); no entity takes part."""
        return self.encoder.relations(self.relation_embedding)

    def encode(self, g: RelationalGraph, text: Tensor | None = None) -> Encoded:
        """Eq. 1-2, then the expansion of e^L to L different positions of width code_dim.

        text [M, T]: looked at where a member starts from it.
        """
        projection = None if self.text_projection is None else self.text_projection.weight
        e = self.inputs(self.entity_embedding, text, projection)
        e, relations = self.encoder(e, self.relation_embedding, g)
        z = self.ffn(e).view(-1, self.seq_len, self.code_dim)  # (M, L, code_dim)
        if len(self.transformer):
            z = (z + self.position).view(-1, self.seq_len // self.members, self.code_dim)  # a member's positions meet
            for block in self.transformer:
                z = block(z)
        z = self.norm(z.reshape(len(e), -1)).view(-1, self.seq_len, self.code_dim)
        return Encoded(z, relations)

    def semantic_loss(self, q: Tensor, text: Tensor) -> Tensor:
        """Eq. 8 over some entities: q [N, D], their text embeddings [N, T]; squared distance, mean over entities (and
        over the members of an ensemble, each of which has to tell the text; where some start from it, these alone)."""
        if self.W_s is None:
            raise ValueError("the model was built without text_dim, so it has no W_s for the semantic loss")
        told = self.W_s(q).view(len(q), self.members, -1)
        if len(self.told) < self.members:
            told = told[:, self.told]
        return (told - text.unsqueeze(1)).square().sum(dim=2).mean()

    @torch.no_grad()
    def clean_z(self, g: RelationalGraph, text: Tensor | None = None) -> Tensor:
        """z [M, L, code_dim] without dropout: the one path that codes come from."""
        training = self.training
        self.eval()
        z = self.encode(g, text).z
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
