"""Models: a frozen base, named LoRA adapters and scalar heads on it, and where they come from.

In come paths, Hub ids and adapter folders; out come `RoleModels`, whose `forward` makes every pass of RLHF. `assembly.py` builds
them for a job, `backbone.py` and `loading.py` load a base, `adapters.py` and `adapter_files.py` handle LoRA, `role_models.py` and
`forward.py` make the passes, `zero3.py` is the only place that knows sharded parameters, `lineage.py` checks that artefacts belong
together, `merge.py` and `importers/` turn artefacts into others. It must not know how tokens are sampled or why.
"""

import logging

# bitsandbytes, which PEFT imports wherever it is installed, misses a kernel for 4-bit matrices on CPUs, and says so in every run
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
