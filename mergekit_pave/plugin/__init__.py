"""Wraps mergekit's planner and executor, for mergekit >=0.1.5,<0.2; `hook.host` lists what is relied on.

wrap          what of mergekit is wrapped, and when each of the others is called
inputs        whether the device, the models and their layers are there, and the Hub if mergekit's card needs it
stored_names  mergekit's architecture, with the names that the checkpoints use
checkpoints   what mergekit finds in the checkpoints; `conversion`: what it can make of that
parameters    the parameters that a config gives to its merge method
dry_run       settings that mergekit looks at only when it merges
planner       the planned merge, as `planning` needs it
phases        what is run before a merge: the caches are filled
following     what to type once it is done
references    how mergekit writes a model's name
"""
