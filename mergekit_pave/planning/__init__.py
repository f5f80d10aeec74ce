"""From a merge as mergekit has planned it to the tasks that purify it.

Configurations, tokenizers, samples and the headers of weights are read, but no weights, so that every mistake in the `pave:`
block shows before any work. (Only `unchanged` may read the first rows of weights, and only when all else is in order.)
"""
