"""TIMParameterRollback on directories of the older layout."""

import copy
import itertools
import json
import pickle
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from openunlearning_checkout import Checkout, ForgetRetainDataset, Texts, texts
from torch import nn
from trainers import new_model

import timstore
from timstore.errors import CoverageError, InvalidInputError, NotFoundError, StateError
from timstore.integrations.openunlearning import TIMParameterRollback
from timstore.model.sample_ids import row_hash

pytestmark = [
    pytest.mark.filterwarnings("ignore:first order"),
    pytest.mark.filterwarnings("ignore:.*probe:timstore.TimstoreWarning"),
]

FORGET, RETAIN, RATE = texts(2), texts(6, seed=1), 0.25
NAME = "model.norm.weight"


@pytest.fixture
def checkout(monkeypatch: pytest.MonkeyPatch) -> Checkout:
    found = Checkout("processing_class")
    found.registry["TIMParameterRollback"] = TIMParameterRollback
    found.install(monkeypatch)
    return found


def gradient(sample: int, epoch: int) -> list[float]:
    draw = torch.Generator().manual_seed(10 * sample + epoch)
    return (torch.randn(32, generator=draw) * 1e-3).tolist()


def layout(
    folder: Path,
    *,
    rate: float | None = RATE,
    keys: Any = str,
    format: str = "json",
    samples: Sequence[int] = range(4),
) -> Path:
    """Write two epochs of some samples, whose ids are places in a training set."""
    folder.mkdir(parents=True, exist_ok=True)
    for epoch in range(2):
        held = {keys(sample): {NAME: gradient(sample, epoch), f"{NAME}_step": sample} for sample in samples}
        if format == "json":
            (folder / f"epoch_{epoch}.json").write_text(json.dumps({"sample_gradients": held}))
        else:
            (folder / f"epoch_{epoch}.pkl").write_bytes(pickle.dumps({"sample_gradients": held}, protocol=4))
    info = {"num_epoch": 2, "num_steps": 8} | ({} if rate is None else {"learning_rate": rate})
    (folder / "global_info.json").write_text(json.dumps(info))
    return folder


def unlearning(checkout: Checkout, folder: Path, model: nn.Module, **method_args: Any) -> Any:
    return checkout.load_trainer(
        "TIMParameterRollback",
        folder / "rolled",
        model=model,
        train_dataset=ForgetRetainDataset(Texts(FORGET), Texts(RETAIN)),
        method_args={"tim_output_dir": str(folder / "old"), "probe": None, **method_args},
    )


