"""Looking at a batch go through the model before it is recorded: where does each module have the samples?

The sum of all gradients cannot see a batch axis in the wrong place when there are as many tokens as rows. So the batch
is run again with its rows in another order, and with one row fewer: what each module is given, what it returns and what
the model returns must change order and shrink alike. What the model returns for the rows that are left, and its loss,
must be the same: else samples are tied together.

Tokens that are routed, as to experts, may be as many as samples by chance. So where a module has tokens in one axis
with the samples, or one of each, the batch is also run with other tokens: each row's own, drawn again at random.

The model runs in its own mode, with gradients, as it is about to, but drops nothing out. Where chance has another part
in what a module is given, nothing can be compared: that module is looked at in eval mode.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from timstore.errors import CoverageError
from timstore.model.eval_guard import undisturbed
from timstore.recording.batches import token_counts
from timstore.recording.calm import calm, other_numbers
from timstore.recording.layouts import Axis, Folded, Layout
from timstore.recording.outputs import outputs_of
from timstore.recording.own_rows import has_own_rows
from timstore.recording.watching import Place, Sizes, Watch, places_of, unlike

# Of a loss, that rounding may make of its parts.
_ADDS_UP = 1e-2
# Changes an argument of the model, given the axis of its rows.
Turn = Callable[[torch.Tensor, int], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Look:
    """What was seen.

    Attributes:
        places: where each module, and each of the model's outputs, has the samples; None where they cannot be seen.
        batched: of the model's arguments, by place or name, whether they have the batch's rows.
        tables: of those that are looked up by one row of ids for all samples, whether a row for each does the same.
        tied: what the model returns for a sample depends on others, or its loss is not a mean or a sum over samples.
    """

    places: dict[str, Place | None]
    batched: dict[int | str, bool]
    tables: dict[str, bool]
    tied: bool

    def layout(self, name: str, shape: torch.Size, rows: int, sizes: Sizes) -> Layout | None:
        """Return where a module that is given a tensor of this shape has the samples, None where that is not known.

        A module that was not seen is not known: it may have its input from anywhere.
        """
        place = self.places.get(name)
        if place is None or not place.tokens:
            return None if place is None else place.layout
        count, rest = divmod(shape[0], rows)
        # Of other lengths than those that were seen: some argument must have them too. Where tokens are chosen by what
        # they hold, as for an expert, their number fits only by chance.
        expected = {place.tokens} if sizes == place.sizes else {size[0] for size in sizes if size}
        return place.layout if not rest and count in expected else None

    def moved(self, later: "Look") -> list[str]:
        """Return the modules that have the samples elsewhere in a later look."""
        pairs = [(name, self.places.get(name), place) for name, place in later.places.items()]
        both = [(name, was.layout, now.layout) for name, was, now in pairs if was is not None and now is not None]
        return [name for name, was, now in both if was != now and not _may_be_one(was, now)]

    def and_then(self, later: "Look") -> "Look":
        """Return a later look, and this one of what was not seen in it; what was nowhere once stays so.

        An expert may get a token of each sample, in order, by chance.
        """
        places = {**self.places, **later.places}
        for name, was in self.places.items():
            now = later.places.get(name)
            if was is None:
                places[name] = None
            elif now is not None and was.tokens and now.layout == Axis(0):
                places[name] = Place(was.layout, 1, now.sizes)
        tables = {**self.tables, **{name: one and self.tables.get(name, True) for name, one in later.tables.items()}}
        batched = {**later.batched, **self.batched}
        return replace(later, places=places, batched=batched, tables=tables, tied=self.tied or later.tied)


def _may_be_one(one: Layout, other: Layout) -> bool:
    """Say whether these are the same of samples of one token: tokens in one axis with them, and they alone."""
    return Axis(0) in (one, other) and (isinstance(one, Folded) or isinstance(other, Folded))


def output_name(path: str) -> str:
    """Return the name in `Look.places` of one of the model's outputs."""
    return f"output {path}"


