"""PPO: prompts in, an adapter that earns more reward out.

Read `minimal.py` first (the algorithm alone), then `loop.py` (one step of the real loop) and `rlhf_ray/maths`. In come a
`PPOConfig` and a `Session`; out goes a run folder with the adapter. The rest is what the loop stands on: `setup.py` (everything
before the first step), `models.py` and `actors.py` (which models each role loads, in one process or as Ray actors), `prompts.py`
and `ptx.py` (the data), `checkpoint.py`, `pending_rollout.py`. It must not know how Ray places processes (`launch`), nor
what SFT does (`supervised`).

The package is called like its function: `rlhf_ray.ppo(config)`.
"""

import sys

from rlhf_ray.callable_package import CallablePackage

FUNCTION = ("rlhf_ray.stages.start", "ppo")
sys.modules[__name__].__class__ = CallablePackage
