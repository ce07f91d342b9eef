// The frame of the page: tabs by the address's hash, and the key's button.
//
// A tab is a module whose `show(view, parts, signal)` fills `view`. `parts` is what follows the tab in the hash,
// `#/play/vowels` gives ["vowels"]; `signal` is aborted when the tab is left, and ends what the tab has begun.

import { wantKey } from "./api.js";
import { h } from "./dom.js";
import * as models from "./models.js";
import * as play from "./play.js";
import { hideProblem, showProblem } from "./problem.js";
import * as server from "./server.js";
import * as sessions from "./sessions.js";

const TABS = {
  models: ["Models", models],
  play: ["Play", play],
  sessions: ["Sessions", sessions],
  server: ["Server", server],
};

const view = document.getElementById("view");
const links = {};
let leaving = new AbortController();

async function route() {
  const [name = "models", ...parts] = location.hash.replace(/^#\/?/, "").split("/").filter(Boolean).map(decode);
  const chosen = TABS[name] ? name : "models";
  leaving.abort();
  leaving = new AbortController();
  const { signal } = leaving;
  const [label, tab] = TABS[chosen];
  document.title = `${label} · Cellserve`;
  for (const [each, link] of Object.entries(links)) {
    if (each === chosen) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  hideProblem();
  const fresh = h("div", { class: `tab ${chosen}` });
  view.replaceChildren(fresh);
  try {
    await tab.show(fresh, parts, signal);
  } catch (error) {
    if (!signal.aborted) showProblem(error);
  }
}

function decode(part) {
  try {
    return decodeURIComponent(part);
  } catch {
    return part; // a % that no browser has written
  }
}

for (const [name, [label]] of Object.entries(TABS)) {
  links[name] = h("a", { href: `#/${name}` }, label);
  document.getElementById("tabs").append(links[name]);
}
document.getElementById("skip").onclick = (event) => {
  event.preventDefault(); // the hash is the tab's
  document.getElementById("content").focus();
};
document.getElementById("key-button").onclick = async () => {
  if (await wantKey()) route();
};
addEventListener("hashchange", async () => {
  await route();
  // What had the focus may be gone with what was shown before.
  if (document.activeElement === document.body) document.getElementById("content").focus({ preventScroll: true });
});
// What a tab's event handlers do not catch themselves.
addEventListener("unhandledrejection", (event) => {
  event.preventDefault();
  showProblem(event.reason);
});
route();
