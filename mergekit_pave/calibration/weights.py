"""A model whose weights come and go: loaded from its checkpoint when a module needs them, released afterwards."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any, Protocol

import torch
import transformers
from mergekit.common import ModelPath, ModelReference
from mergekit.io.tasks import LoaderCache, LoadTensor
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from mergekit_pave.calibration.models import empty_model, renaming
from mergekit_pave.core.failures import is_out_of_memory


class UnknownWeightError(Exception):
    """A weight that is not found in the checkpoint, or that is used while it is not loaded."""


class _Unloaded(nn.Parameter):
    """A parameter without values. It has a shape, a type and a device, but nothing can be computed with it.

    PyTorch alone does not prevent this: the result of a matrix product with a weight on the meta device may be memory that
    nobody has written.

    Attributes:
        path: its name in the model.
        target: the device that it will be loaded on.
    """

    path: str
    target: torch.device

    @classmethod
    def of(cls, parameter: nn.Parameter, name: str, device: str) -> _Unloaded:
        unloaded = Tensor._make_subclass(cls, parameter.data, False)
        unloaded.path, unloaded.target = name, torch.device(device)
        return unloaded

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        """
        Raises:
            UnknownWeightError: the function would use its values.
        """
        unloaded = next(value for value in tree_leaves((args, kwargs)) if isinstance(value, cls))
        if func == Tensor.device.__get__:
            return unloaded.target
        is_attribute = getattr(func, "__name__", "") == "__get__"
        misuse = f"{unloaded.path} is used by another module than its own"
        try:
            with torch._C.DisableTorchFunctionSubclass():
                result = func(*args, **kwargs or {})
        except (RuntimeError, NotImplementedError) as error:  # most functions refuse to mix devices
            if is_out_of_memory(error):
                raise
            raise UnknownWeightError(misuse) from error
        if any(isinstance(value, Tensor) for value in tree_leaves(result)) or (result is None and not is_attribute):
            raise UnknownWeightError(misuse)
        return result


class Tensors(Protocol):
    """Where the weights of a model come from.

    Attributes:
        names: of its tensors.
    """

    names: Collection[str]

    def find(self, names: list[str]) -> Tensor | None:
        """The tensor with the first of these names that there is."""

    def flush(self) -> None:
        """Let go of what has been read."""


class Checkpoint:
    """The tensors of a checkpoint.

    Raises:
        UnknownWeightError: it cannot be read in parts.
    """

    def __init__(self, folder: str):
        self._reference = ModelReference(model=ModelPath(path=folder))
        index = LoaderCache().get(self._reference).index
        if not index.is_safetensors:
            raise UnknownWeightError("its weights are not in safetensors files, which can be read in parts")
        self.names = index.tensor_paths

    def find(self, names: list[str]) -> Tensor | None:
        return LoadTensor(model=self._reference, tensor=names[0], aliases=tuple(names[1:]), optional=True).execute()

    def flush(self) -> None:
        """Close files: open ones are mapped to memory, which counts as ours."""
        LoaderCache().get(self._reference).flush()


class StreamedModel:
    """A transformers model on the meta device, with weights that are loaded module by module.

    Attributes:
        model: the model. Its buffers are real. Its parameters have values only while they are loaded.

    Raises:
        UnknownWeightError: the model cannot do without some of its weights.
    """

    def __init__(self, cls: Any, config: transformers.PretrainedConfig, tensors: Tensors, dtype: torch.dtype, device: str):
        self._tensors = tensors
        self._dtype, self._device = dtype, device
        self.model = empty_model(cls, config, dtype)
        self.model.tie_weights()
        self.model.eval().requires_grad_(False)
        # The checkpoint has a tied weight under one of its names.
        names: dict[nn.Parameter, list[str]] = {}
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            names.setdefault(parameter, []).append(name)
        unloaded = {parameter: _Unloaded.of(parameter, same[0], device) for parameter, same in names.items()}
        self._names = {id(unloaded[parameter]): same for parameter, same in names.items()}
        for module in self.model.modules():
            module._parameters.update({leaf: unloaded[p] for leaf, p in module._parameters.items() if p is not None})
        renamed = renaming(self.model)
        self._stored = {renamed(name): name for name in tensors.names}
        self._loaded: list[tuple[nn.Module, str, nn.Parameter]] = []
        self._load_buffers()

    def load(self, module: nn.Module, recurse: bool = True) -> None:
        """Load the parameters of a module, and of all modules in it, unless they are loaded already.

        Raises:
            UnknownWeightError: one of them cannot be found.
        """
        before = len(self._loaded)
        for owner in module.modules() if recurse else (module,):
            for leaf, parameter in list(owner._parameters.items()):
                if isinstance(parameter, _Unloaded):
                    value = self._read(self._names[id(parameter)])
                    if value is None or value.shape != parameter.shape:
                        raise UnknownWeightError(self._names[id(parameter)][0])
                    owner._parameters[leaf] = nn.Parameter(value, requires_grad=False)
                    self._loaded.append((owner, leaf, parameter))
        if len(self._loaded) > before:
            self._tensors.flush()

    def release(self) -> None:
        """Drop the values of all parameters that are loaded."""
        for owner, leaf, parameter in self._loaded:
            owner._parameters[leaf] = parameter
        self._loaded.clear()

    def _load_buffers(self) -> None:
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        for name, buffer in self.model.state_dict(keep_vars=True).items():
            if name not in parameters and (value := self._read([name])) is not None:
                buffer.copy_(value)
        for module in self.model.modules():
            held = (value for value in tree_leaves(list(vars(module).values())) if isinstance(value, Tensor))
            if any(value.is_meta and not isinstance(value, _Unloaded) for value in held):
                raise UnknownWeightError(f"{type(module).__name__} keeps weights, or values made of them, in a place of its own")
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = buffer.to(self._device)

    def _read(self, names: list[str]) -> Tensor | None:
        prefix = f"{self.model.base_model_prefix}."
        # A checkpoint of the bare backbone lacks the prefix, and one of a model with a head may have an additional prefix.
        aliases = [variant for name in names for variant in (name, prefix + name, name.removeprefix(prefix))]
        aliases += [self._stored[variant] for variant in aliases if variant in self._stored]
        value = self._tensors.find(aliases)
        if value is None:
            return None
        # Always a copy: the original may be mapped from a file, and would keep it open.
        return value.to(self._device, self._dtype if value.is_floating_point() else value.dtype, copy=True)


def stored_weights(folder: str) -> Iterator[tuple[str, Tensor]]:
    """The names and tensors of a checkpoint, one after the other."""
    loader = LoaderCache().get(ModelReference(model=ModelPath(path=folder)))
    for name in sorted(loader.index.tensor_paths, key=lambda name: (loader.index.tensor_paths[name], name)):
        yield name, loader.get_tensor(name)
    loader.flush()
