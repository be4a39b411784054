"""How much memory a job takes, in every process and on every GPU, and which card holds it. Loads nothing.

In come a job and a config.json; out comes a plan. `job_plan.py` is the command, `estimate.py` goes from a job to processes and
phases, `role_models.py` builds the job's own models on torch's meta device, `passes.py` runs the job's own passes on them,
`meta_tracker.py` counts every storage, `memory.py` adds what ZeRO and CUDA do, `advice.py` looks for the smallest change that fits.
"""
