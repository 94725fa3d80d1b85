"""Recording TRL's trainers: each sample is held to autograd, and the sum of all to what the optimizer consumed."""

import contextlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import peft
import pytest
import torch
from coverage_cases import llama
from pages import run, sections
from torch import nn
from trainers import USUAL, Consumed
from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedTokenizerFast

import timstore
from timstore.errors import CoverageError, InvalidInputError
from timstore.integrations.transformers import TrajectoryCallback, content_ids

trl = pytest.importorskip("trl")

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:first order"),
    pytest.mark.filterwarnings("ignore:.*lr_scheduler.step:UserWarning"),
]

LENGTHS = (5, 9, 4, 7, 6, 8, 3, 5, 6, 4, 7, 9)
PAST_ITS_MODULE = r"takes its loss from .*lm_head.weight directly.*capture='per-sample'"
Gradients = dict[str, torch.Tensor]


def tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {f"w{number}": number for number in range(58)} | {"<pad>": 58, "<eos>": 59}
    made = Tokenizer(models.WordLevel(words, unk_token="w0"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<eos>", unk_token="w0")


def new_model(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    return llama(attention_dropout=0.0, **options)


def rows(column: str | None = None) -> list[dict[str, Any]]:
    draw = torch.Generator().manual_seed(3)
    tokens = [torch.randint(2, 58, (length,), generator=draw).tolist() for length in LENGTHS]
    named = [{} if column is None else {column: 100 + number} for number in range(len(tokens))]
    # Of the prompt, one token in some rows, nothing is learnt.
    labels = [[-100] * (number % 3) + row[number % 3 :] for number, row in enumerate(tokens)]
    return [{"input_ids": row, "labels": label, **one} for row, label, one in zip(tokens, labels, named, strict=True)]


def options(folder: Path, **more: Any) -> dict[str, Any]:
    return {**USUAL, "output_dir": str(folder), "max_steps": 2, "bf16": False, **more}


def adapters(lora: bool) -> Any:
    return peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "down_proj"]) if lora else None


def sft(folder: Path, callbacks: list[Any], *, lora: bool = False, data: Any = None, **more: Any) -> Any:
    return trl.SFTTrainer(
        new_model(),
        trl.SFTConfig(**options(folder, **more)),
        train_dataset=datasets.Dataset.from_list(rows() if data is None else data),
        eval_dataset=datasets.Dataset.from_list(rows()) if "eval_steps" in more else None,
        processing_class=tokenizer(),
        callbacks=callbacks,
        peft_config=adapters(lora),
    )


def predictions(model: Any, tokens: list[int], labels: list[int]) -> torch.Tensor:
    """The log-probabilities of the labels that count, by the model's own forward pass of this row alone."""
    scores = model(input_ids=torch.tensor([tokens])).logits[0, :-1].log_softmax(-1)
    counted = [(place, label) for place, label in enumerate(labels[1:]) if label != -100]
    return torch.stack([scores[place, label] for place, label in counted])


def as_it_is(trained: Any) -> Any:
    """A model with the same parameters, whose forward pass is its own: copies keep what TRL put in its place."""
    lora = hasattr(trained, "get_base_model")
    base = new_model()
    made: Any = peft.get_peft_model(base, adapters(True)) if lora else base
    made.load_state_dict(trained.state_dict())
    return made


def own_gradient(model: Any, loss: Callable[[Any], torch.Tensor]) -> Gradients:
    model.zero_grad()
    loss(model).backward()
    return {name: one.grad.clone() for name, one in model.named_parameters() if one.requires_grad}


def held(record: Any, gradients: Gradients, scale: float) -> None:
    for name, gradient in gradients.items():
        mine = record.dense(name) if name in record.gradients else np.zeros(gradient.shape)
        np.testing.assert_allclose(mine, gradient.double(), rtol=1e-5, atol=1e-5 * scale, err_msg=name)


def add_up(store: timstore.Store, consumed: Consumed) -> None:
    """Hold the sum of the records of every step to what the optimizer consumed."""
    ratios = store.sql("SELECT consumed_ratio FROM steps WHERE group_id = 0 ORDER BY step").fetchall()
    for step, ((ratio,), gradients) in enumerate(zip(ratios, consumed.steps, strict=True)):
        records = list(store.read(f"step = {step}"))
        assert records
        scale = max(float(one.norm()) for one in gradients.values()) / ratio
        for name, gradient in gradients.items():
            parts = [record.dense(name) for record in records if name in record.gradients]
            total = np.sum(parts, axis=0, dtype=np.float64)
            np.testing.assert_allclose(total * ratio, gradient.double(), rtol=1e-5, atol=1e-5 * scale)


def check(store: timstore.Store, consumed: Consumed, own: dict[int, Callable[[list[int]], Gradients]]) -> None:
    """Hold the records of the first step to autograd, and of all steps the sum to what was consumed.

    Args:
        own: of each sample, its gradient, given the samples of the step.
    """
    add_up(store, consumed)
    records = {record.sample: record for record in store.read("step = 0")}
    for sample, record in records.items():
        gradients = own[sample](list(records))
        assert gradients.keys() == consumed.steps[0].keys()
        held(record, gradients, max(float(one.norm()) for one in gradients.values()))


# --- SFT ---------------------------------------------------------------------------------------------------------

PACKED = {"packing": True, "max_length": 16, "per_device_train_batch_size": 2}
KINDS = {
    "padded": {},
    "packed": PACKED,
    "padding-free": {"padding_free": True, "max_length": None},
    "accumulated": {"gradient_accumulation_steps": 2, "max_grad_norm": 0.01},
    "filled up": {"padding_free": True, "max_length": None, "pad_to_multiple_of": 8},
    "packed and accumulated": {**PACKED, "gradient_accumulation_steps": 2},
    "a smaller batch at last": {
        "padding_free": True,
        "max_length": None,
        "per_device_train_batch_size": 5,
        "max_steps": -1,
        "num_train_epochs": 2,
    },
    "evaluated in between": {**PACKED, "eval_strategy": "steps", "eval_steps": 1},
    "by workers": {"padding_free": True, "max_length": None, "dataloader_num_workers": 2},
}


def sft_gradients(
    model: Any, data: list[dict[str, Any]], ids: list[int]
) -> dict[int, Callable[[list[int]], Gradients]]:
    """Each sample's gradient, given those that the step consists of: a mean over all their labels that count."""
    row_of = dict(zip(ids, data, strict=True))

    def of(sample: int) -> Callable[[list[int]], Gradients]:
        def gradient(others: list[int]) -> Gradients:
            count = sum(label != -100 for one in others for label in row_of[one]["labels"][1:])
            row = row_of[sample]
            return own_gradient(model, lambda one: -predictions(one, row["input_ids"], row["labels"]).sum() / count)

        return gradient

    return {sample: of(sample) for sample in row_of}


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("known", ["column", "content"])
@pytest.mark.parametrize("kind", KINDS)
def test_each_sample_of_sft_is_its_own_gradient_and_all_add_up(
    kind: str, known: str, lora: bool, tmp_path: Path
) -> None:
    column = "idx" if known == "column" else None
    data = rows(column)
    if KINDS[kind].get("packing") and column is not None:
        with pytest.raises(InvalidInputError, match=r"packing=True keeps no column.*content_ids"):
            sft(tmp_path, [TrajectoryCallback(tmp_path / "s", id_column=column)], data=data, **KINDS[kind]).train()
        return
    consumed = Consumed()
    with timstore.open(tmp_path / "s") as store:
        trainer = sft(
            tmp_path / "t", [TrajectoryCallback(store, id_column=column), consumed], lora=lora, data=data, **KINDS[kind]
        )
        before = as_it_is(trainer.model)
        with told(not lora):
            trainer.train()
        ids = content_ids(data) if column is None else [row[column] for row in data]
        check(store, consumed, sft_gradients(before, data, ids))
        tokens = {sample: sum(one != -100 for one in row["labels"][1:]) for sample, row in zip(ids, data, strict=True)}
        assert all(record.tokens == tokens[record.sample] for record in store.read())
        chosen = [ids[0], ids[5]]
        steps = store.sql("SELECT sample_ids FROM steps WHERE group_id = 0").fetchall()
        drawn = {one for (step,) in steps for one in step}
        report = store.rollback(trainer.model, [one for one in chosen if one in drawn] or sorted(drawn)[:1])
        kept = store.snapshot().kept_rows()
        assert report.records and {row.sample for row in kept.rows} == drawn and kept.loss == "cross_entropy"
        assert report.probe is not None and report.probe.sequences == len(drawn) - len(report.samples)


def told(price: bool) -> Any:
    if price:
        return pytest.warns(timstore.TimstoreWarning, match=PAST_ITS_MODULE)
    return contextlib.nullcontext()


def test_rolling_back_one_example_of_packed_rows_leaves_what_the_others_did(tmp_path: Path) -> None:
    data = rows()
    with timstore.open(tmp_path / "s") as store:
        once = {**PACKED, "max_steps": 1, "max_grad_norm": 0.0}
        trainer = sft(tmp_path / "t", [TrajectoryCallback(store, capture="per-sample")], data=data, **once)
        initial = as_it_is(trainer.model)
        trainer.train()
        (drawn,) = store.sql("SELECT sample_ids FROM steps WHERE group_id = 0").fetchall()[0]
        gone = drawn[1]
        gradients = sft_gradients(initial, data, content_ids(data))
        store.rollback(trainer.model, [gone], probe=False)
        wanted = dict(initial.named_parameters())
        moved = [gradients[one](drawn) for one in drawn if one != gone]
        for name, one in trainer.model.named_parameters():
            expected = wanted[name] - 0.05 * sum(gradient[name] for gradient in moved)
            torch.testing.assert_close(one, expected, rtol=0, atol=1e-6)


def test_the_price_is_told_with_the_embeddings_when_they_are_tied(tmp_path: Path) -> None:
    tied = new_model(tie_word_embeddings=True)
    consumed = Consumed()
    with timstore.open(tmp_path / "s") as store:
        trainer = trl.SFTTrainer(
            tied,
            trl.SFTConfig(**options(tmp_path / "t", **KINDS["padding-free"])),
            train_dataset=datasets.Dataset.from_list(rows()),
            processing_class=tokenizer(),
            callbacks=[TrajectoryCallback(store), consumed],
        )
        before = new_model(tie_word_embeddings=True)
        with pytest.warns(timstore.TimstoreWarning, match="through the whole model, since the embeddings are tied"):
            trainer.train()
        check(store, consumed, sft_gradients(before, rows(), content_ids(rows())))


@pytest.mark.parametrize("strategy", ["wrapped", "bfd_split"])
def test_examples_that_are_cut_in_two_are_refused(strategy: str, tmp_path: Path) -> None:
    packed = {**PACKED, "packing_strategy": strategy}
    with pytest.raises(CoverageError, match=rf"packing_strategy='{strategy}' cuts examples in two"):
        sft(tmp_path, [TrajectoryCallback(tmp_path / "s")], **packed).train()


def test_a_dataset_that_was_packed_with_its_ids_is_known_by_them(tmp_path: Path) -> None:
    data = [{**row, "idx": [100 + number] * len(row["input_ids"])} for number, row in enumerate(rows())]
    packed = trl.pack_dataset(datasets.Dataset.from_list(data), 16, "bfd_split")
    consumed = Consumed()
    with timstore.open(tmp_path / "s") as store:
        trainer = trl.SFTTrainer(
            new_model(),
            trl.SFTConfig(**options(tmp_path / "t", **PACKED), dataset_kwargs={"skip_prepare_dataset": True}),
            train_dataset=packed,
            processing_class=tokenizer(),
            callbacks=[TrajectoryCallback(store, id_column="idx", capture="per-sample"), consumed],
        )
        before = as_it_is(trainer.model)
        trainer.train()
        check(store, consumed, sft_gradients(before, rows(), [100 + number for number in range(len(data))]))


# --- preferences -------------------------------------------------------------------------------------------------


def pairs(column: str | None = None) -> list[dict[str, Any]]:
    draw = torch.Generator().manual_seed(4)
    found = []
    for number in range(8):
        lengths = {"prompt": 3 + number % 3, "chosen": 2 + number % 4, "rejected": 5 - number % 3}
        drawn = {part: torch.randint(2, 58, (length,), generator=draw).tolist() for part, length in lengths.items()}
        text = {part: "".join(f" w{one}" for one in words) for part, words in drawn.items()}
        found.append(text if column is None else {**text, column: 100 + number})
    return found


def dpo(folder: Path, callbacks: list[Any], *, lora: bool, column: str | None = None, **more: Any) -> Any:
    return trl.DPOTrainer(
        new_model(),
        ref_model=None if lora else new_model(),
        args=trl.DPOConfig(**options(folder, **{"beta": 0.5, "learning_rate": 0.5, **more})),
        train_dataset=datasets.Dataset.from_list(pairs(column)),
        processing_class=tokenizer(),
        callbacks=callbacks,
        peft_config=adapters(lora),
    )


def score(model: Any, row: dict[str, Any], answer: str) -> torch.Tensor:
    prompt = row["prompt_ids"]
    return predictions(model, prompt + row[answer], [-100] * len(prompt) + row[answer]).sum()


@pytest.mark.parametrize("more", [{}, {"precompute_ref_log_probs": True}, {"loss_type": "hinge"}], ids=str)
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("known", ["column", "content"])
def test_each_pair_of_dpo_is_one_sample(known: str, lora: bool, more: dict[str, Any], tmp_path: Path) -> None:
    column = "idx" if known == "column" else None
    consumed = Consumed()
    with timstore.open(tmp_path / "s") as store:
        trainer = dpo(
            tmp_path / "t", [TrajectoryCallback(store, id_column=column), consumed], lora=lora, column=column, **more
        )
        data = list(trainer.train_dataset)
        before = as_it_is(trainer.model)
        with told(not lora):
            trainer.train()
        ids = content_ids(data) if column is None else [row[column] for row in data]
        reference = new_model()

        def gradient(row: dict[str, Any], others: list[int]) -> Gradients:
            def loss(model: Any) -> torch.Tensor:
                with torch.no_grad():
                    then = score(reference, row, "chosen_ids") - score(reference, row, "rejected_ids")
                margin = 0.5 * (score(model, row, "chosen_ids") - score(model, row, "rejected_ids") - then)
                own = torch.relu(1 - margin) if more.get("loss_type") == "hinge" else -nn.functional.logsigmoid(margin)
                return own / len(others)

            return own_gradient(before, loss)

        check(store, consumed, {one: partial(gradient, row) for one, row in zip(ids, data, strict=True)})
        assert store.sql("SELECT DISTINCT mean_over FROM steps").fetchall() == [("samples",)]
        record = next(iter(store.read("step = 1")))
        assert store.rollback(trainer.model, [record.sample]).records == 1


def rewarding(folder: Path, callbacks: list[Any], column: str | None) -> Any:
    torch.manual_seed(0)
    scores = LlamaForSequenceClassification(
        LlamaConfig(
            vocab_size=60,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            pad_token_id=58,
            num_labels=1,
        )
    )
    return trl.RewardTrainer(
        scores,
        trl.RewardConfig(**options(folder)),
        train_dataset=datasets.Dataset.from_list(pairs(column)),
        processing_class=tokenizer(),
        callbacks=callbacks,
    )


def judging(folder: Path, callbacks: list[Any], column: str | None) -> Any:
    held = [{**row, "completion": row["chosen"], "label": number % 2 == 0} for number, row in enumerate(pairs(column))]
    data = datasets.Dataset.from_list(held).remove_columns(["chosen", "rejected"])
    return trl.KTOTrainer(
        new_model(),
        ref_model=new_model(),
        args=trl.KTOConfig(**options(folder)),
        train_dataset=data,
        processing_class=tokenizer(),
        callbacks=callbacks,
    )


@pytest.mark.parametrize("make", [rewarding, judging])
@pytest.mark.parametrize("column", [None, "idx"])
def test_what_rewards_and_judgements_do_adds_up(make: Any, column: str | None, tmp_path: Path) -> None:
    consumed = Consumed()
    with timstore.open(tmp_path / "s") as store:
        trainer = make(tmp_path / "t", [TrajectoryCallback(store, id_column=column), consumed], column)
        with told(make is judging):
            trainer.train()
        add_up(store, consumed)
        assert store.sql("SELECT DISTINCT mean_over FROM steps").fetchall() == [("samples",)]
        if make is rewarding:
            ids = content_ids(trainer.train_dataset) if column is None else [100 + number for number in range(8)]
            assert {record.sample for record in store.read()} <= set(ids)


def test_a_trainer_that_leaves_out_the_ids_is_refused(tmp_path: Path) -> None:
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    callback = TrajectoryCallback(tmp_path / "s")
    trainer = ORPOTrainer(
        new_model(),
        args=ORPOConfig(**options(tmp_path / "t", max_length=32, remove_unused_columns=False)),
        train_dataset=datasets.Dataset.from_list(pairs()),
        processing_class=tokenizer(),
        callbacks=[callback],
    )
    with pytest.raises(InvalidInputError, match="lost their ids: ORPOTrainer makes"):
        trainer.train()
    callback.close()


def test_the_recipes_run(tmp_path: Path) -> None:
    assert run([sections("docs/training.md")["TRL"]], tmp_path) >= 2
