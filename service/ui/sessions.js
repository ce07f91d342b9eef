// The tab of sessions: `#/sessions` lists them, `#/sessions/ID` opens one, `#/sessions/ID/OTHER` compares two.

import { get } from "./api.js";
import { LineChart } from "./charts.js";
import { field, h, table } from "./dom.js";
import { age } from "./durations.js";
import { showProblem } from "./problem.js";
import { createSession, openSession } from "./session.js";
import { SessionPanel } from "./session_panel.js";

const PAGE = 50;
const LINES = 4; // states, at most, whose distances are drawn

/** Fills the tab. */
export async function show(view, [id, other], signal) {
  if (id === undefined) return showList(view, signal);
  view.append(
    h("p", {}, h("a", { href: "#/sessions" }, "All sessions")),
    h("h1", {}, other === undefined ? "A session" : "Two futures"),
  );
  const sessions = await Promise.all([id, other].filter(Boolean).map((one) => openSession(one, signal)));
  if (sessions.length === 1) view.append(new SessionPanel(sessions[0], "Session", signal).element);
  else view.append(...compared(sessions, signal));
}

async function showList(view, signal) {
  const list = h("div", {});
  view.append(h("h1", {}, "Sessions"), h("div", { class: "row" }, await newSession(signal), byId()), list);
  await showPage(list, null, signal);
}

async function newSession(signal) {
  const { models } = await get("models", { signal });
  const served = models.filter(({ version }) => version !== null);
  const model = h(
    "select",
    {},
    served.map(({ name }) => h("option", {}, name)),
  );
  const create = async (event) => {
    event.preventDefault();
    try {
      open(await createSession(model.value));
    } catch (error) {
      showProblem(error);
    }
  };
  return h(
    "form",
    { class: "row", onsubmit: create },
    field("Model", model),
    h("button", { type: "submit", class: "first" }, "New session"),
  );
}

function byId() {
  const id = h("input", { type: "text", required: true, spellcheck: "false", autocomplete: "off" });
  const submit = (event) => {
    event.preventDefault();
    open(id.value.trim());
  };
  return h(
    "form",
    { class: "row", onsubmit: submit },
    field("Session's id", id),
    h("button", { type: "submit" }, "Open"),
  );
}

function open(id) {
  location.hash = `#/sessions/${encodeURIComponent(id)}`;
}

/** Shows a page of the list in an element; `after` is where it begins. */
async function showPage(list, after, signal) {
  const from = after ? `&after=${encodeURIComponent(after)}` : "";
  const { sessions, next } = await get(`sessions?limit=${PAGE}${from}`, { signal });
  const turn = async (to) => {
    try {
      await showPage(list, to, signal);
      list.querySelector(".pages button")?.focus();
    } catch (error) {
      showProblem(error);
    }
  };
  const rows = sessions.map(({ session, model, version, position, created_at }) => [
    h("a", { class: "id", href: `#/sessions/${encodeURIComponent(session)}` }, session),
    model,
    version,
    position,
    age(created_at),
  ]);
  list.replaceChildren(
    rows.length
      ? table(["Session", "Model", "Version", "Position", "Age"], rows, { caption: "Your sessions", numbers: 2 })
      : h("p", {}, after ? "No further sessions." : "You have no sessions. Begin one here, or with the API."),
    h(
      "div",
      { class: "row pages" },
      h("button", { type: "button", onclick: () => turn(after) }, "Refresh"),
      after && h("button", { type: "button", onclick: () => turn(null) }, "First page"),
      next && h("button", { type: "button", onclick: () => turn(next) }, "Next page"),
    ),
  );
}

/** Returns what compares two sessions: their panels side by side, and how far apart their states are. */
function compared(sessions, signal) {
  const panels = sessions.map((session, place) => new SessionPanel(session, "AB"[place], signal));
  panels[1].controls.differ();
  const both = async () => {
    const ends = await Promise.allSettled(panels.map((panel) => panel.controls.run()));
    for (const { reason } of ends) if (reason) showProblem(reason);
  };
  const button = h("button", { type: "button", class: "first", onclick: both }, "Step both");
  const told = h("p", {}, h("small", {}, "Each as its own controls say: give them different inputs or seeds."));
  const card = h(
    "section",
    { class: "card", "aria-label": "How far apart" },
    h("h2", {}, "How far apart their states are"),
    ...(sessions[0].model.digest === sessions[1].model.digest
      ? distances(sessions, signal)
      : [h("p", {}, "Their models differ, so their states cannot be compared.")]),
    h("div", { class: "row" }, button),
    told,
  );
  return [
    card,
    h(
      "div",
      { class: "pair" },
      panels.map(({ element }) => element),
    ),
  ];
}

function distances(sessions, signal) {
  const names = sessions[0].model.signature.states.map(({ name }) => name).slice(0, LINES);
  const chart = new LineChart(
    "Root mean square of the differences of their states",
    names.map((name) => ({ name })),
    { height: 180, x: "position", min: 0 },
  );
  const draw = () => {
    const [one, other] = sessions.map(
      ({ states }) => new Map(states.map(({ position, tensors }) => [position, tensors])),
    );
    const both = [...one.keys()].filter((position) => other.has(position));
    const first = Math.min(...both);
    const apart = (name) => {
      const list = both.length ? Array(Math.max(...both) - first + 1).fill(null) : [];
      for (const at of both) list[at - first] = distance(one.get(at)[name], other.get(at)[name]);
      return list;
    };
    chart.draw(names.map(apart), both.length ? first : 0);
  };
  for (const session of sessions) session.addEventListener("moved", draw, { signal });
  draw();
  return [chart.element];
}

function distance(one, other) {
  return Math.sqrt(one.reduce((sum, value, place) => sum + (value - other[place]) ** 2, 0) / one.length);
}
