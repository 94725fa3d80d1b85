"""Recording Lightning's Trainer: each sample is held to autograd, and the sum of all to what was accumulated."""

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pages import run, sections
from torch import nn

import timstore
from timstore.errors import CoverageError, InvalidInputError, StateError

pl = pytest.importorskip("lightning.pytorch")

from timstore.integrations.lightning import TrajectoryCallback  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*lr_scheduler.step:UserWarning"),
    pytest.mark.filterwarnings("ignore:first order"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory"),
]

ROWS, WIDTH = 12, 5


class Rows(torch.utils.data.Dataset):
    def __init__(self, text: bool = False) -> None:
        draw = torch.Generator().manual_seed(2)
        self.inputs = torch.randn(ROWS, WIDTH, generator=draw)
        self.targets = torch.randn(ROWS, 2, generator=draw)
        self._text = text

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, number: int) -> dict[str, Any]:
        name = f"document {number}" if self._text else 100 + number
        return {"idx": name, "x": self.inputs[number], "y": self.targets[number]}


def loss_of(out: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    return nn.functional.mse_loss(out, wanted)


class Automatic(pl.LightningModule):
    def __init__(self, optimizer: Any = torch.optim.SGD) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(WIDTH, 6), nn.Tanh(), nn.LayerNorm(6), nn.Linear(6, 2))
        self._made = optimizer
        self.accumulated: list[dict[str, torch.Tensor]] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.net(x)
        return out

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return loss_of(self(batch["x"]), batch["y"])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("worse", loss_of(self(batch["x"]), batch["y"]))

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.accumulated.append({name: one.grad.clone() for name, one in self.named_parameters()})

    def configure_optimizers(self) -> Any:
        return self._made(self.parameters(), lr=0.1)


class PartOfIt(Automatic):
    """Its `training_step` calls the net, and not itself."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return loss_of(self.net(batch["x"]), batch["y"])


class Tuples(Automatic):
    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return loss_of(self(batch[1]), batch[2])


class Manual(Automatic):
    """Two steps for every batch."""

    def __init__(self, optimizer: Any = torch.optim.SGD) -> None:
        super().__init__(optimizer)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        for _ in range(2):
            optimizer.zero_grad()
            self.manual_backward(loss_of(self(batch["x"]), batch["y"]))
            self.clip_gradients(optimizer, 0.05, "norm")
            optimizer.step()


class ByItself(Automatic):
    """Names the samples to the model."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return loss_of(self(batch["x"], sample_ids=batch["idx"]), batch["y"])

    def forward(self, x: torch.Tensor, sample_ids: Any = None) -> torch.Tensor:
        assert sample_ids is None
        out: torch.Tensor = self.net(x)
        return out


def fitted(
    module: Any,
    callbacks: list[Any],
    folder: Path,
    *,
    data: Any = None,
    ckpt: Any = None,
    workers: int = 0,
    **more: Any,
) -> Any:
    loader = torch.utils.data.DataLoader(
        Rows() if data is None else data,
        batch_size=3,
        shuffle=True,
        generator=torch.Generator().manual_seed(1),
        num_workers=workers,
    )
    trainer = pl.Trainer(
        **{
            "accelerator": "cpu",
            "max_epochs": 2,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": folder,
            "log_every_n_steps": 1,
            "callbacks": callbacks,
            **more,
        }
    )
    trainer.fit(module, loader, torch.utils.data.DataLoader(Rows(), batch_size=4), ckpt_path=ckpt)
    return trainer


def sums(store: timstore.Store, step: int) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}
    for record in store.read(f"step = {step}"):
        for name in record.gradients:
            found[name] = found.get(name, 0) + record.dense(name).astype(np.float64)
    return found


