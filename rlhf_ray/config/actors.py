"""Where generators and scorers live under `placement: split`: one section for each of the two roles."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from rlhf_ray.config.sections import Count, Float, NotNegative, Positive, Section, field


class ActorsConfig(Section):
    """The actors of one role (placement: split; colocate ignores them)."""

    num_actors: Count = field(1, "actors of this role; results do not depend on it")
    num_gpus: Annotated[Float, Field(ge=0, le=1)] | None = field(
        None,
        "GPU of each actor: 1, a fraction, or 0 for the CPU; default where the cluster has GPUs: 1, or equal shares of those that"
        " the learner leaves; else 0",
    )
    num_cpus: NotNegative | None = field(
        None,
        "CPUs each actor asks Ray for; default: its threads; on a Ray that the command starts, a share that always fits",
    )
    num_threads: Count | None = field(
        None, "CPU threads of each actor; default: usable cores shared among all roles' processes"
    )
    label_selector: dict[str, str] = field({}, "Ray node labels that the node must have, e.g. {ray.io/zone: a}")
    accelerator_type: str | None = field(None, "GPU model the node must have, as Ray calls it, e.g. A100")
    timeout_s: Positive | None = field(
        None,
        "longest wait of this role without a chunk being finished, models' loading included; then the actor is replaced; default:"
        " 1800, and for a scorer that asks a reward server as long as the server's retries may take, where that is more",
    )
