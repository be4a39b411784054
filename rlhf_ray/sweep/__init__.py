"""Search over PPO or DPO jobs with Ray Tune: what varies (`space`), the trials (`trials`, `trial`, `tuning`), what a DPO trial is
measured by (`evaluation`), results (`results`), the choice (`choice`), and the report. In comes a `SweepConfig`; out goes a folder
with ordinary run folders, a table, a winner and a report. It must not know how PPO or DPO works: a trial is the public function of
its stage, and all figures come from run folders.

The package is called like its function: `rlhf_ray.sweep(config)`.
"""

import sys

from rlhf_ray.callable_package import CallablePackage

FUNCTION = ("rlhf_ray.sweep.sweep", "sweep")
sys.modules[__name__].__class__ = CallablePackage
