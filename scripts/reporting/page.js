// Filters, switches and legends of the page that results.py --html writes.
"use strict";
const form = document.querySelector("form");
const all = (selector, within = document) => [...within.querySelectorAll(selector)];

function apply() {
  const { task, model } = Object.fromEntries(new FormData(form));
  const states = new Set(all(".tile[aria-pressed=true]").map((tile) => tile.dataset.state));
  const counts = {};
  for (const item of all("[data-task]")) {
    const fits =
      (!task || !item.dataset.task || item.dataset.task === task) &&
      (!model || !item.dataset.model || item.dataset.model === model);
    const state = item.dataset.state;
    if (fits && state && !item.classList.contains("other")) counts[state] = (counts[state] || 0) + 1;
    item.toggleAttribute("hidden", !fits || (state !== undefined && !states.has(state)));
  }
  // Inner boxes first: an empty figure makes its section empty.
  for (const box of all("[data-box]").reverse()) {
    const items = all("[data-task]", box);
    box.toggleAttribute("hidden", items.length > 0 && items.every((item) => item.hasAttribute("hidden")));
  }
  for (const section of all("section")) {
    const items = all("[data-task]", section);
    const empty = section.querySelector(".empty");
    if (empty && items.length) empty.hidden = items.some((item) => !item.hasAttribute("hidden"));
  }
  for (const tile of all(".tile")) tile.querySelector("b").textContent = counts[tile.dataset.state] || 0;
}

function switched() {
  const { axis, theme } = Object.fromEntries(new FormData(form));
  document.body.dataset.axis = axis;
  document.documentElement.dataset.theme = theme;
}

form.addEventListener("submit", (event) => event.preventDefault());
form.addEventListener("change", () => {
  apply();
  switched();
});
document.addEventListener("click", (event) => {
  const button = event.target.closest("button[aria-pressed]");
  if (!button) return;
  const on = button.getAttribute("aria-pressed") !== "true";
  button.setAttribute("aria-pressed", on);
  if (button.dataset.toggles) {
    for (const mark of all(".mark", button.closest("figure"))) {
      if (mark.dataset.line === button.dataset.toggles) mark.style.display = on ? "" : "none";
    }
  } else apply();
});
apply();
switched();
