// What went wrong, above the tab.

import { Problem } from "./api.js";
import { h } from "./dom.js";

const place = document.getElementById("problem");

/** Shows an error where a screen reader reads it out; nothing for what was given up on purpose. */
export function showProblem(error) {
  if (error?.name === "AbortError") return;
  if (!(error instanceof Problem)) console.error(error);
  place.replaceChildren(
    h(
      "p",
      {},
      error?.problem?.title && error.problem.title !== error.message ? h("b", {}, `${error.problem.title}: `) : null,
      error?.message ?? String(error),
    ),
    h("button", { type: "button", class: "quiet", "aria-label": "Dismiss this message", onclick: hideProblem }, "×"),
  );
  place.hidden = false;
}

/** Takes away what is shown. */
export function hideProblem() {
  place.hidden = true;
  place.replaceChildren();
}
