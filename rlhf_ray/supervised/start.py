"""Where the adapter that SFT, DPO or reward modelling trains starts from: fresh on the base, or a copy of a trained one."""

from __future__ import annotations

from typing import NamedTuple

from peft import PeftModel

from rlhf_ray.config import LoraConfig
from rlhf_ray.data.templates import Template
from rlhf_ray.errors import ConfigError
from rlhf_ray.models.adapter_files import policy_files
from rlhf_ray.models.adapters import read_adapter, wrap
from rlhf_ray.models.backbone import Backbone
from rlhf_ray.models.lineage import Parent, check_lineage, parent_of
from rlhf_ray.models.specs import policy_source
from rlhf_ray.runtime.session import Session


class Start(NamedTuple):
    """The base with the adapter on it, what it was copied from, and a few words for the header."""

    model: PeftModel
    parents: list[Parent]
    told: str


def fresh(backbone: Backbone, lora: LoraConfig, name: str, seed: int) -> Start:
    return Start(wrap(backbone.model, lora, name, seed=seed), [], "fresh (B = 0)")


def copy_of(
    path: str, backbone: Backbone, template: Template, name: str, session: Session, for_reward: bool = False
) -> Start:
    """A copy of the adapter of `path`, a run or an adapter folder. ConfigError if it has none; ArtifactError if it does not fit, or
    is a reward model's.   for_reward: which a reward model may start from, with a new head."""
    source = policy_source(path)
    if source.kind != "adapter":
        raise ConfigError.at(
            "sft", f"{path} is not a run or an adapter", fix="drop it, and set model_name_or_path to it"
        )
    files = read_adapter(source.path) if for_reward else policy_files(read_adapter(source.path), path)
    notes = [f"sft: {path} is a reward model: its adapter is copied, its head is not"] if files.head is not None else []
    for line in [*notes, *check_lineage(source, backbone.identity, template, role="sft")]:
        if session.is_main:
            session.console.warn(line)
    model = wrap(backbone.model, files, name)
    return Start(model, [parent_of(source, "sft")], f"a copy of {source.path}")