@dataclass(frozen=True, slots=True)
class _Run:
    """One forward pass.

    Attributes:
        loss: that the model returned, None where it did not.
        counts: samples, tokens and one: what the loss may have been divided by.
    """

    watch: Watch
    loss: float | None
    counts: tuple[int, int, int]


class Trial:
    """A batch, to be run through the model in several ways.

    Args:
        args, kwargs: of the model, for a batch of `rows` samples, 2 or more.
        capture: whose hooks tell.
        axis: of the batch in the model's arguments.
        before: what was seen of another batch: the two passes of fewer rows are left out.
    """

    def __init__(
        self,
        model: nn.Module,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        rows: int,
        capture: Any,
        axis: int,
        before: Look | None,
    ) -> None:
        self._before = before
        self._known = {} if before is None else before.places
        self._model = model
        self._args = args
        self._kwargs = kwargs
        self._rows = rows
        self._capture = capture
        self._axis = axis
        # An argument may have as many rows by chance, which it had not before.
        before_that = {} if before is None else before.batched
        given: dict[int | str, Any] = {}
        given.update(enumerate(args))
        given.update(kwargs)
        self._batched = {
            key: before_that.get(key, True) and _batch_axis(value, rows, axis) is not None
            for key, value in given.items()
        }
        self._sizes = sizes_of(args, kwargs, rows, axis)
        self._order = _order(rows)
        self._spread: frozenset[str] = frozenset()

    def look(self) -> Look:
        """See where the samples are.

        Cost: four forward passes, one of them of one row; two more where tokens may be routed, three and two backward
        passes for a table that is looked up by one row of ids, and as many again where chance has a part in them. The
        model and the generators of random numbers are left as they were.

        Raises:
            CoverageError: the model does not take rows in another order.
        """
        found, straight = self._look(evaluate=False)
        unseen = self._capture.names - found.places.keys()
        if not unseen and not found.tied and None not in found.places.values():
            return found
        with undisturbed(self._model, evaluate=False), calm():
            other_numbers()
            chancy = unlike(straight, self._run(self._rows, _as_it_is).watch)
        if not chancy and not unseen:
            return found
        # Also layers that are left out by chance, or without noise.
        at_rest, _ = self._look(evaluate=True)
        calmer = {name: at_rest.places[name] for name in chancy | unseen if name in at_rest.places}
        return replace(found, places={**found.places, **calmer}, tied=at_rest.tied if chancy else found.tied)

    def _look(self, *, evaluate: bool) -> tuple[Look, Watch]:
        """Return where the samples are in one mode, and the pass of the batch as it is."""
        with undisturbed(self._model, evaluate=evaluate) as rewind, calm():
            whole = self._run(self._rows, _as_it_is)
            tables = {name: self._takes_rows(name, rewind, whole) for name in whole.watch.tables}
            self._spread = frozenset(name for name, alike in tables.items() if alike)
            rewind()
            if self._spread:
                whole = self._run(self._rows, _as_it_is)
                rewind()
            try:
                mixed = self._run(self._rows, _in_order(self._order, _as_it_is))
            except Exception as error:
                raise CoverageError(
                    f"{type(self._model).__name__} cannot run the batch with its rows in another order, by which is "
                    f"found where the samples are ({type(error).__name__}: {error}). Let it take rows in any order "
                    "(pack_padded_sequence: enforce_sorted=False)",
                    kind="order-check",
                ) from error
            fewer = self._part(rewind, 0, self._rows - 1)
            last = self._part(rewind, self._rows - 1, 1)
            known, sizes = self._known, self._sizes
            places = places_of(whole.watch, mixed.watch, (fewer or whole).watch, self._order, known, sizes)
            tied = fewer is not None and last is not None and _tied(whole, [fewer, last], places)
            tied |= self._before is not None and self._before.tied
            if self._has_tokens() and _may_be_routed(whole.watch, places, sizes):
                places |= self._denied(rewind, places, whole.watch, _draw(self._rows, sizes), self._order)
            if self._rows == 2 and not tied and not self._capture.warns_of_coupling:
                # The one other order of two rows is also what a model may put them in.
                places |= self._denied(
                    rewind, places, whole.watch, _as_it_is, torch.zeros(2, dtype=torch.int64, device="cpu")
                )
        return Look(places, self._batched, tables, tied), whole.watch

    def _takes_rows(self, name: str, rewind: Callable[[], None], plain: _Run) -> bool:
        """Say whether a table that is looked up by one row of ids, (1, T), can be by as many as the batch has.

        That takes nothing away from what the model returns, and what comes back from one sample comes to its row: not
        of a table of which the model then takes the first row.
        """
        rewind()
        watch = Watch(self._rows, {name})
        try:
            self._forward(*self._turned(_as_it_is), watch)
        except Exception:  # what it does with one row, it cannot do with more
            return False
        if any(one.startswith(output_name("")) for one in unlike(plain.watch, watch)):
            return False
        for evaluate in (False, True):  # a model leaves checkpoints out when it does not train
            try:
                with undisturbed(self._model, evaluate=evaluate) as again:
                    return has_own_rows(partial(self._tensors, name, again), self._rows, self._axis)
            except RuntimeError:  # of a reentrant checkpoint, which cannot be asked for gradients in it
                continue
        return False

    def _tensors(
        self, name: str, rewind: Callable[[], None], order: torch.Tensor | None
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Return what the model, and a table that is given a row for each sample, returned for rows in some order."""
        rewind()
        watch = Watch(self._rows, {name})
        returned = self._forward(*self._turned(_as_it_is if order is None else _in_order(order, _as_it_is)), watch)
        return [one for one in outputs_of(returned).values() if one.requires_grad], watch.tables[name]

    def _run(self, count: int, turn: Turn) -> _Run:
        """Run the model with its arguments changed so that they hold `count` rows."""
        watch = Watch(count, self._spread)
        args, kwargs = self._turned(turn)
        returned = self._forward(args, kwargs, watch)
        loss = getattr(returned, "loss", None)
        loss = float(loss.detach()) if isinstance(loss, torch.Tensor) and loss.numel() == 1 else None
        tokens = token_counts(self._model, kwargs, count)
        return _Run(watch, loss, (count, 0 if tokens is None else int(tokens.sum()), 1))

    def _forward(self, args: Sequence[Any], kwargs: Mapping[str, Any], watch: Watch) -> Any:
        """Return what the model returns for these arguments, watched."""
        self._capture.watch = watch
        try:
            returned = self._model(*args, **kwargs)
        finally:
            self._capture.watch = None
        for path, tensor in outputs_of(returned).items():
            if tensor.ndim:
                watch.note(output_name(path), tensor)
        return returned

    def _turned(self, turn: Turn) -> tuple[list[Any], dict[str, Any]]:
        """Return the model's arguments, changed."""

        def turned(key: int | str, value: Any) -> Any:
            # Copies: a model may change what it is given.
            if not self._batched[key]:
                return value.clone() if isinstance(value, torch.Tensor) else value
            place = _batch_axis(value, self._rows, self._axis)
            assert place is not None
            return turn(value, place).clone()

        positional = [turned(key, value) for key, value in enumerate(self._args)]
        return positional, {name: turned(name, value) for name, value in self._kwargs.items()}

    def _part(self, rewind: Callable[[], None], first: int, count: int) -> _Run | None:
        if self._before is not None:
            return None
        rewind()
        try:
            return self._run(count, lambda value, place: value.narrow(place, first, count))
        except Exception:  # a model may be made for one size of batch
            return None

    def _has_tokens(self) -> bool:
        """Whether an argument is ids (rows, tokens) or states (rows, tokens, d)."""
        given = [
            one for one in (*self._args, *self._kwargs.values()) if _batch_axis(one, self._rows, self._axis) is not None
        ]
        return any(one.ndim == (3 if one.is_floating_point() else 2) for one in given)

    def _denied(
        self,
        rewind: Callable[[], None],
        places: Mapping[str, Place | None],
        whole: Watch,
        change: Turn,
        order: torch.Tensor,
    ) -> dict[str, None]:
        """Return the modules that do not have the samples there with changed rows, or in this order of them."""
        try:
            if change is not _as_it_is:
                rewind()
                whole = self._run(self._rows, change).watch
            rewind()
            mixed = self._run(self._rows, _in_order(order, change)).watch
        except Exception:  # a model may refuse such rows
            return {}
        again = places_of(whole, mixed, whole, order, places, self._sizes)
        return {name: None for name in again if places.get(name) != again[name]}


def sizes_of(args: tuple[Any, ...], kwargs: Mapping[str, Any], rows: int, axis: int) -> Sizes:
    """Return the shapes of the model's arguments for one sample."""
    found = []
    for value in (*args, *kwargs.values()):
        place = _batch_axis(value, rows, axis)
        if place is not None:
            found.append((*value.shape[:place], *value.shape[place + 1 :]))
    return tuple(found)


def _as_it_is(value: torch.Tensor, place: int) -> torch.Tensor:
    return value


def _in_order(order: torch.Tensor, change: Turn) -> Turn:
    return lambda value, place: change(value, place).index_select(place, order.to(value.device))


def _order(rows: int) -> torch.Tensor:
    """Return another order of the rows, always the same and of no pattern that a model may have as well."""
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(rows), device="cpu")
    return order.roll(1) if torch.equal(order, torch.arange(rows, device="cpu")) else order


