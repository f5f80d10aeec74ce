"""Covariances of the inputs of linear layers, and of experts, during a forward pass."""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from torch import Tensor, nn

from mergekit_pave.calibration.batches import Batch
from mergekit_pave.calibration.blame import NotFiniteError
from mergekit_pave.calibration.experts import find_experts, run_experts
from mergekit_pave.calibration.forward import HeadReachedError, counted_rows, version
from mergekit_pave.calibration.predictions import Predictions
from mergekit_pave.core.covariance import Covariance, Measurement, SecondMoment, magnitudes
from mergekit_pave.errors import PaveError


@dataclass
class _Group:
    """Layers that are called with the same tensor, which is measured once."""

    moment: SecondMoment
    layers: list[str]
    calls: Counter[str] = field(default_factory=Counter)

    def check(self) -> None:
        """
        Raises:
            DivergedError: a layer was not called with one of the inputs of this group.
        """
        if missing := [layer for layer in self.layers if self.calls[layer] != self.calls[self.layers[0]]]:
            raise DivergedError(missing[0])


@dataclass
class _Failure:
    """A layer's input that was not finite.

    Attributes:
        batch: the last batch with such an input.
        rows: samples for which it was, or may have been, not finite.
        exact: all of `rows` are known to be such samples.
        some_are_finite: for some sample it was finite.
    """

    layer: str
    group: _Group
    batch: Batch | None = None
    rows: list[str] = field(default_factory=list)
    exact: bool = True
    some_are_finite: bool = False


class ReenteredError(Exception):
    """A layer was called again after its covariance had been taken."""


class DivergedError(Exception):
    """A layer shared its input with others on its first call, but not on a later one.

    Attributes:
        role: the last part of the layer's name.
    """

    def __init__(self, layer: str):
        super().__init__(layer)
        self.role = _role(layer)


def _role(layer: str) -> str:
    return layer.rpartition(".")[2]


