"""PAVE (arXiv 2510.14697) for mergekit: purify task vectors before they are merged.

The rooms, from the top. Each imports only what is below it, and `lint-imports` checks that (see pyproject.toml):

    cli           the command `mergekit-pave`
    hook          gets into mergekit: the field `pave`, and what is added to its modules when they are imported
    plugin        wraps mergekit's planner and executor, and runs the phases before a merge
    planning      decides what to do to which weight of which model, and checks everything first
    tasks         does it, as tasks of mergekit's graph (`in_memory` does the same to a model in memory)
    emr           what EMR-Merging keeps for each model, and the models made of it again
    calibration   data -> samples -> batches -> model -> covariances
    report        pave_report.json, the model card, and the page with plots
    methods       the merge methods `regmean`, `tsv` and `emr`
    cache         everything that is kept on the disk between two runs
    core          the mathematics: tensors in, tensors out

PyTorch imports this package whenever it is imported itself (see `hook.autoload`). So importing it is cheap: everything that needs
torch or mergekit is loaded on first use.
"""

from importlib import import_module

from mergekit_pave.hook import autoload

__version__ = "0.1.0"

_PUBLIC = {
    "Covariance": "mergekit_pave.core.covariance",
    "PaveConfig": "mergekit_pave.config",
    "PaveError": "mergekit_pave.errors",
    "allocate_ranks": "mergekit_pave.core.allocation",
    "load_task": "mergekit_pave.emr.load",
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
