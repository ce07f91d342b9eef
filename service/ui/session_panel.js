// One session: what it is, its state as it moves, and everything that can be done with it.

import { BASE, currentKey } from "./api.js";
import { HeatStrip } from "./heat_strip.js";
import { announce, confirmed, field, h } from "./dom.js";
import { age, duration } from "./durations.js";
import { showProblem } from "./problem.js";
import { copyable, curlLines, pythonLines } from "./session_lines.js";
import { KEPT } from "./session.js";
import { dropZone } from "./source.js";
import { StepControls } from "./step_controls.js";
import { outputView } from "./step_outputs.js";
import { samplesOf, sizeOf } from "./time_steps.js";

const DURABLE = {
  none: "in the server's memory: it ends with the process",
  process: "on this machine: it outlives every crash of the server",
  disk: "on this machine's disk: it outlives a power cut",
  store: "in the shared store: it outlives this machine",
};
const ROWS = 1024; // of a strip: the first entries of a larger tensor

/** A session's panel; `title` names it, `signal` ends it. */
export class SessionPanel {
  constructor(session, title, signal) {
    Object.assign(this, { session, signal });
    this.controls = new StepControls(session, samplesOf(session.model), signal);
    this.facts = h("dl", { class: "facts" });
    this.strips = session.model.signature.states.map((spec) => this.#strip(spec));
    this.output = outputView(session.model);
    this.element = h(
      "section",
      { class: "card session", "aria-label": title },
      h("h2", {}, `${title} `, h("code", {}, session.id)),
      this.facts,
      DURABLE[session.told.durable] && h("p", { class: "dim" }, `It is ${DURABLE[session.told.durable]}.`),
      h("h3", {}, "Step it"),
      this.controls.element,
      this.output.element,
      h("h3", {}, "Its state"),
      this.#followed(),
      h(
        "div",
        { class: "columns" },
        this.strips.map((strip) => strip.chart.element),
      ),
      this.#rewind(),
      this.#actions(),
      this.#lines(),
    );
    session.addEventListener("moved", () => this.#moved(), { signal });
    for (const state of session.states) this.#push(state);
    this.#moved(false);
    session.follow(signal).catch((error) => this.#ended(error));
  }

  #strip({ name, shape }) {
    const size = sizeOf(shape);
    const rows = Math.min(size, ROWS);
    const label = `${name} [${shape.join(", ")}]${rows < size ? `, the first ${rows} numbers` : ""}`;
    const entry = (row) => (shape.length ? `${name}[${indexes(row, shape).join(", ")}]` : name);
    return { name, rows, chart: new HeatStrip(label, rows, { columns: KEPT, name: entry }) };
  }

  #push({ position, tensors }) {
    for (const { name, rows, chart } of this.strips) chart.push(tensors[name].slice(0, rows), position);
  }

  #moved(pushes = true) {
    const { told, latest } = this.session;
    if (pushes) this.#push(latest);
    const facts = [
      ["Model", h("a", { href: `#/models/${encodeURIComponent(told.model)}` }, told.model)],
      ["Version", told.version],
      ["Position", told.position],
      ["Age", h("time", { datetime: told.created_at, title: told.created_at }, age(told.created_at))],
      ["Ends when idle for", duration(told.expires_in)],
      ["Durable", told.durable],
    ];
    this.facts.replaceChildren(...facts.map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value))));
    this.output.show(this.session.steps);
    this.#offerStates();
    this.#renewLines();
  }

  #followed() {
    const box = h("input", { type: "checkbox", checked: true, onchange: () => (this.session.paused = !box.checked) });
    this.session.paused = false;
    return h(
      "p",
      {},
      h("label", {}, box, " Follow it, whoever steps it"),
      h("small", {}, " (that counts as use: it does not expire)"),
    );
  }

  #rewind() {
    this.chosen = null; // the newest
    this.slider = h("input", { type: "range", min: 0, max: 0, value: 0, oninput: () => this.#choose() });
    this.back = h("button", {
      type: "button",
      onclick: () =>
        this.#act(async () => {
          const { position } = this.session.states[this.slider.value];
          await this.session.put(this.session.states[this.slider.value]);
          announce(`The state of position ${position} is back, at position ${this.session.told.position}.`);
        }),
    });
    return h(
      "div",
      { class: "row rewind" },
      h(
        "div",
        { class: "wide-field field" },
        field(
          "Rewind to",
          this.slider,
          "These are the states that this page has seen. One that is put back gets a new position: none is used twice.",
        ),
      ),
      this.back,
    );
  }

  #choose() {
    const { states } = this.session;
    const place = Number(this.slider.value);
    this.chosen = place === states.length - 1 ? null : states[place];
    this.#offerStates();
  }

  #offerStates() {
    const { states } = this.session;
    const place = this.chosen ? states.indexOf(this.chosen) : -1;
    const shown = place < 0 ? states.length - 1 : place; // the chosen one may have left the ring
    this.slider.max = states.length - 1;
    this.slider.value = shown;
    this.slider.disabled = states.length < 2;
    const { position } = states[shown];
    this.slider.setAttribute("aria-valuetext", `position ${position}`);
    this.back.textContent = `Put back the state of position ${position}`;
    this.back.disabled = shown === states.length - 1;
  }

  #actions() {
    const { session } = this;
    const file = h("input", { type: "file", accept: ".safetensors", onchange: () => this.#upload(file.files[0]) });
    const upload = dropZone((dropped) => this.#upload(dropped), field("Upload a state", file, "Or drop a file here."));
    const act = (work) => () => this.#act(work);
    return h(
      "div",
      { class: "actions" },
      h(
        "div",
        { class: "row" },
        h("button", { type: "button", onclick: act(() => this.#fork()) }, "Fork and compare"),
        h(
          "button",
          {
            type: "button",
            onclick: act(async () => {
              await session.reset();
              announce(`Reset to zeros, at position ${session.told.position}.`);
            }),
          },
          "Reset to zeros",
        ),
        h("button", { type: "button", onclick: act(() => this.#download()) }, "Download its state"),
        h("button", { type: "button", class: "danger", onclick: act(() => this.#remove()) }, "Delete…"),
      ),
      upload,
    );
  }

  async #act(work) {
    try {
      await work();
    } catch (error) {
      showProblem(error);
    }
  }

  async #fork() {
    const fork = await this.session.fork();
    location.hash = `#/sessions/${encodeURIComponent(this.session.id)}/${encodeURIComponent(fork)}`;
  }

  async #download() {
    await this.session.read();
    const { latest, told } = this.session;
    const url = URL.createObjectURL(new Blob([latest.body]));
    h("a", { href: url, download: `${told.model}-${told.version}-at-${latest.position}.safetensors` }).click();
    setTimeout(() => URL.revokeObjectURL(url), 60_000); // when the browser has read it
    announce(`Downloading the state of position ${latest.position}.`);
  }

  #upload(file) {
    if (!file) return;
    this.#act(async () => {
      await this.session.put({ body: await file.arrayBuffer() });
      announce(`The state of ${file.name} is set, at position ${this.session.told.position}.`);
    });
  }

  async #remove() {
    const question = `Delete session ${this.session.id}?`;
    if (!(await confirmed(question, "Its state is gone then, and its id is not used again.", "Delete it"))) return;
    this.controls.stop();
    await this.session.remove();
    location.hash = "#/sessions";
    announce("The session is deleted.");
  }

  #lines() {
    this.curl = copyable("With curl", "");
    this.python = copyable("In Python", "");
    return h(
      "details",
      { ontoggle: () => this.#renewLines() },
      h("summary", {}, "The same with curl and in Python"),
      this.curl.element,
      this.python.element,
    );
  }

  #renewLines() {
    const told = [BASE.href, this.session.id, this.controls.example, currentKey()];
    this.curl.code.textContent = curlLines(...told);
    this.python.code.textContent = pythonLines(...told);
  }

  #ended(error) {
    if (this.signal.aborted) return;
    this.controls.stop();
    showProblem(error);
  }
}

/** Returns a flat place's indexes in a tensor of a shape. */
function indexes(place, shape) {
  const found = [];
  for (const size of shape.toReversed()) {
    found.unshift(place % size);
    place = Math.floor(place / size);
  }
  return found;
}
