"""The playground in a real browser: type, compare, choose; by keyboard; light and dark."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.unit.serve.conftest import LiveService

sync_api = pytest.importorskip("playwright.sync_api")
expect = sync_api.expect
pytestmark = pytest.mark.integration


class Served(LiveService):
    """The application over one replica, without Ray: the page sees no difference."""

    def rows(self, name: str = "preferences") -> list[dict[str, Any]]:
        path = Path(self.config.output_dir) / f"{name}.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.fixture(scope="module")
def make_served(
    tmp_path_factory: pytest.TempPathFactory, tiny_llama: Callable[..., Path], tiny_run: Callable[..., Path]
) -> Iterator[Callable[..., Served]]:
    """make_served(names of adapters) -> a service; `judge` is a reward model. The longest reply is the demo's, 64 tokens."""
    from rlhf_ray.config.serve import ServeConfig

    folder, base, made = tmp_path_factory.mktemp("page"), tiny_llama(), list[Served]()
    kinds = (("sft", "sft", 1), ("ppo", "ppo", 2), ("judge", "reward", 3))
    runs = {
        name: str(tiny_run(folder / name, base, stage=stage, seed=seed, template="none")) for name, stage, seed in kinds
    }

    def make(*names: str) -> Served:
        config = ServeConfig(
            output_dir=str(folder / f"serve{len(made)}"),
            model_name_or_path=str(base),
            adapters={name: runs.get(name, runs["sft"]) for name in names},
            template="none",
            limits={"max_tokens": 64},
        )
        made.append(Served(config))
        return made[-1]

    yield make
    for service in made:
        service.close()


@pytest.fixture(scope="module")
def served(make_served: Callable[..., Served]) -> Served:
    return make_served("sft", "ppo", "judge")


@pytest.fixture
def open_page(browser: Any) -> Iterator[Callable[..., Any]]:
    """open_page(service, width) -> its page; nothing may be logged as an error, or asked of another address."""
    opened = []

    def make(service: Served, width: int = 1200) -> Any:
        made = browser.new_context(viewport={"width": width, "height": 850}).new_page()
        made.problems = []
        made.on("console", lambda message: made.problems.append(message.text) if message.type == "error" else None)
        made.on("pageerror", lambda error: made.problems.append(str(error)))
        made.on(
            "request",
            lambda request: made.problems.append(request.url) if not request.url.startswith(service.url) else None,
        )
        made.goto(f"{service.url}/")
        made.wait_for_selector("input[name=model]")
        opened.append(made)
        return made

    yield make
    for page in opened:
        assert page.problems == []
        page.context.close()


@pytest.fixture
def page(open_page: Callable[..., Any], served: Served) -> Any:
    return open_page(served)


def wait_for(page: Any, text: str) -> None:
    expect(page.locator("#status")).to_contain_text(text, timeout=60_000)


def test_the_first_click_works(page: Any) -> None:
    """Nothing filled in but the prompt. The page asked for 128 tokens, of a service whose limit is 64."""
    page.fill("#prompt", "Name two animals.")
    page.click("#go")
    wait_for(page, "Which one is better?")
    texts = page.locator(".card .text").all_text_contents()
    assert len(texts) == 3 and any(texts)  # a reply that ends with its first token is one as well


def test_compare_and_choose(page: Any, served: Served, tmp_path: Path) -> None:
    assert page.locator("input[name=model]").evaluate_all("boxes => boxes.map(b => b.value)") == ["base", "ppo", "sft"]
    before = len(served.rows())
    page.fill("#prompt", "<b>Name</b> two animals.")
    page.fill("#tokens", "24")
    page.fill("#seed", "1")
    page.click("#go")
    wait_for(page, "Which")
    shown = page.locator(".card dt").all_text_contents()
    assert shown == ["ended", "reward", "KL"] * 3
    assert page.locator(".card dd").nth(2).text_content() == "0.000 nats"
    texts = page.locator(".card .text").all_text_contents()
    page.click("text=This one is better >> nth=1")
    wait_for(page, "Stored")
    page.screenshot(path=str(tmp_path / "light.png"), full_page=True)
    page.emulate_media(color_scheme="dark")
    page.screenshot(path=str(tmp_path / "dark.png"), full_page=True)
    rows = served.rows()[before:]
    assert [(r["chosen_model"], r["rejected_model"]) for r in rows] == [("ppo", "base"), ("ppo", "sft")]
    assert rows[0]["prompt"] == "<b>Name</b> two animals." and rows[0]["chosen"] == texts[1]
    light, dark = (Path(tmp_path / f"{name}.png").read_bytes() for name in ("light", "dark"))
    assert light != dark


