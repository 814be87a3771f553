"""Two processes against one: the same parameters, rank-0 output, joint shutdown.

torchrun starts this file itself as the two processes (``main`` below): each goes through the same scenarios and leaves
what it found in OUT/{scenario}_{rank}.pt. The single process's results are computed by the same functions here.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import run_rq
from common.config import Config
from common.errors import InputError
from common.files import load_torch
from common.record import seed_everything
from data.knowledge_graph import KnowledgeGraph
from model import trainer as trainer_module
from model.data_parallel import SharedBatchNorm, World
from model.evaluation import evaluate_vectors
from model.RQGCN import RQGCN, model_arguments
from model.trainer import Trainer
from tests.conftest import CODE_DIM, ROOT, SHAPE, D, L, M, R, make_model, small_flags

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def under_torchrun(*words: str, wait: float = 400) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [*TORCHRUN, *words], env=environment, capture_output=True, text=True, timeout=wait, cwd=ROOT, check=False
    )


# ---------------------------------------------------------------- scenarios


def make_trainer(
    kg: KnowledgeGraph, world: World, checkpoint: Path, model: dict[str, Any], double: bool = True, **settings: Any
) -> Trainer:
    """A small trainer on the ring; ``double``: in float64 and without dropout, where two processes must equal one."""
    values: dict[str, Any] = SHAPE | {
        "graph_backend": "torch", "epoch": 4, "lr": 0.01, "batch": 33, "freeze_at": 0.7, "encoder_every": 2,
    }  # fmt: skip
    values |= {"gcn_drop": 0.0, "decoder_drop": 0.0} if double else {}
    text_dim = model.get("text_dim")
    config = Config(**values | settings | {key: value for key, value in model.items() if key != "text_dim"})
    trainer_module.TRAINING_PRECISION = "highest"
    seed_everything(0)
    args = model_arguments(config, text_dim)
    net = RQGCN(kg.num_entities, kg.num_relations, **args)
    text = torch.randn(M, 7, generator=torch.Generator().manual_seed(1)) if text_dim else None
    if double:
        net, text = net.double(), None if text is None else text.double()
    return Trainer(kg, net, config, checkpoint, args, {}, text, report=lambda line: None, world=world)


def result_of(trainer: Trainer) -> dict[str, Any]:
    assert trainer.best is not None
    averages = () if trainer.average is None else trainer.average.values or ()
    return {
        "state": {name: value.detach().clone() for name, value in trainer.model.named_parameters()}
        | {name: value.clone() for name, value in trainer.model.scorer.decoder.named_buffers()}
        | {f"average {place}": value for place, value in enumerate(averages)},
        "codes": trainer.codes,
        "losses": [[row["structure"], row["semantic"], row["quantization"], *row["levels"]] for row in trainer.history],
        "valid": [row["valid"]["mrr"] for row in trainer.history],
        "rng": [torch.get_rng_state(), trainer.generator.get_state()],
    }


Scenario = Callable[[KnowledgeGraph, World, Path], dict[str, Any]]


def trained(model: dict[str, Any], double: bool = True, **settings: Any) -> Scenario:
    """All of ``fit``: warm-up, k-means, codes found anew and revived, frozen codes, rankings, checkpoints."""

    def scenario(kg: KnowledgeGraph, world: World, folder: Path) -> dict[str, Any]:
        checkpoint = folder / f"of_{world.rank}" / "run.pt"
        trainer = make_trainer(kg, world, checkpoint, model, double, **settings)
        trainer.fit()
        return result_of(trainer) | {"wrote": checkpoint.parent.exists()}

    return scenario


EQUAL: dict[str, Scenario] = {
    "distmult": trained({"decoder": "distmult"}),
    "layers that add": trained(
        {"init_dim": L * CODE_DIM, "gcn_dim": L * CODE_DIM, "tf_layers": 1, "decoder": "complex"}, encoder_every=3
    ),
    "conve": trained({"decoder": "conve"}, weight_average=0.9),
    "binary cross-entropy": trained({"decoder": "complex"}, loss="bce", n3=0.1),
    "text": trained({"decoder": "distmult", "text_dim": 7}, text_weight=2.0),
    "ensemble": trained(  # each member has batch norms of its own
        {"decoder": "conve", "ensemble": 3, "gcn_layers": 0, "init_dim": L * CODE_DIM}, n3=0.1
    ),
    "codes that die": trained({"num_code": 32}, epoch=6),
    "masked inputs": trained({}, mask_inputs=0.3),
    "sampled softmax": trained({"decoder": "complex"}, num_negatives=9, n3=0.1),
}


def fixed_assignments(kg: KnowledgeGraph, world: World, folder: Path) -> dict[str, Any]:
    """Codes given and never searched: the step alone."""
    trainer = make_trainer(kg, world, folder / "fixed" / "run.pt", {"decoder": "conve"}, warmup_epochs=0, freeze_at=1.0)
    shape = (M, SHAPE["seq_len"], SHAPE["num_quantizers"])
    trainer.codes = torch.randint(SHAPE["num_code"], shape, generator=torch.Generator().manual_seed(3))
    trainer.model.rq_codebook.initialized.fill_(True)
    trainer._refresh = lambda *args, **kwargs: None  # type: ignore[method-assign]
    trainer._start_epoch = lambda phase: None  # type: ignore[method-assign]
    trainer.fit()
    return result_of(trainer)


def without_shared_batch_norm(kg: KnowledgeGraph, world: World, folder: Path) -> dict[str, Any]:
    """The control of "conve": every process's batch norms see its own queries alone."""
    shared, trainer_module.share_batch_norms = trainer_module.share_batch_norms, lambda module, world: None
    try:
        return EQUAL["conve"](kg, world, folder)
    finally:
        trainer_module.share_batch_norms = shared


