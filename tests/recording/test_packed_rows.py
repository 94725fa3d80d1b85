"""Several samples in one row of tokens, and several rows of one: who is whose, held to autograd."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import transformers
from coverage_cases import llama
from torch import nn
from trainers import Consumed, Rows, trained

import timstore
from timstore.errors import InvalidInputError
from timstore.integrations.transformers import TrajectoryCallback, content_ids
from timstore.model.sample_ids import row_ids
from timstore.recording.packing import pieces_of

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

# The mask that keeps packed rows apart without flash attention.
KEEPS_APART = hasattr(transformers, "masking_utils")
LENGTHS = (5, 9, 4, 7, 6, 8, 3, 5, 6, 4, 7, 2)
Row = dict[str, Any]
Gradients = dict[str, torch.Tensor]


def rows(column: str | None = None) -> list[Row]:
    draw = torch.Generator().manual_seed(3)
    tokens = [torch.randint(2, 58, (length,), generator=draw).tolist() for length in LENGTHS]
    named = [{} if column is None else {column: 100 + number} for number in range(len(tokens))]
    labels = [[-100] * (number % 2) + row[number % 2 :] for number, row in enumerate(tokens)]
    return [{"input_ids": row, "labels": label, **one} for row, label, one in zip(tokens, labels, named, strict=True)]


def new_model() -> nn.Module:
    torch.manual_seed(0)
    return llama(attention_dropout=0.0)


def alone(model: nn.Module, row: Row, count: int) -> Gradients:
    """The gradient of one row by itself, of a loss that is a mean over `count` labels."""
    model.zero_grad()
    labels = torch.tensor([row["labels"]])
    logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1]
    (nn.functional.cross_entropy(logits, labels[0, 1:], reduction="sum") / count).backward()
    return {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}


def counted(row: Row) -> int:
    return sum(label != -100 for label in row["labels"][1:])


def check(store: timstore.Store, consumed: list[Gradients], row_of: dict[int, Row]) -> None:
    """Hold the first step's records to autograd, and the sum of those of every step to what was consumed."""
    ratios = store.sql("SELECT consumed_ratio FROM steps WHERE group_id = 0 ORDER BY step").fetchall()
    for step, ((ratio,), gradients) in enumerate(zip(ratios, consumed, strict=True)):
        records = {record.sample: record for record in store.read(f"step = {step}")}
        scale = max(float(one.norm()) for one in gradients.values())
        for name, gradient in gradients.items():
            total = np.sum([one.dense(name) for one in records.values()], axis=0, dtype=np.float64)
            np.testing.assert_allclose(total * ratio, gradient.double(), rtol=1e-5, atol=1e-5 * scale)
        if step:
            continue
        whole = sum(counted(row_of[one]) for one in records)
        for sample, record in records.items():
            assert record.tokens == counted(row_of[sample])
            for name, gradient in alone(new_model(), row_of[sample], whole).items():
                np.testing.assert_allclose(record.dense(name), gradient.double(), rtol=1e-5, atol=1e-5 * scale)


def flattened(**options: Any) -> Any:
    return transformers.DataCollatorWithFlattening(**options)


def filled_up(features: list[Row]) -> dict[str, torch.Tensor]:
    """One row for all, and numbers that mean nothing up to a multiple of 16."""
    batch = {
        "input_ids": [one for row in features for one in row["input_ids"]],
        "labels": [one for row in features for one in [-100, *row["labels"][1:]]],
        "position_ids": [place for row in features for place in range(len(row["input_ids"]))],
    }
    short = -len(batch["input_ids"]) % 16
    fill = {"input_ids": 1, "labels": -100, "position_ids": 0}
    return {name: torch.tensor([held + [fill[name]] * short]) for name, held in batch.items()}


COLLATORS: list[tuple[str, str | None, Callable[[], Any]]] = [
    ("flattening", None, flattened),
    ("flattening", "idx", flattened),
    ("where each begins", None, lambda: flattened(return_flash_attn_kwargs=True)),
    ("numbers of pieces", "idx", lambda: flattened(return_seq_idx=True)),
    ("filled up", None, lambda: filled_up),
    ("filled up", "idx", lambda: filled_up),
]


