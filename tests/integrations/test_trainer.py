"""Recording transformers' Trainer, whatever its version."""

import copy
import inspect
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import datasets
import numpy as np
import pytest
import torch
import transformers
from trainers import LENGTH, MODELS, ROWS, Consumed, Rows, arguments, live, new_model, recorder, rows, trained

import timstore
from timstore.errors import CoverageError, InvalidInputError, StateError
from timstore.integrations.transformers import TrajectoryCallback, content_ids

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:first order"),
    pytest.mark.filterwarnings("ignore:.*lr_scheduler.step:UserWarning"),
]


@pytest.fixture(autouse=True)
def same_environment() -> Iterator[None]:
    """Take back what TrainingArguments tell Accelerate, which reads it in every later training of the process."""
    with mock.patch.dict(os.environ):
        yield


@pytest.mark.parametrize("name", MODELS)
def test_at_each_step_the_records_add_up_to_the_gradient_that_was_consumed(name: str, tmp_path: Path) -> None:
    # 12 rows in batches of 3, two of them a step: unequal numbers of tokens, clipped.
    model, consumed = new_model(name), Consumed()
    with timstore.open(tmp_path / "s") as store:
        trained(model, [recorder(store), consumed], tmp_path / "t", gradient_accumulation_steps=2, max_grad_norm=0.05)
        steps = store.sql(
            "SELECT epoch, step, consumed_ratio, samples FROM steps WHERE group_id = 0 ORDER BY step"
        ).fetchall()
        assert [(epoch, step, samples) for epoch, step, _, samples in steps] == [
            (0, 0, 6),
            (0, 1, 6),
            (1, 2, 6),
            (1, 3, 6),
        ]
        assert max(ratio for _, _, ratio, _ in steps) < 0.9
        drawn = store.sql("SELECT epoch, list_sort(list(sample)) FROM records GROUP BY epoch ORDER BY epoch").fetchall()
        assert [ids for _, ids in drawn] == [list(range(100, 100 + ROWS))] * 2
        for (_, step, ratio, _), gradients in zip(steps, consumed.steps, strict=True):
            total: dict[str, Any] = {}
            for record in store.read(f"step = {step}"):
                for one in record.gradients:
                    total[one] = total.get(one, 0) + record.dense(one).astype(np.float64)
            scale = max(float(one.norm()) for one in gradients.values())
            for one, gradient in gradients.items():
                np.testing.assert_allclose(total[one] * ratio, gradient.double(), rtol=1e-4, atol=1e-6 * scale)


@pytest.mark.parametrize("name", MODELS)
def test_rolling_back_every_sample_of_an_sgd_run_returns_the_initial_parameters(name: str, tmp_path: Path) -> None:
    model = new_model(name)
    initial = copy.deepcopy(model.state_dict())
    with timstore.open(tmp_path / "s") as store:
        trained(model, [recorder(store)], tmp_path / "t", max_grad_norm=0.05)
        store.rollback(model, list(range(100, 100 + ROWS)))
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, initial[key], rtol=0, atol=2e-6)