class Observer:
    """Accumulates the second moment of the input of every layer that it watches.

    Layers with the same input tensor (query, key and value; gate and up) are recognised on their first call. From then on they
    share one second moment. An expert sees only the tokens that are routed to it. It has a second moment of its own for each
    projection, named by the parameter's path and the expert's number.

    Args:
        layers: paths of the modules to watch, in addition to all experts. If there are none, experts are left alone, too.
        name: the model's name, for messages.
        apart: roles of layers that must not share a second moment.
        unpadded: batches have one sample each, so that all rows of an input that is not aligned with tokens count.
        head: where to add up what the model predicts; None to leave its head alone. Then the model runs only up to the head.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: list[str],
        name: str,
        apart: frozenset[str],
        unpadded: bool,
        head: Predictions | None = None,
    ):
        self._head = head
        self._apart = apart
        self._unpadded = unpadded
        self._model = model
        self._layers = layers
        self._name = name
        self._experts = find_experts(model) if layers else {}
        self._checked: set[str] = set()
        self._groups: dict[str, _Group] = {}
        self._taken: set[str] = set()
        self._batch: Batch | None = None
        self._failure: _Failure | None = None
        self._begun: set[str] = set()
        self._last: tuple[weakref.ref[Tensor], int, _Group] | None = None

    @contextlib.contextmanager
    def watching(self) -> Iterator[Callable[[Batch], None]]:
        """Watch within this context. Yields a function that has to be called with each batch before it runs."""
        modules = dict(self._model.named_modules())
        vocabulary = getattr(self._model.get_input_embeddings(), "num_embeddings", None)
        with contextlib.ExitStack() as hooks:
            for layer in self._layers:

                def see(_: nn.Module, args: tuple, kwargs: dict[str, Tensor], layer: str = layer) -> None:
                    self._see(layer, *args, *kwargs.values())

                hooks.enter_context(modules[layer].register_forward_pre_hook(see, with_kwargs=True))
            for module in modules.values():
                if isinstance(module, nn.Embedding) and module.num_embeddings == vocabulary:
                    hooks.enter_context(module.register_forward_pre_hook(self._see_tokens))
            if self._head:
                hooks.enter_context(modules[self._head.path].register_forward_pre_hook(self._see_head))
            for path, experts in self._experts.items():
                hooks.callback(_restore_forward, experts, vars(experts).get("forward"))
                experts.forward = functools.partial(self._see_experts, path)
            yield self._begin

    def _begin(self, batch: Batch) -> None:
        self._stop_at_failure(finished=False)
        self._begun.update(batch.origins)
        self._batch = batch
        self._last = None

    def _see_tokens(self, module: nn.Module, args: tuple) -> None:
        """Refuse a model that pads its inputs itself (as Longformer does, to whole windows): that padding would count.

        Raises:
            PaveError: the model looks up more tokens than it was given.
        """
        if args and self._batch.counted and args[0].numel() > max(counted.numel() for counted in self._batch.counted):
            raise PaveError(
                f"{self._name}: {type(self._model).__name__} pads its inputs by itself, and that padding cannot be told "
                "from tokens; give the model `purify: false`"
            )

    def _see(self, layer: str, x: Tensor) -> None:
        if layer in self._taken:
            raise ReenteredError(layer)
        group = self._groups.get(layer)
        last = self._last
        same = last is not None and last[0]() is x and last[1] == version(x)
        if same and group is last[2] and layer != group.layers[0]:
            group.calls[layer] += 1
            return
        if same and group is None and last[2].calls[last[2].layers[0]] == 1 and _role(layer) not in self._apart:
            last[2].layers.append(layer)
            last[2].calls[layer] += 1
            self._groups[layer] = last[2]
            return
        if group is None:
            group = self._groups[layer] = _Group(SecondMoment(x.shape[-1]), [layer])
        elif layer != group.layers[0]:
            raise DivergedError(layer)
        else:
            group.check()
        flat, counted = x.reshape(-1, x.shape[-1]), counted_rows(self._batch, layer, x, self._unpadded)
        self._add(group, layer, flat.clone() if counted is None else flat[counted], x)
        group.calls[layer] += 1
        self._last = (weakref.ref(x), version(x), group)

    def _see_head(self, head: nn.Module, args: tuple) -> None:
        """
        Raises:
            HeadReachedError: always. Nobody needs the scores of all tokens.
        """
        self._see(self._head.path, *args)
        x, counted = args[0], counted_rows(self._batch, self._head.path, args[0], self._unpadded)
        flat = x.reshape(-1, x.shape[-1])
        self._head.add(head, flat if counted is None else flat[counted])
        raise HeadReachedError

    def _see_experts(self, path: str, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Replaces the forward pass of a module of experts.

        Raises:
            PaveError: the original forward pass does not compute the same.
        """
        if path in self._taken:
            raise ReenteredError(path)
        counted = counted_rows(self._batch, path, hidden_states, self._unpadded)

        seen: list[tuple[_Group, str, Tensor]] = []

        def see(projection: str, expert: int, rows: Tensor) -> None:
            layer = f"{path}.{projection}.{expert}"
            group = self._groups.get(layer)
            if group is None:
                group = self._groups[layer] = _Group(SecondMoment(rows.shape[-1]), [layer])
            seen.append((group, layer, rows))

        experts = self._experts[path]
        result = run_experts(experts, hidden_states, top_k_index, top_k_weights, counted, see)
        for (group, layer, rows), largest in zip(seen, magnitudes([rows for _, _, rows in seen])):
            self._add(group, layer, rows, rows, largest)
        if path not in self._checked and (counted is None or counted.any()):
            self._checked.add(path)
            original = type(experts).forward(experts, hidden_states, top_k_index, top_k_weights)
            rows = slice(None) if counted is None else counted  # padding may have any values, also NaN
            # With another layout or activation the error is as large as the result. Rounding is a hundredth of it at most.
            if result[rows].isfinite().all() and not (original - result)[rows].norm() <= 0.05 * original[rows].norm():
                raise PaveError(
                    f"{self._name}: the experts of {path} ({type(experts).__name__}) compute otherwise than the interface of "
                    "transformers promises, so what each of them sees is not known; give the model `purify: false`"
                )
        return result

    def _add(self, group: _Group, layer: str, rows: Tensor, x: Tensor, largest: float | None = None) -> None:
        """Add the counted rows of a layer's input x. They must not change afterwards. For `largest` see `SecondMoment.add`."""
        try:
            group.moment.add(rows, largest)
        except ValueError:  # not finite
            self._note_failure(group, layer, x)

    def _note_failure(self, group: _Group, layer: str, x: Tensor) -> None:
        """Remember the failure. Whether it is one of all samples shows only when the others have gone the same way."""
        failure = self._failure = self._failure or _Failure(layer, group)
        if failure.batch is not self._batch:
            failure.batch = self._batch
            rows = self._culprits(x)
            failure.rows += rows or self._batch.origins
            failure.exact &= bool(rows) or len(self._batch.origins) == 1
            failure.some_are_finite |= bool(rows) and len(rows) < len(self._batch.origins)

    def _stop_at_failure(self, finished: bool) -> None:
        """
        Raises:
            NotFiniteError: a layer's input was not finite, and either all samples have run or it is known to be finite for one.
        """
        failure = self._failure
        some_are_finite = failure is not None and (failure.some_are_finite or failure.group.moment.tokens > 0)
        if some_are_finite or (failure and finished):
            everywhere = not some_are_finite and self._begun <= set(failure.rows)
            raise NotFiniteError(failure.layer, failure.rows, failure.exact, everywhere)

    def _culprits(self, x: Tensor) -> list[str]:
        """The samples for which a layer's input is not finite; empty if x does not tell samples apart."""
        for counted in self._batch.counted:
            if x.shape[:-1] == counted.shape:
                not_finite = (~x.isfinite().all(dim=-1) & counted.to(x.device)).any(dim=1)
                return [origin for origin, failed in zip(self._batch.origins, not_finite.tolist()) if failed]
        return []

    def take(self, block: str | None = None) -> list[Measurement]:
        """The covariances of the layers of one block, or of all that remain. The observer does not keep them.

        Layers that saw no counted token have none.

        Raises:
            DivergedError: see `_Group.check`.
            NotFiniteError: a layer's input was not finite.
            PaveError: inputs were too large to be squared.
        """
        self._stop_at_failure(finished=True)
        prefix = f"{block}." if block else ""
        groups = {id(group): group for layer, group in self._groups.items() if f"{layer}.".startswith(prefix)}
        for group in groups.values():
            group.check()
            for layer in group.layers:
                del self._groups[layer]
            self._taken.update(group.layers)
        self._taken.update(path for path in self._experts if path.startswith(prefix))
        return [Measurement(group.layers, self._result(group)) for group in groups.values() if group.moment.tokens]

    def _result(self, group: _Group) -> Covariance:
        try:
            return group.moment.result()
        except ValueError as error:
            raise PaveError(f"{self._name}: the inputs of {group.layers[0]} are too large to be squared in float64") from error


def _restore_forward(module: nn.Module, forward: Callable | None) -> None:
    """Undo the replacement of a module's `forward`. In a model on several devices it had been replaced before."""
    del module.forward
    if forward is not None:
        module.forward = forward
