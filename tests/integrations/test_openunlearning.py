"""TIMRecorder and TIMParameterRollback in a checkout of OpenUnlearning (a stand-in with its interfaces)."""

import copy
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import transformers
from openunlearning_checkout import (
    Checkout,
    Collator,
    FinetuneTrainer,
    ForgetRetainDataset,
    Texts,
    Tokenizer,
    texts,
)
from torch import nn
from trainers import new_model

import timstore
from timstore.errors import CoverageError, InvalidInputError, ModelMismatchError, NotFoundError, StateError
from timstore.integrations.openunlearning import TIMParameterRollback, TIMRecorder
from timstore.integrations.openunlearning.trainer import spelled
from timstore.integrations.transformers import content_ids

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:first order"),
    pytest.mark.filterwarnings("ignore:.*lr_scheduler.step:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*probe:timstore.TimstoreWarning"),
]

FORGET, RETAIN = texts(4), texts(14, seed=1)
TUNING = {"optim": "adamw_torch", "learning_rate": 5e-3, "num_train_epochs": 2, "per_device_train_batch_size": 6}


@pytest.fixture(autouse=True)
def same_environment() -> Iterator[None]:
    """Take back what TrainingArguments tell Accelerate, which reads it in every later training of the process."""
    with mock.patch.dict(os.environ):
        yield


