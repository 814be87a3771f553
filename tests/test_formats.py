"""Files of triples in every format give one graph; what is left out of them is reported; how one file is split."""

from __future__ import annotations

import gzip
import shutil
import sys
from collections.abc import Callable
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from Class import gen_fb_data_rq
from common.errors import InputError
from common.files import ROOT, read_json
from data import split as split_script
from data.formats import ENDINGS, INSTALL, read_triples
from data.hold_out import write_texts
from data.knowledge_graph import SPLITS, KnowledgeGraph, train_sha256
from data.split import MOST, Sizes, split_triples
from tests.conftest import Command, small_flags

Triples = list[tuple[str, str, str]]
BASE = "http://example.org/"
WORDS = {
    "train": ["zoé knows bob", "bob knows cid", "cid likes dee", "dee likes zoé", "北京 likes bob", "bob likes 北京"],
    "valid": ["zoé likes cid"],
    "test": ["bob likes dee", "dee knows bob"],
}
GRAPH: dict[str, Triples] = {
    split: [(f"{BASE}{h}", f"{BASE}p/{r}", f"{BASE}{t}") for h, r, t in map(str.split, lines)]
    for split, lines in WORDS.items()
}
WRITERS: dict[str, Callable[[Triples], str]] = {
    ".txt": lambda rows: "".join("\t".join(row) + "\n" for row in rows),
    ".tsv": lambda rows: "subject\tpredicate\tobject\n" + "".join("\t".join(row) + "\r\n" for row in rows),
    ".csv": lambda rows: "".join(f'"{h}",{r}, "{t}"\n' for h, r, t in rows),
    ".nt": lambda rows: "# a comment\n\n" + "".join(f"<{h}> <{r}> <{t}> .\n" for h, r, t in rows),
    ".ttl": lambda rows: (
        f"@prefix : <{BASE}> .\n@prefix p: <{BASE}p/> .\n"
        + "".join(f"<{h}> p:{r.rsplit('/', 1)[1]} <{t}> .\n" for h, r, t in rows)
    ),
}


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = text.encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def write_graph(folder: Path, end: str, splits: dict[str, Triples] = GRAPH) -> Path:
    for split, rows in splits.items():
        write(folder / f"{split}{end}", WRITERS[end.removesuffix(".gz")](rows))
    return folder


def identity(kg: KnowledgeGraph) -> tuple[object, ...]:
    return kg.train_digest(), kg.input_hashes, kg.entities, kg.relations, [kg.split(name).tolist() for name in SPLITS]


# ---------------------------------------------------------------- one graph in every format


@pytest.mark.parametrize("end", ENDINGS)
def test_every_format_gives_the_same_graph(tmp_path: Path, end: str) -> None:
    plain = KnowledgeGraph.load(write_graph(tmp_path / "plain", ".txt"))
    assert plain.num_entities == 5 and plain.labels[0] == "bob" and plain.relation_labels == ["knows", "likes"]
    folder = write_graph(tmp_path / "other", end)
    assert identity(KnowledgeGraph.load(folder)) == identity(plain)
    assert train_sha256(folder) == train_sha256(tmp_path / "plain") is not None


@pytest.mark.parametrize("end", [".csv", ".nt.gz", ".ttl"])
def test_optional_files_beside_other_formats(tmp_path: Path, end: str) -> None:
    order = [f"{BASE}{name}" for name in ("dee", "cid", "北京", "bob", "zoé")]
    folder = write_graph(tmp_path / "g", end)
    write(folder / "entity2id.txt", "5\n" + "".join(f"{name}\t{i}\n" for i, name in enumerate(order)))
    write(folder / "entity2label.txt", f"{order[0]}\tDee Dee\n")
    write(folder / f"test_neg{end}", WRITERS[end.removesuffix(".gz")](GRAPH["train"][:1]))
    kg = KnowledgeGraph.load(folder)
    assert kg.entities == order and kg.labels[0] == "Dee Dee"
    negatives = kg.negatives("test")
    assert negatives is not None and negatives.tolist() == kg.train[:1].tolist()


