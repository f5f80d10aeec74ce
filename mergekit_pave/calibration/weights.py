"""A model whose weights come and go: loaded from its checkpoint when a module needs them, released afterwards."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from mergekit.common import ModelPath, ModelReference
from mergekit.io.tasks import LoaderCache, LoadTensor
from torch import Tensor, nn

from mergekit_pave.calibration.layers import empty_model, renaming


class UnknownWeightError(Exception):
    """A weight that the checkpoint has under no name known to us."""


class StreamedModel:
    """A transformers model on the meta device, with weights that are loaded module by module.

    Attributes:
        model: the model. Its buffers are real, its parameters are not unless loaded.

    Raises:
        UnknownWeightError: the checkpoint cannot be read in parts.
    """

    def __init__(self, cls: Any, config: transformers.PretrainedConfig, folder: str, dtype: torch.dtype, device: str):
        self._reference = ModelReference(model=ModelPath(path=folder))
        self._dtype, self._device = dtype, device
        if not LoaderCache().get(self._reference).index.is_safetensors:
            raise UnknownWeightError("its weights are not in safetensors files, which can be read in parts")
        self.model = empty_model(cls, config, dtype)
        self.model.tie_weights()
        self.model.eval().requires_grad_(False)
        # A tied weight is in the checkpoint under one of its names.
        self._names: dict[int, list[str]] = {}
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            self._names.setdefault(id(parameter), []).append(name)
        renamed = renaming(self.model)
        self._stored = {renamed(name): name for name in LoaderCache().get(self._reference).index.tensor_paths}
        self._loaded: list[tuple[nn.Module, str, nn.Parameter]] = []
        self._load_buffers()

    def load(self, module: nn.Module, recurse: bool = True) -> None:
        """Load the parameters of a module, and of all below it, unless they are there.

        Raises:
            UnknownWeightError: one of them cannot be found.
        """
        before = len(self._loaded)
        for owner in module.modules() if recurse else (module,):
            for leaf, parameter in list(owner._parameters.items()):
                if parameter is not None and parameter.is_meta:
                    value = self._read(self._names[id(parameter)])
                    if value is None or value.shape != parameter.shape:
                        raise UnknownWeightError(self._names[id(parameter)][0])
                    owner._parameters[leaf] = nn.Parameter(value, requires_grad=False)
                    self._loaded.append((owner, leaf, parameter))
        if len(self._loaded) > before:
            # Open files are mapped memory, which counts until they are closed.
            LoaderCache().get(self._reference).flush()

    def release(self) -> None:
        """Let go of every parameter that is loaded."""
        for owner, leaf, parameter in self._loaded:
            owner._parameters[leaf] = parameter
        self._loaded.clear()

    def _load_buffers(self) -> None:
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        for name, buffer in self.model.state_dict(keep_vars=True).items():
            if name not in parameters and (value := self._read([name])) is not None:
                buffer.copy_(value)
        for module in self.model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = buffer.to(self._device)

    def _read(self, names: list[str]) -> Tensor | None:
        prefix = f"{self.model.base_model_prefix}."
        # A checkpoint of the bare backbone lacks the prefix, one of a model with a head may have it in addition.
        aliases = [variant for name in names for variant in (name, prefix + name, name.removeprefix(prefix))]
        aliases += [self._stored[variant] for variant in aliases if variant in self._stored]
        task = LoadTensor(model=self._reference, tensor=aliases[0], aliases=tuple(aliases[1:]), optional=True)
        value = task.execute()
        if value is None:
            return None
        # A copy also where nothing changes: the original is mapped from the file and would keep it open.
        return value.to(self._device, self._dtype if value.is_floating_point() else value.dtype, copy=True)