@pytest.mark.skipif(not KEEPS_APART, reason="packed rows need flash attention there")
@pytest.mark.parametrize(("name", "column", "collate"), COLLATORS, ids=[f"{one[0]}, {one[1]}" for one in COLLATORS])
def test_each_sample_of_a_flattened_batch_is_its_own_gradient(
    name: str, column: str | None, collate: Callable[[], Any], tmp_path: Path
) -> None:
    data, consumed = rows(column), Consumed()
    ids = content_ids(data) if column is None else [row["idx"] for row in data]
    with timstore.open(tmp_path / "s") as store:
        callbacks = [TrajectoryCallback(store, id_column=column), consumed]
        options = {"collate": collate(), "gradient_accumulation_steps": 2, "num_train_epochs": 1}
        trained(new_model(), callbacks, tmp_path / "t", Rows(data), **options)
        check(store, consumed.steps, dict(zip(ids, data, strict=True)))
        assert sorted(one for (one,) in store.sql("SELECT sample FROM records").fetchall()) == sorted(ids)
        known = dict(store.sql("SELECT sample, content_hash FROM samples").fetchall())
        assert [int(known[sample][:16], 16) >> 1 for sample in ids] == content_ids(data)


@pytest.mark.skipif(not KEEPS_APART, reason="packed rows need flash attention there")
@pytest.mark.parametrize("column", [None, "idx"])
def test_one_sample_of_a_flattened_batch_is_recorded_and_rolled_back(column: str | None, tmp_path: Path) -> None:
    data, model = rows(column), new_model()
    chosen = content_ids(data)[3] if column is None else 103
    with timstore.open(tmp_path / "s") as store:
        callback = TrajectoryCallback(store, [chosen], id_column=column)
        trained(model, [callback], tmp_path / "t", Rows(data), collate=flattened(), num_train_epochs=1)
        assert store.sql("SELECT sample FROM records").fetchall() == [(chosen,)]
        report = store.rollback(model, [chosen])
        assert report.records == 1
        # Each of the others is asked by itself, as a row of its own.
        assert report.probe is not None and report.probe.sequences == report.probe.kept == len(LENGTHS) - 1


@pytest.mark.skipif(not KEEPS_APART, reason="packed rows need flash attention there")
def test_rows_that_the_dataset_holds_packed_are_known_by_their_pieces(tmp_path: Path) -> None:
    data, consumed = rows(), Consumed()
    packed = [filled_up(data[first : first + 3]) for first in range(0, len(data), 3)]
    held = [{name: one[0].tolist() for name, one in row.items()} for row in packed]
    held = [{**row, "source": number} for number, row in enumerate(held)]

    def collate(features: list[Row]) -> dict[str, torch.Tensor]:
        width = max(len(row["input_ids"]) for row in features)
        fill = {"input_ids": 1, "labels": -100, "position_ids": 0}
        return {
            name: torch.tensor([row[name] + [by] * (width - len(row[name])) for row in features])
            for name, by in fill.items()
        }

    with timstore.open(tmp_path / "s") as store:
        callbacks = [TrajectoryCallback(store), consumed]
        trained(new_model(), callbacks, tmp_path / "t", Rows(held), collate=collate, per_device_train_batch_size=2)
        check(store, consumed.steps, dict(zip(content_ids(data), data, strict=True)))


