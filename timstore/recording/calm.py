"""Running a model as it is, but for dropout."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

_DROPOUTS = {f"{kind}dropout{end}" for kind in ("", "alpha_", "feature_", "feature_alpha_") for end in ("", "_")}
_DROPOUTS |= {"dropout1d", "dropout2d", "dropout3d"}


@contextmanager
def calm() -> Iterator[None]:
    """Run without dropout, and without the fast path of torch's own Transformer layers, which calls no children."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with _NothingDropped():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


def other_numbers() -> None:
    """Let every generator go on from elsewhere."""
    torch.manual_seed(torch.initial_seed() ^ 0x2545F491)
    random.seed(random.getrandbits(32))
    np.random.seed(np.random.randint(2**31))


class _NothingDropped(torch.overrides.TorchFunctionMode):
    """Leaves out dropout, of whatever module or function: it has no order of rows."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        if name in _DROPOUTS:
            given = args[0] if args else kwargs["input"]
            # A tensor of its own, as dropout returns: what is done to it in place is done to no other.
            return given if name.endswith("_") or kwargs.get("inplace") else given.clone()
        if name == "scaled_dot_product_attention":
            if len(args) > 4:
                args = (*args[:4], 0.0, *args[5:])
            else:
                kwargs = {**kwargs, "dropout_p": 0.0}
        return func(*args, **kwargs)
