// The tab: not written yet.

import { h } from "./dom.js";

export async function show(view) {
  view.append(h("h1", {}, "Server"));
}
