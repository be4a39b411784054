"""The report as a whole: every stage, every state of the folder, and nothing a model wrote can act."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlhf_ray.errors import ArtifactError
from rlhf_ray.report import write_report
from rlhf_ray.report.folder import read_folder
from rlhf_ray.report.render import page

VOID = {"meta", "br", "hr", "img", "input", "link"}
ELEMENTS = frozenset(
    {"html", "head", "meta", "title", "style", "body", "header", "nav", "main", "section", "footer", "script"}
    | {
        "h1",
        "h2",
        "h4",
        "h5",
        "p",
        "span",
        "b",
        "small",
        "em",
        "mark",
        "i",
        "a",
        "pre",
        "code",
        "article",
        "details",
        "summary",
        "div",
    }
    | {"dl", "dt", "dd", "ul", "ol", "li", "figure", "figcaption", "svg", "path"}
    | {"table", "caption", "thead", "tbody", "tr", "th", "td"}
)
ATTACK = """</pre></style></title><script>alert(1)</script><img src="http://evil.example/x" onerror='alert(2)'>"&\x1b[2J\u202e"""


class Page(HTMLParser):
    """Checks while it reads: tags nest, attributes are unique, only known elements appear."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.raw: dict[str, list[str]] = {"script": [], "style": []}
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in ELEMENTS, f"unexpected element {tag}"
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), f"repeated attribute in {tag}: {names}"
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-1:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        where = self.open[-1] if self.open else ""
        self.raw.get(where, self.words).append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def check(path: Path) -> Page:
    """What holds for every report: valid nesting, self-contained, only our script, links only into the page or the run."""
    text = (path / "report.html").read_text(encoding="utf-8")
    found = Page(text)
    assert len(found.raw["script"]) == 1 and len(found.raw["style"]) == 1
    digest = base64.b64encode(hashlib.sha256(found.raw["script"][0].encode()).digest()).decode()
    policy = next(
        value for tag, name, value in found.attributes if tag == "meta" and name == "content" and "default-src" in value
    )
    assert f"script-src 'sha256-{digest}'" in policy and "default-src 'none'" in policy
    outside_text = [value for _, _, value in found.attributes if value] + found.raw["script"] + found.raw["style"]
    assert not [value for value in outside_text if re.search(r"https?:|//\w|javascript:|@import|url\(", value)]
    for tag, name, value in found.attributes:
        assert not name.startswith("on") and name not in ("src", "srcdoc", "action", "formaction"), (tag, name)
        if name == "href":
            assert re.fullmatch(r"#[\w-]+|(sft|reward|ppo|evaluate)/report\.html", value)
    anchors = {value for _, name, value in found.attributes if name == "id"}
    links = {value[1:] for _, name, value in found.attributes if name == "href" and value.startswith("#")}
    assert links <= anchors
    return found


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo", "evaluate", "demo"])
def test_each_stage_gets_a_page_of_its_own(fake: SimpleNamespace, tmp_path: Path, stage: str) -> None:
    path = getattr(fake, stage)(tmp_path / "the-run")
    assert write_report(path) == path / "report.html"
    found = check(path)
    heading = {
        "sft": "Supervised fine-tuning",
        "reward": "Reward model",
        "ppo": "PPO",
        "evaluate": "Evaluation",
        "demo": "Demo",
    }
    assert heading[stage] in found.text and "the-run" in found.text and "models/tiny-llama" in found.text
    assert "is missing" not in found.text


def test_ppo_shows_its_headline_curves_samples_lineage_and_configuration(fake: SimpleNamespace, tmp_path: Path) -> None:
    path = fake.ppo(tmp_path / "run")
    write_report(path)
    text = check(path).text
    titles = (
        "KL from the reference",
        "Reward bought with KL",
        "Penalty charged",
        "Reply length",
        "Finished replies",
        "Entropy",
    )
    titles += (
        "Clipped tokens",
        "Step size",
        "Value model",
        "Gradient norms",
        "Learning rates",
        "Time per step",
        "Sampling speed",
    )
    assert [title for title in titles if title not in text] == []
    rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    assert f"{rows[-1]['eval/reward']:.2f} ± 0.06" in text
    assert (
        f"{rows[-1]['kl/k1_per_response']:.2f} nats" in text and f"k3 {rows[-1]['kl/k3_per_response']:.2f} nats" in text
    )
    assert "Step 60" in text and "Write a short story about a lost key." in text
    assert "runs/demo/sft" in text and "data/stories.jsonl" in text and "4,000" in text and "torch 2.13.0+cpu" in text
    assert "kl_coef: 0.05" in text and "The coefficient is fixed at 0.05." in text
    assert "7 min 12 s" in text and "All 37 metrics" in text


def test_the_cover_compares_policies_and_links_to_the_stages_that_have_a_report(
    fake: SimpleNamespace, tmp_path: Path
) -> None:
    path = fake.demo(tmp_path / "demo")
    write_report(path / "sft")
    write_report(path)
    found = check(path)
    assert (
        "True reward: −0.200 for base, 0.310 for sft and 1.94 for ppo; by judge, prompt by prompt, ppo differs clearly from sft"
        in found.text
    )
    assert "All 11 figures figure base sft ppo meaning true_reward" in found.text, (
        "and none of the other stages' metrics"
    )
    assert "1.94 ± 0.05" in found.text and "93% ± 2" in found.text
    assert {value for _, name, value in found.attributes if name == "href" and "/" in value} == {"sft/report.html"}


@pytest.mark.parametrize("missing", ["config.yaml", "manifest.json", "summary.json", "metrics.jsonl", "samples.jsonl"])
@pytest.mark.parametrize("stage", ["sft", "reward", "ppo", "evaluate"])
def test_a_missing_file_leaves_the_rest(fake: SimpleNamespace, tmp_path: Path, stage: str, missing: str) -> None:
    path = getattr(fake, stage)(tmp_path / stage)
    (path / missing).unlink(missing_ok=True)
    write_report(path)
    text = check(path).text
    needed = missing in ("config.yaml", "manifest.json") or (missing == "metrics.jsonl" and stage != "evaluate")
    assert (f"{missing} is missing" in text) == needed


@pytest.mark.parametrize("kept", ["config.yaml", "manifest.json", "summary.json", "metrics.jsonl", "samples.jsonl"])
def test_one_file_alone_is_enough(fake: SimpleNamespace, tmp_path: Path, kept: str) -> None:
    path = fake.ppo(tmp_path / "run", steps=6)
    for file in path.iterdir():
        if file.name != kept:
            file.unlink()
    write_report(path)
    check(path)


def test_damaged_files_are_named_and_the_rest_is_shown(fake: SimpleNamespace, tmp_path: Path) -> None:
    path = fake.ppo(tmp_path / "run", steps=6)
    (path / "config.yaml").write_text("a: [1,\nb: }", encoding="utf-8")
    (path / "summary.json").write_text('{"stage": "ppo", "status"', encoding="utf-8")
    (path / "samples.jsonl").write_text('{"step": 1}\nrubbish\n{"step": 2}\n', encoding="utf-8")
    write_report(path)
    text = check(path).text
    assert "config.yaml is not valid YAML" in text and "summary.json is damaged" in text
    assert "samples.jsonl is damaged: not a JSON object at 2" in text and "KL from the reference" in text


def test_a_run_in_progress_says_how_far_it_is(fake: SimpleNamespace, tmp_path: Path) -> None:
    path = fake.ppo(tmp_path / "run", steps=23, done=False)
    with open(path / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('{"step": 24, "rewa')
    write_report(path)
    text = check(path).text
    assert "not finished, step 23 of 60" in text and "in 23 steps" in text


def test_a_pipeline_half_way(fake: SimpleNamespace, tmp_path: Path) -> None:
    path = fake.demo(tmp_path / "demo")
    shutil.rmtree(path / "evaluate")
    (path / "summary.json").unlink()
    (path / "ppo" / "metrics.jsonl").unlink()
    write_report(path)
    text = check(path).text
    assert "The stages so far" in text and "No step has been finished yet." in text and "Held-out accuracy" in text


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_the_first_steps_already_make_a_report(fake: SimpleNamespace, tmp_path: Path, steps: int) -> None:
    path = fake.ppo(tmp_path / "run", steps=steps, done=False)
    write_report(path)
    expected = ["before the first update", "after 1 step.", "after 2 steps."][steps]
    assert expected in check(path).text


def test_a_long_run_is_thinned(fake: SimpleNamespace, tmp_path: Path) -> None:
    path = fake.ppo(tmp_path / "run", steps=900, total=900)
    write_report(path)
    text = check(path).text
    assert "Drawn as means of 3 steps." in text and "25 of 900 steps are shown" in text
    assert (path / "report.html").stat().st_size < 500_000


def test_nothing_a_model_or_a_file_says_becomes_markup(fake: SimpleNamespace, tmp_path: Path) -> None:
    path = fake.ppo(tmp_path / "run", steps=12, response=ATTACK)
    for name in ("config.yaml", "manifest.json", "summary.json"):
        text = (path / name).read_text(encoding="utf-8")
        (path / name).write_text(text.replace("runs/demo", "runs/<script>alert(3)</script>"), encoding="utf-8")
    config = (path / "config.yaml").read_text(encoding="utf-8")
    (path / "config.yaml").write_text(
        config + 'run_name: "</title><script>alert(4)</script>"\nkl_penalty: "<b>"\n', encoding="utf-8"
    )
    rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        row["reward/<script>alert(5)</script>"] = row["reward/x\"' onclick="] = row["memory/</script>"] = 1.0
    fake.lines(path / "metrics.jsonl", rows)
    write_report(path)
    found = check(path)
    assert "<script>alert(1)</script>" in found.text, "shown as text"
    assert "<script>alert(5)</script>" in found.text and "<script>alert(4)</script>" in found.text
    raw = (path / "report.html").read_text(encoding="utf-8")
    assert "alert(" not in raw.split("<script>")[1] and "\x1b" not in raw and "\u202e" not in raw


def test_attacks_in_an_evaluation_and_on_the_cover(fake: SimpleNamespace, tmp_path: Path) -> None:
    path = fake.demo(tmp_path / "demo")
    rows = [
        {"step": 0, "policy": ATTACK, "prompt": ATTACK + str(i), "reply": ATTACK, "reward": 1.0, ATTACK: 2.0}
        for i in range(3)
    ]
    fake.lines(path / "evaluate" / "samples.jsonl", rows)
    summary = json.loads((path / "evaluate" / "summary.json").read_text())
    summary["metrics"] |= {f"reward/{ATTACK.replace('/', '')}": 1.0, f"{ATTACK}/ppo": 3.0}
    (path / "evaluate" / "summary.json").write_text(json.dumps(summary))
    for folder in (path / "evaluate", path):
        write_report(folder)
        check(folder)


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(ArtifactError, match="not a run folder"):
        write_report(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def test_the_report_is_replaced_whole_and_reading_changes_nothing(fake: SimpleNamespace, tmp_path: Path) -> None:
    path = fake.ppo(tmp_path / "run", steps=3)
    before = {p.name: p.read_bytes() for p in path.iterdir()}
    (path / "report.html").write_text("old")
    write_report(path)
    first = (path / "report.html").read_text()
    write_report(path)
    assert (path / "report.html").read_text() == first, "equal files, equal report"
    after = {p.name: p.read_bytes() for p in path.iterdir()}
    assert after.pop("report.html") and after == before


def test_a_report_needs_no_torch() -> None:
    code = "import sys, rlhf_ray.report; sys.exit('torch' in sys.modules or 'rich' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=4,
)


@pytest.mark.parametrize("stage", ["ppo", "reward", "demo"])
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_content_of_the_files_stops_the_report(
    fake: SimpleNamespace, tmp_path: Path, stage: str, data: st.DataObject
) -> None:
    """A run that trained for days must not end in an error because its report stumbled over an odd value."""
    path = tmp_path / stage
    if not path.exists():
        (fake.ppo(path, steps=4) if stage == "ppo" else getattr(fake, stage)(path))
        (path / "keep").mkdir()
        for name in ("manifest.json", "summary.json", "metrics.jsonl"):
            if (path / name).exists():
                shutil.copy(path / name, path / "keep" / name)
    for name in ("manifest.json", "summary.json"):
        content = json.loads((path / "keep" / name).read_text())
        content[data.draw(st.sampled_from(sorted(content)))] = data.draw(JSON)
        (path / name).write_text(json.dumps(content))
    if (path / "keep" / "metrics.jsonl").exists():
        rows = [json.loads(line) for line in (path / "keep" / "metrics.jsonl").read_text().splitlines()]
        for _ in range(3):
            row = data.draw(st.sampled_from(rows))
            row[data.draw(st.sampled_from(sorted(row)) | st.text(max_size=5))] = data.draw(JSON)
        (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Page(page(read_folder(path)))


def test_a_split_run_shows_its_roles_log(fake: SimpleNamespace, tmp_path: Path) -> None:
    """Who is who stays, however long the run; of the steps the last ones."""
    run = fake.ppo(tmp_path / "ppo")
    steps = [f"10:00  step {i}: adapter {i - 1} (ab)  generator 0: 4 chunks, 1 s" for i in range(1, 61)]
    (run / "roles.log").write_text("\n".join(["10:00  generator 0  pid <1> on n", *steps]) + "\n")
    html = write_report(run).read_text()
    assert "generator 0  pid &lt;1&gt; on n\n… 20 lines left out\n10:00  step 21: adapter" in html
    assert "step 60: adapter 59" in html and "step 20: adapter" not in html


def test_half_a_character_in_a_reply_does_not_cost_the_page(fake: SimpleNamespace, tmp_path: Path) -> None:
    """As a server cuts an emoji; JSON can hold it, UTF-8 cannot."""
    path = fake.ppo(tmp_path / "run")
    row = {"step": 6, "prompt": "What now?", "reply": "half \ud83d of it", "reward": 1.0}
    with open(path / "samples.jsonl", "a") as file:
        file.write(json.dumps(row) + "\n")
    write_report(path)
    assert "half \\ud83d of it" in check(path).text


DAMAGED = {
    "seconds that are not a number": ("ppo", "summary.json", {"seconds": math.nan}),
    "seconds without an end": ("sft", "summary.json", {"seconds": 1e400}),
    "a size as text": ("ppo", "manifest.json", {"files": {"a": {"bytes": "12", "sha256": 1}}}),
    "a group without figures": ("reward", "manifest.json", {"reward": {"held_out": {"groups": {"g": {}, "h": 1}}}}),
    "groups that are a list": ("reward", "manifest.json", {"reward": {"held_out": {"groups": [1]}}}),
    "bins without figures": ("reward", "manifest.json", {"reward": {"held_out": {"reliability": [{"pairs": 3}, 1]}}}),
    "a step that is a list": ("ppo", "samples.jsonl", {"step": [1], "prompt": "a", "reply": "b"}),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_files_that_say_something_odd_cost_no_page(fake: SimpleNamespace, tmp_path: Path, damage: str) -> None:
    stage, name, values = DAMAGED[damage]
    file = getattr(fake, stage)(tmp_path / "run") / name
    if name == "samples.jsonl":
        file.write_text(file.read_text() + json.dumps(values) + "\n")
    else:
        file.write_text(json.dumps({**json.loads(file.read_text()), **values}))
    write_report(file.parent)
    assert "run" in check(file.parent).text