def batch_norm_of_parts(kg: KnowledgeGraph, world: World, folder: Path) -> dict[str, Any]:
    """SharedBatchNorm over 3 rows: one in one process, two in the other."""
    generator = torch.Generator().manual_seed(0)
    x, target = torch.randn(2, 3, 4, 2, 5, generator=generator, dtype=torch.float64)
    plain = nn.BatchNorm2d(4).double()
    with torch.no_grad():
        plain.weight.copy_(torch.tensor([1.0, -2.0, 0.5, 3.0]))
    norm: nn.Module = plain if world.size == 1 else SharedBatchNorm(plain, world)
    rows = world.own(x).clone().requires_grad_()
    out = norm(100 + rows)
    (out * world.own(target)).sum().backward()
    assert rows.grad is not None
    assert plain.weight.grad is not None and plain.bias.grad is not None
    return {
        "out": world.gather(out.detach(), 3),
        "x": world.gather(rows.grad, 3),
        "weight": world.sum(plain.weight.grad),
        "bias": world.sum(plain.bias.grad),
        "buffers": dict(norm.state_dict()),
    }


def ranking(kg: KnowledgeGraph, world: World, folder: Path) -> dict[str, Any]:
    """Metrics from vectors at random: no two scores tie, as those of entities with one code do up to rounding."""
    torch.manual_seed(0)
    q_all, relations = torch.randn(M, D).double(), torch.randn(2 * R, D).double()
    scorer = make_model(kg).double().scorer
    return evaluate_vectors(scorer, relations, q_all, kg, "valid", world, batch=5)


def clocks_that_differ(kg: KnowledgeGraph, world: World, folder: Path) -> dict[str, Any]:
    """The second process's clock says that the time was over long ago."""
    trainer = make_trainer(kg, world, folder / "clock" / "run.pt", {}, epoch=10**6, max_minutes=0.5 / 60)
    trainer.seconds += 1e6 * world.rank
    trainer.fit()
    return {
        "phases": [row["phase"] for row in trainer.history],
        "seconds": trainer.seconds,
        "last": trainer.history[-1],
    }


