"""PAVE (arXiv 2510.14697) for mergekit: purify task vectors before they are merged.

Importing this package is cheap: PyTorch imports it whenever it is imported itself (see `_autoload`),
so everything that needs torch or mergekit is loaded on first use.
"""

from importlib import import_module

from mergekit_pave import _autoload

__version__ = "0.1.0"

_PUBLIC = {
    "Covariance": "mergekit_pave.covariance",
    "PaveConfig": "mergekit_pave.config",
    "PaveError": "mergekit_pave.errors",
    "allocate_ranks": "mergekit_pave.allocation",
    "purify": "mergekit_pave.subspace",
    "purify_model": "mergekit_pave.in_memory",
    "register": "mergekit_pave.host",
}

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)


_autoload.install()
