"""What several processes do together; run by test_ranks through torchrun: ranked.py SCENARIO FOLDER."""

import copy
import json
import os
import signal
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from networks import network
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from trainers import Rows, new_model, recorder, rows, trained

import timstore
from timstore.model.fingerprints import digests
from timstore.rollbacks.targets import InModule

STEPS, SAMPLES = 4, 8


def data() -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(3)
    return torch.randn(SAMPLES, 4, generator=draw), torch.randn(SAMPLES, 2, generator=draw)


def loop(model: nn.Module, store: timstore.Store, optimizer: Any, mine: slice, **options: Any) -> list[dict[str, Any]]:
    """Train, half of the samples in every step in each of two micro-batches; returns what each step consumed."""
    inputs, targets = data()
    consumed = []
    with store.record(model, optimizer, **options):
        for step in range(STEPS):
            ids = torch.arange(SAMPLES).roll(step)[mine]
            for part, last in ((ids[: len(ids) // 2], False), (ids[len(ids) // 2 :], True)):
                apart = isinstance(model, DistributedDataParallel) and not last
                with model.no_sync() if apart else torch.enable_grad():  # type: ignore[union-attr]
                    loss = nn.functional.mse_loss(model(inputs[part], sample_ids=part), targets[part]) / 2
                    loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.05)
            inner = getattr(model, "module", model)
            consumed.append({name: one.grad.clone() for name, one in inner.named_parameters()})  # type: ignore[union-attr]
            optimizer.step()
            optimizer.zero_grad()
    return consumed


def plain(folder: Path) -> None:
    """A loop of our own under DistributedDataParallel, rolled back in both processes."""
    rank = dist.get_rank()
    inner = network(seed=rank)  # DistributedDataParallel gives both the first one's parameters
    model = DistributedDataParallel(inner)
    initial = copy.deepcopy(inner.state_dict())
    optimizer = torch.optim.SGD(inner.parameters(), lr=0.1, momentum=0.9)
    with timstore.open(folder / "s") as store:
        half = SAMPLES // 2
        consumed = loop(model, store, optimizer, slice(rank * half, (rank + 1) * half))
        torch.save(consumed, folder / f"consumed-{rank}.pt")
        trained_to = digests(inner)
        report = store.rollback(model, list(range(SAMPLES)), keep_delta=True)
        torch.save(inner.state_dict(), folder / f"back-{rank}.pt")
        torch.save(initial, folder / f"initial-{rank}.pt")
        gone = digests(inner)
        try:
            store.rollback(model, [1])
        except timstore.StateError as error:
            refused = error.kind
        store.undo(model, report.rollback_id)
        said = {"records": report.records, "gone": gone, "undone": digests(inner) == trained_to, "refused": refused}
        (folder / f"said-{rank}.json").write_text(json.dumps(said))


def disturbed(folder: Path) -> None:
    """One of two processes is interrupted, or fails, at several moments of a rollback that both make."""
    rank = dist.get_rank()
    inner = network(seed=rank)
    model = DistributedDataParallel(inner)
    said: dict[str, Any] = {}
    plain_write, plain_append = InModule.write, timstore.Store.append_rollback

    def interrupt(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    failed: list[bool] = []

    def fail(*_: Any) -> None:
        failed.append(True)
        if len(failed) == 3:
            raise MemoryError

    def met(who: int, act: Any, plain: Any) -> Any:
        def call(*arguments: Any) -> Any:
            done = plain(*arguments)
            if rank == who:
                act()
            return done

        return call

    with timstore.open(folder / "s") as store:
        half = SAMPLES // 2
        loop(model, store, torch.optim.SGD(inner.parameters(), lr=0.1), slice(rank * half, (rank + 1) * half))
        said["start"] = digests(inner)
        for name, write, append in (
            ("first, before", plain_write, met(0, interrupt, plain_append)),
            ("second fails", met(1, fail, plain_write), plain_append),
            ("first, writing", met(0, interrupt, plain_write), plain_append),
            ("second, writing", met(1, interrupt, plain_write), plain_append),
        ):
            InModule.write, timstore.Store.append_rollback = write, append  # type: ignore[method-assign]
            report: Any = None
            try:
                report, raised = store.rollback(model, [1, 5], keep_delta=True), ""
            except BaseException as error:
                report, raised = getattr(error, "report", None), type(error).__name__
            InModule.write, timstore.Store.append_rollback = plain_write, plain_append  # type: ignore[method-assign]
            said[name] = {"raised": raised, "done": report is not None, "model": digests(inner)}
            if digests(inner) != said["start"]:
                with timstore.open(folder / "s") as own:
                    own.undo(inner, report.rollback_id)
            dist.barrier()
            store.refresh()
    (folder / f"said-{rank}.json").write_text(json.dumps(said))


def changed_by_hand(folder: Path) -> None:
    """A communication hook that does not average is refused at the first step."""

    def doubled(state: None, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        return dist.all_reduce(bucket.buffer(), async_op=True).get_future().then(lambda future: future.value()[0])

    model = DistributedDataParallel(network())
    model.register_comm_hook(None, doubled)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with timstore.open(folder / "s") as store:
        try:
            loop(model, store, optimizer, slice(dist.get_rank() * 4, dist.get_rank() * 4 + 4))
        except timstore.StateError as error:
            (folder / f"said-{dist.get_rank()}.json").write_text(json.dumps(error.kind))


class Power(transformers.TrainerCallback):
    """Kills one process in the middle of a step."""

    def __init__(self, step: int) -> None:
        self._step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.process_index == 1 and state.global_step == self._step:
            os.kill(os.getpid(), signal.SIGKILL)


def by_trainer(folder: Path, *, killed_at: int = 0, resume: bool = False) -> None:
    warnings.simplefilter("ignore")
    model = new_model("llama")
    with timstore.open(folder / "s") as store:
        callbacks = [recorder(store), *([Power(killed_at)] if killed_at else [])]
        trained(
            model,
            callbacks,
            folder / "t",
            Rows(rows(masked=False)),
            per_device_train_batch_size=2,
            save_strategy="steps",
            save_steps=2,
            resume=resume or None,
        )
    torch.save(model.state_dict(), folder / f"model-{os.environ['RANK']}.pt")


SCENARIOS = {
    "plain": plain,
    "changed-by-hand": changed_by_hand,
    "disturbed": disturbed,
    "trainer": by_trainer,
    "trainer-killed": lambda folder: by_trainer(folder, killed_at=5),
    "trainer-resumed": lambda folder: by_trainer(folder, resume=True),
}

if __name__ == "__main__":
    torch.set_num_threads(1)
    if not sys.argv[1].startswith("trainer"):
        dist.init_process_group("gloo")
    SCENARIOS[sys.argv[1]](Path(sys.argv[2]))
    if dist.is_initialized():
        dist.destroy_process_group()
