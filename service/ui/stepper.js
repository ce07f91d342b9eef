// A session that the page plays with, and the buttons that play a sequence into it.

import { call, path, post } from "./api.js";
import { announce, field, h } from "./dom.js";

/** A session of a model, begun with its first step and deleted when the tab is left. Each step carries its position. */
export class Stepper {
  constructor(model, signal) {
    Object.assign(this, { model, signal, id: null, position: 0, kept: false });
    const leave = () => this.kept || this.end();
    signal.addEventListener("abort", leave);
    addEventListener("pagehide", leave, { signal });
    this.link = h("a", { hidden: true, onclick: () => (this.kept = true) }, "Look into this session");
  }

  /** Begins the session if there is none yet; returns its id. */
  async begin() {
    this.beginning ??= this.#begin();
    await this.beginning;
    return this.id;
  }

  async #begin() {
    try {
      const { session, position } = await post("sessions", { model: `${this.model.name}:${this.model.version}` });
      Object.assign(this, { id: session, position });
      this.link.href = `#/${path("sessions", session)}`;
      this.link.hidden = false;
      if (this.signal.aborted) this.end(); // left while it began
    } catch (error) {
      this.beginning = undefined;
      throw error;
    }
  }

  /** Advances it by one time step or several; returns the answer. */
  async step(x, options = {}) {
    const id = await this.begin();
    const answer = await post(
      path("sessions", id, "step"),
      { x, position: this.position, ...options },
      { signal: this.signal },
    );
    if (this.id === id) this.position = answer.position; // else it was started over meanwhile
    return answer;
  }

  /** Returns what a rollout would give from here, and leaves the session where it is. */
  async rolloutOfFork(request, signal) {
    const { session } = await post(path("sessions", await this.begin(), "fork"), {}, { signal });
    try {
      return await post(path("sessions", session, "rollout"), request, { signal });
    } finally {
      call("DELETE", path("sessions", session)).catch(() => {});
    }
  }

  /** Deletes the session; the next step begins another. */
  end() {
    const { id } = this;
    Object.assign(this, { id: null, position: 0, beginning: undefined });
    this.link.hidden = true;
    if (id) call("DELETE", path("sessions", id), undefined, { keepalive: true }).catch(() => {}); // it expires anyway
  }
}

const RATES = [1, 2, 5, 10, 20, 50, 100, 500];
const TURNS = 20; // requests a second, at most: faster rates send several steps in each

/**
 * Buttons that step or play through a sequence.
 *
 * @param advance Called with a number of steps: takes them, and returns a text of where it then is.
 * @param left Returns the steps that are left.
 * @param restart Called to start over.
 */
export class Player {
  constructor({ advance, left, restart, signal, rate = 20 }) {
    Object.assign(this, { advance, left, signal, playing: false });
    const button = (text, onclick, kind) => h("button", { type: "button", class: kind, onclick }, text);
    this.stepButton = button("Step", () => this.#guard(() => this.#take(1)));
    this.playButton = button("Play", () => (this.playing ? this.pause() : this.#guard(() => this.#play())), "first");
    this.restartButton = button("Start over", () =>
      this.#guard(async () => {
        await restart();
        this.update();
      }),
    );
    this.rate = h("input", {
      type: "range",
      min: 0,
      max: RATES.length - 1,
      value: RATES.findIndex((each) => each >= rate),
    });
    const told = h("output", {}, "");
    const tell = () => {
      told.textContent = `${RATES[this.rate.value]} a second`;
      this.rate.setAttribute("aria-valuetext", told.textContent);
    };
    this.rate.addEventListener("input", tell);
    tell();
    const speed = field("Speed", this.rate);
    speed.firstChild.append(": ", told);
    this.element = h("div", { class: "row player" }, this.stepButton, this.playButton, this.restartButton, speed);
    signal.addEventListener("abort", () => this.pause());
    this.update();
  }

  /** Shows what can be done now. */
  update() {
    const done = this.left() <= 0;
    this.stepButton.disabled = done || this.playing || this.busy;
    this.playButton.disabled = done && !this.playing;
    this.restartButton.disabled = this.playing || this.busy;
    this.playButton.textContent = this.playing ? "Pause" : "Play";
  }

  /** Stops after the step that is under way. */
  pause() {
    this.playing = false;
  }

  /** Stops, and resolves once nothing is under way any more. */
  async stop() {
    this.pause();
    await this.work?.catch(() => {});
  }

  async #guard(begin) {
    if (this.busy) return;
    this.busy = true;
    this.update();
    try {
      this.work = begin();
      await this.work;
    } finally {
      this.busy = this.playing = false;
      this.update();
    }
  }

  async #take(steps) {
    announce(await this.advance(steps));
  }

  async #play() {
    this.playing = true;
    this.update();
    let told = "";
    while (this.playing && this.left() > 0 && !this.signal.aborted) {
      const rate = RATES[this.rate.value];
      const steps = Math.min(Math.max(1, Math.round(rate / TURNS)), this.left());
      const [answer] = await Promise.all([
        this.advance(steps),
        new Promise((resolve) => setTimeout(resolve, (1000 * steps) / rate)),
      ]);
      told = answer;
    }
    announce(told); // not at each step: nobody could follow
  }
}
