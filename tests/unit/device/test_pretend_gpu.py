"""Nothing is left on the CPU where the model is not: every role walked once on a device that refuses to mix with it, and each kind
of move left out once, which must be noticed. In processes of their own: torch cannot forget the device."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

WALK = Path(__file__).with_name("walk.py")
UTILITY = Path(__file__).parents[2] / "pretend_gpu.py"


@pytest.mark.long
@pytest.mark.integration
def test_nothing_is_left_on_the_cpu_and_what_would_be_is_noticed(
    tiny_llama: Callable[..., Path], tmp_path: Path
) -> None:
    """SFT, reward model, PPO (sampler, scorer, evaluate, update, publish), ZeRO 2, evaluate, serve; then four moves left out."""
    command = [sys.executable, str(WALK), str(tiny_llama()), str(tmp_path / "x")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert done.stderr.count("device     pretend:0") >= 5
    assert told["found"].pop("refused") == []
    assert all(number is not None for walk in told["found"].values() for number in walk.values()), told["found"]
    assert {name for name, what in told["noticed"].items() if what["refused"] and what["error"]} == {
        "a step of the sampler", "rows of the learner", "rows of the scorer", "a prompt that is echoed"
    }  # fmt: skip


SCRIPT = f"""
import importlib.util, torch
spec = importlib.util.spec_from_file_location("pretend_gpu", {str(UTILITY)!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
with module.pretend_gpu() as device:
    x, cpu = torch.arange(3.0).to(device), torch.arange(3.0)
    layer = torch.nn.Linear(3, 3).to(device)
    refused = [lambda: x + cpu, lambda: layer(cpu), lambda: torch.where(cpu > 1, x, x), lambda: torch.cat([x, cpu]),
               lambda: torch.nn.functional.embedding(torch.tensor([1]), layer.weight), lambda: cpu.add_(x)]
    for number, wrong in enumerate(refused):
        try:
            wrong()
        except RuntimeError as error:
            assert "tensors on pretend:0 and on the CPU" in str(error), error
        else:
            raise AssertionError(number)
    made = [torch.zeros(2, device=device), torch.tensor([1, 2], device=device), x.new_ones(2), torch.empty_like(x), x[:2], x * 2,
            torch.arange(3, device=device), layer(x), layer.weight]
    assert all(t.device == device for t in made)
    assert all(t.device.type == "cpu" for t in (x.cpu(), x.to("cpu"), torch.ones(2), x.cpu() + 1))
    assert (x * 2 + torch.tensor(1.0))[torch.tensor([0, 2])].tolist() == [1.0, 5.0] and f"{{x.sum():.1f}}" == "3.0"
    cpu.copy_(x + 1)
    assert cpu.tolist() == [1.0, 2.0, 3.0] and bool((x == 1).any())
    layer(x).sum().backward()
    torch.optim.AdamW(layer.parameters()).step()
    assert layer.weight.grad.device == device and layer.weight.grad[0].tolist() == [0.0, 1.0, 2.0]
print("done")
"""


def test_the_device_refuses_what_cuda_refuses_and_does_what_cuda_does() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.endswith("done\n"), done.stderr[-2000:]