def check(trainer: Any, before: nn.Module, samples: list[int], rate: float = RATE, share: float = 1.0) -> None:
    """The samples' gradients were added back times the rate, to nothing else."""
    trainer.train()
    removed = sum(torch.tensor(gradient(sample, epoch)) for sample in samples for epoch in range(2))
    for name, value in trainer.model.state_dict().items():
        expected = before.state_dict()[name] + (share * rate * removed if name == NAME else 0)
        torch.testing.assert_close(value, expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize("id_map", ["list", "mapping", "file"])
def test_an_older_layout_is_rolled_back_by_an_explicit_map(checkout: Checkout, id_map: str, tmp_path: Path) -> None:
    layout(tmp_path / "old")
    given: Any = {"list": [3, 1], "mapping": {0: 3, 1: 1}, "file": str(tmp_path / "map.json")}[id_map]
    (tmp_path / "map.json").write_text('{"0": 3, "1": 1}')
    model = new_model("llama")
    before = copy.deepcopy(model)
    check(unlearning(checkout, tmp_path, model, id_map=given, rollback_strength=0.5), before, [3, 1], share=0.5)
    with pytest.raises(StateError, match="removed from this model before"):
        unlearning(checkout, tmp_path, model, id_map=given).train()


def test_places_in_the_forget_split_are_never_taken_for_ids(checkout: Checkout, tmp_path: Path) -> None:
    layout(tmp_path / "old")
    model = new_model("llama")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(
        InvalidInputError, match=r"none of them: pass trainer.method_args.id_map=.* 4 samples and 2 rows"
    ) as caught:
        unlearning(checkout, tmp_path, model).train()
    assert caught.value.kind == "no-id-map"
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def forget_alone(folder: Path, *, keys: Any = lambda number: str(100 + number), format: str = "json") -> list[int]:
    """Write the layout of the forget rows and no others, as the original did; returns the numbers of its gradients."""
    held = [3, 1]
    layout(folder, samples=held, keys=keys, format=format)
    return held


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_the_original_s_command_needs_no_map_where_there_are_as_many_samples_as_rows(
    checkout: Checkout, share: float, tmp_path: Path
) -> None:
    held = forget_alone(tmp_path / "old")
    model = new_model("llama")
    before = copy.deepcopy(model)
    trainer = unlearning(checkout, tmp_path, model, rollback_strength=share)
    with pytest.warns(timstore.TimstoreWarning, match=r"has 2 of them.*all are taken.*trainer.method_args.id_map="):
        check(trainer, before, held, share=share)
    told = json.loads((tmp_path / "rolled" / "timstore_report.json").read_text())
    assert (told["rows_known_by"], told["samples"], told["missing_rows"]) == ("count", [101, 103], [])


@pytest.mark.parametrize("kind", ["pickle", "text", "saved"])
def test_nor_do_pickles_text_and_the_older_function(checkout: Checkout, kind: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {}
    if kind == "saved":
        for sample, epoch in itertools.product([3, 1], range(2)):
            one = (epoch, sample, sample, NAME, gradient(sample, epoch), {"learning_rate": RATE})
            with warnings.catch_warnings(action="ignore"):
                timstore.save_gradient_trajectory(tmp_path / "old", *one)
    elif kind == "pickle":
        forget_alone(tmp_path / "old", keys=int, format="pickle")
        options["allow_pickle"] = True
    else:
        forget_alone(tmp_path / "old", keys=lambda number: f"person {number}")
    model = new_model("llama")
    trainer, before = unlearning(checkout, tmp_path, model, **options), copy.deepcopy(model)
    with pytest.warns(timstore.TimstoreWarning, match="all are taken to be those rows"):
        check(trainer, before, [3, 1])


def test_a_count_is_nothing_to_go_by_in_a_store_of_the_user_s_own(checkout: Checkout, tmp_path: Path) -> None:
    with timstore.open(tmp_path / "own") as store:
        for sample in range(2):
            store.append(0, sample, sample, {NAME: torch.tensor(gradient(sample, 0))}, lr=RATE)
    with pytest.raises(InvalidInputError, match=r"pass trainer.method_args.id_map=, the number of .* sample id$"):
        unlearning(checkout, tmp_path, new_model("llama"), tim_output_dir=str(tmp_path / "own")).train()


def test_samples_that_are_named_by_their_content_are_found(checkout: Checkout, tmp_path: Path) -> None:
    named = {0: row_hash(torch.tensor(FORGET[1])), 2: row_hash(torch.tensor(FORGET[0]))}
    layout(tmp_path / "old", keys=lambda sample: named.get(sample, f"text {sample}"))
    model = new_model("llama")
    check(unlearning(checkout, tmp_path, model), copy.deepcopy(model), [0, 2])


def test_names_in_a_map_are_looked_up(checkout: Checkout, tmp_path: Path) -> None:
    layout(tmp_path / "old", keys=lambda sample: f"text {sample}")
    model = new_model("llama")
    check(unlearning(checkout, tmp_path, model, id_map=["text 2", "text 1"]), copy.deepcopy(model), [2, 1])
    with pytest.raises(InvalidInputError, match="text 9"):
        unlearning(checkout, tmp_path, model, id_map=["text 2", "text 9"]).train()


def test_a_layout_is_imported_once_and_never_with_other_numbers(checkout: Checkout, tmp_path: Path) -> None:
    folder = layout(tmp_path / "old", rate=None)
    with pytest.raises(InvalidInputError, match=r"pass trainer\.method_args\.lr=, the rate"):
        unlearning(checkout, tmp_path, new_model("llama"), id_map=[3, 1]).train()
    model = new_model("llama")
    check(unlearning(checkout, tmp_path, model, id_map=[3, 1], lr=0.5), copy.deepcopy(model), [3, 1], rate=0.5)
    made = (folder / "imported.tim" / "timstore.json").stat().st_mtime_ns
    model = new_model("llama")
    check(unlearning(checkout, tmp_path, model, id_map=[0, 1], lr=0.5), copy.deepcopy(model), [0, 1], rate=0.5)
    assert (folder / "imported.tim" / "timstore.json").stat().st_mtime_ns == made
    with pytest.raises(InvalidInputError, match=r"other files, or with another lr or scale: remove it"):
        unlearning(checkout, tmp_path, new_model("llama"), id_map=[3, 1], lr=0.1).train()
    (folder / "epoch_2.json").write_text((folder / "epoch_1.json").read_text())
    (folder / "global_info.json").unlink()
    with pytest.raises(InvalidInputError, match="other files"):
        unlearning(checkout, tmp_path, new_model("llama"), id_map=[3, 1], lr=0.5).train()


def test_a_probe_works_on_an_older_layout_too(checkout: Checkout, tmp_path: Path) -> None:
    layout(tmp_path / "old")
    trainer = unlearning(checkout, tmp_path, new_model("llama"), id_map=[3, 1], probe=4)
    trainer.train()
    assert trainer.rollback_report.method.endswith("+ probe")


def test_pickles_are_read_only_when_allowed(checkout: Checkout, tmp_path: Path) -> None:
    layout(tmp_path / "old", format="pickle", keys=int)
    with pytest.raises(InvalidInputError, match=r"pass trainer\.method_args\.allow_pickle=true to read"):
        unlearning(checkout, tmp_path, new_model("llama"), id_map=[3, 1]).train()
    model = new_model("llama")
    options = {"id_map": [3, 1], "allow_pickle": True, "trajectory_format": "pickle"}
    check(unlearning(checkout, tmp_path, model, **options), copy.deepcopy(model), [3, 1])
    with pytest.raises(NotFoundError, match=r"no epoch_N\.json"):
        unlearning(checkout, tmp_path, model, id_map=[3, 1], trajectory_format="json").train()


def test_a_store_of_the_older_function_is_found_and_two_kinds_are_not_mixed(checkout: Checkout, tmp_path: Path) -> None:
    folder = tmp_path / "old"
    with timstore.open(folder / "trajectories.tim") as store:
        for sample in range(4):
            for epoch in range(2):
                store.append(epoch, sample, sample, {NAME: torch.tensor(gradient(sample, epoch))}, lr=RATE)
    model = new_model("llama")
    check(unlearning(checkout, tmp_path, model, id_map=[3, 1]), copy.deepcopy(model), [3, 1])
    layout(folder, rate=0.5)
    with pytest.raises(InvalidInputError, match="set trajectory_format"):
        unlearning(checkout, tmp_path, model, id_map=[3, 1]).train()
    for format, rate in (("timstore", RATE), ("json", 0.5)):
        model = new_model("llama")
        trainer = unlearning(checkout, tmp_path, model, id_map=[0, 2], trajectory_format=format)
        check(trainer, copy.deepcopy(model), [0, 2], rate=rate)


@pytest.mark.parametrize(
    ("id_map", "error", "match"),
    [
        ([3], CoverageError, r"of 2 forget rows, 1 \(rows 1\).*what id_map says is no sample"),
        ([8, 9], CoverageError, r"none was ever recorded.*what id_map says is no sample"),
        ({"0": 3, "2": 1}, InvalidInputError, "names row 2, and the forget split has 2"),
        ({"first": 3}, InvalidInputError, "a row"),
        ([3, 1.5], InvalidInputError, "the sample of row 1"),
        (["a", 1], InvalidInputError, "store.samples"),
        (7, InvalidInputError, "is no int"),
        ("nowhere.json", NotFoundError, "there is no file"),
    ],
)
def test_a_map_that_is_wrong_is_told(
    checkout: Checkout, id_map: Any, error: type[Exception], match: str, tmp_path: Path
) -> None:
    layout(tmp_path / "old")
    with pytest.raises(error, match=match):
        unlearning(checkout, tmp_path, new_model("llama"), id_map=id_map).train()
