"""Every place where we touch mergekit's inside, for mergekit >=0.1.5,<0.2; `hook.host` lists what is relied on."""
