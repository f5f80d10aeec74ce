"""How the plugin gets into mergekit: a watch for its configuration module.

PyTorch calls `install` at the end of every `import torch` (entry point group `torch.backends`). By then mergekit's
configuration may not be imported yet (a finder waits for it), may be half-way through its own import, which is what has
imported torch (its first use from outside is waited for), or may be there. Nothing here may import anything
heavy, and `install` may not raise: it would break `import torch` itself.
"""

import importlib.abc
import sys
import types

_TARGET = "mergekit.config"


def install() -> None:
    """Put the finder in place, and see to a configuration that is loaded already. Idempotent."""
    if any(isinstance(finder, _Finder) for finder in sys.meta_path):
        return
    sys.meta_path.insert(0, _Finder())
    module = sys.modules.get(_TARGET)
    if hasattr(module, "ConfigReader"):
        _add_field()
    elif module is not None:
        module.__class__ = _HalfLoaded


def _add_field() -> None:
    from mergekit_pave import _field

    _field.add()


class _HalfLoaded(types.ModuleType):
    """mergekit's configuration until somebody asks it for something and it has all there is to have."""

    def __getattribute__(self, name: str):
        if not name.startswith("__") and "ConfigReader" in self.__dict__:
            self.__class__ = types.ModuleType
            _add_field()
        return types.ModuleType.__getattribute__(self, name)


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, fullname, path=None, target=None):
        if fullname != _TARGET:
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
    """The module's own loader, after which the field is added."""

    def __init__(self, loader):
        self._loader = loader

    def create_module(self, spec):
        return self._loader.create_module(spec)

    def exec_module(self, module):
        module.__spec__.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        _add_field()
