"""What is kept on the disk between two runs, and how models are distinguished without reading all of their weights."""

from mergekit_pave.cache.artefact import MANIFEST, Artefact, cache_root, require_space, writable
from mergekit_pave.cache.entries import Entry, copy, entries
from mergekit_pave.cache.identity import files_identity, weights_fingerprint, weights_identity
from mergekit_pave.cache.keys import FORMATS, digest, key
from mergekit_pave.cache.manifest import DamagedError

__all__ = [
    "FORMATS",
    "MANIFEST",
    "Artefact",
    "DamagedError",
    "Entry",
    "cache_root",
    "copy",
    "digest",
    "entries",
    "files_identity",
    "key",
    "require_space",
    "weights_fingerprint",
    "weights_identity",
    "writable",
]
