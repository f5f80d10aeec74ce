"""The merge methods `regmean`, `tsv` and `emr`, as mergekit knows them.

mergekit's own come first: once they are complete, `registry` adds these, whichever of the two packages somebody imports.
"""

import mergekit.merge_methods  # noqa: F401
