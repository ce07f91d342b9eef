// A session that is watched: what the server says of it, and a ring of its last states.

import { get, path, post, request } from "./api.js";
import { readState } from "./safetensors.js";

const SAFETENSORS = "application/x-safetensors";
export const KEPT = 200; // states in the ring
const KEPT_BYTES = 16 * 1024 * 1024;
const SOON = 300; // milliseconds until the next look at a session that moves
const LATE = 2000; // and at one that does not

const known = new Map(); // by id, so that a session's states are still there when its tab is opened again

/** Returns a session, as far as it is known after asking the server. */
export async function openSession(id, signal) {
  const session = known.get(id) ?? new Session(id);
  await session.load(signal);
  known.set(id, session);
  return session;
}

/** Makes a session and returns its id. */
export async function createSession(model) {
  return (await post("sessions", { model })).session;
}

/** A session of the server: `told` is its document, `model` its model's. */
class Session extends EventTarget {
  constructor(id) {
    super();
    this.id = id;
    this.states = []; // {position, body, tensors, next}
    this.steps = []; // {position, x, y, label} of those that were made here
    this.fed = 0; // time steps of the test data that it was given
    this.turn = Promise.resolve();
  }

  async load(signal) {
    this.told = await get(path("sessions", this.id), { signal });
    this.model ??= await get(path("models", `${this.told.model}:${this.told.version}`), { signal });
    await this.read(signal);
  }

  get latest() {
    return this.states.at(-1);
  }

  /** Reads the state; returns whether the session has moved. */
  read(signal) {
    return this.#inTurn(() => this.#read(signal));
  }

  /** Does one thing after the other, so that the ring is in order and each state has what was fed to it. */
  #inTurn(work) {
    this.turn = this.turn.catch(() => {}).then(work);
    return this.turn;
  }

  async #read(signal) {
    const body = await (await request("GET", path("sessions", this.id, "state"), { signal })).arrayBuffer();
    const { metadata, tensors } = readState(body);
    const position = Number(metadata.position);
    if (position === this.latest?.position) return false;
    this.states.push({ position, body, tensors, next: this.next });
    let bytes = this.states.reduce((sum, state) => sum + state.body.byteLength, 0);
    while (this.states.length > KEPT || (bytes > KEPT_BYTES && this.states.length > 1)) {
      bytes -= this.states.shift().body.byteLength;
    }
    this.told = { ...this.told, position };
    this.dispatchEvent(new Event("moved"));
    return true;
  }

  /** Looks at the session again and again, until the signal; not while nobody sees the page, nor while `paused`. */
  async follow(signal) {
    let wait = SOON;
    while (!signal.aborted) {
      await new Promise((resolve) => setTimeout(resolve, wait));
      if (signal.aborted || document.hidden || this.paused) continue;
      try {
        const moved = await this.#inTurn(() => !this.paused && this.#read(signal));
        wait = moved ? SOON : Math.min(wait * 1.5, LATE);
      } catch (error) {
        if (error.status !== 0 && error.status !== 503) throw error;
        wait = LATE; // it may come back
      }
    }
  }

  /**
   * Steps by one time step. `this.next` is then what a rollout would feed next: the output of a model of values, a
   * symbol that is drawn from the output of a model of symbols.
   */
  feed(x, { temperature, seed } = {}) {
    const { rollout } = this.model;
    const draws = rollout && rollout !== "value";
    return this.#inTurn(async () => {
      const answer = draws
        ? await post(path("sessions", this.id, "rollout"), { x, steps: 1, temperature, seed })
        : await post(path("sessions", this.id, "step"), { x });
      this.last = x;
      this.next = draws ? answer.symbols[0] : rollout ? answer.y : undefined;
      this.steps.push({ position: answer.position, x, y: answer.y, label: answer.label });
      if (this.steps.length > KEPT) this.steps.shift();
      await this.#read();
    });
  }

  reset() {
    return this.#inTurn(async () => {
      await post(path("sessions", this.id, "reset"));
      await this.#read();
    });
  }

  /** Sets the state to one of the ring, or to another `body` in safetensors. */
  put({ body, next }) {
    return this.#inTurn(async () => {
      await request("PUT", path("sessions", this.id, "state"), { body, type: SAFETENSORS });
      this.next = next;
      await this.#read();
    });
  }

  /** Makes another session of this one's state, with what is known of its past; returns its id. */
  async fork() {
    const { session: id } = await post(path("sessions", this.id, "fork"));
    const fork = new Session(id);
    const { states, steps, last, next, fed } = this;
    Object.assign(fork, { states: [...states], steps: [...steps], last, next, fed });
    known.set(id, fork);
    return id;
  }

  remove() {
    return this.#inTurn(async () => {
      await request("DELETE", path("sessions", this.id));
      known.delete(this.id);
      this.paused = true; // there is nothing to follow any more
    });
  }
}