def _may_be_routed(seen: Watch, places: Mapping[str, Place | None], sizes: Sizes) -> bool:
    for name, place in places.items():
        if place is not None and not name.startswith(output_name("")):
            sample = tuple(seen.calls[name][0][place.layout][0])
            if place.tokens or (len(sample) == 1 and sample not in sizes):
                return True
    return False


def _draw(rows: int, sizes: Sizes) -> Callable[[torch.Tensor, int], torch.Tensor]:
    """Return what draws each row's tokens again from its own, the same ones of every argument."""
    lengths = [size[0] for size in sizes if size]
    length = max(set(lengths), key=lengths.count, default=0)
    draw = torch.Generator().manual_seed(rows)
    chosen = torch.randint(max(1, length), (rows, length), generator=draw, device="cpu")

    def drawn(value: torch.Tensor, place: int) -> torch.Tensor:
        moved = value.movedim(place, 0)
        if moved.ndim < 2 or moved.shape[1] != length:
            return value
        of_each = torch.arange(rows, device=value.device)[:, None], chosen.to(value.device)
        return moved[of_each].movedim(0, place)

    return drawn


def _tied(whole: _Run, parts: Sequence[_Run], places: Mapping[str, Place | None]) -> bool:
    """Say whether the model returns something else for a batch than for its parts, the first rows and the last one."""
    losses = [(one.loss, one.counts) for one in parts if one.loss is not None]
    if whole.loss is not None and len(losses) == len(parts):
        wanted = [whole.loss * count for count in whole.counts]
        sums = [sum(loss * counts[unit] for loss, counts in losses) for unit in range(3)]
        off = [abs(one - other) for one, other in zip(wanted, sums, strict=True)]
        known = [unit for unit, count in enumerate(whole.counts) if count]
        if not any(off[unit] <= _ADDS_UP * abs(wanted[unit]) for unit in known):
            return True
    for name, (call, *_) in whole.watch.calls.items():
        place = places.get(name)
        if name.startswith(output_name("")) and place is not None:
            found = [part.watch.calls.get(name, [{}])[0].get(place.layout) for part in parts]
            (summary,) = call[place.layout][1]
            apart = [one[1][0].numbers for one in found if one is not None]
            if len(apart) == len(parts) and summary.differs_from(replace(summary, numbers=torch.cat(apart))):
                return True
    return False


def _batch_axis(value: Any, rows: int, axis: int) -> int | None:
    if not isinstance(value, torch.Tensor):
        return None
    places = (axis, 0) if axis else (0,)
    return next((place for place in places if value.ndim > place and value.shape[place] == rows), None)
