"""The library's messages name arguments as Python spells them; here they are keys of a configuration."""

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields

from timstore.errors import TimstoreError
from timstore.integrations.openunlearning.arguments import RecorderArguments, RollbackArguments

METHOD = "trainer.method_args."
_KEYS = {one.name: METHOD + one.name for kind in (RecorderArguments, RollbackArguments) for one in fields(kind)}
_KEYS |= {"strength": METHOD + "rollback_strength", "torch_dtype": "model.model_args.torch_dtype"}
# `name=` and the value behind it, if there is one.
_ARGUMENT = re.compile(rf"(?<![\w.])({'|'.join(_KEYS)})=('?)([\w-]*)\2")
_VALUES = {"True": "true", "False": "false", "None": "null"}


def spelled(message: str) -> str:
    """Return a message with keys as a command line sets them, `trainer.method_args.force=true`, for arguments."""
    return _ARGUMENT.sub(lambda found: f"{_KEYS[found[1]]}={_VALUES.get(found[3], found[3])}", message)


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
        for one in caught:
            warnings.warn_explicit(spelled(str(one.message)), one.category, one.filename, one.lineno)
