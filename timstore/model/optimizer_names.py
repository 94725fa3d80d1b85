"""Optimizer classes by the names they are recorded under."""

from collections.abc import Iterable

import torch

SGD_FAMILY, ADAM_FAMILY = ("SGD",), ("Adam", "AdamW")

# Their steps treat every element by itself, so that a parameter may be taken in blocks; others need whole matrices.
ELEMENTWISE = frozenset(
    ("SGD", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "Adagrad", "Adadelta", "RMSprop", "Rprop", "ASGD")
)


def class_name(kind: type) -> str:
    """Return torch's own classes by their name alone; a namesake or a subclass may step differently."""
    return kind.__name__ if getattr(torch.optim, kind.__name__, None) is kind else f"{kind.__module__}.{kind.__name__}"


def class_of(name: str, given: Iterable[torch.optim.Optimizer]) -> type[torch.optim.Optimizer] | None:
    """Return the class that was recorded under a name, None if it is not known.

    Args:
        given: optimizers, one of them of that class, if it is not one of torch's own.
    """
    own = next((type(one) for one in given if class_name(type(one)) == name), None)
    found = own or getattr(torch.optim, name, None)
    return found if isinstance(found, type) else None
