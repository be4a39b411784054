"""A registry that an older version left (tests/old_files) is served: its names, and the reply that its adapter gave then."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest

from .conftest import start, stop

pytestmark = [pytest.mark.integration, pytest.mark.slow]
ARCHIVE = Path(__file__).parents[2] / "old_files" / "fixtures.tar.xz"


def test_a_registry_of_an_older_version_is_served(tmp_path: Path) -> None:
    with tarfile.open(ARCHIVE) as packed:
        packed.extractall(tmp_path, filter="tar")
    answers = json.loads((tmp_path / "answers.json").read_text())["generate"]
    service = start(
        tmp_path,
        model_name_or_path=str(tmp_path / "base"),
        registry=str(tmp_path / "registry"),
        replicas={"min_replicas": 1, "num_threads": 1},
    )
    try:
        client = service.client()
        served = {model.id: model for model in client.models.list().data}
        assert {"base", "helper", "judge"} < served.keys() and served["helper"].root.startswith("helper@v2-")
        asked = [{"role": "user", "content": "Name the toad."}]
        answer = client.chat.completions.create(
            model="helper", messages=asked, max_tokens=8, temperature=0, extra_body={"reward": "judge"}
        )
        assert answer.choices[0].message.content == answers["registry:helper"]["completion"]
        reward = answers["runs/ppo"]["reward"]  # of the same adapter, by the same reward model
        assert answer.choices[0].reward == pytest.approx(reward, abs=1e-3)
    finally:
        stop(service)
