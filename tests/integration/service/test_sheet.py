"""The comparison sheet that `generate --out FILE.html` writes, in a real browser: a blind vote by keyboard, light and dark."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rlhf_ray.config import DataConfig, SamplingConfig
from rlhf_ray.console import LocalConsole
from rlhf_ray.data.records import read_rows
from rlhf_ray.stages.generate import generate

pytestmark = pytest.mark.integration
ASKED = ["Name a bird.", "Name a <b>fish</b> & a tree.", "Name two animals."]


@pytest.fixture(scope="module")
def sheet(
    tmp_path_factory: pytest.TempPathFactory, tiny_llama: Callable[..., Path], tiny_run: Callable[..., Path]
) -> Path:
    folder, base = tmp_path_factory.mktemp("sheet"), tiny_llama()
    runs = [
        str(tiny_run(folder / name, base, seed=seed, template="none"))
        for seed, name in enumerate(("sft", "dpo", "ppo"))
    ]
    asked = folder / "asked.jsonl"
    asked.write_text("".join(json.dumps({"instruction": text, "input": ""}) + "\n" for text in ASKED))
    how: dict[str, Any] = {
        "max_new_tokens": 24,
        "sampling": SamplingConfig(temperature=0.7),
        "seed": 3,
        "num_threads": 1,
    }
    out = folder / "sheet.html"
    generate(policies=["base", *runs], file=str(asked), out=str(out), console=LocalConsole(quiet=True), **how)
    return out


@pytest.fixture
def page(browser: Any, sheet: Path, request: pytest.FixtureRequest) -> Iterator[Any]:
    """The sheet, in light or dark; nothing may be logged as an error, or asked of anybody."""
    opened = browser.new_page(viewport={"width": 1200, "height": 850}, color_scheme=request.param)
    opened.problems = []
    opened.on("console", lambda said: opened.problems.append(said.text) if said.type == "error" else None)
    opened.on("pageerror", lambda error: opened.problems.append(str(error)))
    opened.on(
        "request", lambda asked: None if asked.url.startswith(("file:", "blob:")) else opened.problems.append(asked.url)
    )
    opened.goto(sheet.as_uri())
    yield opened
    assert opened.problems == []
    opened.close()


def focused(page: Any) -> str:
    return str(page.evaluate("(document.activeElement.textContent || '').trim()"))


def tab_to(page: Any, text: str, card: str | None = None) -> None:
    """Press Tab until a button that begins with `text` has the focus; card: in the card of that number."""
    for _ in range(40):
        page.keyboard.press("Tab")
        at = page.evaluate("document.activeElement.closest('article')?.dataset.at ?? null")
        if focused(page).startswith(text) and (card is None or at == card):
            return
    raise AssertionError(f"no {text!r} within 40 tabs")


def names_in(page: Any, block: int) -> list[str]:
    return list(page.locator(".ballot").nth(block).locator("h5").all_text_contents())


@pytest.mark.parametrize("page", ["light", "dark"], indirect=True)
def test_a_blind_vote_by_keyboard_becomes_rows_that_the_reward_stage_reads(page: Any, tmp_path: Path) -> None:
    policies = names_in(page, 0)
    assert policies == ["base", "sft", "dpo", "ppo"] and page.locator("mark").first.is_visible()
    ballots = [
        json.loads(found) for found in page.locator(".ballot").evaluate_all("all => all.map(b => b.dataset.ballot)")
    ]
    assert [ballot["prompt"] for ballot in ballots] == ASKED and page.locator(".ballot b:has-text('fish')").count() == 0
    tab_to(page, "Vote blind")
    page.screenshot(path=str(tmp_path / "before.png"), full_page=True)
    page.keyboard.press("Enter")
    assert sorted(names_in(page, 0)) == ["Reply A", "Reply B", "Reply C", "Reply D"]
    assert not any(figures.is_visible() for figures in page.locator(".ballot .figures").all())
    lines = page.locator(".ballot mark").evaluate_all("all => all.map(m => getComputedStyle(m).textDecorationLine)")
    assert set(lines) == {"none"}, "what is marked gives the first policy away"
    assert page.evaluate("document.activeElement.tagName") == "SUMMARY", "the focus went with the button"
    page.screenshot(path=str(tmp_path / "blind.png"), full_page=True)

    tab_to(page, "This one is best", card="3")
    page.keyboard.press("Enter")
    assert sorted(names_in(page, 0)) == ["base", "dpo", "ppo (chosen)", "sft"]
    assert sorted(names_in(page, 1))[0] == "Reply A", "the next prompt is still blind"
    tab_to(page, "This one is best", card="1")
    page.keyboard.press("Space")
    tab_to(page, "None is better")
    page.keyboard.press("Enter")
    status = page.locator(".votes [role=status]").text_content()
    assert status.strip() == "3 of 3 prompts voted on: ppo 1, sft 1"
    assert focused(page).startswith("Download preferences.jsonl (6 rows)")
    page.screenshot(path=str(tmp_path / "after.png"), full_page=True)
    with page.expect_download() as waiting:
        page.keyboard.press("Enter")
    assert waiting.value.suggested_filename == "preferences.jsonl"
    kept = tmp_path / "preferences.jsonl"
    waiting.value.save_as(kept)

    rows = [json.loads(line) for line in kept.read_text(encoding="utf-8").splitlines()]
    assert [(row["chosen_model"], row["rejected_model"]) for row in rows] == [
        *(("ppo", name) for name in ("base", "sft", "dpo")),
        *(("sft", name) for name in ("base", "dpo", "ppo")),
    ]
    read = read_rows(DataConfig(train=(str(kept),)), "preference").rows
    texts = [{reply["model"]: reply["text"] for reply in ballot["replies"]} for ballot in ballots]
    assert [(r.prompt.text, r.chosen, r.rejected) for r in read] == [
        *((ASKED[0], texts[0]["ppo"], texts[0][name]) for name in ("base", "sft", "dpo")),
        *((ASKED[1], texts[1]["sft"], texts[1][name]) for name in ("base", "dpo", "ppo")),
    ]


@pytest.mark.parametrize("page", ["light"], indirect=True)
def test_a_narrow_screen_is_not_scrolled_sideways(page: Any, tmp_path: Path) -> None:
    page.set_viewport_size({"width": 320, "height": 700})
    page.click("text=Vote blind")
    assert page.evaluate("document.documentElement.scrollWidth") <= 320
    page.screenshot(path=str(tmp_path / "narrow.png"), full_page=True)
