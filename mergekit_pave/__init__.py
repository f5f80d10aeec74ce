"""PAVE (arXiv 2510.14697) for mergekit: purify task vectors before they are merged.

The rooms, from the top. Each imports only what is below it, and `lint-imports` checks that (see pyproject.toml):

    cli           the command `mergekit-pave`
    hook          how mergekit comes to know us: the field `pave`, and what is added to its modules as they are imported
    plugin        the only room that touches mergekit's inside: the planner is wrapped, and the phases before a merge are run
    planning      what is to be done to which weight of which model: everything is checked here, and no weight is read
    tasks         what is done: tasks of mergekit's graph (`in_memory` does the same to a model in memory)
    calibration   data -> samples -> batches -> model -> covariances
    report        pave_report.json, the model card, and the page with plots
    methods       the merge methods `regmean` and `tsv`
    cache         everything that is kept on the disk
    core          the mathematics: tensors in, tensors out

Importing this package is cheap: PyTorch imports it whenever it is imported itself (see `hook.autoload`), so everything that
needs torch or mergekit is loaded on first use.
"""

from importlib import import_module

from mergekit_pave.hook import autoload

__version__ = "0.1.0"

_PUBLIC = {
    "Covariance": "mergekit_pave.core.covariance",
    "PaveConfig": "mergekit_pave.config",
    "PaveError": "mergekit_pave.errors",
    "allocate_ranks": "mergekit_pave.core.allocation",
    "purify": "mergekit_pave.core.purification",
    "purify_model": "mergekit_pave.in_memory",
    "register": "mergekit_pave.hook.host",
}

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)


autoload.install()
