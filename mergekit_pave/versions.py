"""Versions of the packages that determine a result, and whether they fit each other."""

from __future__ import annotations

from functools import cache
from importlib.metadata import version

from packaging.specifiers import SpecifierSet

PACKAGES = ("mergekit-pave", "mergekit", "torch", "transformers", "datasets")
MERGEKIT = SpecifierSet(">=0.1.5,<0.2")  # the versions of mergekit that this one works with


@cache
def installed() -> dict[str, str]:
    """The version of each package."""
    return {package: version(package) for package in PACKAGES}


def problem() -> str | None:
    """If the installed mergekit is of another version: the message about it, and what to do."""
    installed_version = version("mergekit")
    if installed_version in MERGEKIT:
        return None
    return (
        f"mergekit-pave {version('mergekit-pave')} works with mergekit {MERGEKIT}, but {installed_version} is installed. "
        f"Install a version that fits (pip install 'mergekit{MERGEKIT}')"
    )
