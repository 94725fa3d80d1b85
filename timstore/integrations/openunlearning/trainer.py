"""What our trainers inherit from: the checkout's own FinetuneTrainer where one is loaded, else the Trainer itself."""

import inspect
import sys
from functools import cache
from typing import Any, Self

from transformers import Trainer

NAMES = ("tokenizer", "processing_class")


class OpenUnlearningTrainer(Trainer):
    """A Trainer that OpenUnlearning's `load_trainer` can make, of any revision, with transformers 4.45 to 5.

    OpenUnlearning's evaluators and whatever else it gives its trainers are the business of its FinetuneTrainer, which
    cannot be imported here. So the class is settled when a trainer is made, by which time OpenUnlearning is loaded: the
    new trainer is of a class that inherits from this one and from that FinetuneTrainer. Without OpenUnlearning it is a
    plain Trainer.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        theirs: Any = getattr(sys.modules.get("trainer"), "FinetuneTrainer", None)
        is_trainer = isinstance(theirs, type) and issubclass(theirs, Trainer)
        ours: Any = cls
        kind = _joined(ours, theirs) if is_trainer and not issubclass(ours, theirs) else ours
        return super().__new__(kind)  # type: ignore[no-any-return]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # OpenUnlearning's revisions and those of transformers each have a name of their own for it.
        takes = inspect.signature(Trainer.__init__).parameters
        for name, other in (NAMES, NAMES[::-1]):
            if name in kwargs and name not in takes:
                kwargs[other] = kwargs.pop(name)
        super().__init__(*args, **kwargs)
        if not hasattr(type(self), "tokenizer") and not hasattr(self, "tokenizer"):
            self.tokenizer = self.processing_class  # what its evaluators ask for


@cache
def _joined(ours: Any, theirs: Any) -> type[Any]:
    return type(ours.__name__, (ours, theirs), {"__doc__": ours.__doc__, "__module__": ours.__module__})