@pytest.mark.skipif(not KEEPS_APART, reason="packed rows need flash attention there")
@pytest.mark.parametrize("each", ["piece", "token"])
def test_packed_rows_with_lists_of_ids_are_known_by_them(each: str, tmp_path: Path) -> None:
    data, consumed = rows(), Consumed()
    held = []
    for first in range(0, len(data), 2):
        pair = data[first : first + 2]
        ids = [
            100 + first + place for place in range(2) for _ in range(len(pair[place]["input_ids"]) ** (each == "token"))
        ]
        held.append({**{name: one[0].tolist() for name, one in flattened()(pair).items()}, "idx": ids})

    def collate(features: list[Row]) -> dict[str, torch.Tensor]:
        names = ("input_ids", "labels", "position_ids")
        return {name: torch.tensor([[one for row in features for one in row[name]]]) for name in names}

    with timstore.open(tmp_path / "s") as store:
        callbacks = [TrajectoryCallback(store, id_column="idx"), consumed]
        trained(new_model(), callbacks, tmp_path / "t", Rows(held), collate=collate, per_device_train_batch_size=2)
        check(store, consumed.steps, {100 + number: row for number, row in enumerate(data)})
        held[0]["idx"] = [*held[0]["idx"], 7, 7, 7]
        with pytest.raises(InvalidInputError, match="one for each piece, or for each token"):
            trained(
                new_model(), [TrajectoryCallback(tmp_path / "u", id_column="idx")], tmp_path / "t", Rows(held[:1]),
                collate=collate,
            )  # fmt: skip


# --- pairs, and rows that are repeated ---------------------------------------------------------------------------


def pairs(column: str | None) -> list[Row]:
    draw = torch.Generator().manual_seed(4)
    found = []
    for number in range(6):
        parts = {
            part: torch.randint(2, 58, (3 + number % 3,), generator=draw).tolist() for part in ("chosen", "rejected")
        }
        found.append({f"{part}_ids": tokens for part, tokens in parts.items()})
        if column is not None:
            found[-1][column] = 100 + number
    return found


def padded(tokens: list[list[int]]) -> dict[str, torch.Tensor]:
    width = max(map(len, tokens))
    return {
        "input_ids": torch.tensor([row + [0] * (width - len(row)) for row in tokens]),
        "attention_mask": torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in tokens]),
    }


def chosen_first(features: list[Row]) -> dict[str, torch.Tensor]:
    return padded([row[part] for part in ("chosen_ids", "rejected_ids") for row in features])


def in_turn(features: list[Row]) -> dict[str, torch.Tensor]:
    return padded([row[part] for row in features for part in ("chosen_ids", "rejected_ids")])


