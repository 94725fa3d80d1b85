"""Parameters that a recorder keeps on the way, and a rollback that asks for the curvature there."""

import copy
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from networks import Net
from test_curvature import (
    DOUBLE,
    batches,
    dense_gauss_newton,
    flat,
    small,
    spread,
    vector_of,
    workspace_for,
)
from torch import nn

import timstore
from timstore.database.states import State
from timstore.format.segments import ByteCache
from timstore.rollbacks.filtering import Stretch, probe_filter
from timstore.rollbacks.probe import Probe
from timstore.rollbacks.report import RollbackReport

SAMPLES, WIDTH, CLASSES = 40, 4, 3


def classifier() -> nn.Module:
    torch.manual_seed(1)
    return Net(nn.Linear(WIDTH, 6), nn.Tanh(), nn.Linear(6, CLASSES))


def train(store: timstore.Store, model: nn.Module, steps: int, **options: Any) -> list[dict[str, torch.Tensor]]:
    """Return the parameters after each step."""
    draw = torch.Generator().manual_seed(2)
    x, y = torch.randn(SAMPLES, WIDTH, generator=draw), torch.randint(CLASSES, (SAMPLES,), generator=draw)
    trained = [one for one in model.parameters() if one.requires_grad]
    optimizer, left = torch.optim.SGD(trained, lr=0.1), []
    with store.record(model, optimizer, samples=range(10), **options) as recorder:
        for number in range(steps):
            rows = (torch.arange(8) + 8 * number) % SAMPLES
            recorder.epoch = recorder.step // 16
            F.cross_entropy(model(x[rows], sample_ids=rows), y[rows]).backward()
            optimizer.step()
            optimizer.zero_grad()
            left.append({name: one.detach().clone() for name, one in model.named_parameters()})
    return left


def waypoints(store: timstore.Store) -> list[tuple[int, int]]:
    return store.sql(
        "SELECT DISTINCT epoch, step FROM states WHERE role = 'theta' AND rollback_id IS NULL ORDER BY ALL"
    ).fetchall()


def test_the_parameters_are_kept_where_the_steps_taken_are_a_power_of_two(tmp_path: Path) -> None:
    with timstore.open(tmp_path / "s") as store:
        left = train(store, classifier(), 35)
        assert waypoints(store) == [(0, 7), (0, 15), (1, 31)]
        for epoch, step in waypoints(store):
            state = State.find(store.snapshot(), ByteCache(2**20), "theta", moment=(epoch, step))
            for name, one in left[step].items():
                numbers = state.read(name, one.reshape(len(one), -1).shape[1], 0, one.numel())
                np.testing.assert_allclose(numbers, one.flatten().numpy(), rtol=2**-8)
        assert timstore.verify(tmp_path / "s").sound


def test_a_run_that_goes_on_counts_its_steps_from_the_start(tmp_path: Path) -> None:
    model = classifier()
    with timstore.open(tmp_path / "s") as store:
        train(store, model, 12)
        train(store, model, 12)
        assert waypoints(store) == [(0, 7), (0, 15)]


def test_none_are_kept_where_none_are_wanted_and_of_what_is_not_trained(tmp_path: Path) -> None:
    with timstore.open(tmp_path / "none") as store:
        train(store, classifier(), 20, waypoints=False)
        assert waypoints(store) == []
        with pytest.raises(timstore.InvalidInputError, match="waypoints is True or False"):
            store.record(classifier(), torch.optim.SGD(classifier().parameters(), lr=0.1), waypoints="no")  # type: ignore[arg-type]
    with timstore.open(tmp_path / "some") as store:
        model = classifier()
        next(model.parameters()).requires_grad_(False)
        train(store, model, 9)
        kept = store.sql("SELECT count(DISTINCT parameter) FROM states WHERE role = 'theta'").fetchall()
        assert kept == [(len(list(model.parameters())) - 1,)]


def report_of(store: timstore.Store, model: nn.Module, **options: Any) -> RollbackReport:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", timstore.TimstoreWarning)
        return store.rollback(copy.deepcopy(model), [1, 2], dry_run=True, **options)


def test_a_rollback_asks_at_no_more_than_three_of_them_and_says_so(tmp_path: Path) -> None:
    model = classifier()
    with timstore.open(tmp_path / "s") as store:
        train(store, model, 70)
        assert len(waypoints(store)) == 4
        report = report_of(store, model)
        assert report.probe is not None
        assert report.probe.waypoints == 3
        assert "at 3 waypoints and the end" in str(report)
        assert report_of(store, model, bins=1).probe is not None


def test_what_a_later_attempt_superseded_is_not_asked(tmp_path: Path) -> None:
    model, other = classifier(), classifier()
    with timstore.open(tmp_path / "s") as store:
        train(store, other, 20)
        train(store, model, 9, resume_from=(0, 0))
        assert waypoints(store) == [(0, 7)]
        report = report_of(store, model)
        assert report.probe is not None
        assert report.probe.waypoints == 1


