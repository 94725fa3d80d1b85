"""Hooks on the model's modules: inputs going forward, gradients coming back, parts of each sample out.

A hook is a tensor's or a module's and holds neither the output nor, once its gradient has come, the input.
"""

import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from timstore.errors import CoverageError, InvalidInputError, StateError, TimstoreWarning
from timstore.model.eval_guard import RandomState, undisturbed
from timstore.options import Capture as CaptureMode
from timstore.recording.attention import Projections
from timstore.recording.batch_axis import CANDIDATES, Axis, Folded, Layout, Whole
from timstore.recording.batches import MicroBatch
from timstore.recording.buffers import Buffers
from timstore.recording.calls import Arguments, Autocast, Call, Input, with_each_tensor
from timstore.recording.checks import something_else
from timstore.recording.kinds import hooked_modules
from timstore.recording.modules import EmbeddingKind, Kind
from timstore.recording.pending import OwnPass, Running
from timstore.recording.proof import Evidence, Places, Proof, Prover
from timstore.recording.recomputed_modules import BatchNormKind

WAY_OUT = "freeze it, or record with capture='per-sample' (one more backward pass for each recorded sample)"


class Capture:
    """Puts the hooks on and takes them off.

    Args:
        parameters: the ones to capture, by name.
        running: which micro-batch runs.
        own: passes of our own, of which hooks take nothing; but for a proof's, which the proof itself is told of.
        mode: what no module's hook can see is refused (`modules`), or left to a backward pass of each sample: with a
            warning of the price (`auto`) or without (`per-sample`).
        scale: of the gradients that arrive in those that the optimizer consumes: 1 / ranks.

    Attributes:
        places: where modules, and the model's outputs, have the samples.
        used_directly: parameters, by identity, that something else than their modules uses.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        running: Running,
        own: OwnPass,
        *,
        mode: CaptureMode = "auto",
        scale: float = 1.0,
    ) -> None:
        self._model = model
        self._parameters = parameters
        self._trained = {id(parameter) for parameter in parameters.values()}
        self._running = running
        self._own = own
        self.mode = mode
        self._scale = scale
        self.buffers = Buffers()
        self.places = Places()
        self.used_directly: set[int] = set()
        self._prover = Prover(parameters, self.buffers, scale, own)
        self._partners: dict[str, str] = {}
        self._agreed: set[str] = set()
        self._trusted: set[str] = set()
        self._warned: set[str] = set()
        self._kinds: list[Kind] = []
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        try:
            for kind in hooked_modules(model, lambda one: id(one) in self._trained, self.replaying):
                if isinstance(kind, Kind):
                    self._hook(kind)
                else:
                    self._hook_attention(*kind)
        except BaseException:
            self.remove()
            raise

    def remove(self) -> None:
        """Leave no hook behind."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    @property
    def warns_of_coupling(self) -> bool:
        """Whether a module that mixes samples says so itself."""
        return any(isinstance(kind, BatchNormKind) and kind.mixes for kind in self._kinds)

    @property
    def is_replaying(self) -> bool:
        """Whether a module is being computed again, or differentiated once more, by ourselves."""
        return self._own.runs()

    def replaying(self) -> AbstractContextManager[None]:
        """Let no hook of ours do anything."""
        return self._own.running()

    def _hook(self, kind: Kind) -> None:
        self._kinds.append(kind)
        random: list[RandomState] = []

        def forward(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if not self.is_replaying:
                given = args[0] if args else next(iter(kwargs.values()), None)
                self._seen(kind, given, output, (args, kwargs), _drawn(kind, random.pop()) if random else None)

        def before(module: nn.Module, args: tuple[Any, ...]) -> None:
            batch = self._running.current
            idle = self.is_replaying or (batch is not None and batch.empty)
            random.clear()
            if not idle and torch.is_grad_enabled():
                devices = (one.device for one in kind.parameters())
                random.append(RandomState(devices, beyond_torch=kind.draws_elsewhere is not False))

        if kind.needs_arguments:  # nothing else is computed again
            self._handles.append(kind.module.register_forward_pre_hook(before))
        self._handles.append(kind.module.register_forward_hook(forward, with_kwargs=True))

    def _hook_attention(self, name: str, module: nn.MultiheadAttention) -> None:
        def see(kind: Kind, given: torch.Tensor, output: torch.Tensor, layout: Layout) -> None:
            if not self.is_replaying:
                self._seen(kind, given, output, None, None, layout)

        projections = Projections(name, module, see)
        self._handles.append(module.register_forward_pre_hook(lambda *_: projections.begin()))
        self._handles.append(module.register_forward_hook(lambda *_: projections.end(), always_call=True))

    def _is_trained(self, parameter: Any) -> bool:
        """Whether a backward pass accumulates into it: it may have been frozen on the way."""
        return id(parameter) in self._trained and parameter.requires_grad

    def _batch(self, module: nn.Module) -> MicroBatch | None:
        batch = self._running.current
        if batch is None and _in_backward():
            batch = self._running.recomputed(module)
        return batch

    def _seen(
        self,
        kind: Kind,
        given: Any,
        output: Any,
        arguments: Arguments | None,
        random: RandomState | None,
        layout: Layout | None = None,
    ) -> None:
        batch = self._batch(kind.module)
        if not torch.is_grad_enabled():
            if batch is not None:
                batch.unseen.add(id(kind.module))
            return
        if batch is None:
            if _in_backward() or not _requires_grad(output):
                return  # a checkpoint that computes again what has its hooks
            raise InvalidInputError(
                f"module {kind.name} ran a training forward without sample ids: pass sample_ids=... to the model, use "
                "recorder.batch(ids), or wrap what is no training in torch.no_grad()",
                kind="no-ids",
            )
        if batch.empty or not _requires_grad(output):
            return
        # torch itself says where an attention has the samples of each of its projections.
        place = kind.name if layout is None else f"{kind.name} {layout}"
        try:
            declared = batch.axis_of(given) if layout is None else None
            known, candidates = self._layouts(kind, place, given, output, batch, layout, declared)
        except CoverageError as error:
            self._leave_to_passes(kind, batch, error)
            return
        self._check_separable(kind)
        kept = with_each_tensor(arguments, torch.Tensor.detach) if kind.needs_arguments and arguments else None
        # Only factors keep their input beyond backward; anything else must not hold on to an activation.
        shared = batch.share(given) if kind.keeps_input else Input(given.detach())
        call = Call(
            f"{kind.name} ({type(kind.module).__name__})",
            place,
            batch.chosen,
            known,
            candidates,
            given.shape,
            shared,
            given._version,
            output.shape,
            kept,
            Autocast.now(output.device),
            random,
            self.buffers,
        )
        call.takes_argument = declared is not None
        batch.watch(call)
        if not candidates:
            batch.shared.append(call)
            batch.proving |= kind.name not in self._partners
        hooked = _hooked(output)
        if known is None:
            batch.edges[id(call)] = get_gradient_edge(hooked)
        hooked.register_hook(self._backward(kind, call, weakref.ref(batch)))  # type: ignore[no-untyped-call]

    def _leave_to_passes(self, kind: Kind, batch: MicroBatch, error: CoverageError) -> None:
        """Have the gradients of a module's parameters taken by a backward pass of each sample, where that is allowed.

        Raises:
            CoverageError: the one that is given, where it is not.
        """
        if self.mode == "modules" or not batch.called:
            raise error
        batch.whole.update(id(parameter) for parameter in kind.parameters() if id(parameter) in self._trained)

    def _warn_once(self, kind: Kind, what: str) -> None:
        """Say something of a module, the first time that it is so."""
        if kind.name not in self._warned:
            self._warned.add(kind.name)
            text = f"module {kind.name} ({type(kind.module).__name__}) {what}"
            warnings.warn(text, TimstoreWarning, stacklevel=3)

    def _layouts(
        self,
        kind: Kind,
        place: str,
        given: Any,
        output: Any,
        batch: MicroBatch,
        fixed: Layout | None,
        declared: int | None,
    ) -> tuple[Layout | None, tuple[Layout, ...]]:
        """Return where the samples are, None where that has to be proved, and where they may be.

        Raises:
            CoverageError: they cannot be told apart there.
        """
        if not isinstance(output, torch.Tensor) or not isinstance(given, torch.Tensor):
            raise CoverageError(
                f"module {kind.name} ({type(kind.module).__name__}) does not map one tensor to one tensor: its "
                f"gradient cannot be taken per sample; {WAY_OUT}, or build it from Linear layers",
                module=kind.name,
            )
        rows = len(batch.ids)
        self.places.meet(place, batch)
        if place in self.places.nowhere and rows > 1 and batch.layout is None:
            raise self._nowhere(kind, given.shape)
        possible: Sequence[Layout] = CANDIDATES if fixed is None else (fixed,)
        if batch.layout is not None:
            possible = (batch.layout,)
        elif rows == 1 and fixed is None:
            possible = (Axis(0), Whole())
        elif declared is not None:
            # An argument of the model has the batch where the caller says, however many tokens it has: all else that
            # is proved hangs on that.
            possible = (Axis(declared),)
        fitting = tuple(
            layout
            for layout in possible
            # Of one token each, a folded axis is the batch itself.
            if layout.fits(given.shape, rows)
            and layout.fits(output.shape, rows)
            and not (isinstance(layout, Folded) and fixed is None and given.shape[0] == rows)
        )
        if not fitting and isinstance(kind, EmbeddingKind) and given.ndim == 2 and len(given) == 1:
            return None, ()
        if not fitting:
            self.places.misfit(place)
            raise CoverageError(
                f"module {kind.name} ({type(kind.module).__name__}) maps {tuple(given.shape)} to "
                f"{tuple(output.shape)}, and the batch has {rows} sample ids: no axis of it is the batch. Keep axis 0 "
                f"so; or {WAY_OUT}",
                kind="order-check",
                module=kind.name,
            )
        if not given.shape[0]:
            self.places.misfit(place)
        if batch.layout is not None or rows == 1:
            return fitting[0], fitting[:1]
        known = self.places.known(place, given.shape, rows, batch.sizes) if fixed is None else fixed
        if place in self.places.nowhere:
            raise self._nowhere(kind, given.shape)
        if known is None or (fixed is not None and not self.places.is_proved(place)):
            batch.proving = True
        if known is not None and not batch.proving:
            self._trusted.add(place)
            return known, (known,)
        if fixed is not None:
            return fixed, fitting
        return None, fitting if known is None else (known, *(one for one in fitting if one != known))

    def _nowhere(self, kind: Kind, shape: Sequence[int]) -> CoverageError:
        return CoverageError(
            f"module {kind.name} ({type(kind.module).__name__}): its input {tuple(shape)} does not follow the order of "
            "the batch's rows on any axis, or not always on the same one: no gradient could be told from another. Keep "
            f"the batch on axis 0; or {WAY_OUT}",
            kind="order-check",
            module=kind.name,
        )

    def undisturbed(self) -> AbstractContextManager[Any]:
        """Leave buffers and random numbers as they are: a checkpoint computes its modules again in a pass of ours."""
        return undisturbed(self._model, evaluate=False)

    def prove(
        self,
        batch: MicroBatch,
        edge: GradientEdge,
        gradient: torch.Tensor,
        shape: torch.Size,
        layouts: Sequence[Layout],
        declared: Layout | None = None,
    ) -> Layout | None:
        """Find out where the modules have the samples, by the gradient at an output of the model or of a module.

        Args:
            shape: of the output, where the gradient is that of a tensor of which it is a view.
            layouts: where the output may have them, the likeliest first.
            declared: where the caller says. Another one of them is taken only if what comes back to the model's own
                arguments says so: modules among themselves may agree on a wrong axis.

        Returns:
            Where it has them; None where that cannot be told.

        Raises:
            CoverageError: some module has them nowhere, and no backward pass of each sample is allowed.
        """
        coupled = self.warns_of_coupling or batch.layout is not None
        with self.undisturbed():
            proofs = [self._prover.prove(batch, edge, gradient, shape, layout, coupled=coupled) for layout in layouts]
        proof = min(proofs, key=lambda one: one.denied)
        if declared in layouts:
            told = [one for one in proofs if one.agrees_with_arguments]
            proof = told[0] if len(told) == 1 else next(one for one in proofs if one.layout == declared)
        elif len(proofs) > 1 and (not proof.evidence or sum(one.denied == proof.denied for one in proofs) > 1):
            return None
        self._conclude(batch, proof)
        return proof.layout

    def _conclude(self, batch: MicroBatch, proof: Proof) -> None:
        found: dict[str, list[Evidence]] = {}
        for evidence in proof.evidence.values():
            found.setdefault(evidence.call.place, []).append(evidence)
        for place, calls in found.items():
            kind, shape = calls[0].kind, calls[0].call.shape
            layout = self._agreed_on(calls, batch)
            for evidence in calls:
                evidence.call.layout = layout
            denied = layout is None and place in self._trusted
            if layout is not None and batch.layout is None:
                rows, sizes, tokens = len(batch.ids), batch.sizes, batch.has_tokens
                denied = any(
                    [self.places.moved(place, layout, one.call.shape, rows, sizes, tokens=tokens) for one in calls]
                )
            if denied:
                raise CoverageError(
                    f"module {kind.name} has the samples on another axis than was proved before: keep the batch on one "
                    f"axis, axis 0 at best; or {WAY_OUT}{self._running.since_proof()}",
                    kind="order-check",
                    module=kind.name,
                )
            self._trusted.discard(place)
            if layout is None or place in self.places.nowhere:
                self.places.nowhere.add(place)
                self._leave_to_passes(kind, batch, calls[0].error or self._nowhere(kind, shape))
        for call, partners in proof.partners.items():
            self._join(call, [name for name in partners if found[name][0].call.layout == Axis(0)], batch)
        for name, off in proof.off.items():
            if id(self._parameters[name]) in batch.whole:
                continue
            # What agreed before may have been used directly ever since, unseen.
            if self.mode == "modules" or (self.mode == "auto" and name in self._agreed):
                raise something_else(name, off, more=self._running.since_proof())
            self.used_directly.add(id(self._parameters[name]))
        self._agreed |= proof.agreeing
        batch.whole |= self.used_directly

    def _join(self, call: Call, partners: Sequence[str], batch: MicroBatch) -> None:
        """Note by which module's gradients those of a table that all samples look up by one row of ids are known."""
        kind = next(one for one in self._kinds if one.name == call.place)
        earlier = self._partners.get(kind.name)
        if earlier in partners:
            return
        if earlier is None and partners:
            self._partners[kind.name] = min(partners)
            return
        self.places.nowhere.add(kind.name)
        self._leave_to_passes(kind, batch, self._nowhere(kind, call.shape))

    def _shared_rows(self, call: Call, gradient: torch.Tensor, batch: MicroBatch, wanted: Any) -> None:
        """Take the gradients of tables that get, by sample, what has come to this call."""
        for shared in batch.shared:
            if self._partners.get(shared.place) == call.place and shared.input.tensor is not None:
                ids = shared.input.tensor.expand(len(gradient), -1)
                kind = next(one for one in self._kinds if one.name == shared.place)
                own = replace(shared, layout=call.layout, input=Input(ids), version=ids._version)
                batch.arrive(kind.capture(own, gradient, wanted))

    def _agreed_on(self, calls: Sequence[Evidence], batch: MicroBatch) -> Layout | None:
        """Return where all calls of a module have the samples, None where they have them nowhere.

        Where samples are tied together, a row's gradient comes to others' parts too, but most of it to its own.
        """
        for layout in calls[0].candidates:
            if all(layout in evidence.candidates for evidence in calls):
                return layout
        apart = [evidence for evidence in calls if not evidence.candidates]
        if not apart or any(evidence.error is not None for evidence in apart):
            return None
        layout, share = min((evidence.likeliest for evidence in apart), key=lambda pair: pair[1])
        if batch.layout is not None:
            self._warn_of_coupling(
                "lets the samples that are packed into a row see each other (what it returns for one depends on the "
                "tokens of others): its attention has to keep them apart, as transformers' does from position_ids "
                "without an attention_mask and with use_cache=False"
            )
            return layout
        if share < 0.5 or not all(evidence.tied for evidence in apart):
            return None
        if self.warns_of_coupling:
            return layout
        self._warn_of_coupling(
            "ties the samples of a batch together (what it returns for one depends on the others: statistics over the "
            "batch, contrastive losses)"
        )
        return None

    def _warn_of_coupling(self, how: str) -> None:
        if "" not in self._warned:
            self._warned.add("")
            warnings.warn(
                f"{type(self._model).__name__} {how}: a record holds what came through its sample's row, a part of "
                "which other samples caused, and what it did to theirs stays when it is rolled back",
                TimstoreWarning,
                stacklevel=2,
            )

    def _check_separable(self, kind: Kind) -> None:
        """Warn of a module whose output for one sample depends on the others."""
        if isinstance(kind, BatchNormKind) and kind.mixes:
            if isinstance(kind.module, nn.SyncBatchNorm):
                raise CoverageError(
                    f"module {kind.name} (SyncBatchNorm) mixes the samples of several processes; put it in eval mode",
                    module=kind.name,
                )
            self._warn_once(
                kind,
                "mixes the samples of a batch in training mode: a record holds what came through its sample's row, a "
                "part of which other samples' losses caused, and the running statistics keep what a rollback removes "
                "from the parameters. The records still add up to the gradient. To keep samples apart: "
                f"{kind.name}.eval(), or GroupNorm or LayerNorm",
            )

    def _backward(self, kind: Kind, call: Call, owner: "weakref.ref[MicroBatch]") -> Callable[[torch.Tensor], None]:
        def arrived(gradient: torch.Tensor) -> None:
            if not self._handles or (self.is_replaying and not self._prover.running):
                return
            batch = owner()
            if batch is None or call.released:
                raise StateError(
                    f"module {kind.name}: a backward pass came after the optimizer step that its forward pass belonged "
                    "to; run every backward before the step",
                    kind="late-backward",
                )
            whole = batch.whole

            def wanted(parameter: Any) -> bool:
                return self._is_trained(parameter) and id(parameter) not in whole

            scaled = gradient.reshape(call.output_shape)
            scaled = scaled if self._scale == 1.0 else scaled * self._scale
            if self._prover.running:
                self._prover.note(kind, call, scaled, wanted)
                return
            if call.layout is None and call.candidates and any(map(wanted, kind.parameters())):
                self._begin_here(kind, call, gradient, batch)
            if call.layout is not None:
                batch.arrive(kind.capture(call, scaled, wanted))
                if batch.shared:
                    self._shared_rows(call, scaled, batch, wanted)

        return arrived

    def _begin_here(self, kind: Kind, call: Call, gradient: torch.Tensor, batch: MicroBatch) -> None:
        """Begin a proof at a module's output, where no gradient has come to from an output of the model before.

        Raises:
            CoverageError: as `prove`.
        """
        edge = batch.edges.get(id(call))
        if edge is not None and bool(gradient.any()):
            entry = batch.entry_at(edge)
            if entry is not None and entry.layout is not None:
                layouts: Sequence[Layout] = (entry.layout,)
                entry.proven = True
            else:
                last = len(call.output_shape) - 1
                layouts = [one for one in call.candidates if not (isinstance(one, Axis) and 0 < one.number == last)]
            before = set(batch.whole)
            if self.prove(batch, edge, gradient, call.output_shape, layouts) is None:
                self._leave_to_passes(kind, batch, self._nowhere(kind, call.shape))
            if batch.whole - before and all(one.layout is None for one in batch.entries):
                raise self._out_of_reach(batch.whole - before)
        if call.layout is None and not any(id(parameter) in batch.whole for parameter in kind.parameters()):
            call.layout = call.candidates[0]  # whose gradient is zero, or no number

    def _out_of_reach(self, parameters: set[int]) -> CoverageError:
        names = [name for name, parameter in self._parameters.items() if id(parameter) in parameters]
        return CoverageError(
            f"no module shows the gradients of {', '.join(names[:3])} by sample, and a backward pass of each sample "
            "needs a model that returns a tensor with the batch on an axis (logits, hidden states): the loss alone "
            "cannot be told apart"
        )


def _drawn(kind: Kind, began: RandomState) -> RandomState | None:
    """Return where the generators were when a module's call began; None where it drew no random numbers."""
    if kind.draws_elsewhere is None and kind.module.training:
        kind.draws_elsewhere = began.moved_beyond_torch()
    return began if began.moved() else None


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


def _requires_grad(output: Any) -> bool:
    if isinstance(output, torch.Tensor):
        return output.requires_grad
    if isinstance(output, tuple | list):
        return any(_requires_grad(one) for one in output)
    return isinstance(output, dict) and _requires_grad(list(output.values()))


def _hooked(output: torch.Tensor) -> torch.Tensor:
    """Return the tensor to hook: an in-place operation on a view would lose a hook on the view itself."""
    base = output._base if output._is_view() else None
    whole = base is not None and base.numel() == output.numel() and base.is_contiguous() and output.is_contiguous()
    # A permuted view has its elements in another order than what it is a view of.
    return base if base is not None and whole and base.requires_grad else output