@pytest.mark.parametrize(
    "names",
    [("x_train.txt", "x_valid.txt", "x_test.txt"), ("m-train.txt", "m-dev.txt", "m-test.txt"),
     ("train.tsv", "val.txt", "test.txt.gz"), ("a.train.txt", "a.validation.txt", "a.test.txt")],
)  # fmt: skip
def test_other_names_of_the_splits(tmp_path: Path, names: tuple[str, ...]) -> None:
    for name, rows in zip(names, GRAPH.values(), strict=True):
        write(tmp_path / "g" / name, WRITERS[".txt"](rows))
    write(tmp_path / "g" / "readme.txt", "no triples\n")
    plain = KnowledgeGraph.load(write_graph(tmp_path / "plain", ".txt"))
    assert identity(KnowledgeGraph.load(tmp_path / "g")) == identity(plain)


def test_two_graphs_in_one_folder_are_refused_and_second_formats_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a_train.txt", "b_train.txt"):
        write(tmp_path / "two" / name, WRITERS[".txt"](GRAPH["train"]))
    with pytest.raises(InputError, match="a_train, b_train"):
        KnowledgeGraph.load(tmp_path / "two")
    folder = write_graph(write_graph(tmp_path / "g", ".txt"), ".csv")
    KnowledgeGraph.load(folder)
    assert "train.csv is not read: train.txt is" in capsys.readouterr().err


# ---------------------------------------------------------------- tables


@pytest.mark.parametrize(
    "text",
    [
        "source,target,type,weight\na,b,r,1\nb,c,r,2\n",
        ":START_ID;:END_ID;:TYPE\na;b;r\nb;c;r\n",
        "id,node1,label,node2\n1,a,r,b\n2,b,r,c\n",
        '"head","relation","tail"\n"a","r","b"\n"b","r","c"\n',
        "h\trel\tt\na\tr\tb\nb\tr\tc\n",
        "\ufeffhead,relation,tail\r\na,r,b\r\nb,r,c\r\n",
        "a, r, b\nb, r, c\n",
    ],
)  # fmt: skip
def test_headers_name_the_columns_of_a_table(tmp_path: Path, text: str) -> None:
    content = read_triples(write(tmp_path / "x.csv", text))
    assert content.text == b"a\tr\tb\nb\tr\tc\n" and len(content.notes) == text.count("\n") - 2


def test_quotes_and_separators_inside_names(tmp_path: Path) -> None:
    text = '"say ""hi""","r, or s",b\nb,"r, or s",\'c\'\n'
    assert read_triples(write(tmp_path / "x.csv", text)).text == b"say \"hi\"\tr, or s\tb\nb\tr, or s\t'c'\n"
    header = "head,relation,tail\na,relation,b\n"
    assert read_triples(write(tmp_path / "y.csv", header)).text.count(b"\n") == 2, "its relation is used: a triple"


TABLE_FAULTS = [
    ("a,r,b\na,r\n", "x.csv:2", "2 columns"),
    ("a,r,b\n\nb,r,a\n", "x.csv:2", "an empty line"),
    ("a,r,b,1\n", "x.csv:1", "4 columns"),
    ("a,r,b\na,,b\n", "x.csv:2", "an empty name"),
    ('a,r,b\na,r,"two\nlines"\n', "x.csv:2", "line break"),
    ('a,r,b\n"a" b,r,c\n', "x.csv:2", "no CSV"),
    ("head,relation,tail\n", "x.csv:1", "header"),
    ("", "x.csv:1", "empty file"),
    ("a,r,b\na,r,\0\n", "x.csv:2", "NUL"),
]


@pytest.mark.parametrize(("text", "where", "what"), TABLE_FAULTS)
def test_faults_of_tables(tmp_path: Path, text: str, where: str, what: str) -> None:
    with pytest.raises(InputError, match=what) as error:
        read_triples(write(tmp_path / "x.csv", text))
    assert str(error.value).startswith(f"{tmp_path}/{where}: found ") and "\n" not in str(error.value)


def test_lines_of_later_faults_are_those_of_the_file(tmp_path: Path) -> None:
    folder = write_graph(tmp_path / "g", ".txt")
    (folder / "valid.txt").unlink()
    write(
        folder / "valid.csv", 'head,relation,tail\n"a\nb",r,c\n'.replace("a\nb", BASE + "zoé") + "zoe ,r,c\nzoe,r,c\n"
    )
    with pytest.raises(InputError, match=r"valid\.csv:3: found 1 entity names in several spellings"):
        KnowledgeGraph.load(folder)


# ---------------------------------------------------------------- RDF