@pytest.fixture(params=["tokenizer", "processing_class"])
def checkout(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Checkout:
    found = Checkout(request.param)
    found.registry |= {one.__name__: one for one in (TIMRecorder, TIMParameterRollback)}
    found.install(monkeypatch)
    return found


@pytest.fixture
def newest(monkeypatch: pytest.MonkeyPatch) -> Checkout:
    """A checkout of one revision alone."""
    found = Checkout("processing_class")
    found.registry |= {one.__name__: one for one in (TIMRecorder, TIMParameterRollback)}
    found.install(monkeypatch)
    return found


def tuned(checkout: Checkout, folder: Path, *, args: Any = None, given: Any = None, **method_args: Any) -> nn.Module:
    """Fine-tune with a TIMRecorder that writes into `folder/tim`, save the model, and return it."""
    model = new_model("llama")
    trainer = checkout.load_trainer(
        "TIMRecorder",
        folder / "tuned",
        train_dataset=Texts([*RETAIN, *FORGET]),
        args={**TUNING, **(args or {})},
        method_args={"tim_output_dir": str(folder / "tim"), **method_args},
        **{"model": model, **(given or {})},
    )
    trainer.train()
    trainer.save_model(str(folder / "tuned"))
    return model


def unlearning(
    checkout: Checkout,
    folder: Path,
    model: nn.Module,
    *,
    forget: Any = FORGET,
    retain: Any = RETAIN,
    **method_args: Any,
) -> Any:
    """Return the trainer that `src/train.py` would make next."""
    given = method_args.pop("given", {})
    return checkout.load_trainer(
        "TIMParameterRollback",
        folder / "rolled",
        model=model,
        train_dataset=ForgetRetainDataset(Texts(forget), None if retain is None else Texts(retain)),
        method_args={"tim_output_dir": str(folder / "tim"), "probe": 4, **method_args},
        **given,
    )


def loaded(folder: Path) -> nn.Module:
    return transformers.AutoModelForCausalLM.from_pretrained(folder)


def ids_of(rows: list[list[int]]) -> list[int]:
    return content_ids([{"input_ids": row} for row in rows])  # the end, which is padding here, left out


# --- what it does ------------------------------------------------------------------------------------------


def test_the_saved_model_is_what_a_rollback_with_the_same_probe_leaves(checkout: Checkout, tmp_path: Path) -> None:
    tuned(checkout, tmp_path)
    expected = loaded(tmp_path / "tuned")
    trainer = unlearning(checkout, tmp_path, loaded(tmp_path / "tuned"))
    assert isinstance(trainer, FinetuneTrainer)
    output = trainer.train()
    trainer.save_state()
    trainer.save_model(str(tmp_path / "rolled"))

    told = json.loads((tmp_path / "rolled" / "timstore_report.json").read_text())
    rows = [Texts(RETAIN)[number] for number in told["probe_rows"]]
    assert len(set(told["probe_rows"])) == 4
    batches = [Collator()(rows[start : start + 3]) for start in (0, 3)]
    report = timstore.rollback(expected, ids_of(FORGET), tmp_path / "tim" / "trajectories.tim", probe=batches)
    saved = loaded(tmp_path / "rolled").state_dict()
    for name, value in expected.state_dict().items():
        assert torch.equal(saved[name], value), name
    assert told["samples"] == sorted(ids_of(FORGET))
    assert told["rollback_id"] == report.rollback_id
    assert (told["forget_rows"], told["missing_rows"], told["records"]) == (4, [], 8)
    assert output.global_step == 0
    assert output.metrics["rollback_records"] == 8
    assert output.metrics["rollback_probe_loss_after"] == pytest.approx(report.probe.loss_after)
    logged = json.loads((tmp_path / "rolled" / "trainer_state.json").read_text())["log_history"]
    assert logged[0]["rollback_samples"] == 4
    assert told["method"].endswith("+ probe")


@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_are_known_whatever_pads_them_in_their_batch(newest: Checkout, side: str, tmp_path: Path) -> None:
    model = tuned(newest, tmp_path, given={"data_collator": Collator(side)})
    with timstore.open(tmp_path / "tim" / "trajectories.tim", "r") as store:
        recorded = {row[0] for row in store.sql("SELECT DISTINCT sample FROM records").fetchall()}
    assert recorded == set(ids_of([*RETAIN, *FORGET]))
    trainer = unlearning(newest, tmp_path, model, given={"data_collator": Collator(side)})
    trainer.train()
    assert trainer.rollback_report.samples == tuple(sorted(ids_of(FORGET)))


def test_the_probe_holds_no_row_that_is_to_be_forgotten(newest: Checkout, tmp_path: Path) -> None:
    model = tuned(newest, tmp_path)
    mixed = [*FORGET, *RETAIN[:3], *FORGET, RETAIN[0]]
    unlearning(newest, tmp_path, model, retain=mixed, probe=64).train()
    told = json.loads((tmp_path / "rolled" / "timstore_report.json").read_text())
    assert sorted(ids_of([mixed[number] for number in told["probe_rows"]])) == sorted(ids_of(RETAIN[:3]))
    assert told["probe"]["sequences"] == 3


def test_by_default_what_was_kept_of_the_training_is_asked(newest: Checkout, tmp_path: Path) -> None:
    model = tuned(newest, tmp_path)
    expected = copy.deepcopy(model)
    trainer = unlearning(newest, tmp_path, model, retain=None, probe="auto")
    trainer.train()
    told = json.loads((tmp_path / "rolled" / "timstore_report.json").read_text())
    assert told["probe_rows"] == []
    assert (told["probe"]["kept"], told["probe"]["left_out"]) == (len(RETAIN) + len(FORGET), len(FORGET))
    report = timstore.rollback(expected, ids_of(FORGET), tmp_path / "tim" / "trajectories.tim", force=True)
    assert told["rollback_id"] == report.rollback_id


def test_where_nothing_was_kept_the_retain_split_is_asked(newest: Checkout, tmp_path: Path) -> None:
    trainer = unlearning(newest, tmp_path, tuned(newest, tmp_path, probe=None), probe="auto")
    trainer.train()
    told = json.loads((tmp_path / "rolled" / "timstore_report.json").read_text())
    assert len(told["probe_rows"]) == len(RETAIN) and told["probe"]["kept"] is None


def test_without_a_probe_it_is_first_order_and_needs_no_retain_split(newest: Checkout, tmp_path: Path) -> None:
    model = tuned(newest, tmp_path)
    expected, asked = copy.deepcopy(model), copy.deepcopy(model)
    path = tmp_path / "tim" / "trajectories.tim"
    with timstore.open(path) as store:  # nor is the one asked that a store keeps
        store.keep_probe([{"input_ids": np.array(RETAIN[:1])}], loss="cross_entropy")
        store.commit()
        assert store.rollback(asked, ids_of(FORGET), strength=0.5, dry_run=True).method.endswith("+ probe")
    trainer = unlearning(newest, tmp_path, model, retain=None, probe=None, rollback_strength=0.5)
    trainer.train()
    report = timstore.rollback(expected, ids_of(FORGET), path, strength=0.5, probe=False)
    assert report.probe is None
    assert trainer.rollback_report.probe is None
    assert all(torch.equal(one, two) for one, two in zip(model.parameters(), expected.parameters(), strict=True))
    with pytest.raises(InvalidInputError, match=r"retain split, and there is none.*probe: null"):
        unlearning(newest, tmp_path, model, retain=None).train()


def test_it_evaluates_as_the_checkout_does(checkout: Checkout, tmp_path: Path) -> None:
    class Evaluator:
        def evaluate(self, model: nn.Module, tokenizer: Any, template_args: Any) -> dict[str, float]:
            assert isinstance(tokenizer, Tokenizer)
            assert template_args == {"apply_chat_template": False}
            return {"first": next(model.parameters()).sum().item()}

    tuned(checkout, tmp_path)
    trainer = unlearning(checkout, tmp_path, loaded(tmp_path / "tuned"), given={"evaluators": {"mine": Evaluator()}})
    before = trainer.evaluate(metric_key_prefix="eval")["first"]
    trainer.train()
    assert trainer.evaluate(metric_key_prefix="eval")["first"] != before
    trainer.evaluators = None
    assert trainer.evaluate() == {}
    assert trainer.evaluate(Texts(FORGET))["eval_loss"] > 0


def test_without_the_checkout_it_is_a_plain_trainer(tmp_path: Path) -> None:
    registry = Checkout("processing_class")  # not among the modules
    registry.registry |= {one.__name__: one for one in (TIMRecorder, TIMParameterRollback)}
    with pytest.raises(TypeError, match="evaluators"):
        tuned(registry, tmp_path)
    trainer = TIMRecorder(new_model("llama"), tim_output_dir=str(tmp_path))
    assert type(trainer) is TIMRecorder
    assert not isinstance(trainer, FinetuneTrainer)


def test_it_trains_on_the_retain_split_only_when_asked_to(newest: Checkout, tmp_path: Path) -> None:
    class Seen(transformers.TrainerCallback):
        rows = 0

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.rows += args.per_device_train_batch_size

    tuned(newest, tmp_path)
    for asked in (False, True):
        model, seen = loaded(tmp_path / "tuned"), Seen()
        trainer = unlearning(newest, tmp_path, model, train_after=asked, given={"args": {"num_train_epochs": 1}})
        trainer.add_callback(seen)
        output = trainer.train()
        assert output.global_step == (5 if asked else 0)  # 14 rows in batches of 3
        assert seen.rows == (15 if asked else 0)
        assert output.metrics["rollback_records"] == 8
        assert trainer.state.log_history[0]["rollback_records"] == 8
        assert isinstance(trainer.train_dataset, ForgetRetainDataset)


# --- what it refuses ---------------------------------------------------------------------------------------


def test_finding_no_forget_row_is_an_error_and_never_success(newest: Checkout, tmp_path: Path) -> None:
    model = tuned(newest, tmp_path)
    before = copy.deepcopy(model.state_dict())
    others = texts(4, seed=9)
    for missing in ("error", "skip"):
        with pytest.raises(CoverageError, match=r"of 4 forget rows, none was ever recorded.*18 samples.*tokenizer"):
            unlearning(newest, tmp_path, model, forget=others, missing=missing).train()
    with pytest.raises(CoverageError, match=r"of 8 forget rows, 4 \(rows 0, 1, 2, 3\) were never recorded") as caught:
        unlearning(newest, tmp_path, model, forget=[*others, *FORGET]).train()
    assert caught.value.fields["rows"] == (0, 1, 2, 3)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not (tmp_path / "rolled" / "timstore_report.json").exists()
    trainer = unlearning(newest, tmp_path, model, forget=[*others, *FORGET], missing="skip")
    assert trainer.train().metrics["rollback_rows_missing"] == 4
    assert trainer.rollback_report.samples == tuple(sorted(ids_of(FORGET)))


def test_an_empty_forget_split_is_told_so(newest: Checkout, tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="the forget split is empty"):
        unlearning(newest, tmp_path, new_model("llama"), forget=[]).train()


def test_a_row_that_was_trained_on_and_not_recorded_is_no_success(newest: Checkout, tmp_path: Path) -> None:
    model = tuned(newest, tmp_path, samples=ids_of(FORGET[:2]))
    with pytest.raises(CoverageError, match=r"of 4 forget rows, 2 \(rows 2, 3\)"):
        unlearning(newest, tmp_path, model).train()
    unlearning(newest, tmp_path, model, forget=FORGET[:2]).train()


def test_the_same_rows_are_not_removed_twice_from_one_model(newest: Checkout, tmp_path: Path) -> None:
    tuned(newest, tmp_path)
    trainer = unlearning(newest, tmp_path, loaded(tmp_path / "tuned"))
    trainer.train()
    trainer.save_model(str(tmp_path / "rolled"))
    with pytest.raises(StateError, match="removed from this model before"):
        trainer.train()
    with pytest.raises(StateError, match="removed from this model before"):
        unlearning(newest, tmp_path, loaded(tmp_path / "rolled")).train()
    with pytest.warns(timstore.TimstoreWarning, match="removed from this model before"):
        unlearning(newest, tmp_path, loaded(tmp_path / "rolled"), force=True).train()
    # The model as it was fine-tuned has them still.
    unlearning(newest, tmp_path, loaded(tmp_path / "tuned")).train()
    with pytest.raises(ModelMismatchError):
        unlearning(newest, tmp_path, new_model("llama")).train()


def test_what_cannot_be_right_is_told_by_name(newest: Checkout, tmp_path: Path) -> None:
    model = tuned(newest, tmp_path)

    def fails(match: str, error: type[Exception] = InvalidInputError, **options: Any) -> None:
        with pytest.raises(error, match=match):
            unlearning(newest, tmp_path, model, **options).train()

    fails("no directory .*elsewhere", NotFoundError, tim_output_dir=str(tmp_path / "elsewhere"))
    fails("holds no store.*and no epoch_N.json", NotFoundError, tim_output_dir=str(tmp_path / "tuned"))
    fails(
        "holds no store trajectories.tim: nothing", NotFoundError, tim_output_dir="tests", trajectory_format="timstore"
    )
    fails("holds no epoch_N.json", NotFoundError, trajectory_format="json")
    fails("trajectory_format is 'auto' or 'timstore'", trajectory_format="csv")
    fails(r"trainer.method_args.tim_output_dir=", tim_output_dir=None)
    fails("probe, unless it is auto or null, the number of rows", probe=0)
    fails("missing is 'error' or 'skip'", missing="none")
    fails("strength lies between", rollback_strength=2.0)
    fails("method", method="magic")
    fails("force is True or False", force="yes")
    fails("strengths", TypeError, strengths=1.0)
    with pytest.raises(InvalidInputError, match=r"Texts has no forget split.*--config-name=unlearn.yaml"):
        newest.load_trainer(
            "TIMParameterRollback",
            tmp_path,
            model=model,
            train_dataset=Texts(FORGET),
            method_args={"tim_output_dir": str(tmp_path / "tim")},
        ).train()
    nested = ForgetRetainDataset([{"original": Texts(FORGET)[0], "alternate": Texts(FORGET)[1]}], Texts(RETAIN))
    trainer = unlearning(newest, tmp_path, model)
    trainer.train_dataset = nested
    with pytest.raises(InvalidInputError, match=r"row 0 of the forget split has no input_ids.*'alternate', 'original'"):
        trainer.train()


def test_attention_without_second_derivatives_and_several_processes_are_refused(
    newest: Checkout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model: Any = tuned(newest, tmp_path)
    trainer = unlearning(newest, tmp_path, model)
    with monkeypatch.context() as patch:
        patch.setattr(model.config, "_attn_implementation", "flash_attention_2")
        with pytest.raises(InvalidInputError, match="attn_implementation=sdpa"):
            trainer.train()
    monkeypatch.setattr(type(trainer.args), "world_size", 2)
    with pytest.raises(CoverageError, match="in one process"):
        trainer.train()


def test_messages_name_the_keys_of_the_configuration(
    newest: Checkout, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tuned(newest, tmp_path)
    half = loaded(tmp_path / "tuned").bfloat16()
    with pytest.raises(ModelMismatchError, match=r"is bfloat16, .* such as by model\.model_args\.torch_dtype=float32"):
        unlearning(newest, tmp_path, half).train()
    model = loaded(tmp_path / "tuned")
    unlearning(newest, tmp_path, model).train()
    with caplog.at_level("INFO", "timstore"), pytest.raises(StateError, match=r"trainer\.method_args\.force=true"):
        unlearning(newest, tmp_path, model).train()
    # Said before the work begins, which may take hours, and by a logger of ours.
    assert [one.message for one in caplog.records if one.name.startswith("timstore.")] == [
        "4 of 4 forget rows are recorded, as 4 samples (known by their tokens); 0 not"
    ]
    assert spelled("record with optimizer_history='gradients', or capture='per-sample'; see trainer.args.lr=") == (
        "record with trainer.method_args.optimizer_history=gradients, or trainer.method_args.capture=per-sample; "
        "see trainer.args.lr="
    )


def test_a_damaged_model_is_told_with_the_strength_s_own_name(newest: Checkout, tmp_path: Path) -> None:
    model = new_model("llama")
    with timstore.open(tmp_path / "tim") as store:  # a change that no linearisation carries
        pushed = {"model.norm.weight": 100 * torch.randn(32, generator=torch.Generator().manual_seed(0))}
        store.append(0, 0, 7, pushed, lr=1.0)
    trainer = unlearning(newest, tmp_path, model, id_map=[7, 7, 7, 7])
    with pytest.warns(timstore.TimstoreWarning, match=r"damaged.* trainer\.method_args\.rollback_strength="):
        trainer.train()
    told = json.loads((tmp_path / "rolled" / "timstore_report.json").read_text())
    assert "trainer.method_args.rollback_strength=" in told["warnings"][0]


# --- recording ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", ["ids", "file", "data set"])
def test_the_recorder_records_the_rows_that_it_is_told(newest: Checkout, given: str, tmp_path: Path) -> None:
    samples: Any = ids_of(FORGET)
    if given == "file":
        (tmp_path / "ids.json").write_text(json.dumps(samples))
        samples = str(tmp_path / "ids.json")
    elif given == "data set":
        samples = {"TOFU_QA_forget": {"handler": "Texts", "args": {"rows": FORGET}}}
    model = tuned(newest, tmp_path, samples=samples, precision="int8", optimizer_history="gradients")
    with timstore.open(tmp_path / "tim" / "trajectories.tim", "r") as store:
        counts = dict(store.sql("SELECT sample, count(*) FROM records GROUP BY sample").fetchall())
        assert counts == dict.fromkeys(ids_of(FORGET), 2)
        assert store.settings.precision == "int8"
    trainer = unlearning(newest, tmp_path, model)
    trainer.train()
    assert "exact replay" in trainer.rollback_report.method


def test_a_recorder_that_goes_on_from_a_checkpoint_goes_on_in_the_store(newest: Checkout, tmp_path: Path) -> None:
    class Power(transformers.TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 3:
                raise KeyboardInterrupt

    whole = tuned(newest, tmp_path / "whole")
    saving = {"save_strategy": "steps", "save_steps": 2}
    trainer = newest.load_trainer(
        "TIMRecorder",
        tmp_path / "tuned",
        model=new_model("llama"),
        train_dataset=Texts([*RETAIN, *FORGET]),
        args={**TUNING, **saving},
        method_args={"tim_output_dir": str(tmp_path / "tim")},
    )
    trainer.add_callback(Power())
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    again = tuned(newest, tmp_path, args={**saving, "resume_from_checkpoint": True})
    for one, two in zip(whole.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(one, two)
    with timstore.open(tmp_path / "tim" / "trajectories.tim", "r") as store:
        assert store.sql("SELECT from_step FROM attempts ORDER BY attempt").fetchall() == [(0,), (2,)]
        assert store.sql("SELECT count(*) FROM records").fetchall() == [(36,)]
    trainer = unlearning(newest, tmp_path, again)
    trainer.train()
    assert trainer.rollback_report.records == 8


def test_a_second_training_is_not_mixed_into_the_first(newest: Checkout, tmp_path: Path) -> None:
    tuned(newest, tmp_path)
    where = r"name another folder, trainer.method_args.tim_output_dir=.*\+trainer.args.resume_from_checkpoint=true"
    for model in (new_model("llama"), loaded(tmp_path / "tuned")):  # from the start, and from where the record ends
        with pytest.raises(StateError, match=where) as caught:
            tuned(newest, tmp_path, given={"model": model})
        assert isinstance(caught.value.__cause__, timstore.TimstoreError)
    with pytest.raises(StateError, match=where):
        tuned(newest, tmp_path, samples=ids_of(FORGET))
    with pytest.raises(InvalidInputError, match="precision"):
        tuned(newest, tmp_path, precision="int8")
    assert unlearning(newest, tmp_path, loaded(tmp_path / "tuned")).train().metrics["rollback_records"] == 8


def test_samples_that_are_none_are_refused(newest: Checkout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidInputError, match=r"nowhere\.json is no JSON file"):
        tuned(newest, tmp_path, samples=str(tmp_path / "nowhere.json"))
    with pytest.raises(InvalidInputError, match="samples are ids"):
        tuned(newest, tmp_path, samples=5)
    monkeypatch.delitem(sys.modules, "data")
    with pytest.raises(StateError, match="OpenUnlearning's `data`"):
        tuned(newest, tmp_path, samples={"forget": {}})
