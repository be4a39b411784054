"use strict";
// One cursor through all charts that count steps: the legends show the values at the step under the pointer.
const plots = [...document.querySelectorAll(".plot[data-steps]")].map((plot) => {
  const section = plot.closest("section").id.startsWith("stage-") ? plot.closest("section") : document;
  const steps = plot.dataset.steps.split("|").map(Number);
  const figure = plot.closest("figure");
  const cells = [...figure.querySelectorAll(".legend b")];
  return {
    section, steps, cells, box: plot.querySelector(".box"), cursor: plot.querySelector(".cursor"),
    rest: cells.map((cell) => cell.textContent),
    span: plot.dataset.span.split("|").map(Number),
    values: plot.dataset.values.split("\n").map((column) => column.split("|")),
  };
});

function nearest(steps, step) {
  let best = 0;
  steps.forEach((s, i) => { if (Math.abs(s - step) < Math.abs(steps[best] - step)) best = i; });
  return best;
}

function point(section, step) {
  for (const plot of plots) {
    if (plot.section !== section) continue;
    plot.cursor.hidden = step === null;
    if (step === null) {
      plot.cells.forEach((cell, i) => { cell.textContent = plot.rest[i]; });
      continue;
    }
    const at = nearest(plot.steps, step);
    const [first, last] = plot.span;
    plot.cursor.style.left = 100 * (plot.steps[at] - first) / Math.max(last - first, 1) + "%";
    plot.cells.forEach((cell, i) => { cell.textContent = plot.values[i][at] || "–"; });
    plot.cursor.dataset.step = "step " + plot.steps[at];
  }
}

for (const plot of plots) {
  const [first, last] = plot.span;
  plot.box.addEventListener("pointermove", (event) => {
    const frame = plot.box.getBoundingClientRect();
    point(plot.section, first + (last - first) * (event.clientX - frame.left) / frame.width);
  });
  plot.box.addEventListener("pointerleave", () => point(plot.section, null));
}

// Samples of two steps side by side, instead of the folded list that stands there without this script.
for (const list of document.querySelectorAll(".steps")) {
  const blocks = [...list.querySelectorAll(".step")];
  if (blocks.length < 2) continue;
  const panes = document.createElement("div");
  panes.className = "panes";
  for (const chosen of [0, blocks.length - 1]) {
    const pane = document.createElement("div"), label = document.createElement("label");
    const select = document.createElement("select"), place = document.createElement("div");
    blocks.forEach((block, i) => select.add(new Option("Step " + block.dataset.step, i, false, i === chosen)));
    select.setAttribute("aria-label", "Step");
    const show = () => {
      const block = blocks[select.value];
      place.replaceChildren(block.querySelector(".cards").cloneNode(true));
      label.replaceChildren(select, block.querySelector("summary small").cloneNode(true));
    };
    select.addEventListener("change", show);
    show();
    pane.append(label, place);
    panes.append(pane);
  }
  list.before(panes);
  list.hidden = true;
}

// A blind vote on replies side by side: names and figures are hidden, replies of a prompt in random order. What was voted can only be
// offered as a file here; its rows are those that the service stores, which the reward stage and DPO read.
function preferenceRows(ballot, chosen, id, created) {
  const better = ballot.replies[chosen];
  if (!better || !better.text.trim()) return [];
  return ballot.replies
    .filter((reply) => reply !== better && reply.text.trim() && reply.text.trim() !== better.text.trim())
    .map((worse) => ({
      prompt: ballot.prompt, chosen: better.text, rejected: worse.text,
      chosen_model: better.model, rejected_model: worse.model, comparison: id, created,
    }));
}

function shuffled(items) {
  const found = [...items];
  for (let i = found.length - 1; i > 0; i--) {
    const j = crypto.getRandomValues(new Uint32Array(1))[0] % (i + 1);
    [found[i], found[j]] = [found[j], found[i]];
  }
  return found;
}

function button(text, press) {
  const made = document.createElement("button");
  made.type = "button";
  made.textContent = text;
  made.addEventListener("click", press);
  return made;
}

for (const sheet of document.querySelectorAll(".sheet")) {
  const blocks = [...sheet.querySelectorAll(".ballot")].filter((block) => block.querySelectorAll("article").length > 1);
  if (!blocks.length) continue;
  const bar = document.createElement("p"), said = document.createElement("span");
  const rows = [], wins = new Map();
  let votes = 0;
  bar.className = "votes";
  said.setAttribute("role", "status");

  const download = button("", () => {
    const text = rows.map((row) => JSON.stringify(row) + "\n").join("");
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text], {type: "application/jsonl"}));
    link.download = "preferences.jsonl";
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  });
  download.hidden = true;

  // What was pressed is gone: whoever votes by keyboard goes on here.
  function show(block) {
    block.open = true;
    block.querySelector("summary").focus();
  }

  function vote(block, names, chosen) {
    const ballot = JSON.parse(block.dataset.ballot);
    const id = "cmp-" + [...crypto.getRandomValues(new Uint8Array(12))].map((n) => n.toString(16).padStart(2, "0")).join("");
    const found = chosen === null ? [] : preferenceRows(ballot, chosen, id, Math.floor(Date.now() / 1000));
    rows.push(...found);
    votes += 1;
    if (chosen !== null) wins.set(names[chosen], (wins.get(names[chosen]) || 0) + 1);
    block.querySelectorAll("button").forEach((each) => each.remove());
    block.classList.remove("blind");
    block.querySelectorAll("article").forEach((card) => {
      card.querySelector("h5").textContent = names[card.dataset.at] + (Number(card.dataset.at) === chosen ? " (chosen)" : "");
    });
    const tally = [...wins].map(([name, count]) => name + " " + count).join(", ");
    said.textContent = votes + " of " + blocks.length + " prompts voted on" + (tally ? ": " + tally : "") + " ";
    download.hidden = !rows.length;
    download.textContent = "Download preferences.jsonl (" + rows.length + (rows.length === 1 ? " row)" : " rows)");
    const next = blocks.find((each) => each.classList.contains("blind"));
    if (next) show(next);
    else if (rows.length) download.focus();
  }

  const start = button("Vote blind", () => {
    start.remove();
    for (const block of blocks) {
      const place = block.querySelector(".cards"), cards = [...place.querySelectorAll("article")];
      const names = cards.map((card) => card.querySelector("h5").textContent);
      block.classList.add("blind");
      cards.forEach((card, at) => { card.dataset.at = at; });
      shuffled(cards).forEach((card, i) => {
        card.querySelector("h5").textContent = "Reply " + String.fromCharCode(65 + i);
        card.append(button("This one is best", () => vote(block, names, Number(card.dataset.at))));
        place.append(card);
      });
      block.append(button("None is better", () => vote(block, names, null)));
    }
    show(blocks[0]);
    said.textContent = "Names and figures are hidden until you have chosen. ";
  });
  bar.append(start, said, download);
  sheet.before(bar);
}

// Paper has no folds.
window.addEventListener("beforeprint", () => {
  document.querySelectorAll("#provenance details, #summary details").forEach((fold) => { fold.open = true; });
});