def test_rdf_labels_literals_and_blank_nodes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rdfs = "http://www.w3.org/2000/01/rdf-schema#"
    lines = [
        f"<{BASE}a> <{BASE}r> <{BASE}b> .", f'<{BASE}a> <{rdfs}label> "Ahorn"@de .', f"_:n1 <{BASE}r> <{BASE}a> .",
        f'<{BASE}a> <{rdfs}label> "maple"@en .', f'<{BASE}b> <{rdfs}comment> "a   tree" .',
        f'<{BASE}b> <{BASE}height> "12"^^<http://www.w3.org/2001/XMLSchema#integer> .', f"<{BASE}b> <{BASE}r> _:n1 .",
        f"<{BASE}\\u00e9> <{BASE}r> <{BASE}a> .", f"<{BASE}b> <{BASE}s> <{BASE}\\u00e9> .",
    ]  # fmt: skip
    folder = tmp_path / "g"
    write(folder / "train.nt", "\n".join(lines))
    for split in ("valid", "test"):
        write(folder / f"{split}.nt", f"_:n1 <{BASE}s> <{BASE}b> .\n")
    kg = KnowledgeGraph.load(folder)
    assert kg.entities == ["_:n1", f"{BASE}a", f"{BASE}b", f"{BASE}é"], "a label is one blank node in all files"
    assert kg.labels[1] == "maple" and kg.descriptions[2] == "a tree" and kg.labels[3] == "é"
    assert "1 triples with a literal" in (err := capsys.readouterr().err) and "height" in err
    write_texts(tmp_path / "texts", kg)
    assert (tmp_path / "texts" / "entity2label.txt").read_text() == f"{BASE}a\tmaple\n"
    for name, text in (("train", "\n".join(lines)), ("valid", f"<{BASE}a> <{BASE}s> <{BASE}b> .")):
        write(tmp_path / "t" / f"{name}.ttl", text)
    shutil.copy(tmp_path / "t" / "valid.ttl", tmp_path / "t" / "test.ttl")
    turtle = KnowledgeGraph.load(tmp_path / "t")
    assert turtle.entities[0] == "_:train1" and turtle.entities[1:] == kg.entities[1:] and turtle.labels[1] == "maple"
    assert turtle.train.tolist() == kg.train.tolist()


def test_turtle_abbreviations_keep_their_order_and_relative_names(tmp_path: Path) -> None:
    text = f"@prefix e: <{BASE}> .\n<ada> e:knows <bob>, <cid> ; a e:Person .\n<bob> e:knows <cid> .\n"
    found = read_triples(write(tmp_path / "x.ttl", text)).text.decode().splitlines()
    assert [line.split("\t")[0::2] for line in found] == [
        ["ada", "bob"], ["ada", "cid"], ["ada", f"{BASE}Person"], ["bob", "cid"],
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "text", "where"),
    [
        ("x.nt", f"<{BASE}a> <{BASE}r> <{BASE}b> .\nada knows bob\n", "x.nt:2"),
        ("x.nt", f"<{BASE}a> <{BASE}r> <{BASE}b>\n", "x.nt:1"),
        ("x.nt", f'<{BASE}a> <{BASE}r> "b" .\n', "x.nt:1"),
        ("x.ttl", f"<{BASE}a> <{BASE}r> <{BASE}b> .\n\nada e:knows bob .\n", "x.ttl:3"),
        ("x.ttl", f"<{BASE}a> <{BASE}r> .\n", "x.ttl:1"),
    ],
)
def test_faults_of_rdf(tmp_path: Path, name: str, text: str, where: str) -> None:
    with pytest.raises(InputError) as error:
        read_triples(write(tmp_path / name, text))
    assert str(error.value).startswith(f"{tmp_path}/{where}: found ") and "\n" not in str(error.value)


