"""card.md of an export: what the codes are, how they were trained and measured, terms, how to load them, limits."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from common.errors import is_hub_id
from common.files import ROOT, read_json, sha256_file
from data.knowledge_graph import KnowledgeGraph, train_hash
from tables.system import other_flags, system_of

if TYPE_CHECKING:
    from lora_training.adapters import Saved

FREEBASE = (
    "derived from Freebase (Toutanova and Chen 2015); labels and definitions from Wikidata; no licence of the data was "
    "found at its sources"
)
TERMS = {  # of public data sets, as data/README.md states them
    "FB15k-237": FREEBASE,
    "FB15k-237N": FREEBASE + "; the subset is by Lv et al. (2022)",
    "WN18RR": "derived from WordNet, whose own licence permits use with its notice; by Dettmers et al. (2018)",
    "family": "made up by data/family.py of the toolkit, MIT like the toolkit",
}
METRICS = {"mrr": "MRR", "hits@1": "Hits@1", "hits@3": "Hits@3", "hits@10": "Hits@10", "mr": "MR", "count": "queries"}
SPLITS = {"valid": "valid", "test": "test", "test_shuffled_codes": "test, shuffled codes (control)"}


class Example(NamedTuple):
    """A query (head, relation, ?) by names and by ids, with the best entities and their scores."""

    head: str
    relation: str
    h: int
    r: int
    answers: list[tuple[str, float]]


def data_terms(hashes: Mapping[str, str]) -> str | None:
    """The terms of a known data set, told by its training file's hash; None for another one."""
    own = train_hash(hashes)
    public = read_json(ROOT / "data" / "public.json", "list of public data sets")
    known = {name: files["train.txt"]["sha256"] for name, files in public.items() if name in TERMS}
    bundled = ROOT / "data" / "family" / "train.txt"
    if bundled.is_file():
        known["family"] = sha256_file(bundled)
    return next((TERMS[name] for name, value in known.items() if value == own), None)


def card_text(
    record: Mapping[str, Any], kg: KnowledgeGraph, example: Example, adapter: Saved | None, licence: str | None
) -> str:
    """The card as Markdown. KeyError, TypeError or ValueError where the record is damaged."""
    parts = [
        front_matter(adapter), about(record, kg), training(record), metrics(record, kg), terms(kg, adapter, licence),
        loading(example), limits(record, adapter),
    ]  # fmt: skip
    if adapter is not None:
        parts.insert(-1, llm(adapter))
    return "\n".join(parts)


def front_matter(adapter: Saved | None) -> str:
    """What the Hugging Face hub reads."""
    base = adapter.record["base_model"] if adapter is not None else ""
    lines = ["tags: [knowledge-graph, link-prediction, residual-quantization]"]
    lines += [f"base_model: {base}"] if is_hub_id(base) else []
    return "\n".join(["---", *lines, "---", ""])


def about(record: Mapping[str, Any], kg: KnowledgeGraph) -> str:
    system = system_of(record)
    _, L, Q = record_shape(record, kg)
    K = record["args"]["num_code"]
    return f"""# {record["name"]}: codes of {record["dataset"]}

{kg.num_entities:,} entities and {kg.num_relations:,} relations. Each entity is a sequence of {L * Q} integers:
{L} positions with {Q} codes of {K:,} each. Codebooks turn the integers into vectors; relations and decoder
({system.decoder}) turn vectors into scores of triples (head, relation, tail). No parameter is indexed by an entity: the
integers alone carry the graph.

| file | content |
|---|---|
| `codes.safetensors` | `codes`, int64 [M, L, Q] = [{kg.num_entities}, {L}, {Q}] |
| `codes.parquet` | entity id, name, and the codes as an LLM reads them |
| `codebooks.safetensors` | `codebooks`, float32 [Q, K, width] |
| `scorer.safetensors` | `relations` [2R, D], the decoder's weights, and `W_q` if there is one |
| `config.json`, `names.json` | sizes and decoder; names and ids of the rows |
| `load.py` | codes -> vectors -> scores with torch and safetensors |
| `record.json` | the run records of the export and (`run`) of the training: every setting, versions, hashes |
"""


def record_shape(record: Mapping[str, Any], kg: KnowledgeGraph) -> tuple[int, int, int]:
    """(M, L, Q)"""
    args = record["args"]
    return kg.num_entities, args["seq_len"], 1 if args.get("quantizer") == "vq" else args["num_quantizers"]