def one_gets_a_signal(kg: KnowledgeGraph, world: World, folder: Path) -> dict[str, Any]:
    """Both must leave after the step in which one received the signal."""
    trainer = make_trainer(kg, world, folder / "signal" / "run.pt", {})
    previous, steps, step = signal.signal(signal.SIGTERM, world.interrupt), [], trainer.optimizer.step

    def counted() -> None:
        step()
        steps.append(1)
        if len(steps) == 5 and world.rank == world.size - 1:
            os.kill(os.getpid(), signal.SIGTERM)

    trainer.optimizer.step = counted  # type: ignore[assignment,method-assign]
    code: Any = None
    try:
        trainer.fit()
    except SystemExit as stop:
        code = stop.code
    finally:
        signal.signal(signal.SIGTERM, previous)
        world.stop_signal = 0
    return {"steps": len(steps), "code": code}


def one_fails(kg: KnowledgeGraph, world: World, folder: Path) -> dict[str, Any]:
    """The full disk of one, a bad number of all: who raises what."""

    def ends(failing: Callable[[int], bool]) -> str:
        try:
            with world.together():
                if failing(world.rank):
                    raise InputError(f"of {world.rank}")
            return "goes on"
        except InputError as error:
            return str(error)
        except SystemExit as stop:
            return f"leaves with {stop.code}"

    return {
        "none": ends(lambda rank: False),
        "the last": ends(lambda rank: rank == world.size - 1),
        "all": ends(lambda rank: True),
    }


def randomness(kg: KnowledgeGraph, world: World, folder: Path) -> dict[str, Any]:
    torch.manual_seed(5)
    with world.own_randomness():
        inside = torch.rand(3)
    return {"inside": inside, "after": torch.rand(3)}


SCENARIOS: dict[str, Scenario] = EQUAL | {
    "fixed assignments": fixed_assignments,
    "own batch norms": without_shared_batch_norm,
    "batch norm of parts": batch_norm_of_parts,
    "dropout": trained({"decoder": "conve"}, double=False),
    "noise of samples": trained({"decoder": "distmult"}, double=False, num_negatives=9, z_noise=0.5, frozen_noise=0.5),
    "ranking": ranking,
    "clocks": clocks_that_differ,
    "signal": one_gets_a_signal,
    "failures": one_fails,
    "randomness": randomness,
}


def main(ring: Path, out: Path) -> None:
    """What each of the two processes does."""
    world = World.start(torch.device("cpu"))
    assert world.size == 2 == torch.distributed.get_world_size() and torch.distributed.get_backend() == "gloo"
    kg = KnowledgeGraph.load(ring)
    for name, scenario in SCENARIOS.items():
        torch.save(scenario(kg, world, out / f"files of {name}"), out / f"{name}_{world.rank}.pt")
    flags = small_flags(ring, out / "command", decoder="conve", graph_backend="torch", epoch=3)
    with open(out / f"command_{world.rank}.txt", "w") as said, redirect_stdout(said), redirect_stderr(said):
        run_rq.train(run_rq.parse_config(flags))


# ---------------------------------------------------------------- two processes equal one


