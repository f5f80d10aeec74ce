"""How the plugin gets into mergekit: a finder that waits for mergekit's modules to be imported.

PyTorch calls `install` at the end of every `import torch` (entry point group `torch.backends`), and
mergekit imports torch before its planner, so the finder is always in place in time. Nothing here may
import anything heavy, and `install` may not raise: it would break `import torch` itself.
"""

import importlib.abc
import sys

# Module to wait for -> function of `mergekit_pave.plugin` to call once it has been executed.
_AFTER = {"mergekit.plan": "register", "mergekit.merge": "register_run_merge"}


def install() -> None:
    """Put the finder in place, and register at once with what is loaded already. Idempotent."""
    if any(isinstance(finder, _Finder) for finder in sys.meta_path):
        return
    sys.meta_path.insert(0, _Finder())
    for module in _AFTER:
        loaded = sys.modules.get(module)
        # A module that is still executing was found before us; torch is not imported that late.
        if loaded is not None and not getattr(loaded.__spec__, "_initializing", False):
            _register(module)


def _register(module: str) -> None:
    from mergekit_pave import plugin

    # Where the plugin itself has started the import it is half-loaded, and registers when it is done.
    function = getattr(plugin, _AFTER[module], None)
    if function is not None:
        function()


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, fullname, path=None, target=None):
        if fullname not in _AFTER:
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
    """The module's own loader, followed by the registration."""

    def __init__(self, loader):
        self._loader = loader

    def create_module(self, spec):
        return self._loader.create_module(spec)

    def exec_module(self, module):
        module.__spec__.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        _register(module.__name__)
