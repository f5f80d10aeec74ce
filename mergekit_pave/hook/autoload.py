"""How the plugin gets into mergekit: each module of mergekit that we add something to is watched.

PyTorch calls `install` at the end of every `import torch` (entry point group `torch.backends`). By then such a module may be

- not imported yet: a finder waits for it;
- half imported, where its own import is what has imported torch: its first use from outside is waited for;
- imported: we add to it at once.

Nothing here may import anything heavy, and `install` may not raise: it would break `import torch` itself.
"""

import importlib
import importlib.abc
import logging
import sys
import types

LOG = logging.getLogger(__name__)

# By module of mergekit: a name that it has once it is complete, and the module of ours that then adds to it.
_TARGETS = {
    "mergekit.config": ("ConfigReader", "mergekit_pave.hook.field"),
    "mergekit.merge_methods": ("__all__", "mergekit_pave.methods.registry"),
    "mergekit.io.tensor_writer": ("TensorWriter", "mergekit_pave.hook.outputs"),
    "mergekit.moe.config": ("is_bad_config", "mergekit_pave.hook.refusals"),
    "mergekit.scripts.merge_raw_pytorch": ("main", "mergekit_pave.hook.refusals"),
    "mergekit.scripts.bakllama": ("main", "mergekit_pave.hook.refusals"),
    "mergekit.evo.genome": ("ModelGenome", "mergekit_pave.hook.refusals"),
    "mergekit.evo.config": ("check_for_naughty_config", "mergekit_pave.hook.refusals"),
}


def install() -> None:
    """Put the finder in place, and add to modules that are imported already. Idempotent."""
    if any(isinstance(finder, _Finder) for finder in sys.meta_path):
        return
    sys.meta_path.insert(0, _Finder())
    for target, (last, _) in _TARGETS.items():
        module = sys.modules.get(target)
        if hasattr(module, last):
            _add_to(module)
        elif module is not None:
            module.__class__ = _HalfLoaded


def _add_to(module: types.ModuleType) -> None:
    """Add to a module of mergekit, whose import is complete. Nothing that goes wrong here may stop a merge without a block."""
    try:
        importlib.import_module(_TARGETS[module.__name__][1]).add(module)
    except Exception as error:
        LOG.warning(
            "mergekit-pave could not extend %s (%s: %s). Merges without a `pave:` block are not affected; see `mergekit-pave "
            "doctor` before you use one",
            module.__name__,
            type(error).__name__,
            error,
        )


class _HalfLoaded(types.ModuleType):
    """The class of a half imported module. At the first access once the import is complete, we add to the module."""

    def __getattribute__(self, name: str):
        if not name.startswith("__") and _TARGETS[self.__name__][0] in self.__dict__:
            self.__class__ = types.ModuleType
            _add_to(self)
        return types.ModuleType.__getattribute__(self, name)


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, fullname, path=None, target=None):
        if fullname not in _TARGETS:
            return None
        # Ask the finders behind this one for the real module, whatever they are.
        for finder in sys.meta_path:
            if finder is self or not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _Loader(spec.loader)
                return spec
        return None


class _Loader(importlib.abc.Loader):
    """The module's own loader. Once it has run, we add to the module."""

    def __init__(self, loader):
        self._loader = loader

    def __getattr__(self, name: str):  # `python -m` asks for the code
        return getattr(self._loader, name)

    def create_module(self, spec):
        return self._loader.create_module(spec)

    def exec_module(self, module):
        module.__spec__.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        _add_to(module)