class ChosenFirst(transformers.Trainer):
    """Has the chosen answer score higher, by the sum of its log-probabilities."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
        scores = scores_of(model(**inputs).logits, inputs["input_ids"], inputs["attention_mask"])
        chosen, rejected = self.halves(scores)
        return -nn.functional.logsigmoid(chosen - rejected).mean()

    def halves(self, scores: torch.Tensor) -> Any:
        return scores.chunk(2)


class InTurn(ChosenFirst):
    def halves(self, scores: torch.Tensor) -> Any:
        return scores.reshape(-1, 2).T


def scores_of(logits: torch.Tensor, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    each = logits[:, :-1].log_softmax(-1).gather(2, tokens[:, 1:, None])[..., 0]
    return (each * mask[:, 1:]).sum(1)


@pytest.mark.parametrize(("collate", "kind"), [(chosen_first, ChosenFirst), (in_turn, InTurn)])
@pytest.mark.parametrize("column", [None, "idx"])
def test_both_rows_of_a_pair_are_one_sample(
    column: str | None, collate: Any, kind: type[transformers.Trainer], tmp_path: Path
) -> None:
    data, consumed = pairs(column), Consumed()
    ids = content_ids(data) if column is None else [row["idx"] for row in data]
    with timstore.open(tmp_path / "s") as store:
        callbacks = [TrajectoryCallback(store, id_column=column), consumed]
        options = {"remove_unused_columns": False, "num_train_epochs": 1, "max_grad_norm": 0.0, "kind": kind}
        trained(new_model(), callbacks, tmp_path / "t", Rows(data), collate=collate, **options)
        records = {record.sample: record for record in store.read("step = 0")}
        assert len(records) == 3
        assert sorted(one for (one,) in store.sql("SELECT sample FROM records").fetchall()) == sorted(ids)
        total = {name: np.zeros(one.shape) for name, one in consumed.steps[0].items()}
        twin = new_model()
        for sample, record in records.items():
            twin.zero_grad()
            batch = chosen_first([data[ids.index(sample)]])
            chosen, rejected = scores_of(twin(**batch).logits, batch["input_ids"], batch["attention_mask"])
            (-nn.functional.logsigmoid(chosen - rejected) / len(records)).backward()
            for name, one in twin.named_parameters():
                assert one.grad is not None
                total[name] += record.dense(name)
                np.testing.assert_allclose(record.dense(name), one.grad.double(), rtol=1e-5, atol=1e-6)
        for name, gradient in consumed.steps[0].items():
            np.testing.assert_allclose(total[name], gradient.double(), rtol=1e-5, atol=1e-6)


# --- what cannot be told -----------------------------------------------------------------------------------------


def without_ends(features: list[Row]) -> dict[str, torch.Tensor]:
    batch: dict[str, torch.Tensor] = flattened(return_position_ids=False)(features)
    return batch


def renumbered(features: list[Row]) -> dict[str, torch.Tensor]:
    """Other tokens, where there are other rows."""
    batch: dict[str, torch.Tensor] = flattened()(features)
    return {**batch, "input_ids": (batch["input_ids"] + len(features)) % 60}


def one_left_out(features: list[Row]) -> dict[str, torch.Tensor]:
    batch: dict[str, torch.Tensor] = flattened()(features[1:] or features)
    return batch


CANNOT = [(without_ends, None), (without_ends, "idx"), (renumbered, "idx"), (one_left_out, "idx")]


@pytest.mark.parametrize(("collate", "column"), CANNOT)
def test_what_cannot_be_told_is_refused_at_the_first_batch(column: str | None, collate: Any, tmp_path: Path) -> None:
    model = new_model()
    before = [one.detach().clone() for one in model.parameters()]
    with timstore.open(tmp_path / "s") as store:
        callback = TrajectoryCallback(store, id_column=column)
        with pytest.raises(InvalidInputError, match=r"makes 1 rows for the model of 3 of the dataset.*cannot be told"):
            trained(model, [callback], tmp_path / "t", Rows(rows(column)), collate=collate)
        callback.close()
        assert store.sql("SELECT count(*) FROM steps").fetchall() == [(0,)]
    assert all(torch.equal(one, two) for one, two in zip(before, model.parameters(), strict=True))


def test_a_collator_with_no_place_for_ids_is_refused(tmp_path: Path) -> None:
    callback = TrajectoryCallback(tmp_path / "s", id_column="idx")
    with pytest.raises(InvalidInputError, match="returns a list, which has no place for ids"):
        trained(new_model(), [callback], tmp_path / "t", Rows(rows("idx")), collate=lambda features: features)
    callback.close()


class MakesItsOwn(transformers.Trainer):
    """Makes the model's batch itself, of names that the model does not know."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
        return model(input_ids=inputs["both"]).logits.square().mean()


@pytest.mark.parametrize("column", [None, "idx"])
def test_a_trainer_that_leaves_out_the_ids_of_pairs_is_refused(column: str | None, tmp_path: Path) -> None:
    callback = TrajectoryCallback(tmp_path / "s", id_column=column)
    lost = "pairs of the training set have lost their ids" if column is None else "carry no 'idx', or MakesItsOwn makes"
    with pytest.raises(InvalidInputError, match=lost):
        trained(
            new_model(),
            [callback],
            tmp_path / "t",
            datasets.Dataset.from_list(pairs(column)),
            kind=MakesItsOwn,
            remove_unused_columns=False,
            collate=lambda features: {"both": chosen_first(features)["input_ids"]},
        )
    callback.close()


# --- rows in another order ---------------------------------------------------------------------------------------


def flattened_backwards(features: list[Row]) -> dict[str, torch.Tensor]:
    batch: dict[str, torch.Tensor] = flattened()(features[::-1])
    return batch


