"""The playground in a real browser: type, compare, choose; by keyboard; light and dark."""

from __future__ import annotations

import asyncio
import json
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

sync_api = pytest.importorskip("playwright.sync_api")
expect = sync_api.expect
pytestmark = pytest.mark.integration

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        try:
            made = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        except sync_api.Error as error:
            pytest.skip(f"no Chromium: {str(error).splitlines()[0]}")
        yield made
        made.close()


@pytest.fixture(scope="module")
def served(
    tmp_path_factory: pytest.TempPathFactory, tiny_llama: Callable[..., Path], tiny_run: Callable[..., Path]
) -> Iterator[tuple[str, Path]]:
    """(URL, output_dir) of the application over one replica, without Ray: the page sees no difference."""
    import uvicorn

    from rlhf_ray.config.serve import ServeConfig
    from rlhf_ray.serve.api import HttpApi
    from rlhf_ray.serve.replica import Replica

    folder, base = tmp_path_factory.mktemp("page"), tiny_llama()
    kinds = (("sft", "sft", 1), ("ppo", "ppo", 2), ("judge", "reward", 3))
    runs = {
        name: str(tiny_run(folder / name, base, stage=stage, seed=seed, template="none")) for name, stage, seed in kinds
    }
    config = ServeConfig(output_dir=str(folder / "serve"), model_name_or_path=str(base), adapters=runs, template="none")
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    listening.listen(64)
    servers: list[Any] = []
    up = threading.Event()

    async def serve() -> None:
        replica = Replica(config)
        await replica.start()

        class LocalBackend:
            async def complete(self, request: Any) -> Any:
                return [event async for events in replica.events(request) for event in events]

            def stream(self, request: Any) -> Any:
                return replica.events(request)

            async def models(self) -> Any:
                return await replica.models()

        servers.append(uvicorn.Server(uvicorn.Config(HttpApi(config, LocalBackend()).app, log_level="warning")))
        up.set()
        await servers[0].serve([listening])
        await replica.close()

    thread = threading.Thread(target=lambda: asyncio.run(serve()), daemon=True)
    thread.start()
    assert up.wait(60)
    yield f"http://127.0.0.1:{listening.getsockname()[1]}/", folder / "serve"
    servers[0].should_exit = True
    thread.join(30)


@pytest.fixture
def page(browser: Any, served: tuple[str, Path]) -> Iterator[Any]:
    context = browser.new_context(viewport={"width": 1200, "height": 850})
    made = context.new_page()
    made.problems = []
    made.on("console", lambda message: made.problems.append(message.text) if message.type == "error" else None)
    made.on("pageerror", lambda error: made.problems.append(str(error)))
    made.on(
        "request", lambda request: made.problems.append(request.url) if not request.url.startswith(served[0]) else None
    )
    made.goto(served[0])
    made.wait_for_selector("input[name=model]")
    yield made
    assert made.problems == []
    context.close()


def test_compare_and_choose(page: Any, served: tuple[str, Path], tmp_path: Path) -> None:
    assert page.locator("input[name=model]").evaluate_all("boxes => boxes.map(b => b.value)") == ["base", "ppo", "sft"]
    page.fill("#prompt", "<b>Name</b> two animals.")
    page.fill("#tokens", "24")
    page.fill("#seed", "1")
    page.click("#go")
    expect(page.locator(".card dl div")).to_have_count(9, timeout=30_000)
    shown = page.locator(".card dt").all_text_contents()
    assert shown == ["ended", "reward", "KL"] * 3
    assert page.locator(".card dd").nth(2).text_content() == "0.000 nats"
    texts = page.locator(".card .text").all_text_contents()
    page.click("text=This one is better >> nth=1")
    expect(page.locator("#status")).to_contain_text("Stored", timeout=30_000)
    page.screenshot(path=str(tmp_path / "light.png"))
    page.emulate_media(color_scheme="dark")
    page.screenshot(path=str(tmp_path / "dark.png"))
    rows = [json.loads(line) for line in (served[1] / "preferences.jsonl").read_text().splitlines()]
    assert [(r["chosen_model"], r["rejected_model"]) for r in rows] == [("ppo", "base"), ("ppo", "sft")]
    assert rows[0]["prompt"] == "<b>Name</b> two animals." and rows[0]["chosen"] == texts[1]
    light, dark = (Path(tmp_path / f"{name}.png").read_bytes() for name in ("light", "dark"))
    assert light != dark


def test_by_keyboard_alone_and_blind(page: Any, served: tuple[str, Path]) -> None:
    stored = (served[1] / "preferences.jsonl").read_text() if (served[1] / "preferences.jsonl").exists() else ""
    page.locator("input[name=model]").first.focus()
    page.keyboard.press("Space")  # without the base
    page.locator("#blind").focus()
    page.keyboard.press("Space")
    page.fill("#seed", "3")
    page.fill("#tokens", "8")
    page.locator("#prompt").focus()
    page.keyboard.type("Name a bird.")
    page.keyboard.press("Control+Enter")
    expect(page.locator("#status")).to_contain_text("Which", timeout=30_000)
    assert page.locator(".card h2").all_text_contents() == ["Reply 1", "Reply 2"]
    page.locator("#go").focus()
    page.keyboard.press("2")
    expect(page.locator("#status")).to_contain_text("Stored", timeout=30_000)
    assert set(page.locator(".card h2").all_text_contents()) == {"ppo", "sft"}
    assert len((served[1] / "preferences.jsonl").read_text()) > len(stored)


def test_errors_are_shown(page: Any) -> None:
    page.fill("#prompt", "x" * 3000)
    page.click("#go")
    expect(page.locator("#status")).to_have_class("bad", timeout=30_000)
    assert "3001 tokens" in page.text_content("#status")
    page.problems.clear()  # the browser reports the 400