def training(record: Mapping[str, Any]) -> str:
    lines = [
        f"- System: {system_of(record).label}.",
        f"- Settings: {', '.join(other_flags(record))}; seed {record.get('seed')}.",
        f"- Command: `{record.get('command')}`",
        f"- Toolkit at commit {record.get('git_commit') or 'unknown'}, torch {record['versions'].get('torch')}, "
        f"{record.get('device')}, {record['wall_seconds'] / 60:,.1f} minutes, finished {record.get('finished')}.",
    ]  # fmt: skip
    if "epochs" in record:
        lines.insert(1, f"- Epoch {record['best_epoch']} of {record['epochs']}: the best by valid MRR.")
    encoded = record.get("encoded")
    if encoded:
        lines.append(
            f"- {encoded['new_entities']:,} of the entities arrived after training: their codes were chosen from "
            f"{encoded['triples']:,} triples with everything else frozen. Command, commit and time are of that step; "
            f"the file that it extends has sha256 {str(record.get('extends'))[:12]}."
        )
    return "\n".join(["## How it was trained", "", *lines, ""])


def metrics(record: Mapping[str, Any], kg: KnowledgeGraph) -> str:
    found = {title: record[split] for split, title in SPLITS.items() if split in record}
    if not found:
        return (
            "## Metrics\n\nThe record has none: these codes were extended by entities that arrived after training. "
            "Rank them with the toolkit: `run_rq.py --eval_codes`, also with `--shuffle_codes`.\n"
        )
    rows = [f"| split | {' | '.join(METRICS.values())} |", f"|---|{'---|' * len(METRICS)}"]
    for title, values in found.items():
        cells = [f"{values[key]:,}" if key == "count" else f"{values[key]:.4f}" for key in METRICS]
        rows.append(f"| {title} | {' | '.join(cells)} |")
    rows += [
        "",
        f"Filtered ranks on {kg.name}, heads and tails, among all entities, ties at their mean, from the integers in "
        "`codes.safetensors` alone.",
        "The control gives every entity the codes of another one: what is left does not come from the codes."
        if "test_shuffled_codes" in record
        else "The test split and the control with shuffled codes were not ranked.",
    ]
    return "\n".join(["## Metrics", "", *rows, ""])


def terms(kg: KnowledgeGraph, adapter: Saved | None, licence: str | None) -> str:
    licence = licence or data_terms(kg.input_hashes)
    lines = [f"Data, {kg.name}: {licence or 'terms unknown; state them here before you pass this folder on'}."]
    if adapter is not None:
        lines.append(f"The adapter is for {adapter.record['base_model']}, whose own licence holds too.")
    return "\n".join(["## Data and licence", "", *lines, "Look up the terms before you pass this folder on.", ""])


def loading(example: Example) -> str:
    head, relation = (json.dumps(word, ensure_ascii=False) for word in (example.head, example.relation))
    shown = "\n".join(f"{score:9.4f}  {name}" for name, score in example.answers)
    return f"""## How to load it

In this folder, with `pip install torch safetensors`:

```sh
python load.py {shlex.quote(example.head)} {shlex.quote(example.relation)}
```

prints the ten best tails, which begin with

```text
{shown}
```

Known answers are not filtered. `~` before a relation ranks heads. From Python:

```python
import torch
from load import Codes

kg = Codes(".")                                                # or the path of this folder
print(kg.rank({head}, {relation}, top=3))
print(kg.vectors.shape)                                        # [M, D], decoded from kg.codes [M, L, Q]
print(kg.scores(torch.tensor([{example.h}]), torch.tensor([{example.r}])).shape)  # the same query by row: [1, M]
```
"""


def llm(adapter: Saved) -> str:
    base = adapter.record["base_model"]
    example = "<ENT>name</ENT> <CODE>...</CODE>"
    return f"""## The LLM adapter

`adapter/` holds a LoRA adapter of {base}, its tokenizer, in which each code is one token, and its run record
(`run_record.json`). The base model is not included. With `pip install transformers peft`:

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("adapter")
base = AutoModelForCausalLM.from_pretrained({json.dumps(base)})  # a local folder at training time? give yours
rows = max(len(tokenizer), base.get_input_embeddings().num_embeddings)
base.resize_token_embeddings(rows, mean_resizing=False)
model = PeftModel.from_pretrained(base, "adapter").eval()
```

An entity stands in a prompt as `{example}`, its codes as in `codes.parquet`. The toolkit's docs/LLM.md has the prompts.
"""


def limits(record: Mapping[str, Any], adapter: Saved | None) -> str:
    lines = [
        "Scores order the entities of one query. They are no probabilities, and scores of different queries are not "
        "comparable.",
        "A high rank is a guess from the training triples. The graph may be wrong, incomplete or out of date, and so "
        "are the answers.",
        "Only these entities and relations. Codes for new entities need the toolkit and the checkpoint (`run_rq.py "
        "--encode`).",
        f"One run with seed {record.get('seed')}; the metrics hold for this graph and its splits.",
    ]
    if adapter is not None:
        lines.append("The adapter needs its base model, with the same vocabulary; its answers were not measured here.")
    return "\n".join(["## Limits", "", *(f"- {line}" for line in lines), ""])
