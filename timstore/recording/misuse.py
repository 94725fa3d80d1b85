"""Uses of a recorder that would leave nothing, or what is wrong: noticed as soon as they can be."""

import warnings
import weakref
from collections.abc import Set
from typing import Any, NoReturn

import torch
from torch import nn

from timstore.errors import CoverageError, StateError, TimstoreWarning


class Unentered:
    """Warns at the first optimizer step that is taken after a recorder was made and nobody entered it.

    Args:
        recorded: models that a recorder, be it another one, records now.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, recorded: Set[nn.Module]) -> None:
        self.is_over, self._is_first = False, True
        self._model = weakref.ref(model)
        self._recorded = recorded
        self._hook = optimizer.register_step_pre_hook(self._stepped)

    def end(self) -> None:
        """The recorder was entered."""
        self.is_over = True
        self._hook.remove()

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