def test_without_rdflib_the_error_names_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("rdflib", "rdflib.term"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(InputError, match=r"needs the package rdflib; run: pip install rdflib=="):
        read_triples(write(tmp_path / "x.ttl", WRITERS[".ttl"](GRAPH["train"])))
    assert INSTALL.split()[-1] in (ROOT / "requirements-dev.txt").read_text().split(), "one version everywhere"
    plain = read_triples(write(tmp_path / "x.nt", WRITERS[".nt"](GRAPH["train"])))
    assert plain.text.decode() == WRITERS[".txt"](GRAPH["train"]), "plain lines need no package"


def test_plain_lines_are_read_as_rdflib_reads_them(tmp_path: Path) -> None:
    from rdflib import Graph

    rng = np.random.default_rng(0)
    signs = list("abcXYZ019-_.~:/?#[]@!$&'()*+,;=%éß北")
    iri = ["<http:" + "".join(rng.choice(signs, rng.integers(1, 9))) + ">" for _ in range(60)]
    lines = [f"{' ' * (i % 3)}{iri[i]}\t{iri[i + 1]} {iri[i + 2]}{' ' * (i % 2)}. # end" for i in range(58)]
    text = "\n".join(lines)
    ours = {tuple(line.split("\t")) for line in read_triples(write(tmp_path / "x.nt", text)).text.decode().splitlines()}
    assert ours == {tuple(map(str, triple)) for triple in Graph().parse(data=text, format="nt")} and len(ours) > 50


DAMAGED = [b"no gzip", gzip.compress(b"a\tr\tb\n" * 99)[:-9], b""]


@pytest.mark.parametrize("content", DAMAGED, ids=["no gzip", "cut off", "empty"])
def test_a_damaged_gzip_file_is_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.tsv.gz").write_bytes(content)
    with pytest.raises(InputError, match=r"x\.tsv\.gz") as error:
        KnowledgeGraph.load(tmp_path / "x.tsv.gz")
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------- one file


def dense(seed: int, M: int, R: int, n: int) -> Triples:
    rng = np.random.default_rng(seed)
    return [
        (f"{BASE}e{h}", f"{BASE}p/r{r}", f"{BASE}e{t}") for h, r, t in rng.integers((M, R, M), size=(n, 3)).tolist()
    ]


def check_split(parts: dict[str, Triples], whole: Triples) -> None:
    """What every split promises."""
    assert sorted(row for rows in parts.values() for row in rows) == sorted(set(whole))
    known = {name for h, _, t in parts["train"] for name in (h, t)}, {r for _, r, _ in parts["train"]}
    pairs = {name: {frozenset((h, t)) for h, _, t in rows} for name, rows in parts.items()}
    for name in ("valid", "test"):
        assert parts[name]
        assert all({h, t} <= known[0] and r in known[1] for h, r, t in parts[name])
    assert not any(pairs[a] & pairs[b] for a, b in combinations(SPLITS, 2))


@pytest.mark.parametrize("seed", range(4))
def test_a_split_covers_and_does_not_leak(seed: int) -> None:
    for M, R, n in ((5, 2, 60), (40, 3, 200), (300, 9, 900)):
        rows = dense(seed, M, R, n)
        rows += [(t, r, h) for h, r, t in rows[: n // 3]]
        names = sorted({name for h, _, t in rows for name in (h, t)})
        kinds = sorted({r for _, r, _ in rows})
        ids = np.array([(names.index(h), kinds.index(r), names.index(t)) for h, r, t in rows])
        found = split_triples(ids, len(names), len(kinds), Sizes(seed=seed), Path("x"))
        parts = {s: [(names[h], kinds[r], names[t]) for h, r, t in ids.tolist()] for s, ids in found.items()}
        check_split(parts, rows)
        mixed = split_triples(ids[::-1], len(names), len(kinds), Sizes(seed=seed), Path("x"))
        assert all(np.array_equal(found[name], mixed[name]) for name in SPLITS), "the order of the file does not matter"
        other = split_triples(ids, len(names), len(kinds), Sizes(seed=seed + 9), Path("x"))
        assert n < 100 or not np.array_equal(found["test"], other["test"])


def test_sizes() -> None:
    assert Sizes().counts(200) == (20, 20) and Sizes().counts(10**7) == (MOST, MOST) and Sizes().counts(4) == (1, 1)
    assert Sizes(valid=0.05, test=7).counts(200) == (10, 7)


@pytest.mark.parametrize("end", [".csv", ".tsv.gz", ".nt", ".ttl.gz", ".txt"])
def test_one_file_is_the_folder_that_split_writes(
    tmp_path: Path, end: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = dense(1, 30, 3, 150)
    path = write(tmp_path / f"my{end}", WRITERS[end.removesuffix(".gz")](rows))
    kg = KnowledgeGraph.load(path)
    assert kg.name == "my" and "triples of train / valid / test" in capsys.readouterr().err
    parts = {s: [(kg.entities[h], kg.relations[r], kg.entities[t]) for h, r, t in kg.split(s).tolist()] for s in SPLITS}
    check_split(parts, rows)
    alone = write_graph(tmp_path / "alone", end, {"train": rows})
    assert identity(KnowledgeGraph.load(alone)) == identity(kg)
    assert identity(KnowledgeGraph.load(alone / f"train{end}")) == identity(kg)
    words = ["split.py", str(path), "--out", str(tmp_path / "out")]
    monkeypatch.setattr("sys.argv", words)
    split_script.main()
    written = KnowledgeGraph.load(tmp_path / "out")
    assert written.train_digest() == kg.train_digest() and train_sha256(path) == train_sha256(tmp_path / "out")
    assert [written.split(name).tolist() for name in SPLITS] == [kg.split(name).tolist() for name in SPLITS]
    record = read_json(tmp_path / "out" / "split.json", "record")
    assert record["triples"] == {s: len(kg.split(s)) for s in SPLITS} and record["seed"] == 0
    with pytest.raises(InputError, match="--overwrite"):
        split_script.main()
    monkeypatch.setattr("sys.argv", [*words, "--overwrite", "--seed", "1", "--valid", "5", "--test", "0.2"])
    split_script.main()
    assert not np.array_equal(KnowledgeGraph.load(tmp_path / "out").test, kg.test)
    monkeypatch.setattr("sys.argv", ["split.py", str(ROOT / "data" / "family"), "--out", str(tmp_path / "again")])
    with pytest.raises(InputError, match="valid and test already"):
        split_script.main()
    for source in (alone, alone / f"train{end}"):
        monkeypatch.setattr("sys.argv", ["split.py", str(source), "--out", str(alone), "--overwrite"])
        with pytest.raises(InputError, match="choose another folder"):
            split_script.main()


def test_files_that_cannot_be_split_or_are_no_graphs(tmp_path: Path) -> None:
    star = write(tmp_path / "star.csv", "".join(f"hub,r,leaf{i}\n" for i in range(20)))
    with pytest.raises(InputError, match="0 can be taken from train"):
        KnowledgeGraph.load(star)
    with pytest.raises(InputError, match=r"expected a folder or a file that ends with .*\.ttl\.gz"):
        KnowledgeGraph.load(write(tmp_path / "x.xlsx", "x"))
    with pytest.raises(InputError, match="give the folder"):
        KnowledgeGraph.load(write_graph(tmp_path / "g", ".txt") / "train.txt")
    write(tmp_path / "one" / "graph.nt", WRITERS[".nt"](dense(0, 9, 2, 40)))
    assert KnowledgeGraph.load(tmp_path / "one").name == "one"


# ---------------------------------------------------------------- stage 1


def test_stage_1_from_one_file_and_with_kept_names(
    tmp_path: Path, rq: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same codes from a .csv and a .ttl.gz, named relative to another folder; the instruction data finds them."""
    rows = dense(3, 30, 3, 200)
    write(tmp_path / "my.csv", WRITERS[".csv"](rows))
    write(tmp_path / "other" / "my.ttl.gz", WRITERS[".ttl"](rows[::-1]))
    monkeypatch.chdir(tmp_path / "other")
    codes: list[Path] = []
    for dataset, out in (("../my.csv", "csv"), ("my.ttl.gz", "ttl")):
        flags = small_flags(Path(dataset), tmp_path / out)
        outcome = rq(*flags)
        assert outcome.code == 0 and "split by data/split.py" in outcome.err, outcome.err
        codes += (tmp_path / out / "codes").glob("*_rq.pt")
    assert codes[0].read_bytes() == codes[1].read_bytes()
    words = ["--codes", str(codes[0]), "--out_dir", str(tmp_path / "rows"), "--limit", "5"]
    gen_fb_data_rq.main(words)
    monkeypatch.chdir(tmp_path)
    gen_fb_data_rq.main([*words[:-1], "6", "--dataset", "other/my.ttl.gz"])

    write(tmp_path / "odd.tsv", "".join("\t".join(row) + "\n" for row in [*rows, (rows[0][0] + " ", *rows[1][1:])]))
    flags = small_flags(tmp_path / "odd.tsv", tmp_path / "odd")
    outcome = rq(*flags)
    assert outcome.code == 2 and "--keep_names" in outcome.err and outcome.err.count("\n") == 1
    outcome = rq(*flags, "--keep_names", "--overwrite")
    assert outcome.code == 0 and "different entities" in outcome.err, outcome.err
    odd = next((tmp_path / "odd" / "codes").glob("*_rq.pt"))
    gen_fb_data_rq.main(["--codes", str(odd), "--out_dir", str(tmp_path / "kept"), "--limit", "5"])  # the codes say so
