"""Code quality against brute force over Python sets and against cases with known answers."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

import pytest
import torch

import run_rq
from common import device, files
from common.errors import InputError
from common.files import ROOT
from tables import code_quality
from tables.code_quality import jaccard, jaccard_of, nearest_entities, open_code_set, quality
from tests.conftest import arguments, small_flags

BIG = ROOT / "codes_new" / "FB15k-237_16_1024_4_rq.pt"


def stage1(ring: Path, folder: Path, **more: object) -> Path:
    """A short run of run_rq.py; the codes file."""
    with arguments(small_flags(ring, folder, **({"epoch": 2, "graph_backend": "torch"} | more))):
        run_rq.main()
    return max((folder / "codes").glob("*.pt"), key=lambda path: (not path.stem.endswith("_emd"), path.stat().st_mtime))


@pytest.fixture(scope="module")
def codes_file(ring: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stage1(ring, tmp_path_factory.mktemp("quality"))


def draw(M: int, L: int, K: int, Q: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, K, (M, L, Q), generator=torch.Generator().manual_seed(seed))


def by_sets(codes: torch.Tensor, vectors: torch.Tensor, k: int) -> float:
    """The definition, spelled out."""
    items = [{(p, q, int(c)) for p, row in enumerate(entity) for q, c in enumerate(row)} for entity in codes]
    total = 0.0
    for i in range(len(codes)):
        squares = [(float((vectors[i].double() - other.double()).square().sum()), j) for j, other in enumerate(vectors)]
        near = [j for _, j in sorted((square, j) for square, j in squares if j != i)[:k]]
        total += sum(1 - len(items[i] & items[j]) / len(items[i] | items[j]) for j in near) / k
    return total / len(codes)


@pytest.mark.parametrize("seed", range(4))
def test_jaccard_is_that_of_the_sets_whatever_the_chunks(seed: int) -> None:
    M = 37
    codes = draw(M, 3, 4, 2, seed)
    # whole numbers: many distances tie exactly, and equal rows are at distance 0
    vectors = torch.randint(0, 3, (M, 4), generator=torch.Generator().manual_seed(seed)).float()
    (found,) = jaccard_of([codes], vectors, (1, 5, 36, 37, 50), chunk=7)
    assert list(found) == [1, 5, 36], "only M - 1 others exist"
    assert found == pytest.approx({k: by_sets(codes, vectors, k) for k in found}, abs=1e-12)
    for chunk in (1, 36, 1000):
        assert jaccard_of([codes], vectors, (1, 5, 36), chunk)[0] == pytest.approx(found, abs=1e-12)


def test_jaccard_of_known_sets() -> None:
    M, L, Q = 12, 3, 2
    vectors = torch.randn(M, 5, generator=torch.Generator().manual_seed(0))
    same = torch.zeros(M, L, Q, dtype=torch.int64)
    apart = torch.arange(M).view(M, 1, 1).expand(M, L, Q).contiguous()
    half = apart.clone()
    half[:, :, 0] = 0  # level 0 shared by all: L of L*Q items
    swapped = torch.stack([apart[:, :, 0], apart[:, :, 0] + M], 2)
    crossed = swapped.flip(2)  # the same indices at other levels are other items
    found = jaccard_of([same, apart, half], vectors, (1, 4, 11))
    assert found[0] == {1: 0, 4: 0, 11: 0} and found[1] == {1: 1, 4: 1, 11: 1}
    assert found[2] == pytest.approx(dict.fromkeys((1, 4, 11), 1 - L / (2 * L * Q - L)))
    both = torch.cat([swapped, crossed])
    assert jaccard(both, torch.tensor([0]), torch.tensor([[M, 0]])).tolist() == [[1, 0]]


def test_nearest_are_sorted_by_distance_then_id_and_leave_the_entity_out() -> None:
    generator = torch.Generator().manual_seed(3)
    vectors = torch.randint(0, 2, (50, 3), generator=generator).float() * 0.1 + 1000  # few distinct rows, far from 0
    ids = nearest_entities(torch.arange(50), vectors, 20)
    exact = (vectors.double()[:, None] - vectors.double()).square().sum(2).float().numpy()
    for i in range(50):
        others = [j for j in range(50) if j != i]
        order = sorted(others, key=lambda j: (round(float(exact[i, j]), 4), j))[:20]
        assert ids[i].tolist() == order
    assert nearest_entities(torch.tensor([7]), vectors, 500).shape == (1, 49)


def test_names_of_codes_do_not_matter_but_owners_do() -> None:
    M, L, K, Q = 60, 4, 16, 3
    codes = draw(M, L, K, Q)
    # near entities get near codes: neighbours of the line share items
    codes = torch.stack([codes[torch.arange(M) // 4][:, :, q] if q else codes[torch.arange(M) // 8][:, :, q]
                         for q in range(Q)], 2)  # fmt: skip
    vectors = torch.arange(M).float()[:, None]
    renamed = (codes + torch.arange(1, Q + 1)) % K
    shuffled = codes[torch.randperm(M, generator=torch.Generator().manual_seed(1))]
    found, again, control = jaccard_of([codes, renamed, shuffled], vectors, (3,))
    assert found == again and found[3] < control[3] - 0.1


def test_a_run_is_measured_and_written(codes_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "quality.json"
    code_quality.main(["--codes", str(codes_file), "--k", "3", "42", "43", "--json", str(out)])
    [row] = json.loads(out.read_text())
    recorded = json.loads(codes_file.with_suffix(".json").read_text())["codes"]
    for key in ("perplexity", "collisions", "entropy_bits"):
        assert row[key] == pytest.approx(recorded[key]), key
    assert row["bits_per_entity"] == 3 * 2 * 3  # L = 3, Q = 2, K = 8
    found = open_code_set(codes_file)
    assert row["entropy_bits_max"] == math.log2(43) >= row["entropy_bits"] - 1e-9
    assert row["jaccard"] == {str(k): pytest.approx(by_sets(found.codes, found.flat_vectors(), k)) for k in (3, 42)}
    shown = capsys.readouterr().out
    assert "left out    k = 43: only 42 other entities" in shown and f"{row['jaccard']['3']:.4f}" in shown


def test_without_vectors_the_rest_is_measured(codes_file: Path, tmp_path: Path) -> None:
    for file in codes_file.parent.glob(f"{codes_file.stem}*"):
        if "_emd" not in file.name:
            (tmp_path / file.name).write_bytes(file.read_bytes())
    found = open_code_set(tmp_path / codes_file.name)
    assert quality(found)["jaccard"] is None and quality(found)["perplexity"]
    with pytest.raises(InputError):
        found.flat_vectors()


def test_files_that_are_not_the_recorded_ones_are_refused(codes_file: Path, tmp_path: Path) -> None:
    for file in codes_file.parent.glob(f"{codes_file.stem}*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    vectors = tmp_path / f"{codes_file.stem}_emd.pt"
    files.save_torch(torch.zeros(43, 3, 4), vectors)
    with pytest.raises(InputError):
        open_code_set(tmp_path / codes_file.name)
    with pytest.raises(InputError):
        open_code_set(tmp_path / "none.pt")


def test_flags_and_defaults(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(code_quality, "dumped_codes", list)
    with pytest.raises(InputError):
        code_quality.main([])
    with pytest.raises(SystemExit) as end:
        code_quality.parse_args(["--k", "0"])
    assert end.value.code == 2 and "--k" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(not BIG.is_file(), reason="needs the codes of FB15k-237")
def test_fb15k237_takes_less_than_a_minute_of_cpu_and_4_gb() -> None:
    start = time.process_time()
    row = quality(open_code_set(BIG))
    assert time.process_time() - start < 60 and device.peak_memory_mb() < 4000
    values = list(row["jaccard"].values())
    assert len(values) == 9 and values == sorted(values), "farther entities share less"
