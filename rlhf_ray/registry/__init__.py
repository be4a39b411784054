"""The adapter registry: promoted adapters, immutable and verified, and the names (aliases) under which they are served.

In come runs, RUN@STEP or sweeps to promote (candidate.py), and specs like `helper@v3` to resolve. Out go entries (`Entry`: files,
manifest, template, stop tokens), the history of a name, and the folder that store.py describes. A promotion passes the gates of
gates.py first, or is forced, with a reason that is kept.

The registry loads no base model, and does not know who serves its names: readers poll it (follow.py).

Read store.py first; then alias.py (names and history), entry.py and manifest.py (one adapter on disk).
"""

from rlhf_ray.registry.entry import Entry
from rlhf_ray.registry.follow import RegistryFollower
from rlhf_ray.registry.store import Promotion, Registry

__all__ = ["Entry", "Promotion", "Registry", "RegistryFollower"]
