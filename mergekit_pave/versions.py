"""Versions of what decides a result."""

from importlib.metadata import version

PACKAGES = ("mergekit-pave", "mergekit", "torch", "transformers", "datasets")


def installed() -> dict[str, str]:
    """Version by package."""
    return {package: version(package) for package in PACKAGES}
