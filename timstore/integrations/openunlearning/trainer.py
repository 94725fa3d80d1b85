"""What both trainers are: made by OpenUnlearning as its own, and told by `method_args` what to do."""

import inspect
import re
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, field, fields
from functools import cache
from typing import Any, ClassVar, Self

from transformers import Trainer

from timstore.arguments import choice, flags, positive_number
from timstore.errors import InvalidInputError, TimstoreError
from timstore.options import RecordOptions, RollbackOptions

AUTO = "auto"
METHOD = "trainer.method_args."


class _Arguments:
    """Arguments of ours among those of a Trainer: fields, and options of the library, which has defaults and checks.

    Attributes:
        NAMES: what an option of the library is called here, and there.
    """

    NAMES: ClassVar[Mapping[str, str]]
    OPTIONS: ClassVar[type[RecordOptions] | type[RollbackOptions]]

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """Return every argument with its default, `MISSING` where there is none."""
        own = {one.name: one.default for one in fields(cls) if one.name != "options"}  # type: ignore[arg-type]
        library = {one.name: one.default for one in fields(cls.OPTIONS)}
        return own | {name: library[option] for name, option in cls.NAMES.items()}

    @classmethod
    def taken_from(cls, given: dict[str, Any]) -> Self:
        """Take ours out of a trainer's keyword arguments, which keep the rest.

        Raises:
            InvalidInputError: one is missing, or cannot be right.
        """
        for name, default in cls.defaults().items():
            if default is MISSING and given.get(name) is None:
                raise InvalidInputError(f"say where the trajectories are: {METHOD}{name}=...")
        options = {option: given.pop(name) for name, option in cls.NAMES.items() if name in given}
        own = {name: given.pop(name) for name in cls.defaults() if name in given}
        checked = cls.OPTIONS(**options)
        return cls(**own, options={name: getattr(checked, name) for name in options})  # type: ignore[call-arg]


@dataclass(frozen=True, slots=True, kw_only=True)
class RecorderArguments(_Arguments):
    """What `TIMRecorder` records, and how.

    Attributes:
        tim_output_dir: gets the store `trajectories.tim`.
        samples: ids to record, the path of a JSON file with a list of them, or OpenUnlearning's configuration of a data
            set, whose rows are recorded; all rows when None.
        precision, max_rel_error: of `timstore.open`.
        options: of `timstore.Store.record`, those that were given.
    """

    OPTIONS = RecordOptions
    NAMES: ClassVar = {name: name for name in ("optimizer_history", "waypoints", "capture", "allow_zero", "probe")}

    tim_output_dir: str
    samples: Any = None
    precision: str | None = None
    max_rel_error: float | None = None
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class RollbackArguments(_Arguments):
    """How `TIMParameterRollback` rolls back.

    Attributes:
        tim_output_dir: the one that `TIMRecorder` or `save_gradient_trajectory` wrote into, one of the older layout, or
            a store.
        trajectory_format: `timstore`, `json` or `pickle`; `auto` is whatever is there.
        id_map: the samples' ids by the number of the row in the forget split, as a mapping or a list, or the path of a
            JSON file with one; where None, rows are known by their tokens, or by their count in an older layout.
        probe: `auto`, what the store keeps, or where it keeps nothing that can be asked, 64 rows of the retain split;
            a number, so many rows of the retain split; None for none, which is first order only.
        lr, scale, allow_pickle: of `import_trajectories`, for an older layout.
        train_after: train on the retain split when the rollback is done.
        options: of `timstore.Store.rollback`, those that were given. `missing`, of forget rows, is one of them.
    """

    OPTIONS = RollbackOptions
    NAMES: ClassVar = {
        "rollback_strength": "strength",
        **{name: name for name in ("missing", "method", "denominator", "memory_limit", "keep_delta", "force")},
    }

    tim_output_dir: str
    trajectory_format: str = AUTO
    id_map: Any = None
    probe: int | str | None = AUTO
    lr: float | None = None
    scale: float | None = None
    allow_pickle: bool = False
    train_after: bool = False
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        choice(self.trajectory_format, (AUTO, "timstore", "json", "pickle"), "trajectory_format")
        flags(allow_pickle=self.allow_pickle, train_after=self.train_after)
        if self.probe not in (None, AUTO):
            positive_number(self.probe, f"probe, unless it is {AUTO} or null, the number of rows of the retain split,")


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
        names = ("tokenizer", "processing_class")
        takes = inspect.signature(Trainer.__init__).parameters
        for name, other in (names, names[::-1]):
            if name in kwargs and name not in takes:
                kwargs[other] = kwargs.pop(name)
        super().__init__(*args, **kwargs)
        if not hasattr(type(self), "tokenizer") and not hasattr(self, "tokenizer"):
            self.tokenizer = self.processing_class  # what its evaluators ask for


@cache
def _joined(ours: Any, theirs: Any) -> type[Any]:
    return type(ours.__name__, (ours, theirs), {"__doc__": ours.__doc__, "__module__": ours.__module__})


# The library's messages name options as Python spells them, `name=value`; here they are keys of a configuration.
_KEYS = {"torch_dtype": "model.model_args.torch_dtype"} | {
    kind.NAMES.get(name, name): METHOD + name
    for kind in (RecorderArguments, RollbackArguments)
    for name in kind.defaults()
}
_OPTION = re.compile(rf"(?<![\w.])({'|'.join(_KEYS)})=('?)([\w-]*)\2")
_VALUES = {"True": "true", "False": "false", "None": "null"}


def spelled(message: str) -> str:
    """Return a message with keys as a command line sets them, `trainer.method_args.force=true`, for options."""
    return _OPTION.sub(lambda match: f"{_KEYS[match[1]]}={_VALUES.get(match[3], match[3])}", message)


@contextmanager
def errors_spelled() -> Iterator[None]:
    """Have our errors name keys."""
    try:
        yield
    except TimstoreError as error:
        error.args = (spelled(str(error)),)
        raise


@contextmanager
def warnings_spelled() -> Iterator[None]:
    """Have warnings name keys; they come when the block ends."""
    caught: list[warnings.WarningMessage] = []
    try:
        with warnings.catch_warnings(record=True) as caught:
            yield
    finally:
        for warning in caught:
            warnings.warn_explicit(spelled(str(warning.message)), warning.category, warning.filename, warning.lineno)
