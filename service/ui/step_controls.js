// Controls that step a session: by itself, through test data, with random numbers, or with what is typed.

import { announce, field, h } from "./dom.js";
import { showProblem } from "./problem.js";
import { randomStep, takesText, typedSteps, zeroStep } from "./time_steps.js";

/** The controls of one session. `run()` steps as they say, until it is done or `stop()`. */
export class StepControls {
  constructor(session, samples, signal) {
    Object.assign(this, { session, samples, signal });
    const { model } = session;
    const text = takesText(model);
    const sources = [
      model.rollout && ["itself", "Its own outputs (rollout)"],
      ...samples.map(({ name }, place) => [`sample ${place}`, `Test data: ${name}`]),
      ["random", "Random numbers"],
      ["typed", text ? "Text that I type" : "Numbers that I type"],
    ].filter(Boolean);
    const offered = sources.map(([value, name]) => h("option", { value }, name));
    this.source = h("select", { onchange: () => this.#choose() }, offered);
    this.count = h("input", { type: "number", min: 1, max: 1000, value: 20 });
    this.typed = h("textarea", { rows: 2, class: "code", spellcheck: "false" });
    this.typed.value = text ? "Alice was" : JSON.stringify(zeroStep(model.signature));
    this.temperature = h("input", { type: "number", min: 0, max: 5, step: 0.1, value: 0.8 });
    this.seed = h("input", { type: "number", min: 0, value: 0 });
    this.button = h("button", { type: "submit", class: "first" }, "Step");
    this.drawing = [field("Temperature", this.temperature), field("Seed", this.seed)];
    this.typing = h(
      "div",
      { class: "field wide-field" },
      field(
        text ? "Text" : "x, in JSON",
        this.typed,
        text ? "Each character is a time step." : "One time step, or a list of them.",
      ),
    );
    this.element = h(
      "form",
      { class: "row steps", onsubmit: (event) => this.#submit(event) },
      field("Input", this.source),
      field("Time steps", this.count),
      this.drawing,
      this.typing,
      this.button,
    );
    this.#choose();
  }

  /** A time step to show in lines to copy. */
  get example() {
    const { session, samples } = this;
    return session.last ?? samples[0]?.x[0] ?? zeroStep(session.model.signature);
  }

  /** Chooses another input or seed than at first, so that a fork has a future of its own. */
  differ() {
    if (this.drawing.some(({ hidden }) => !hidden)) this.seed.value = 1;
    else this.source.selectedIndex = 1;
    this.#choose();
  }

  #choose() {
    const draws = this.source.value === "itself" && this.session.model.rollout !== "value";
    for (const one of this.drawing) one.hidden = !draws;
    this.typing.hidden = this.source.value !== "typed";
    this.count.disabled = this.source.value === "typed" && takesText(this.session.model);
  }

  async #submit(event) {
    event.preventDefault();
    try {
      await this.run();
    } catch (error) {
      showProblem(error);
    }
  }

  /** Steps as the controls say; where that is under way, ends it. */
  async run() {
    if (this.running) {
      this.stop();
      return;
    }
    this.running = new AbortController();
    const signal = AbortSignal.any([this.running.signal, this.signal]);
    this.button.textContent = "Stop";
    try {
      await this.#steps(this.source.value, Math.max(1, Number(this.count.value) || 1), signal);
    } finally {
      this.running = null;
      this.button.textContent = "Step";
    }
    if (!signal.aborted) announce(`Stepped to position ${this.session.told.position}.`);
  }

  /** Ends a run after the step that is under way. */
  stop() {
    this.running?.abort();
  }

  async #steps(source, count, signal) {
    const { session } = this;
    if (source === "itself") {
      for (let step = 0; step < count && !signal.aborted; step++) {
        await session.feed(session.next ?? this.example, this.#options);
      }
      return;
    }
    const steps =
      source === "typed"
        ? typedSteps(session.model, this.typed.value, count)
        : Array.from({ length: count }, (_, step) => this.#given(source, step));
    for (const x of steps) {
      if (signal.aborted) return;
      await session.feed(x, this.#options);
      if (source.startsWith("sample")) session.fed++;
    }
  }

  #given(source, step) {
    if (source === "random") return randomStep(this.session.model.signature);
    const { x } = this.samples[Number(source.split(" ")[1])];
    return x[(this.session.fed + step) % x.length];
  }

  get #options() {
    return { temperature: Number(this.temperature.value), seed: Number(this.seed.value) };
  }
}
