"""roles.log: a line a step, and one for every actor that was restarted."""

from __future__ import annotations

from pathlib import Path

from rlhf_ray.roles.actor_pool import CallStats
from rlhf_ray.roles.roles_log import Done, RolesLog, peaks


def done(role: str, index: int, chunk: int, pid: int, seconds: float) -> Done:
    return Done(role, chunk, CallStats(index, pid, "10.0.0.7 (node 3fa9c1)", ("1",), seconds, 0.0))


def test_a_line_a_step_tells_who_did_what_with_which_adapter(tmp_path: Path) -> None:
    path, sha256 = tmp_path / "roles.log", "9c41d20e" + "0" * 56
    log = RolesLog(path)
    log.start(
        ["generator 0  pid 1 on 10.0.0.7 (node 3fa9c1), GPU 1"], {"generator 0": 1, "generator 1": 2, "scorer 0": 3}
    )
    work = [done("generator", 1, 1, 2, 2.0), done("generator", 0, 0, 1, 1.5), done("generator", 0, 2, 1, 1.25)]
    log.step("step 7", 6, sha256, [*work, *(done("scorer", 0, chunk, 3, 0.5) for chunk in range(3))], 0)
    log.step("step 8", 7, "f" * 64, [done("generator", 0, 0, 4, 0.5), done("scorer", 0, 0, 3, 0.125)], 1)
    log.close()
    again = RolesLog(path)  # an interrupted run goes on
    again.step("evaluation at step 8", 7, "f" * 64, [done("generator", 0, 0, 4, 0.5)], 0)
    again.step("step 9", 7, "f" * 64, [], 0)
    again.close()
    stamps, lines = zip(*(line.split("  ", 1) for line in path.read_text().splitlines()))
    assert all(len(stamp) == len("2026-03-04 10:11:40") for stamp in stamps)
    assert list(lines) == [
        "generator 0  pid 1 on 10.0.0.7 (node 3fa9c1), GPU 1",
        "step 7: adapter 6 (9c41d20e)  generator 0: 2 chunks, 2.8 s  generator 1: 1 chunk, 2 s  scorer 0: 3 chunks, 1.5 s",
        "generator 0  restarted: pid 4 on 10.0.0.7 (node 3fa9c1), GPU 1",
        "step 8: adapter 7 (ffffffff)  generator 0: 1 chunk, 0.5 s  scorer 0: 1 chunk, 0.12 s  1 chunk done again",
        "evaluation at step 8: adapter 7 (ffffffff)  generator 0: 1 chunk, 0.5 s",
        "step 9: adapter 7 (ffffffff)  from the checkpoint",
    ]


def test_the_largest_memory_of_each_role() -> None:
    works = [CallStats(i, 1, "n", (), 1.0, 0.0, {"memory/process_peak": float(size)}) for i, size in ((0, 5), (1, 7))]
    done = [Done("generator", 0, works[0]), Done("generator", 1, works[1]), Done("scorer", 0, works[0])]
    assert peaks(done) == {"memory/generator_process_peak": 7.0, "memory/scorer_process_peak": 5.0}