def test_by_keyboard_alone_and_blind(page: Any, served: Served) -> None:
    """The keys that the page names choose, right after Ctrl+Enter: they were typed into the prompt. Names, KL and rewards are told
    when the vote is cast, and not before."""
    before = len(served.rows())
    page.locator("input[name=model]").first.focus()
    page.keyboard.press("Space")  # without the base
    page.locator("#blind").focus()
    page.keyboard.press("Space")
    page.fill("#seed", "3")
    page.fill(
        "#tokens", "8"
    )  # a random model's long replies hold a NUL now and then, which no reward can be learnt from
    page.locator("#prompt").focus()
    page.keyboard.type("Name a bird.")
    page.keyboard.press("Control+Enter")
    wait_for(page, "Which")
    assert page.locator(".card h2").all_text_contents() == ["Reply 1", "Reply 2"]
    assert not any(figures.is_visible() for figures in page.locator(".card dl").all())
    page.keyboard.press("2")
    wait_for(page, "Stored")
    assert page.input_value("#prompt") == "Name a bird."
    assert set(page.locator(".card h2").all_text_contents()) == {"ppo", "sft"}
    assert all(figures.is_visible() for figures in page.locator(".card dl").all())
    assert len(served.rows()) == before + 1


@pytest.mark.parametrize(("key", "verdict", "told"), [("t", "tie", "a tie"), ("b", "both_bad", "all bad")])
def test_nobody_wins(page: Any, served: Served, key: str, verdict: str, told: str) -> None:
    """Kept apart from the rows that a reward is learnt from."""
    before, ties = len(served.rows()), len(served.rows("ties"))
    page.fill("#prompt", "Name a fish.")
    page.keyboard.press("Control+Enter")
    wait_for(page, "Which")
    page.keyboard.press(key)
    wait_for(page, told)
    assert len(served.rows()) == before and not page.locator(".card.better").count()
    rows = served.rows("ties")[ties:]
    assert [(r["verdict"], r["chosen_model"], r["rejected_model"]) for r in rows] == [
        (verdict, "base", "ppo"),
        (verdict, "base", "sft"),
    ]


def test_a_system_prompt_and_a_second_turn(page: Any, served: Served) -> None:
    asked: list[Any] = []
    page.on("request", lambda r: asked.append(r.post_data_json) if r.url.endswith("/compare") else None)
    page.fill("#seed", "3")
    page.click("text=System prompt")
    page.fill("#system", "You are brief.")
    page.fill("#prompt", "Name a bird.")
    page.click("#go")
    wait_for(page, "Which")
    first = page.locator(".card .text").nth(0).text_content()
    page.keyboard.press("1")
    wait_for(page, "Stored")
    page.click("text=Go on with this reply >> nth=0")
    assert page.evaluate("document.activeElement.id") == "prompt" and page.input_value("#prompt") == ""
    page.keyboard.type("Another one?")
    page.keyboard.press("Control+Enter")
    wait_for(page, "Which")
    turns = [{"role": "user", "content": "Name a bird."}, {"role": "assistant", "content": first}]
    system, last = {"role": "system", "content": "You are brief."}, {"role": "user", "content": "Another one?"}
    assert [a["messages"] for a in asked] == [[system, turns[0]], [system, *turns, last]]
    page.keyboard.press("2")
    wait_for(page, "Stored")
    assert served.rows()[-1]["prompt"] == [system, *turns, last]
    page.click("#anew")
    assert not page.locator("#talk").is_visible()


def test_many_adapters_are_found_by_a_part_of_their_names(make_served: Callable[..., Served], open_page: Any) -> None:
    service = make_served(*(f"bird{i:02d}" for i in range(12)), "fish")
    page = open_page(service, 320)

    def names() -> list[str]:
        return list(page.locator("input[name=model]").evaluate_all("boxes => boxes.map(b => b.value)"))

    assert len(names()) == 14 and not page.locator("#reward").is_visible()  # no reward is served
    picked = ["base", "bird00", "bird01", "bird02"]
    page.fill("#filter", "FISH")
    assert names() == [*picked, "fish"]
    page.check("input[value=fish]")
    page.fill("#filter", "fish@")
    assert names()[:5] == [*picked, "fish"] and names()[5].startswith("fish@v")
    page.fill("#filter", "")
    page.check("#versions")
    assert len(names()) > 20
    for name in picked:
        page.uncheck(f"input[value={name}]")
    page.fill("#prompt", "Name a fish.")
    page.click("#go")
    wait_for(page, "Done")
    assert page.locator(".card h2").all_text_contents() == ["fish"]


def test_a_narrow_screen_is_not_scrolled_sideways(open_page: Any, served: Served, tmp_path: Path) -> None:
    page = open_page(served, 320)
    page.fill("#prompt", "x" * 200)
    page.click("#go")
    wait_for(page, "Which")
    assert page.evaluate("document.documentElement.scrollWidth") <= 320
    page.screenshot(path=str(tmp_path / "narrow.png"), full_page=True)


def test_errors_are_shown(page: Any) -> None:
    page.fill("#prompt", "x" * 3000)
    page.click("#go")
    expect(page.locator("#status")).to_have_class("bad", timeout=30_000)
    assert "maximum context length" in page.text_content("#status")
    page.problems.clear()  # the browser reports the 400
