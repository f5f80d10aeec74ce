"""Versions of what decides a result, and whether they fit each other."""

from __future__ import annotations

from importlib.metadata import version

from packaging.specifiers import SpecifierSet

PACKAGES = ("mergekit-pave", "mergekit", "torch", "transformers", "datasets")
MERGEKIT = SpecifierSet(">=0.1.5,<0.2")  # the versions of mergekit that this one works with


def installed() -> dict[str, str]:
    """Version by package."""
    return {package: version(package) for package in PACKAGES}


def problem() -> str | None:
    """That the installed mergekit is of another version, and what to do about it, if so."""
    found = version("mergekit")
    if found in MERGEKIT:
        return None
    return (
        f"mergekit-pave {version('mergekit-pave')} works with mergekit {MERGEKIT}, but {found} is installed. "
        f"Install a version that fits (pip install 'mergekit{MERGEKIT}')"
    )