KINDS = {
    "automatic": (Automatic, {}),
    "accumulated and clipped": (Automatic, {"accumulate_grad_batches": 2, "gradient_clip_val": 0.05}),
    "a part of it": (PartOfIt, {}),
    "tuples": (Tuples, {}),
    "manual": (Manual, {}),
    "by itself": (ByItself, {}),
    "bfloat16": (Automatic, {"precision": "bf16-mixed"}),
    "by workers": (Automatic, {"workers": 2}),
}


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW], ids=lambda one: one.__name__)
@pytest.mark.parametrize("kind", KINDS)
def test_each_sample_is_its_own_gradient_and_all_add_up(kind: str, optimizer: Any, tmp_path: Path) -> None:
    make, options = KINDS[kind]
    module, data = make(optimizer), Rows()
    before = copy.deepcopy(module.net)
    column = {"tuples": 0, "by itself": None}.get(kind, "idx")
    given = [tuple(data[number].values()) for number in range(ROWS)] if kind == "tuples" else data
    near = {"rtol": 2e-2, "atol": 5e-3} if kind == "bfloat16" else {"rtol": 1e-5, "atol": 1e-6}
    with timstore.open(tmp_path / "s") as store:
        fitted(module, [TrajectoryCallback(store, id_column=column)], tmp_path, data=given, **options)
        steps = store.sql("SELECT epoch, step, samples, consumed_ratio FROM steps ORDER BY step").fetchall()
        assert (
            len(steps)
            == len(module.accumulated)
            == 8 // options.get("accumulate_grad_batches", 1) * (2 if kind == "manual" else 1)
        )
        assert [epoch for epoch, *_ in steps] == [0] * (len(steps) // 2) + [1] * (len(steps) // 2)
        if "clipped" in kind or kind == "manual":
            assert all(ratio < 0.9 for *_, ratio in steps[:2])
        for step, gradients in enumerate(module.accumulated):
            found = sums(store, step)
            # What Lightning shows is clipped already where training_step clips by itself.
            ratio = steps[step][3] if kind == "manual" else 1.0
            for name, gradient in gradients.items():
                np.testing.assert_allclose(found[name] * ratio, gradient.double(), **near)
        first = list(store.read("step = 0"))
        for record in first:
            number = record.sample - 100
            before.zero_grad()
            # Of micro-batches of 3.
            (loss_of(before(data.inputs[number]), data.targets[number]) / len(first)).backward()
            for name, one in before.named_parameters():
                assert one.grad is not None
                np.testing.assert_allclose(record.dense(f"net.{name}"), one.grad.double(), **near)


def test_rolling_back_all_samples_returns_the_initial_parameters_after_validation_and_saving(tmp_path: Path) -> None:
    module = Automatic()
    initial = copy.deepcopy(module.state_dict())
    saving = pl.callbacks.ModelCheckpoint(dirpath=tmp_path / "c", every_n_train_steps=2, save_top_k=-1)
    fitted(
        module,
        [TrajectoryCallback(tmp_path / "s", id_column="idx", module="net"), saving],
        tmp_path,
        enable_checkpointing=True,
        val_check_interval=2,
        gradient_clip_val=0.1,
    )
    with timstore.open(tmp_path / "s") as store:
        assert store.sql("SELECT count(*) FROM records").fetchall() == [(2 * ROWS,)]
        store.rollback(module.net, list(range(100, 100 + ROWS)))
    for name, value in module.state_dict().items():
        torch.testing.assert_close(value, initial[name], rtol=0, atol=1e-6)


def test_rows_of_the_training_are_kept_and_asked_once_the_loss_is_named(tmp_path: Path) -> None:
    module = Automatic()
    with timstore.open(tmp_path / "s") as store:
        fitted(module, [TrajectoryCallback(store, [105], id_column="idx")], tmp_path)
        kept = store.snapshot().kept_rows()
        assert {row.sample for row in kept.rows} == set(range(100, 112)) - {105}
        for row in kept.rows:
            np.testing.assert_array_equal(row.by_row["0"][0], Rows().inputs[row.sample - 100])
        assert kept.loss is None  # what numbers a mean of squares is held against cannot be seen
        report = store.rollback(module, [105], loss="mse", dry_run=True)
        assert report.probe is not None and report.probe.kept == 11


def test_what_goes_on_from_a_checkpoint_supersedes_what_came_after_it(tmp_path: Path) -> None:
    def trained(store: Any, ckpt: Path | None = None) -> Any:
        saving = pl.callbacks.ModelCheckpoint(
            dirpath=tmp_path / "c", filename="{step}", every_n_epochs=1, save_top_k=-1
        )
        module, callback = Automatic(), TrajectoryCallback(store, id_column="idx")
        fitted(module, [callback, saving], tmp_path, ckpt=ckpt, enable_checkpointing=True, max_epochs=3)
        return module

    trained(tmp_path / "s")
    checkpoint = tmp_path / "c" / "step=4.ckpt"
    again = trained(tmp_path / "s", checkpoint)
    with timstore.open(tmp_path / "s") as store:
        assert store.sql("SELECT from_step FROM attempts ORDER BY attempt").fetchall() == [(0,), (4,)]
        steps = store.sql("SELECT epoch, step, attempt FROM steps ORDER BY step").fetchall()
        assert steps == [(step // 4, step, int(step >= 4)) for step in range(12)]
        assert store.rollback(again, [104]).records == 3
    with timstore.open(tmp_path / "behind") as store:
        store.append(0, 1, 1, {"net.0.bias": np.ones(6, np.float32)}, lr=0.1)
        with pytest.raises(StateError, match=r"goes on from step 4.*ends at step 1"):
            trained(store, checkpoint)


def test_names_of_samples_are_looked_up(tmp_path: Path) -> None:
    with timstore.open(tmp_path / "s") as store:
        store.samples.update([{"sample": number, "idx": f"document {number}"} for number in range(ROWS)])
        callback = TrajectoryCallback(store, ["document 3"], id_column="idx")
        fitted(Automatic(), [callback], tmp_path, data=Rows(text=True))
        assert store.sql("SELECT sample, count(*) FROM records GROUP BY sample").fetchall() == [(3, 2)]


def test_a_batch_without_ids_is_refused_with_what_it_has(tmp_path: Path) -> None:
    with timstore.open(tmp_path / "s") as store:
        with pytest.raises(InvalidInputError, match="no ids at 'id': it has the keys 'idx', 'x', 'y'"):
            fitted(Automatic(), [TrajectoryCallback(store, id_column="id")], tmp_path)
        with pytest.raises(InvalidInputError, match="without sample ids"):
            fitted(Automatic(), [TrajectoryCallback(store)], tmp_path)
        assert store.sql("SELECT count(*) FROM steps").fetchall() == [(0,)]


def test_an_error_in_training_keeps_what_was_recorded_and_takes_the_hooks_off(tmp_path: Path) -> None:
    class Stops(Automatic):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            if self.trainer.global_step == 3:
                raise ValueError("of the loop's own")
            return super().training_step(batch, batch_idx)

    module = Stops()
    callback = TrajectoryCallback(tmp_path / "s", id_column="idx")
    with pytest.raises(ValueError, match="of the loop's own"):
        fitted(module, [callback], tmp_path)
    with timstore.open(tmp_path / "s") as store:
        assert store.sql("SELECT count(*) FROM records").fetchall() == [(9,)]
        assert store.rollback(module, [next(iter(store.read())).sample]).records == 1
    module(torch.zeros(1, WIDTH)).sum().backward()  # asks for no ids
    with pytest.raises(StateError, match="nothing is being recorded"):
        _ = callback.recorder


def test_several_processes_are_refused(tmp_path: Path) -> None:
    trainer = pl.Trainer(accelerator="cpu", strategy="ddp", devices=1, logger=False, default_root_dir=tmp_path)
    with pytest.raises(CoverageError, match="devices=1"):
        TrajectoryCallback(tmp_path / "s", id_column="idx").on_train_start(trainer, Automatic())
    assert not (tmp_path / "s").exists()


def test_a_smaller_batch_at_last_and_an_epoch_that_no_accumulation_divides(tmp_path: Path) -> None:
    module = Automatic()
    initial = copy.deepcopy(module.state_dict())
    held = [Rows()[number] for number in range(8)]
    with timstore.open(tmp_path / "s") as store:
        callback = TrajectoryCallback(store, id_column="idx")
        # Batches of 3, 3 and 2, the last of which is a step of its own.
        fitted(module, [callback], tmp_path, data=held, accumulate_grad_batches=2, val_check_interval=1)
        steps = store.sql("SELECT epoch, samples FROM steps ORDER BY step").fetchall()
        assert steps == [(0, 6), (0, 2), (1, 6), (1, 2)]
        for step, gradients in enumerate(module.accumulated):
            found = sums(store, step)
            for name, gradient in gradients.items():
                np.testing.assert_allclose(found[name], gradient.double(), rtol=1e-5, atol=1e-6)
        store.rollback(module, list(range(100, 108)))
    for name, value in module.state_dict().items():
        torch.testing.assert_close(value, initial[name], rtol=0, atol=1e-6)


def test_the_same_by_its_older_name(tmp_path: Path) -> None:
    script = """
import sys
sys.modules["lightning"] = None  # as where only pytorch_lightning is installed
import pytorch_lightning as pl
import torch
import timstore
from timstore.integrations.lightning import TrajectoryCallback

class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Linear(3, 2)

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return self(batch[1]).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)

data = torch.utils.data.TensorDataset(torch.arange(8), torch.randn(8, 3))
callback = TrajectoryCallback("s", id_column=0)
assert isinstance(callback, pl.Callback)
trainer = pl.Trainer(accelerator="cpu", max_epochs=2, logger=False, enable_checkpointing=False, callbacks=[callback])
trainer.fit(Module(), torch.utils.data.DataLoader(data, 4))
with timstore.open("s") as store:
    assert store.sql("SELECT count(*) FROM records").fetchall() == [(16,)]
"""
    ran = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


def test_the_recipes_run(tmp_path: Path) -> None:
    assert run([sections("docs/training.md")["Lightning"]], tmp_path) >= 2