def sorted_by_length(features: list[Row]) -> dict[str, torch.Tensor]:
    """As for what packs its rows by their lengths."""
    features = sorted(features, key=lambda row: -len(row["input_ids"]))
    batch = padded([row["input_ids"] for row in features])
    width = batch["input_ids"].shape[1]
    batch["labels"] = torch.tensor([row["labels"] + [-100] * (width - len(row["labels"])) for row in features])
    return batch


@pytest.mark.skipif(not KEEPS_APART, reason="packed rows need flash attention there")
@pytest.mark.parametrize("collate", [flattened_backwards, sorted_by_length])
def test_ids_follow_their_rows_into_another_order(collate: Any, tmp_path: Path) -> None:
    data, consumed = rows("idx"), Consumed()
    with timstore.open(tmp_path / "s") as store:
        callbacks = [TrajectoryCallback(store, id_column="idx"), consumed]
        trained(new_model(), callbacks, tmp_path / "t", Rows(data), collate=collate)
        check(store, consumed.steps, {row["idx"]: row for row in data})


@pytest.mark.skipif(not KEEPS_APART, reason="packed rows need flash attention there")
@pytest.mark.parametrize("mixing", ["a mask of ones", "a cache"])
def test_samples_that_see_each_other_in_a_packed_row_are_warned_of(mixing: str, tmp_path: Path) -> None:
    model = new_model()
    batch = dict(flattened()([{"input_ids": row["input_ids"]} for row in rows()[:3]]))
    if mixing == "a cache":
        batch["use_cache"] = True
    else:
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    with (
        timstore.open(tmp_path / "s") as store,
        store.record(model, torch.optim.SGD(model.parameters(), lr=0.1)),
        pytest.warns(timstore.TimstoreWarning, match=r"packed into a row see each other.*use_cache=False"),
    ):
        model(**batch, sample_ids=[1, 2, 3]).loss.backward()


# --- loops of one's own ------------------------------------------------------------------------------------------


@pytest.mark.skipif(not KEEPS_APART, reason="packed rows need flash attention there")
@pytest.mark.parametrize("named", ["beside", "before", "by content"])
def test_a_loop_names_the_pieces_of_a_packed_row(named: str, tmp_path: Path) -> None:
    data = rows()[:4]
    ids = content_ids(data) if named == "by content" else [11, 12, 13, 14]
    model = new_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with timstore.open(tmp_path / "s") as store:
        with store.record(model, optimizer, by_content=named == "by content") as recorder:
            batch = dict(flattened()(data), use_cache=False)
            if named == "beside":
                batch["sample_ids"] = ids
            elif named == "before":
                recorder.batch(ids)
            model(**batch).loss.backward()
            consumed = {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}
            optimizer.step()
        check(store, [consumed], dict(zip(ids, data, strict=True)))