@pytest.fixture(scope="module")
def found(ring: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of what two real processes found."""
    out = tmp_path_factory.mktemp("two")
    ended = under_torchrun(str(Path(__file__).resolve()), str(ring), str(out))
    assert ended.returncode == 0, ended.stderr[-3000:]
    return out


def of_both(found: Path, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    first, second = (torch.load(found / f"{name}_{rank}.pt", weights_only=True) for rank in range(2))
    return first, second


def assert_close(ours: dict[str, Tensor], theirs: dict[str, Tensor], within: float = 1e-8) -> None:
    assert ours.keys() == theirs.keys()  # names of parameters and buffers: one checkpoint for both
    for name, value in theirs.items():
        assert ours[name].dtype == value.dtype and ours[name].shape == value.shape, name
        if value.is_floating_point():
            assert float((ours[name] - value).abs().max()) < within, name
        else:
            assert torch.equal(ours[name], value), name


@pytest.mark.parametrize("name", [*EQUAL, "fixed assignments"])
def test_two_processes_equal_one(found: Path, ring_kg: KnowledgeGraph, tmp_path: Path, name: str) -> None:
    """Parameters, codes and statistics after four epochs of uneven batches, in float64 without dropout."""
    two, _ = of_both(found, name)
    one = SCENARIOS[name](ring_kg, World(), tmp_path)
    assert_close(two["state"], one["state"])
    assert torch.equal(two["codes"], one["codes"])
    for mine, theirs in zip(two["losses"], one["losses"], strict=True):
        assert mine == pytest.approx(theirs, rel=1e-6)
    assert one["losses"][1][2] > 0  # the quantization loss took part


def test_the_parts_of_a_ranking_make_the_whole(found: Path, ring_kg: KnowledgeGraph, tmp_path: Path) -> None:
    one = SCENARIOS["ranking"](ring_kg, World(), tmp_path)
    assert of_both(found, "ranking") == (one, one) and 0 < one["mrr"] < 0.5


def test_the_last_batch_is_uneven(ring_kg: KnowledgeGraph, tmp_path: Path) -> None:
    batches = make_trainer(ring_kg, World(), tmp_path / "run.pt", {})._batches()
    assert len(batches[0]) % 2 == 1 and len(batches[-1]) not in (1, len(batches[0]))


def test_without_shared_batch_norms_they_would_differ(found: Path) -> None:
    shared, own = of_both(found, "conve")[0]["state"], of_both(found, "own batch norms")[0]["state"]
    name = "scorer.decoder.conv.weight"
    assert float((shared[name] - own[name]).abs().max()) > 1e-4


@pytest.mark.parametrize("name", [*EQUAL, "fixed assignments", "dropout", "noise of samples"])
def test_both_processes_end_with_equal_bits(found: Path, name: str) -> None:
    """Parameters, revived codes, assignments, and what the next draw depends on."""
    first, second = of_both(found, name)
    for key, value in first["state"].items():
        assert torch.equal(value, second["state"][key]), key
    assert torch.equal(first["codes"], second["codes"]) and first["losses"] == second["losses"]
    assert all(map(torch.equal, first["rng"], second["rng"])) and first["valid"] == second["valid"]


def test_the_ring_revives_codes(ring_kg: KnowledgeGraph, tmp_path: Path) -> None:
    """The scenario reaches what it is to compare."""
    revived: list[int] = []
    trainer = make_trainer(ring_kg, World(), tmp_path / "run.pt", {"num_code": 32}, epoch=6)
    revive = trainer.model.rq_codebook.revive_dead_codes
    trainer.model.rq_codebook.revive_dead_codes = lambda *a, **k: revived.extend(revive(*a, **k))  # type: ignore
    trainer.fit()
    assert sum(revived) > 0


def test_only_the_first_process_writes(found: Path) -> None:
    first, second = of_both(found, "distmult")
    assert first["wrote"] and not second["wrote"]
    assert [path.name for path in (found / "files of distmult" / "of_0").iterdir()] == ["run.pt"]


# ---------------------------------------------------------------- batch norm


def test_shared_batch_norm_of_parts_is_that_of_the_whole(found: Path, ring_kg: KnowledgeGraph, tmp_path: Path) -> None:
    first, second = of_both(found, "batch norm of parts")
    whole = batch_norm_of_parts(ring_kg, World(), tmp_path)
    for one in (first, second):
        assert_close(one.pop("buffers"), whole["buffers"] | {}, within=1e-12)
        assert_close(one, {key: value for key, value in whole.items() if key != "buffers"}, within=1e-9)


@pytest.mark.parametrize("shape", [(7, 5), (4, 5, 3, 2)])
def test_shared_batch_norm_alone_is_batch_norm(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    plain = (nn.BatchNorm1d if len(shape) == 2 else nn.BatchNorm2d)(5).double()
    norm = SharedBatchNorm(nn.BatchNorm1d(5).double(), World())
    torch.testing.assert_close(norm(x), plain(x))
    assert_close(dict(norm.state_dict()), dict(plain.state_dict()))
    assert torch.autograd.gradcheck(norm, (x,))
    norm.load_state_dict(plain.state_dict())
    torch.testing.assert_close(norm.eval()(x), plain.eval()(x))


# ---------------------------------------------------------------- clock, shutdown, dropout


def test_the_first_clock_decides(found: Path) -> None:
    first, second = of_both(found, "clocks")
    assert first == second
    assert first["phases"][0] == "warm-up" and first["seconds"] < 1000


def test_a_signal_to_one_ends_both_after_the_same_step(found: Path) -> None:
    for one in of_both(found, "signal"):
        assert one == {"steps": 5, "code": 143}


def test_an_error_of_one_ends_both_and_is_reported_once(found: Path) -> None:
    first, second = of_both(found, "failures")
    assert first == {"none": "goes on", "the last": "leaves with 2", "all": "of 0"}
    assert second == {"none": "goes on", "the last": "of 1", "all": "leaves with 2"}


def test_dropout_of_queries_differs_and_that_of_the_encoder_does_not(found: Path) -> None:
    first, second = of_both(found, "randomness")
    assert not torch.equal(first["inside"], second["inside"]) and torch.equal(first["after"], second["after"])


def test_parts_are_disjoint_and_whole() -> None:
    for size in (1, 2, 3, 5):
        for n in (5, 6, 17):
            parts = [World(rank, size).part(n) for rank in range(size)]
            assert [i for part in parts for i in range(n)[part]] == list(range(n))
            assert {len(range(n)[part]) for part in parts} <= {n // size, n // size + 1}
            assert sum(World(rank, size).share(n) for rank in range(size)) == pytest.approx(1)


def test_a_batch_smaller_than_the_processes_is_refused(ring_kg: KnowledgeGraph, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--batch"):
        make_trainer(ring_kg, World(0, 3), tmp_path / "run.pt", {}, batch=2)


# ---------------------------------------------------------------- the command


def test_the_command_leaves_one_set_of_files_and_rank_0_output(found: Path) -> None:
    folder, stem = found / "command", "ring_3_8_2_rq"
    assert sorted(path.name for path in (folder / "codes").iterdir()) == [
        f"{stem}.entities.txt", f"{stem}.json", f"{stem}.pt", f"{stem}_emd.pt"
    ]  # fmt: skip
    assert [path.name for path in (folder / "checkpoints").iterdir()] == [f"{stem}.pt"]
    record = json.loads((folder / "codes" / f"{stem}.json").read_text())
    assert record["world_size"] == 2 and record["epochs"] == 3
    first, second = ((found / f"command_{rank}.txt").read_text() for rank in range(2))
    epochs = [line.split()[1] for line in first.splitlines() if line.startswith("epoch")]
    assert epochs == ["1", "2", "3"] and first.count("\nwrote") == 1 and not second


@pytest.fixture
def running(ring: Path, tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], list[int], list[str]]]:
    """A long run of two processes that has finished an epoch: torchrun, its two workers' ids, the run's flags."""
    flags = small_flags(ring, tmp_path, graph_backend="torch", epoch=100000)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [*TORCHRUN, "run_rq.py", *flags], env=environment, cwd=ROOT, text=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    ) as process:  # fmt: skip
        deadline = time.monotonic() + 90
        while not list((tmp_path / "checkpoints").glob("*.pt")) and time.monotonic() < deadline:
            assert process.poll() is None
            time.sleep(0.05)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        yield process, [int(child) for child in children], flags
        process.kill()


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the workers through /proc")
@pytest.mark.parametrize("how", ["Ctrl-C", "one is killed"])
def test_the_end_of_one_is_the_end_of_both_and_restore_goes_on(running: Any, tmp_path: Path, how: str) -> None:
    process, workers, flags = running
    assert len(workers) == 2
    if how == "Ctrl-C":
        process.send_signal(signal.SIGINT)
    else:
        os.kill(workers[1], signal.SIGKILL)
    _, err = process.communicate(timeout=120)
    assert process.returncode != 0
    assert not any(Path(f"/proc/{worker}").exists() for worker in workers)
    if how == "Ctrl-C":
        assert err.count("stopped: epoch") == 1 and "--restore goes on" in err
    stored = load_torch(next((tmp_path / "checkpoints").glob("*.pt")), "checkpoint")["last"]
    more = under_torchrun("run_rq.py", *flags, "--epoch", str(stored["epoch"] + 2), "--restore")
    assert more.returncode == 0, more.stderr[-3000:]
    assert f"after epoch {stored['epoch']}" in more.stdout and more.stdout.count("\nepoch ") == 2


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
