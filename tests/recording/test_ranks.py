"""Several processes under torchrun: one store, each its own samples, the same bits for all."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from networks import network
from ranked import SAMPLES, loop
from trainers import Rows, live, new_model, recorder, rows, trained

import timstore

HERE = Path(__file__).parents[1] / "support"

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:first order"),
]


def torchrun(scenario: str, folder: Path, *, dies: bool = False) -> None:
    """Run a scenario in two processes."""
    folder.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([*sys.path, str(HERE)])}
    done = subprocess.run(
        [*command, str(HERE / "ranked.py"), scenario, str(folder)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert (done.returncode != 0) == dies, done.stdout[-2000:] + done.stderr[-4000:]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    torchrun("plain", folder)
    return folder


@pytest.fixture(scope="module")
def by_trainer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trainer")
    torchrun("trainer", folder)
    return folder


def test_the_sum_over_processes_is_the_gradient_that_both_consumed(plain: Path) -> None:
    consumed = [torch.load(plain / f"consumed-{rank}.pt") for rank in (0, 1)]
    with timstore.open(plain / "s", "r") as store:
        ratios = dict(store.sql("SELECT step, consumed_ratio FROM steps WHERE rank = 0").fetchall())
        ranks = store.sql("SELECT rank, count(DISTINCT sample) FROM records GROUP BY rank ORDER BY rank").fetchall()
        assert ranks == [(0, SAMPLES - 1), (1, SAMPLES - 1)]  # each process draws most of them in some step
        assert store.sql("SELECT attempt, ranks FROM attempts").fetchall() == [(0, 2)]
        for step, gradients in enumerate(consumed[0]):
            for name, gradient in gradients.items():
                assert torch.equal(gradient, consumed[1][step][name])
                total = sum(record.dense(name).astype(np.float64) for record in store.read(f"step = {step}"))
                np.testing.assert_allclose(total * ratios[step], gradient, rtol=1e-4, atol=1e-7)


def test_two_processes_record_what_one_does_with_the_doubled_batch(plain: Path, tmp_path: Path) -> None:
    model = network()
    with timstore.open(tmp_path / "s") as store:
        loop(model, store, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), slice(None))
        alone = {(one.step, one.sample): one for one in store.read()}
        with timstore.open(plain / "s", "r") as other:
            together = {(one.step, one.sample): one for one in other.read()}
            assert together.keys() == alone.keys()
            for key, record in alone.items():
                for name in record.gradients:
                    np.testing.assert_allclose(together[key].dense(name), record.dense(name), rtol=1e-4, atol=1e-7)
            for column in ("consumed_ratio", "grad_norm"):
                query = f"SELECT {column} FROM steps WHERE rank = 0 ORDER BY step"
                np.testing.assert_allclose(other.sql(query).fetchall(), store.sql(query).fetchall(), rtol=1e-5)


def test_a_rollback_gives_both_processes_the_same_bits_and_is_written_once(plain: Path) -> None:
    said = [json.loads((plain / f"said-{rank}.json").read_text()) for rank in (0, 1)]
    assert said[0] == said[1]
    assert said[0]["undone"]
    assert said[0]["refused"] == "removed-before"
    back = [torch.load(plain / f"back-{rank}.pt") for rank in (0, 1)]
    initial = torch.load(plain / "initial-0.pt")
    for name, value in initial.items():
        assert torch.equal(back[0][name], back[1][name])
        torch.testing.assert_close(back[0][name], value, rtol=0, atol=2e-6)
    with timstore.open(plain / "s", "r") as store:
        methods = store.sql('SELECT method FROM rollbacks ORDER BY "at"').fetchall()
        assert methods == [("closed form",), ("undo",)]


def test_processes_that_are_interrupted_have_the_old_model_or_the_new_one_and_know_which(tmp_path: Path) -> None:
    torchrun("disturbed", tmp_path)
    said = [json.loads((tmp_path / f"said-{rank}.json").read_text()) for rank in (0, 1)]
    old = said[0]["start"]
    new = said[0]["second, writing"]["model"]
    assert new != old == said[1]["start"]
    # The first one is interrupted before anything is written: so is the other one.
    for one in said:
        assert one["first, before"] == {"raised": "KeyboardInterrupt", "done": False, "model": old}
    # A process that cannot write puts back what it wrote; the first one has the new model by then.
    assert said[0]["second fails"] == {"raised": "", "done": True, "model": new}
    assert said[1]["second fails"] == {"raised": "MemoryError", "done": False, "model": old}
    for rank, name in enumerate(("first, writing", "second, writing")):
        assert said[rank][name] == {"raised": "KeyboardInterrupt", "done": True, "model": new}
        assert said[1 - rank][name] == {"raised": "", "done": True, "model": new}


def test_gradients_that_are_no_mean_over_the_processes_are_refused(tmp_path: Path) -> None:
    torchrun("changed-by-hand", tmp_path)
    assert [json.loads((tmp_path / f"said-{rank}.json").read_text()) for rank in (0, 1)] == ["gradient-changed"] * 2


def test_rows_of_both_processes_are_kept_and_asked(by_trainer: Path) -> None:
    model = new_model("llama")
    model.load_state_dict(torch.load(by_trainer / "model-1.pt"))
    with timstore.open(by_trainer / "s") as store:
        written = [commit.rank for _, commit in store.snapshot().view.objects_of("kept_rows")]
        assert set(written) == {0, 1}
        kept = store.snapshot().kept_rows()
        assert {row.sample for row in kept.rows} == set(range(100, 112)) and kept.loss == "cross_entropy"
        report = store.rollback(model, [103, 107], dry_run=True)
        assert report.probe is not None and (report.probe.sequences, report.probe.left_out) == (10, 2)


def test_a_trainer_of_two_processes_killed_and_restarted_leaves_no_hole_and_no_double(
    by_trainer: Path, tmp_path: Path
) -> None:
    torchrun("trainer-killed", tmp_path / "cut", dies=True)
    torchrun("trainer-resumed", tmp_path / "cut")
    with timstore.open(by_trainer / "s", "r") as whole, timstore.open(tmp_path / "cut" / "s") as cut:
        assert cut.sql("SELECT from_step, ranks FROM attempts ORDER BY attempt").fetchall() == [(0, 2), (4, 2)]
        assert live(cut) == live(whole)
    model = new_model("llama")
    model.load_state_dict(torch.load(tmp_path / "cut" / "model-1.pt"))
    with timstore.open(tmp_path / "cut" / "s") as cut:
        assert len(cut.snapshot().kept_rows()) == 12
        assert cut.rollback(model, [103]).records == 2


def test_a_trainer_of_two_processes_equals_one_with_the_doubled_batch(by_trainer: Path, tmp_path: Path) -> None:
    with timstore.open(tmp_path / "alone") as alone, timstore.open(by_trainer / "s", "r") as together:
        trained(
            new_model("llama"),
            [recorder(alone)],
            tmp_path / "u",
            Rows(rows(masked=False)),
            per_device_train_batch_size=4,
        )
        want = {(one.step, one.sample): one for one in alone.read()}
        got = {(one.step, one.sample): one for one in together.read()}
        assert got.keys() == want.keys()
        for key, record in want.items():
            scale = max(np.abs(record.dense(name)).max() for name in record.gradients)
            for name in record.gradients:
                np.testing.assert_allclose(got[key].dense(name), record.dense(name), rtol=1e-3, atol=1e-5 * scale)