def test_a_packed_row_is_counted_once_also_where_nothing_of_it_is_recorded(tmp_path: Path) -> None:
    class Words(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.head = torch.nn.Embedding(9, 4), torch.nn.Linear(4, 9)

        def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
            return self.head(self.words(input_ids))

    model, places = Words(), torch.tensor([[0, 1, 2, 0, 1, 2, 0, 1, 2]])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    drawn = [[5, 6, 7], [6, 7, 8], [6, 7, 8]]
    with timstore.open(tmp_path / "s") as store:
        with store.record(model, optimizer, samples=[5]):
            for ids in drawn:
                model(input_ids=torch.arange(9)[None], position_ids=places, sample_ids=ids).square().sum().backward()
                optimizer.step()
                optimizer.zero_grad()
        steps = store.sql("SELECT sample_ids, samples, micro_batches FROM steps ORDER BY step").fetchall()
    assert steps == [(ids, 3, [3]) for ids in drawn]


def test_a_row_may_be_left_as_one_sample_and_a_wrong_number_of_ids_is_refused(tmp_path: Path) -> None:
    model = new_model()
    batch = dict(flattened()(rows()[:3]), use_cache=False)
    with timstore.open(tmp_path / "s") as store, store.record(model, torch.optim.SGD(model.parameters(), lr=0.1)):
        with pytest.raises(InvalidInputError, match="has 1 rows and 2 sample ids"):
            model(**batch, sample_ids=[1, 2])
        model(**batch, sample_ids=[1])


def beginnings() -> Iterator[tuple[str, Row, list[list[int]] | None]]:
    tokens = torch.arange(8)[None]
    yield "positions", {"position_ids": torch.tensor([[0, 1, 2, 0, 1, 0, 1, 2]])}, [[0, 0, 0, 1, 1, 2, 2, 2]]
    yield "from 2 on", {"position_ids": torch.tensor([[2, 3, 4, 2, 3, 2, 3, 4]])}, [[0, 0, 0, 1, 1, 2, 2, 2]]
    yield "one piece", {"position_ids": torch.arange(8)[None]}, None
    yield "of every row", {"position_ids": torch.arange(8)[None], "input_ids": tokens.repeat(3, 1)}, None
    yield "three axes", {"position_ids": torch.zeros(3, 1, 8, dtype=torch.long)}, None
    yield "numbers", {"seq_idx": torch.tensor([[0, 0, 1, 1, 1, 2, 2, 2]])}, [[0, 0, 1, 1, 1, 2, 2, 2]]
    yield "ends", {"cu_seq_lens_q": torch.tensor([0, 3, 8], dtype=torch.int32)}, [[0, 0, 0, 1, 1, 1, 1, 1]]
    two = {"input_ids": tokens.reshape(2, 4), "cu_seq_lens": torch.tensor([0, 3, 4, 8])}
    yield "ends over rows", two, [[0, 0, 0, 1], [2, 2, 2, 2]]
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 0]])
    at_left = {"position_ids": torch.tensor([[1, 1, 0, 1, 2, 0, 1, 1]]), "attention_mask": mask}
    yield "padding at both ends", at_left, [[-1, -1, 0, 0, 0, 1, 1, -1]]
    padded_rows = {
        "input_ids": tokens.reshape(2, 4),
        "position_ids": torch.tensor([[1, 1, 0, 1], [0, 1, 2, 3]]),
        "attention_mask": torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]]),
    }
    yield "padded and not packed", padded_rows, None
    filled = {"position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 0, 0]])}
    labels = torch.tensor([[-100, 1, 2, 3, -100, 5, -100, -100]])
    yield "filled up", {**filled, "labels": labels}, [[0, 0, 0, 0, 1, 1, -1, -1]]
    yield "nothing", {}, None


@pytest.mark.parametrize(("given", "wanted"), [one[1:] for one in beginnings()], ids=[one[0] for one in beginnings()])
def test_where_a_piece_ends_is_told_in_many_ways(given: Row, wanted: list[list[int]] | None) -> None:
    found = pieces_of({"input_ids": torch.arange(8)[None], **given})
    assert (None if found is None else found.tolist()) == wanted


def test_content_ids_of_packed_rows_and_pairs(tmp_path: Path) -> None:
    first, second = content_ids([{"input_ids": [5, 6, 7]}, {"input_ids": [8, 9]}])
    assert content_ids([{"input_ids": [5, 6, 7, 8, 9], "seq_lengths": [3, 2]}]) == [first, second]
    assert content_ids([{"input_ids": [8, 9, 0], "attention_mask": [1, 1, 0]}]) == [second]
    pair = {"prompt_ids": [1], "chosen_ids": [2, 3], "rejected_ids": [4]}
    others = [
        {**pair, "rejected_ids": [5]},
        {"prompt_ids": [1, 2], "chosen_ids": [3], "rejected_ids": [4]},
        {"chosen_ids": [1, 2, 3], "rejected_ids": [4]},
    ]
    assert len({*row_ids(pair), *content_ids(others)}) == 4
    older = {"prompt_input_ids": [1], "chosen_input_ids": [2, 3], "rejected_input_ids": [4]}
    assert content_ids([older, {**pair, "input_ids": [3]}]) == row_ids(pair) * 2
    with pytest.raises(InvalidInputError, match="row 1: the row has no input_ids"):
        content_ids([pair, {"prompt": "text"}])
