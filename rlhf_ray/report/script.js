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

// Paper has no folds.
window.addEventListener("beforeprint", () => {
  document.querySelectorAll("#provenance details, #summary details").forEach((fold) => { fold.open = true; });
});
