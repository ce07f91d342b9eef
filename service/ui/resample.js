// Resamples a stream of sound: a windowed sinc, cut off at the lower of the two rates' halves.

const ZEROS = 12; // crossings of the sinc on each side

/** Takes samples at one rate and gives them at another, chunk by chunk. */
export class Resampler {
  constructor(from, to) {
    this.ratio = from / to;
    this.cut = Math.min(1, to / from); // of the input's half rate
    this.reach = Math.ceil(ZEROS / this.cut); // input samples on each side of an output
    this.held = new Float32Array(this.reach); // silence before the first
    this.next = this.reach; // where in `held` the next output lies
  }

  /** Returns the output samples that the input so far decides. */
  push(samples) {
    if (this.ratio === 1) return Float32Array.from(samples);
    const held = new Float32Array(this.held.length + samples.length);
    held.set(this.held);
    held.set(samples, this.held.length);
    const out = [];
    while (this.next + this.reach < held.length) {
      const first = Math.ceil(this.next - this.reach);
      const last = Math.floor(this.next + this.reach);
      let sum = 0;
      for (let place = first; place <= last; place++) sum += held[place] * this.#weight(place - this.next);
      out.push(sum);
      this.next += this.ratio;
    }
    const gone = Math.max(0, Math.floor(this.next) - this.reach);
    this.held = held.slice(gone);
    this.next -= gone;
    return Float32Array.from(out);
  }

  #weight(distance) {
    const x = distance * this.cut;
    if (Math.abs(x) >= ZEROS) return 0;
    const window = 0.5 + 0.5 * Math.cos((Math.PI * x) / ZEROS);
    return this.cut * window * (x === 0 ? 1 : Math.sin(Math.PI * x) / (Math.PI * x));
  }
}
