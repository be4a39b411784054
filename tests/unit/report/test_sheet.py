"""Replies side by side: what is marked, what a vote is made of, and a vote itself, by the page's own script."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from rlhf_ray.config import DataConfig
from rlhf_ray.data.records import read_rows
from rlhf_ray.report import sheet as sheet_module
from rlhf_ray.report import sheet_page
from rlhf_ray.report.samples import samples_section
from rlhf_ray.report.sheet import marked

SCRIPT = Path(sheet_module.__file__).with_name("script.js")


def sample(policy: str, reply: str, prompt: str = "Say it.", **more: Any) -> dict[str, Any]:
    asked = {"asked": json.dumps(prompt)} if "asked" not in more else {}
    return {"policy": policy, "prompt": f"### {prompt}", "reply": reply, "reward": 1.5, **asked, **more}


def ballots(page: str) -> list[dict[str, Any]]:
    return [json.loads(html.unescape(found)) for found in re.findall(r'data-ballot="([^"]*)"', page)]


def test_words_that_differ_are_marked_and_nothing_else() -> None:
    assert marked("the cat sat", "the cat sat") == "the cat sat"
    assert marked("the old cat sat down", "the cat sat") == "the <mark>old </mark>cat sat <mark>down</mark>"
    assert marked("a < b & c", "a < c") == "a &lt; <mark>b &amp; </mark>c"
    assert marked(" two\nlines", "two\nlines") == " two\nlines".replace(" two", "<mark> </mark>two", 1)
    long = "word " * (sheet_module.MOST_WORDS + 1)
    assert "<mark>" not in marked(long, "other") and marked("", "x") == ""


def test_every_policy_has_a_card_and_the_whole_of_each_reply_is_kept_for_the_vote() -> None:
    """Control characters, markup and other scripts come back as they were; figures of a card are still shown."""
    odd = 'nasty </script> "quote" \x00\u202e é 雪 ' + "x" * 5000
    page = sheet_page("Replies", [sample(n, r) for n, r in (("base", "no"), ("sft", "yes"), ("ppo", odd))])
    (ballot,) = ballots(page)
    assert ballot == {
        "prompt": "Say it.",
        "replies": [{"model": "base", "text": "no"}, {"model": "sft", "text": "yes"}, {"model": "ppo", "text": odd}],
    }
    assert [re.sub("<.*?>", "", h) for h in re.findall(r"<h5>.*?</h5>", page)] == ["base", "sft", "ppo"]
    assert page.count("</script>") == 1 and "reward <b>1.50</b>" in page and "<mark>yes</mark>" in page


def test_what_was_asked_of_a_conversation_is_messages_and_without_it_there_is_no_vote() -> None:
    talk = [{"role": "user", "content": "Say it."}]
    (ballot,) = ballots(str(samples_section([sample("a", "x", asked=json.dumps(talk)), sample("b", "y", asked="?")])))
    assert ballot["prompt"] == talk
    older = str(samples_section([sample("a", "x", asked=None), sample("b", "y", asked=None)]))
    assert "data-ballot" not in older and older.count("<article>") == 2


DOM = """
const fs = require("fs"), vm = require("vm");
class Node {
  constructor(tag, classes = [], data = {}) {
    Object.assign(this, {tag, dataset: data, children: [], textContent: "", hidden: false, on: {}, open: false});
    const own = new Set(classes);
    this.classList = {add: (c) => own.add(c), remove: (c) => own.delete(c), contains: (c) => own.has(c)};
    this.parent = null;
  }
  set className(value) { value.split(" ").forEach((c) => this.classList.add(c)); }
  append(...nodes) { for (const n of nodes) { if (n.parent) n.remove(); n.parent = this; this.children.push(n); } }
  before(node) { this.parent.children.unshift(node); node.parent = this.parent; }
  remove() { this.parent.children.splice(this.parent.children.indexOf(this), 1); this.parent = null; }
  setAttribute() {}
  focus() {}
  addEventListener(name, act) { this.on[name] = act; }
  click() { clicked.push(this); if (this.on.click) this.on.click(); }
  matches(s) { return s.startsWith(".") ? this.classList.contains(s.slice(1)) : this.tag === s; }
  querySelectorAll(s) { return this.children.flatMap((c) => [...(c.matches(s) ? [c] : []), ...c.querySelectorAll(s)]); }
  querySelector(s) { return this.querySelectorAll(s)[0]; }
}
const clicked = [], body = new Node("body"), sheet = new Node("div", ["sheet"]);
body.append(sheet);
for (const ballot of JSON.parse(process.argv[2])) {
  const block = new Node("details", ["ballot"], {ballot: JSON.stringify(ballot)}), cards = new Node("div", ["cards"]);
  for (const reply of ballot.replies) {
    const card = new Node("article"), name = new Node("h5");
    name.textContent = reply.model;
    card.append(name);
    cards.append(card);
  }
  block.append(new Node("summary"), cards);
  sheet.append(block);
}
let saved = null;
const context = {
  document: {querySelectorAll: (s) => (s === ".sheet" ? [sheet] : []), createElement: (t) => new Node(t)},
  window: {addEventListener() {}}, crypto: require("crypto").webcrypto, setTimeout() {}, Uint8Array, Uint32Array, JSON, Math,
  URL: {createObjectURL: (blob) => { saved = blob.parts.join(""); return "blob:1"; }, revokeObjectURL() {}},
  Blob: class { constructor(parts) { this.parts = parts; } },
};
vm.runInNewContext(fs.readFileSync(process.argv[1], "utf8"), context);
const press = (place, text) => place.querySelectorAll("button").find((b) => b.textContent.startsWith(text)).click();
press(body, "Vote blind");
const blocks = sheet.children, names = (block) => block.querySelectorAll("h5").map((h) => h.textContent);
const hidden = blocks.map(names);
const best = (block, model) => {
  const at = JSON.parse(block.dataset.ballot).replies.findIndex((r) => r.model === model);
  press(block.querySelectorAll("article").find((card) => Number(card.dataset.at) === at), "This one");
};
best(blocks[0], "ppo");
best(blocks[1], "sft");
press(blocks[2], "None");
press(body, "Download");
console.log(JSON.stringify({
  hidden, shown: blocks.map(names), saved, name: clicked.at(-1).download,
  status: body.querySelectorAll("span").map((s) => s.textContent).join(""), left: sheet.querySelectorAll("button").length,
}));
"""


@pytest.mark.skipif(shutil.which("node") is None, reason="no node")
def test_a_blind_vote_becomes_rows_that_the_reward_stage_reads(tmp_path: Path) -> None:
    """Best of three makes two pairs; a reply that says the same, or nothing, makes none; no difference makes none."""
    replies = {"base": "no\n", "sft": "yes", "ppo": "oh yes"}
    asked = [
        {"prompt": f"Say {i}.", "replies": [{"model": m, "text": t} for m, t in replies.items()]} for i in range(3)
    ]
    asked[1]["replies"] = [{"model": m, "text": t} for m, t in (("base", " "), ("sft", "yes"), ("ppo", "yes "))]
    done = subprocess.run(
        ["node", "-e", DOM, str(SCRIPT), json.dumps(asked)], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert [sorted(names) for names in found["hidden"]] == [["Reply A", "Reply B", "Reply C"]] * 3
    assert sorted(found["shown"][0]) == ["base", "ppo (chosen)", "sft"] and sorted(found["shown"][2]) == [
        "base",
        "ppo",
        "sft",
    ]
    assert found["status"].strip() == "3 of 3 prompts voted on: ppo 1, sft 1" and found["left"] == 0
    assert found["name"] == "preferences.jsonl"
    rows = [json.loads(line) for line in found["saved"].splitlines()]
    assert [(r["chosen_model"], r["rejected_model"], r["chosen"], r["rejected"]) for r in rows] == [
        ("ppo", "base", "oh yes", "no\n"),
        ("ppo", "sft", "oh yes", "yes"),
    ]
    assert rows[0]["comparison"] == rows[1]["comparison"] and rows[0]["created"] > 1_700_000_000
    (tmp_path / "preferences.jsonl").write_text(found["saved"])
    read = read_rows(DataConfig(train=(str(tmp_path / "preferences.jsonl"),)), "preference")
    assert [(r.prompt.text, r.chosen, r.rejected) for r in read.rows] == [
        ("Say 0.", "oh yes", "no\n"),
        ("Say 0.", "oh yes", "yes"),
    ]