class Pulled(torch.nn.Module):
    """A loss that is linear in the parameters, so that training again without rows is exact: a mean over tokens."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = torch.nn.Embedding(60, 4, dtype=torch.float64)
        self.pull = torch.randn(LENGTH, 4, dtype=torch.float64)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor, **loss: Any) -> dict[str, torch.Tensor]:
        each = (self.table(input_ids) * self.pull).sum(2)
        return {"loss": each[labels != -100].sum() / loss["num_items_in_batch"], "logits": each}


@pytest.mark.skipif(
    "num_items_in_batch" not in inspect.signature(transformers.Trainer.training_step).parameters,
    reason="before transformers 4.46 each micro-batch has a mean of its own",
)
@pytest.mark.parametrize("bound", [0.0, 0.2], ids=["unclipped", "clipped"])
def test_the_mean_over_tokens_is_taken_again_over_all_micro_batches(bound: float, tmp_path: Path) -> None:
    held, model = rows(), Pulled()
    start = copy.deepcopy(model)
    with timstore.open(tmp_path / "s") as store:
        trained(
            model, [recorder(store, probe=False)], tmp_path / "t", gradient_accumulation_steps=2, max_grad_norm=bound
        )
        drawn = store.sql("SELECT sample_ids FROM steps WHERE group_id = 0 ORDER BY step")
        steps = [ids for (ids,) in drawn.fetchall()]
        forget = steps[0][:3]  # all of a micro-batch
        with pytest.warns(timstore.TimstoreWarning, match="several micro-batches"):
            store.rollback(model, forget, denominator="renormalised", accumulate="float64")
    optimizer = torch.optim.SGD(start.parameters(), lr=0.05)
    for ids in steps:
        staying = [held[one - 100] for one in ids if one not in forget]
        inputs, labels = (torch.tensor([row[name] for row in staying]) for name in ("input_ids", "labels"))
        start(inputs, labels, num_items_in_batch=(labels != -100).sum())["loss"].backward()
        if bound:
            torch.nn.utils.clip_grad_norm_(start.parameters(), bound)
        optimizer.step()
        optimizer.zero_grad()
    torch.testing.assert_close(model.table.weight, start.table.weight, rtol=0, atol=1e-12)


@pytest.mark.parametrize("saved_at", [1, 3, 5])
def test_an_interrupted_and_resumed_run_equals_an_uninterrupted_one(saved_at: int, tmp_path: Path) -> None:
    class Power(transformers.TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == min(saved_at + 2, 7):
                raise KeyboardInterrupt

    options = {"save_strategy": "steps", "save_steps": saved_at, "save_total_limit": 1}
    model = new_model("llama")
    with timstore.open(tmp_path / "whole") as store:
        trained(model, [recorder(store)], tmp_path / "t0", **options)
        whole = live(store)
    with timstore.open(tmp_path / "s") as store, pytest.raises(KeyboardInterrupt):
        trained(new_model("llama"), [recorder(store), Power()], tmp_path / "t1", **options)
    again = new_model("llama")
    with timstore.open(tmp_path / "s") as store:
        trained(again, [recorder(store)], tmp_path / "t1", resume=True, **options)
        (first, second) = store.sql("SELECT from_epoch, from_step FROM attempts ORDER BY attempt").fetchall()
        checkpoint = min(saved_at + 2, 7) // saved_at * saved_at
        assert (first, second) == ((0, 0), (checkpoint // 4, checkpoint))
        assert live(store) == whole
        assert store.rollback(again, [104]).records == 2


def test_a_rollback_with_a_probe_works_on_the_model_that_a_trainer_leaves_behind(tmp_path: Path) -> None:
    model = new_model("llama")
    probe = [{"input_ids": torch.randint(2, 60, (8, LENGTH))}]
    with timstore.open(tmp_path / "s") as store:
        options = {"optim": "adamw_torch", "learning_rate": 1e-3}
        trained(model, [recorder(store, [103, 104], probe=probe)], tmp_path / "t", **options)
        report = store.rollback(model, [103])
        assert "probe" in report.method
        assert store.sql("SELECT DISTINCT sample FROM records ORDER BY ALL").fetchall() == [(103,), (104,)]


@pytest.mark.parametrize("column", ["idx", None])
def test_rows_of_the_training_are_kept_and_asked(column: str | None, tmp_path: Path) -> None:
    # Four batches of 3 an epoch, two to a step; rows differ in how many labels count.
    model, held = new_model("llama"), rows()
    ids = [row["idx"] for row in held] if column else content_ids(held)
    with timstore.open(tmp_path / "s") as store:
        callback = TrajectoryCallback(store, ids[3:5], id_column=column)
        trained(model, [callback], tmp_path / "t", gradient_accumulation_steps=2)
        kept = store.snapshot().kept_rows()
        assert kept.loss == "cross_entropy"
        assert {row.sample for row in kept.rows} == set(ids) - set(ids[3:5])
        for row in kept.rows:
            drawn = held[ids.index(row.sample)]
            assert {name: one.tolist() for name, one in row.by_row.items()} == {
                name: [drawn[name]] for name in ("input_ids", "labels")
            }
            assert row.epoch == 0
        in_time = [held[ids.index(row.sample)] for row in kept.rows]
        given = [
            {name: torch.tensor([row[name] for row in in_time[start:end]]) for name in ("input_ids", "labels")}
            for start, end in ((0, 2), (2, 5), (5, 8), (8, 10))
        ]
        by_itself = store.rollback(model, ids[3:4], dry_run=True)
    with timstore.open(tmp_path / "keeps none") as store:
        same = new_model("llama")
        callback = TrajectoryCallback(store, ids[3:5], id_column=column, probe=False)
        trained(same, [callback], tmp_path / "u", gradient_accumulation_steps=2)
        wanted = store.rollback(same, ids[3:4], probe=given, dry_run=True)
    assert by_itself.rollback_id == wanted.rollback_id
    assert by_itself.probe is not None and by_itself.probe.kept == 10


# --- ids ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["datasets", "torch"])
@pytest.mark.parametrize("remove", [True, False])
@pytest.mark.parametrize("workers", [0, 2])
def test_ids_travel_whatever_the_trainer_drops(kind: str, remove: bool, workers: int, tmp_path: Path) -> None:
    held = rows()
    if not remove:
        held = [{key: one for key, one in row.items() if key != "source"} for row in held]
    dataset = datasets.Dataset.from_list(held) if kind == "datasets" else Rows(held)
    with timstore.open(tmp_path / "s") as store:
        trainer = trained(
            new_model("llama"),
            [recorder(store, [103])],
            tmp_path / "t",
            dataset,
            evaluated=dataset,
            remove_unused_columns=remove,
            dataloader_num_workers=workers,
            max_steps=4,
            eval_strategy="steps",
            eval_steps=2,
        )
        trainer.evaluate()
        trainer.predict(dataset)
        assert store.sql("SELECT list_sort(flatten(list(sample_ids))) FROM steps WHERE group_id = 0").fetchall() == [
            (list(range(100, 112)),)
        ]
        assert store.sql("SELECT count(*) FROM records").fetchall() == [(1,)]


def test_rows_without_a_column_are_known_by_their_tokens_in_any_split(tmp_path: Path) -> None:
    held = rows(key=None)
    held[5] = {**held[5], "input_ids": held[5]["input_ids"][:6], "labels": held[5]["labels"][:6]}

    def padded(features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        width = max(len(row["input_ids"]) for row in features)
        filled = {"input_ids": 0, "labels": -100, "attention_mask": 0}
        full = [{**row, "attention_mask": [1] * len(row["input_ids"])} for row in features]
        return {
            key: torch.tensor([row[key] + [by] * (width - len(row[key])) for row in full]) for key, by in filled.items()
        }

    split = [held[5], held[2]]  # with a numbering of its own, and no padding
    with timstore.open(tmp_path / "s") as store:
        callback = TrajectoryCallback(store, content_ids(split))
        model = new_model("llama")
        trained(model, [callback], tmp_path / "t", Rows(held), collate=padded)
        counts = store.sql("SELECT sample, count(*) FROM records GROUP BY sample").fetchall()
        assert sorted(counts) == sorted((one, 2) for one in content_ids(split))
        known = store.sql("SELECT sample, content_hash FROM samples").fetchall()
        assert all(int(content_hash[:16], 16) >> 1 == sample for sample, content_hash in known)
        assert store.rollback(model, content_ids([held[5]])).records == 2


def test_text_ids_are_looked_up_in_the_samples_table_or_refused_with_how(tmp_path: Path) -> None:
    dataset = Rows(rows(text=True))
    how = r"'document \d+' is text.*store\.samples\.update.*id_column='idx'"
    with timstore.open(tmp_path / "s") as store, pytest.raises(InvalidInputError, match=how):
        trained(new_model("llama"), [recorder(store)], tmp_path / "t", dataset)
    with timstore.open(tmp_path / "u") as store:
        store.samples.update([{"sample": number, "idx": f"document {number}"} for number in range(ROWS)])
        trained(new_model("llama"), [recorder(store, ["document 3"])], tmp_path / "t", dataset)
        assert store.sql("SELECT DISTINCT sample FROM records").fetchall() == [(3,)]


def test_rows_without_ids_are_refused_at_the_first_step(tmp_path: Path) -> None:
    model = new_model("llama")
    before = copy.deepcopy(model.state_dict())
    for number, dataset in enumerate((Rows(rows(key=None)), datasets.Dataset.from_list(rows(key=None)))):
        with timstore.open(tmp_path / str(number)) as store:
            callback = recorder(store)
            with pytest.raises(InvalidInputError, match="rows of the training set carry no 'idx'"):
                trained(model, [callback], tmp_path / "t", dataset)
            callback.close()
            assert store.sql("SELECT count(*) FROM steps").fetchall() == [(0,)]
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


# --- around training ---------------------------------------------------------------------------------------


def test_a_store_given_by_its_path_is_opened_and_closed(tmp_path: Path) -> None:
    model = new_model("llama")
    trained(model, [recorder(tmp_path / "s", [101])], tmp_path / "t")
    with timstore.open(tmp_path / "s") as store:
        assert store.rollback(model, [101]).records == 2


def test_an_option_that_cannot_be_right_is_told_when_the_callback_is_made(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="capture is"):
        TrajectoryCallback(tmp_path / "s", capture="everything")
    with pytest.raises(TypeError, match="captures"):
        TrajectoryCallback(tmp_path / "s", captures="modules")
    assert not (tmp_path / "s").exists()


def test_the_best_model_is_not_taken_for_the_last_one(tmp_path: Path) -> None:
    model = new_model("llama")
    with timstore.open(tmp_path / "s") as store:
        trained(
            model,
            [recorder(store)],
            tmp_path / "t",
            evaluated=Rows(rows(key=None)),
            load_best_model_at_end=True,
            eval_strategy="epoch",
            save_strategy="epoch",
            greater_is_better=True,  # which is that of the first epoch
            num_train_epochs=3,
        )
        report = store.rollback(model, [101], dry_run=True)
        assert report.records == 1  # of the first epoch's steps alone: the model knows nothing of the others


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_checkpointing_and_autocast_are_recorded_like_anything_else(precision: str, tmp_path: Path) -> None:
    model, consumed = new_model("llama"), Consumed()
    options = {"gradient_checkpointing": True, "bf16": precision == "bf16"}
    with timstore.open(tmp_path / "s") as store:
        trained(model, [recorder(store), consumed], tmp_path / "t", max_steps=2, **options)
        records = list(store.read("step = 0"))
        ratios = store.sql("SELECT consumed_ratio FROM steps WHERE step = 0").fetchall()
        total = sum(record.dense("lm_head.weight").astype(np.float64) for record in records) * ratios[0][0]
    error = np.linalg.norm(total - consumed.steps[0]["lm_head.weight"].double().numpy())
    assert len(records) == 3
    assert error <= (1e-5 if precision == "float32" else 1e-2) * np.linalg.norm(total)


def test_going_on_from_a_checkpoint_that_the_store_does_not_reach_is_refused(tmp_path: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": 3}
    with timstore.open(tmp_path / "other") as store:
        trained(new_model("llama"), [recorder(store)], tmp_path / "t", **options)
    with timstore.open(tmp_path / "s") as store:
        trained(new_model("llama"), [recorder(store)], tmp_path / "u", max_steps=2)
        with pytest.raises(StateError, match=r"goes on from step 6.*ends at step 1.*never recorded") as caught:
            trained(new_model("llama"), [recorder(store)], tmp_path / "t", resume=str(tmp_path / "t" / "checkpoint-6"))
        assert caught.value.kind == "hole"
    with timstore.open(tmp_path / "new") as store, pytest.warns(timstore.TimstoreWarning, match="nothing of the steps"):
        trained(new_model("llama"), [recorder(store)], tmp_path / "t", resume=str(tmp_path / "t" / "checkpoint-6"))


def test_a_compiled_training_and_a_late_callback_are_refused(tmp_path: Path) -> None:
    with timstore.open(tmp_path / "s") as store:
        with pytest.raises(CoverageError, match="torch_compile"):
            trained(new_model("llama"), [recorder(store)], tmp_path / "t", torch_compile=True)
        trainer = transformers.Trainer(
            model=new_model("llama"), args=arguments(tmp_path / "t"), train_dataset=Rows(rows())
        )
        trainer.add_callback(recorder(store))
        with pytest.raises(StateError, match="attach"):
            trainer.train()


def test_a_model_that_accelerate_compiles_by_its_environment_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "inductor")
    with timstore.open(tmp_path / "s") as store, pytest.raises(CoverageError, match=r"compiled.*torch\.compile"):
        trained(new_model("llama"), [recorder(store)], tmp_path / "t")
