"""The console script `rlhf-ray`: one screen, no logic. Arguments come in, exit codes go out.

Every command imports what it runs inside itself, so that help and refusals cost no torch. `app.py` is the root command and the only
place where errors become exit codes; `chat.py`, `importers.py`, `registry.py`, `serve.py` and `cluster.py` add
theirs to it. It must not decide anything that the Python functions of the same names do not.
"""

from rlhf_ray.cli.app import app, main

__all__ = ["app", "main"]
