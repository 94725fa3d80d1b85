"""Uses of a recorder that leave nothing, or what is wrong: noticed as soon as they can be, or told at the end."""

import warnings
import weakref
from collections.abc import Collection, Iterable, Sequence, Set
from typing import Any, NoReturn

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from timstore.database.store import Store
from timstore.errors import CoverageError, StateError, TimstoreWarning

# Of samples that never came, so many are named.
_NAMED = 5


class Unentered:
    """Warns at the first optimizer step that is taken after a recorder was made and nobody entered it.

    Args:
        recorded: models that a recorder, be it another one, records now.
    """

    def __init__(self, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], recorded: Set[nn.Module]) -> None:
        self.is_over, self._is_first = False, True
        self._model = weakref.ref(model)
        self._recorded = recorded
        self._hooks = [one.register_step_pre_hook(self._stepped) for one in optimizers]

    def end(self) -> None:
        """The recorder was entered."""
        self.is_over = True
        for hook in self._hooks:
            hook.remove()

    def check(self) -> None:
        """Refuse what only a recorder that records can do.

        Raises:
            StateError: the recorder was never entered.
        """
        if not self.is_over:
            raise StateError(
                "this recorder records nothing yet: train within `with store.record(...) as recorder:`",
                kind="not-recording",
            )

    def _stepped(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        first, self._is_first = self._is_first, False
        if first and self._model() not in self._recorded:
            warnings.warn(
                "a recorder was made and never entered, so nothing of this training is recorded: train within "
                "`with store.record(...) as recorder:`",
                TimstoreWarning,
                stacklevel=4,
            )


def refuse_compiled(*_: Any) -> None:
    """A hook before a recorded model's forward pass: within a compiled function it is traced, and asks to be run."""
    if torch.compiler.is_compiling():
        _refuse_compiled()


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _refuse_compiled() -> NoReturn:
    raise CoverageError(
        "what calls the recorded model is compiled (torch.compile), and a forward pass in it is out of reach of hooks: "
        "compile neither the model nor the function that computes the loss",
        kind="compiled",
    )


def note_compiled(error: BaseException | None) -> None:
    """Say beside an error of the compiler what brought it about: a function compiled whole cannot leave its graph."""
    if error is not None and type(error).__module__.startswith("torch._dynamo"):
        error.add_note(
            "timstore: a recorded model cannot be called by what is compiled (torch.compile): compile neither it nor "
            "the function that computes the loss"
        )


class Drawn:
    """Sees what is drawn, and warns of what never was: a recording that holds nothing looks like one that does.

    Args:
        optimizers: those that were given.
        parameters: the trained ones.
        chosen: the ids to record, None for all.
        by_content: samples are known by what their rows consist of.
    """

    def __init__(
        self,
        store: Store,
        model: nn.Module,
        optimizers: Sequence[torch.optim.Optimizer],
        parameters: Iterable[nn.Parameter],
        chosen: Collection[int] | None,
        *,
        by_content: bool,
    ) -> None:
        self._store = store
        self._model = type(model).__name__
        self._chosen = chosen
        self._missing = set(chosen or ())
        self._by_content = by_content
        self._owned = frozenset(map(id, parameters))
        self._idle = {id(one): one for one in optimizers}
        self._given = frozenset(self._idle)
        self._others: set[str] = set()
        self._is_run = self._is_stepped = self._told_of_epoch = False
        self._lowest, self._highest = 2**63, -1
        self._handles: list[Any] = [
            model.register_forward_pre_hook(self._passed),
            register_optimizer_step_post_hook(self._stepped),
        ]

    def remove(self) -> None:
        """Leave no hook behind."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def took(self, ids: Sequence[int]) -> None:
        """A step was taken, over these samples."""
        self._is_stepped = True
        self._missing.difference_update(ids)
        if ids:
            self._lowest, self._highest = min(self._lowest, *ids), max(self._highest, *ids)

    def epoch_over(self, epoch: int) -> None:
        """Warn at the end of the first epoch, rather than of the whole training."""
        if self._is_run and not self._told_of_epoch:
            self._told_of_epoch = True
            self._tell(f"epoch {epoch} is over, and ", stacklevel=4)

    def end(self, *, refresh: bool = False) -> None:
        """Warn at the end.

        Args:
            refresh: other processes wrote into the store.
        """
        if refresh and self._missing:
            self._store.refresh()
        self._tell("", stacklevel=5)

    def _passed(self, model: nn.Module, args: Any) -> None:
        self._is_run |= torch.is_grad_enabled()

    def _stepped(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        self._idle.pop(id(optimizer), None)
        if self._idle and id(optimizer) not in self._given:
            trained = (id(one) for group in optimizer.param_groups for one in group["params"])
            if not self._owned.isdisjoint(trained):
                self._others.add(type(optimizer).__name__)

    def _tell(self, when: str, stacklevel: int) -> None:
        said = self._of_steps() or self._of_samples()
        if said:
            warnings.warn(f"{when}{said}", TimstoreWarning, stacklevel=stacklevel)

    def _of_steps(self) -> str:
        if self._idle:
            names = " and the ".join(type(one).__name__ for one in self._idle.values())
            return f"nothing was recorded of the {names} that was given: its step() was never called{self._instead()}"
        if not self._is_stepped:
            return "nothing was recorded: every step was skipped, since its gradients were infinite or NaN"
        return ""

    def _instead(self) -> str:
        if self._others:
            others = " and ".join(sorted(self._others))
            return f". The steps of this model were those of another optimizer ({others}): give that one to record()"
        if self._is_run:
            return (
                ", though the model ran. Give record() the optimizer whose step() is called: wrappers (SAM, Lookahead, "
                "a framework's own) call that of another one inside. A GradScaler skips steps whose gradients are "
                "infinite or NaN"
            )
        return (
            f", nor was the {self._model} that was given. If anything was trained, it was another model: give record() "
            "the one that the loop calls, not a copy of it"
        )

    def _of_samples(self) -> str:
        missing = sorted(self._missing - self._recorded_before()) if self._missing else []
        if not missing:
            return ""
        assert self._chosen is not None
        named = ", ".join(map(str, missing[:_NAMED])) + (", ..." if len(missing) > _NAMED else "")
        return (
            f"{len(missing)} of the {len(self._chosen)} chosen samples were never in a recorded step, and nothing of "
            f"them can be rolled back: {named}. {self._cause(len(missing) == len(self._chosen))}"
        )

    def _cause(self, all_missing: bool) -> str:
        if self._by_content:
            return (
                "Rows are known by their tokens: take content_ids of the very rows that are trained on (the same "
                "tokenizer, template and truncation)"
            )
        came = f"The batches seen here held ids from {self._lowest} to {self._highest}"
        if all_missing:
            return f"{came}: choose samples by the ids that the batches carry, not by places in another list"
        return f"{came}: a sampler, a split or drop_last=True may have left these out, or an id is wrong"

    def _recorded_before(self) -> set[int]:
        """Return which of the missing came before this recording, or in another process."""
        rows = self._store.snapshot().catalog.rows(
            "SELECT DISTINCT sample FROM (SELECT sample FROM records UNION ALL SELECT unnest(sample_ids) FROM steps) "
            "WHERE sample IN (SELECT unnest(?::BIGINT[]))",
            [sorted(self._missing)],
        )
        return set(rows["sample"].to_pylist())
