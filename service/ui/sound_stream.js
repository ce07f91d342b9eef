// Sound streamed to an audio model over `WS /stream`: a step for each piece of as many samples as the model takes.

import { openStream } from "./api.js";

const IN_FLIGHT = 32; // frames that are not answered yet

/** A session on a socket of its own. `onstep(y, samples)` is called with each output, in order. */
export class SoundStream {
  static async open(model, onstep) {
    const socket = await openStream();
    const { handle } = await socket.ask({ op: "open", model: `${model.name}:${model.version}` });
    return new SoundStream(socket, handle, model.signature.inputs[0].shape[0], onstep);
  }

  constructor(socket, handle, chunk, onstep) {
    Object.assign(this, { socket, handle, chunk, onstep, waiting: new Set(), rest: new Float32Array(0), failed: null });
  }

  /** Sends what samples fill; throws the Problem of a step that failed. `signal` ends it early. */
  async push(samples, signal) {
    const joined = new Float32Array(this.rest.length + samples.length);
    joined.set(this.rest);
    joined.set(samples, this.rest.length);
    let at = 0;
    for (; at + this.chunk <= joined.length && !signal.aborted && !this.failed; at += this.chunk) {
      this.#send(joined.subarray(at, at + this.chunk));
      if (this.waiting.size >= IN_FLIGHT) await Promise.race(this.waiting);
    }
    this.rest = joined.slice(at);
    if (this.failed) throw this.failed;
  }

  #send(samples) {
    const answered = this.socket
      .ask({ op: "step", session: this.handle, x: Array.from(samples) })
      .then(({ y }) => this.onstep([y].flat(), samples))
      .catch((error) => (this.failed ??= error))
      .finally(() => this.waiting.delete(answered));
    this.waiting.add(answered);
  }

  /** Waits for all outputs, and deletes the session. */
  async end() {
    try {
      await Promise.all(this.waiting);
      if (!this.failed) await this.socket.ask({ op: "close", session: this.handle });
    } finally {
      this.socket.close();
    }
  }
}
