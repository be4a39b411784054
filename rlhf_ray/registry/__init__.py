"""The adapter registry: promoted adapters, immutable and verified, and the names (aliases) under which they are served."""

from rlhf_ray.registry.entry import Entry
from rlhf_ray.registry.store import Promotion, Registry

__all__ = ["Entry", "Promotion", "Registry"]
