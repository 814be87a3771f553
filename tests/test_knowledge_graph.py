"""KnowledgeGraph: both folder forms, every fault by file and line, the filter sets and the cache."""

import subprocess
import sys
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from common.errors import InputError
from common.files import ROOT
from data.knowledge_graph import KnowledgeGraph, with_inverse

SMALL: dict[str, str] = {
    "train.txt": "b\tlikes\ta\na\tlikes\tc\nc\tnear_to\tb\nc\tnear_to\ta\na\tlikes\ta\n",
    "valid.txt": "b\tnear_to\tc\n",
    "test.txt": "a\tlikes\td\n",
    "entities.dict": "2\ta\n0\tb\n1\tc\n3\td\n",
    "relations.dict": "0\tnear_to\n1\tlikes\n",
}
OPENKE: dict[str, str] = {
    "entity2id.txt": "4\na\t2\nb\t0\nc\t1\nd\t3\n",
    "relation2id.txt": "2\nnear_to\t0\nlikes\t1\n",
    "train2id.txt": "5\n0 2 1\n2 1 1\n1 0 0\n1 2 0\n2\t2\t1\n",  # h t r
    "valid2id.txt": "1\n0 1 0\n",
    "test2id.txt": "1\n2 3 1\n",
}


def write(folder: Path, files: Mapping[str, str | bytes]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder


def same(a: KnowledgeGraph, b: KnowledgeGraph) -> None:
    assert (a.entities, a.relations, a.labels, a.descriptions) == (b.entities, b.relations, b.labels, b.descriptions)
    assert a.relation_labels == b.relation_labels and a.report == b.report
    for name in ("train", "valid", "test", "has_label", "degree", "unseen"):
        left, right = getattr(a, name), getattr(b, name)
        assert left.dtype == right.dtype and np.array_equal(left, right), name
    assert a.negative_splits.keys() == b.negative_splits.keys()
    for name in a.negative_splits:
        assert np.array_equal(a.negative_splits[name], b.negative_splits[name])


# ---------------------------------------------------------------- the forms


def test_names_with_dicts(tmp_path: Path) -> None:
    kg = KnowledgeGraph.load(write(tmp_path / "small", SMALL))
    assert kg.name == "small" and kg.entities == ["b", "c", "a", "d"] and kg.relations == ["near_to", "likes"]
    assert kg.train.tolist() == [[0, 1, 2], [2, 1, 1], [1, 0, 0], [1, 0, 2], [2, 1, 2]]
    assert kg.train.dtype == np.int64 and kg.valid.tolist() == [[0, 0, 1]] and kg.split("test").tolist() == [[2, 1, 3]]
    assert kg.degree.tolist() == [2, 3, 5, 0]  # the loop a-likes-a is an edge in both directions
    assert kg.unseen.tolist() == [False, False, False, True]
    assert kg.report["triples_with_unseen_entities"] == {"valid": 0, "test": 1}
    assert kg.relation_labels == ["near to", "likes"] and kg.labels == kg.entities and not kg.has_label.any()
    assert set(kg.input_hashes) == set(SMALL)
    with pytest.raises(InputError, match="choose one of train, valid, test"):
        kg.split("dev")


def test_openke_is_the_same_graph(tmp_path: Path) -> None:
    names = KnowledgeGraph.load(write(tmp_path / "names", SMALL))
    openke = KnowledgeGraph.load(write(tmp_path / "openke", OPENKE))
    assert openke.report.pop("form") == "openke" and names.report.pop("form") == "names"
    same(names, openke)


def test_without_dicts_ids_follow_sorted_names(tmp_path: Path) -> None:
    kg = KnowledgeGraph.load(write(tmp_path, {name: SMALL[name] for name in ("train.txt", "valid.txt", "test.txt")}))
    assert kg.entities == ["a", "b", "c", "d"] and kg.relations == ["likes", "near_to"]
    assert kg.train[0].tolist() == [1, 0, 0]


def test_crlf_bom_and_a_missing_last_newline_change_nothing(tmp_path: Path) -> None:
    plain = KnowledgeGraph.load(write(tmp_path / "plain", SMALL))
    crlf = {name: b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode() for name, text in SMALL.items()}
    same(plain, KnowledgeGraph.load(write(tmp_path / "crlf", crlf)))
    bare = {name: text.removesuffix("\n") for name, text in SMALL.items()}
    same(plain, KnowledgeGraph.load(write(tmp_path / "bare", bare)))
    openke = KnowledgeGraph.load(write(tmp_path / "openke", OPENKE))
    crlf = {name: b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode() for name, text in OPENKE.items()}
    same(openke, KnowledgeGraph.load(write(tmp_path / "openke_crlf", crlf)))


def test_repeated_and_shared_triples_are_counted_and_kept(tmp_path: Path) -> None:
    files = SMALL | {"train.txt": SMALL["train.txt"] + "a\tlikes\tc\n", "valid.txt": "a\tlikes\tc\nb\tnear_to\tc\n"}
    kg = KnowledgeGraph.load(write(tmp_path, files))
    assert len(kg.train) == 6
    assert kg.report["repeated_triples"] == {"train": 1, "valid": 0, "test": 0}
    assert kg.report["shared_triples"] == {"train/valid": 1, "train/test": 0, "valid/test": 0}


def test_negatives_keep_order_and_repeats(tmp_path: Path) -> None:
    files = SMALL | {"valid_neg.txt": "c\tlikes\tb\na\tnear_to\tb\nc\tlikes\tb\n"}
    kg = KnowledgeGraph.load(write(tmp_path, files))
    negatives = kg.negatives("valid")
    assert negatives is not None and negatives.tolist() == [[1, 1, 0], [2, 0, 0], [1, 1, 0]]
    assert kg.negatives("test") is None


# ---------------------------------------------------------------- names


def test_label_and_description_preference(tmp_path: Path) -> None:
    names = {
        "entity2label.txt": "a\tAnna\nz\tnot of this graph\n",
        "entity2text.txt": "a\tunused\nb\tBerlin, Germany\nc\t\n",
        "FB15k_mid2name.txt": "c\tCarl_Orff\na\tunused\n",
        "entity2definition.txt": "b\t the  capital \n",
        "relation2text.txt": "likes\tis fond of\n",
    }
    kg = KnowledgeGraph.load(write(tmp_path, SMALL | names))
    assert dict(zip(kg.entities, kg.labels, strict=True)) == {
        "a": "Anna",
        "b": "Berlin, Germany",
        "c": "Carl Orff",
        "d": "d",
    }
    assert kg.has_label.tolist() == [True, True, True, False]  # ids: b c a d
    assert kg.descriptions == ["the capital", "", "", ""]
    assert kg.relation_labels == ["near to", "is fond of"]
    assert kg.report["labels_missing"] == 1 and kg.report["descriptions_missing"] == 3
    assert kg.report["names_of_other_entities"] == 1 and kg.report["relation_labels_missing"] == 1


def test_name_and_gloss_lines(tmp_path: Path) -> None:
    gloss = {"entity2text.txt": "a\tape, a large, tailless primate\nb\tbee, an insect\nc\tcat\nd\tdog, a pet\n"}
    kg = KnowledgeGraph.load(write(tmp_path, SMALL | gloss))
    assert kg.labels == ["bee", "cat", "ape", "dog"]
    assert kg.descriptions == ["an insect", "", "a large, tailless primate", "a pet"]


def test_raw_names_as_labels(tmp_path: Path) -> None:
    files = {
        "train.txt": "/m/0a\t/people/person/place_of_birth\t/m/0b\n/m/0b\t_also_see\t/m/0a\n",
        "valid.txt": "/m/0a\t_also_see\t/m/0b\n",
        "test.txt": "/m/0b\t_also_see\t/m/0b\n",
    }
    kg = KnowledgeGraph.load(write(tmp_path, files))
    assert kg.labels == ["/m/0a", "/m/0b"] and kg.relation_labels == ["people person place of birth", "also see"]


# ---------------------------------------------------------------- faults

FAULTS: list[tuple[dict[str, str | bytes], str, str]] = [
    ({"train.txt": "a\tlikes\tc\na\tlikes\n"}, "train.txt:2", "2 columns"),
    ({"train.txt": "a likes c\n"}, "train.txt:1", "found 1 column,"),
    # one column too few and one too many: the sum alone would look right
    ({"train.txt": "a\tlikes\nc\tnear_to\tb\ta\n"}, "train.txt:1", "2 columns"),
    ({"train.txt": "a\t\tc\n"}, "train.txt:1", "an empty name"),
    ({"valid.txt": "a\tlikes\tb\n\nb\tlikes\ta\n"}, "valid.txt:2", "an empty line"),
    ({"valid.txt": "a\tlikes\tb\n\n"}, "valid.txt:2", "an empty line"),
    ({"test.txt": ""}, "test.txt:1", "an empty file"),
    ({"test.txt": "a\tlikes\tb\nnobody\tlikes\tb\n"}, "test.txt:2", "'nobody'"),
    ({"test.txt": "a\thates\tb\n"}, "test.txt:1", "'hates'"),
    ({"train.txt": b"a\tlikes\tb\n\xff\tlikes\tb\n"}, "train.txt:2", "UTF-8"),
    ({"train.txt": b"\xef\xbb\xbfa\tlikes\tb\nb\tlikes\ta\n\xff\tlikes\tb\n"}, "train.txt:3", "UTF-8"),
    ({"train.txt": "a\tlikes\tb\n".encode("utf-16")}, "train.txt:1", "NUL"),
    ({"train.txt": b"a\tlikes\tb\na\tli\0kes\tb\n"}, "train.txt:2", "NUL"),
    ({"entities.dict": "0\tb\n1\tc\n3\td\n5\ta\n"}, "entities.dict:4", "0..3"),
    ({"entities.dict": "0\tb\n1\tc\n1\td\n2\ta\n"}, "entities.dict:3", "'c'"),
    ({"entities.dict": "0\tb\n1\tc\n2\tb\n3\td\n"}, "entities.dict:3", "line 1"),
    ({"entities.dict": "0\tb\n-1\tc\n2\ta\n3\td\n"}, "entities.dict:2", "'-1'"),
    ({"entities.dict": "0\tb\nc\n2\ta\n3\td\n"}, "entities.dict:2", "found 1 column,"),
    ({"relations.dict": "near_to\t0\nlikes\t1\n"}, "relations.dict:1", "'near_to'"),
    ({"entity2label.txt": "a\tAnna\nb Berta\n"}, "entity2label.txt:2", "1 column"),
    ({"relation2text.txt": b"likes\t\xe9\n"}, "relation2text.txt:1", "UTF-8"),
    ({"test_neg.txt": "a\tlikes\tnobody\n"}, "test_neg.txt:1", "'nobody'"),
]


@pytest.mark.parametrize(("files", "where", "what"), FAULTS)
def test_faults_of_the_form_with_names(tmp_path: Path, files: dict[str, str | bytes], where: str, what: str) -> None:
    with pytest.raises(InputError) as error:
        KnowledgeGraph.load(write(tmp_path, SMALL | files))
    message = str(error.value)
    assert message.startswith(f"{tmp_path}/{where}: found ") and what in message
    assert ", expected " in message and "\n" not in message


OPENKE_FAULTS = [
    ({"train2id.txt": "5\n0 2 1\n"}, "train2id.txt:1", "count 5"),
    ({"train2id.txt": "0\n"}, "train2id.txt:1", "at least one line"),
    ({"valid2id.txt": "0\n0 1 0\n"}, "valid2id.txt:1", "1, the number of lines"),
    ({"train2id.txt": "0 2 1\n2 1 1\n"}, "train2id.txt:1", "'0 2 1'"),
    ({"train2id.txt": "2\n0 2 1\n0 4 1\n"}, "train2id.txt:3", "'4'"),
    ({"valid2id.txt": "1\n0 1 2\n"}, "valid2id.txt:2", "h t r"),  # h r t by mistake: the relation's id is out of range
    ({"valid2id.txt": "1\n0 1\n"}, "valid2id.txt:2", "2 columns"),
    ({"valid2id.txt": "1\n0 x 1\n"}, "valid2id.txt:2", "'x'"),
    ({"entity2id.txt": "4\na\t2\nb\t0\nc\t1\nd\t4\n"}, "entity2id.txt:5", "0..3"),
    ({"entity2id.txt": "4\na\t2\nb\t0\na\t1\nd\t3\n"}, "entity2id.txt:4", "line 2"),
    ({"relation2id.txt": "2\nnear_to\t0\nlikes\n"}, "relation2id.txt:3", "found 1 column,"),
]


@pytest.mark.parametrize(("files", "where", "what"), OPENKE_FAULTS)
def test_faults_of_the_openke_form(tmp_path: Path, files: dict[str, str], where: str, what: str) -> None:
    with pytest.raises(InputError) as error:
        KnowledgeGraph.load(write(tmp_path, OPENKE | files))
    assert str(error.value).startswith(f"{tmp_path}/{where}: found ") and what in str(error.value)


def test_the_other_problems_are_counted(tmp_path: Path) -> None:
    files = {"test.txt": "x\tlikes\ta\na\tlikes\ty\nz\tlikes\tz\n"}
    with pytest.raises(InputError, match=r"test\.txt:1: found 'x'.* \(and 3 more problems\)$"):
        KnowledgeGraph.load(write(tmp_path, SMALL | files))


def test_missing_folder_and_files_name_the_next_command(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"does not exist.*python data/download\.py FB15k-237$"):
        KnowledgeGraph.load(tmp_path / "FB15k-237")
    with pytest.raises(InputError, match=r"has no test\.txt; it holds train\.txt, valid\.txt"):
        KnowledgeGraph.load(write(tmp_path / "part", {name: SMALL[name] for name in ("train.txt", "valid.txt")}))
    with pytest.raises(InputError, match=r"has no valid2id\.txt, test2id\.txt, entity2id\.txt, relation2id\.txt"):
        KnowledgeGraph.load(write(tmp_path / "part2", {"train2id.txt": "1\n0 1 0\n"}))
    with pytest.raises(InputError, match="give the folder"):
        KnowledgeGraph.load(tmp_path / "part" / "train.txt")
    (tmp_path / "odd" / "train.txt").mkdir(parents=True)
    with pytest.raises(InputError, match=r"train\.txt cannot be read"):
        KnowledgeGraph.load(write(tmp_path / "odd", {"valid.txt": "", "test.txt": ""}))


# ---------------------------------------------------------------- indexes against brute force


def random_graph(folder: Path, M: int, R: int, n: int, seed: int = 0) -> Path:
    rng = np.random.default_rng(seed)
    files: dict[str, str] = {}
    for split, count in (("train", n), ("valid", n // 10), ("test", n // 10)):
        h, r, t = rng.integers(M, size=count), rng.integers(R, size=count), rng.integers(M, size=count)
        files[f"{split}.txt"] = "".join(
            f"/m/{a:05d}\t/some/relation/{b}\t/m/{c:05d}\n" for a, b, c in zip(h, r, t, strict=True)
        )
    return write(folder, files)


def test_answers_and_csr_equal_brute_force(tmp_path: Path) -> None:
    kg = KnowledgeGraph.load(random_graph(tmp_path, 30, 3, 200))
    R = kg.num_relations
    edges = with_inverse(kg.train, R)
    assert edges.shape == (400, 3) and edges[:200].tolist() == kg.train.tolist()
    assert edges[200:].tolist() == [[t, r + R, h] for h, r, t in kg.train.tolist()]

    for splits in (("train",), ("train", "valid", "test"), ()):
        known = defaultdict(set)
        for split in splits or ("train", "valid", "test"):
            for h, r, t in kg.split(split).tolist():
                known[h, r].add(t)
                known[t, r + R].add(h)
        answers = kg.answers(*splits)
        assert (np.diff(answers.keys) > 0).all() and len(answers.keys) == len(known)
        grid = [(h, r) for h in range(kg.num_entities) for r in range(2 * R)]
        rows = answers.rows(np.array([h for h, _ in grid]), np.array([r for _, r in grid]))
        for query, row in zip(grid, rows, strict=True):
            if row < 0:
                assert query not in known
            else:
                assert answers.targets[answers.indptr[row] : answers.indptr[row + 1]].tolist() == sorted(known[query])
        assert {answers.keys.dtype, answers.indptr.dtype, answers.targets.dtype, rows.dtype} == {np.dtype(np.int64)}


# ---------------------------------------------------------------- the command, the real data


@pytest.mark.parametrize("files", [SMALL, OPENKE], ids=["names", "openke"])
def test_without_test_its_files_are_not_read(tmp_path: Path, files: dict[str, str]) -> None:
    whole = KnowledgeGraph.load(write(tmp_path / "whole", files))
    broken = {name: b"\xff\0" if name.startswith("test") else content for name, content in files.items()}
    folder = write(tmp_path / "broken", broken)
    (folder / "test_neg.txt").write_bytes(b"\xff\0")
    with pytest.raises(InputError, match="test"):
        KnowledgeGraph.load(folder)
    for _ in range(2):
        kg = KnowledgeGraph.load(folder, test=False)
        assert kg.test.shape == (0, 3) and kg.train_digest() == whole.train_digest()
        assert np.array_equal(kg.valid, whole.valid) and not any("test" in name for name in kg.input_hashes)
        for file in folder.glob("test*"):  # nor need they exist
            file.unlink()


def test_command_prints_the_report_and_one_line_errors(tmp_path: Path) -> None:
    script = [sys.executable, str(ROOT / "data" / "knowledge_graph.py")]
    good = subprocess.run([*script, write(tmp_path / "small", SMALL)], capture_output=True, text=True, cwd=tmp_path)
    assert good.returncode == 0 and "small: 4 entities, 2 relations" in good.stdout and "b | likes | a" in good.stdout
    write(tmp_path / "small", {"test.txt": "nobody\tlikes\ta\n"})
    bad = subprocess.run([*script, "small"], capture_output=True, text=True, cwd=tmp_path)
    assert bad.returncode == 2 and bad.stderr.startswith("error: small/test.txt:1: found 'nobody'")
    assert bad.stderr.count("\n") == 1 and bad.stdout == ""


COUNTS = {  # the paper's Table 6; the unseen entities are counted
    "FB15k-237": (14541, 237, 272_115, 17_535, 20_466, 36),
    "WN18RR": (40943, 11, 86_835, 3_034, 3_134, 384),
    "FB15k-237N": (13104, 93, 87_282, 7_041, 8_226, 139),
    "kinship": (104, 25, 8_544, 1_068, 1_074, 0),
    "umls": (135, 46, 5_216, 652, 661, 0),
    "nations": (14, 55, 1_592, 199, 201, 0),
}


@pytest.mark.parametrize("name", COUNTS)
def test_public_data_sets(name: str) -> None:
    folder = ROOT / "data" / name
    if not folder.is_dir():
        pytest.skip(f"python data/download.py {name} has not been run")
    kg = KnowledgeGraph.load(folder)
    sizes = (kg.num_entities, kg.num_relations, len(kg.train), len(kg.valid), len(kg.test), int(kg.unseen.sum()))
    assert sizes == COUNTS[name]
    assert kg.has_label.all() or name in ("kinship", "umls", "nations")
    negatives = kg.negatives("test")
    if name == "FB15k-237N":
        assert negatives is not None and len(negatives) == len(kg.test)
    else:
        assert negatives is None
    if name == "WN18RR":
        assert kg.labels[kg.entities.index("14854262")] == "stool"
        assert kg.descriptions[kg.entities.index("14854262")] == "solid excretory product evacuated from the bowels"