def test_a_store_without_them_asks_at_the_model(tmp_path: Path) -> None:
    """Every store of an earlier version."""
    model = classifier()
    with timstore.open(tmp_path / "s") as store:
        train(store, model, 20, waypoints=False)
        report = report_of(store, model)
        assert report.probe is not None
        assert report.probe.waypoints == 0
        assert "waypoint" not in str(report)


def test_parameters_kept_for_an_undo_are_no_waypoint(tmp_path: Path) -> None:
    model = classifier()
    with timstore.open(tmp_path / "s") as store:
        train(store, model, 20)
        before, kept = {name: one.clone() for name, one in model.state_dict().items()}, waypoints(store)
        report = store.rollback(model, [1, 2], keep_delta=True)
        assert waypoints(store) == kept
        store.undo(model, report.rollback_id)
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())


@pytest.mark.parametrize(
    ("shares", "limit_bytes", "enough"),
    [
        ((0.2, 0.8), 2**26, 1),
        ((1 / 3, 2 / 3), 2**26, 1),
        ((0.5, 0.5), 2**26, 100),
        ((0.2, 0.8), 500, 1),
    ],
    ids=["shared", "shared, an edge of both", "all rows", "spilled"],
)
def test_the_change_is_the_response_to_the_curvature_of_each_stretch(
    shares: tuple[float, float], limit_bytes: int, enough: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """x' = -(A(t) + c) x + y(t), by matrix exponentials of A and y together, leg by leg."""
    monkeypatch.setattr("timstore.rollbacks.filtering._ENOUGH", enough)
    model, earlier = small(), small()
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in earlier.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    names = [name for name, _ in model.named_parameters()]
    increments = [0.1 * torch.randn(len(flat(model)), dtype=DOUBLE) for _ in range(2)]
    lengths = [{name: (number + 1) * (1 + place) for place, name in enumerate(names)} for number in range(2)]
    with workspace_for(model, limit_bytes) as workspace:
        path = [Stretch(shares[0], vector_of(workspace, flat(earlier), model)), Stretch(shares[1])]
        pushes = [vector_of(workspace, one, model) for one in increments]
        found = probe_filter(model, pushes, lengths, Probe(model, batches()), workspace, depth=120, path=path)
        delta = torch.cat([found.delta.read(name).clone() for name in names])

    scale = torch.stack([spread(taus, model) for taus in lengths]).sum(0).sqrt()
    want = torch.zeros_like(delta)
    for half, way in zip(batches(), found.ways, strict=True):
        x = torch.zeros_like(delta)
        for begin, end in zip(edges := sorted({0.0, shares[0], 1 / 3, 1.0}), edges[1:], strict=False):
            stretch, number = int(begin >= shares[0]), int(begin >= 1 / 3)
            rows = {name: one[stretch::2] if enough == 1 else one for name, one in half.items()}
            curvature = dense_gauss_newton((earlier, model)[stretch], "cross_entropy", [rows])
            matrix = scale[:, None] * curvature * scale + way.damping * torch.eye(len(x), dtype=DOUBLE)
            joined = torch.zeros(len(x) + 1, len(x) + 1, dtype=DOUBLE)
            joined[:-1, :-1], joined[:-1, -1] = -matrix, increments[number] / scale / (1 / 3, 2 / 3)[number]
            x = (torch.linalg.matrix_exp(joined * (end - begin)) @ torch.cat([x, torch.ones(1, dtype=DOUBLE)]))[:-1]
        want += scale * x / 2
    torch.testing.assert_close(delta, want, rtol=1e-5, atol=1e-7)


def rows_of(probe: Probe) -> list[list[float]]:
    return [sorted(batch[0][:, 0].tolist()) for batch in probe._batches]


@pytest.mark.parametrize(
    ("sizes", "count", "want"),
    [
        ((2, 2, 2, 2), 2, [[[0, 1], [4, 5]], [[2, 3], [6, 7]]]),
        ((2, 2, 2), 2, [[[0, 1], [4, 5]], [[2, 3]]]),
        ((5,), 2, [[[0, 2, 4]], [[1, 3]]]),
        ((3, 3), 4, [[[0], [4]], [[1], [5]], [[2]], [[3]]]),
        ((1, 7), 4, [[[0], [4]], [[1, 5]], [[2, 6]], [[3, 7]]]),
        ((1, 1), 3, [[[0], [1]]] * 3),
    ],
    ids=str,
)
def test_a_probe_is_shared_out_by_batches_or_by_rows(sizes: tuple[int, ...], count: int, want: list[Any]) -> None:
    given = list(torch.arange(float(sum(sizes)))[:, None].expand(-1, WIDTH).split(list(sizes)))
    assert [rows_of(part) for part in Probe(classifier(), given).parts(count)] == want
