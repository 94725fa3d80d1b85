"""What is different where TRL's trainers train: what they pack, and what their losses take past the model's modules.

TRL is not imported: its trainers are told by what they have.
"""

import inspect
import warnings
from collections.abc import Mapping
from typing import Any

from torch import nn

from timstore.errors import CoverageError, InvalidInputError, TimstoreWarning


def check_packing(args: Any, column: str | None) -> None:
    """Refuse ways to pack in which no row or piece is one example.

    Args:
        args: of the trainer.
        column: that ids are in.

    Raises:
        CoverageError: examples are cut.
        InvalidInputError: the packed rows have lost the column.
    """
    prepared = not (getattr(args, "dataset_kwargs", None) or {}).get("skip_prepare_dataset", False)
    if not getattr(args, "packing", False) or not prepared:
        return
    if args.packing_strategy != "bfd":
        raise CoverageError(
            f"packing_strategy={args.packing_strategy!r} cuts examples in two, and no piece is one: which example a "
            "token belongs to cannot be told. Use packing_strategy='bfd'; or cut the examples yourself, each piece a "
            "row of its own, and pack those"
        )
    if column is not None:
        raise InvalidInputError(
            f"packing=True keeps no column but tokens and labels, and {column!r} is lost: leave id_column out, and "
            "name samples by content_ids(rows); or pack the dataset yourself, with a list of ids in the column, one "
            "for each token, and train with dataset_kwargs={'skip_prepare_dataset': True}",
            kind="no-ids",
        )


def options_for(trainer: Any, model: nn.Module, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of `Store.record` that this trainer needs, for those that were not given.

    Warns:
        TimstoreWarning: one of them has a price.
    """
    options: dict[str, Any] = {}
    if {"chosen_ids", "completion_ids"} & set(getattr(trainer, "_signature_columns", None) or ()):
        options["mean_over"] = "samples"  # of answers; the labels that the model is given are not what the mean counts
    head = None if "capture" in given else _head_past_its_module(model)
    if head is not None:
        options["capture"] = "per-sample"
        name, tied = head
        warnings.warn(
            f"{type(trainer).__name__} takes its loss from {name} directly, past the module: recorded with "
            "capture='per-sample', by one more backward pass for each recorded sample, "
            + ("through the whole model, since the embeddings are tied to it" if tied else "to this parameter alone")
            + ", whose gradients are kept whole. Training with LoRA needs none of it; pass capture='per-sample' to "
            "accept it without this warning",
            TimstoreWarning,
            stacklevel=4,
        )
    return options


def _head_past_its_module(model: nn.Module) -> tuple[str, bool] | None:
    """Return the trained weight that a fused language head uses directly, and whether it is the embeddings' too."""
    whole: Any = model
    base = whole.get_base_model() if hasattr(whole, "get_base_model") else whole
    # Accelerate puts its own forward around it where there is autocast.
    forwards = (vars(base).get("forward"), vars(base).get("_original_forward"))
    if not any(one is not None and "fused_lm_head" in _named_by(one) for one in forwards):
        return None
    weight = getattr(base.get_output_embeddings(), "weight", None)
    if not isinstance(weight, nn.Parameter) or not weight.requires_grad:
        return None
    name = next(name for name, one in model.named_parameters() if one is weight)
    return name, getattr(base.get_input_embeddings(), "weight", None) is weight


def _named_by(forward: Any) -> Mapping[str, Any]:
    # Not of the forward that it says it wraps.
    return inspect.signature(forward, follow_wrapped=False).parameters
