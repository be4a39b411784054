"""The HTML report of a run: `write_report(run_dir)` reads the files of a run folder, and nothing else."""

from rlhf_ray.report.render import write_report

__all__ = ["write_report"]
