"""The HTML report of a run: `write_report(run_dir)` reads the files of a run folder, and nothing else.

In comes the path of a run, finished or not, or of a folder of stages. Out comes `report.html` in it: one page that loads nothing.
A file that is missing or damaged is a note on the page; only a folder that is no run raises ArtifactError.

It knows run folders and metrics, not the code that wrote them, and imports neither torch nor Ray.

Read render.py first (sections of the page), then folder.py (reading) and story.py (what a stage reports); charts.py and html.py
draw.
"""

from rlhf_ray.report.render import sheet_page, write_report

__all__ = ["sheet_page", "write_report"]
