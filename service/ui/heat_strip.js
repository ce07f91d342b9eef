// A strip of colour: a tensor's entries over time. Its colours are `--negative` and `--positive` of style.css.

import { h, short } from "./dom.js";

const FEW = 25; // columns of a strip that begins

/**
 * A strip of colour: time to the right, one row for each entry of a tensor; values are read by pointer or arrow keys.
 *
 * @param label What it shows, such as a state's name.
 * @param rows Entries of the tensor.
 * @param options `columns` that are kept, the oldest go first; `name` turns a row into its text.
 */
export class HeatStrip {
  constructor(label, rows, { columns = 200, name = String, height = Math.min(Math.max(rows * 2, 24), 256) } = {}) {
    Object.assign(this, { label, rows, columns, name });
    this.most = columns;
    this.held = []; // {at, values}
    this.canvas = h("canvas", { role: "img", tabindex: 0, "aria-label": label });
    this.canvas.style.height = `${height}px`;
    this.readout = h("p", { class: "readout" }, " ");
    this.element = h("figure", { class: "heat" }, h("figcaption", {}, label), this.canvas, this.readout);
    this.place = null; // [column, row] that is read
    this.canvas.addEventListener("pointermove", (event) =>
      this.#read(
        Math.floor((event.offsetX / this.canvas.clientWidth) * this.columns),
        Math.floor((event.offsetY / this.canvas.clientHeight) * this.rows),
      ),
    );
    this.canvas.addEventListener("pointerleave", () => (this.readout.textContent = " "));
    this.canvas.addEventListener("keydown", (event) => this.#key(event));
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.#soon());
    new ResizeObserver(() => this.#soon()).observe(this.canvas);
  }

  /** Adds a column of values; `at` is its step's number. */
  push(values, at = (this.held.at(-1)?.at ?? -1) + 1) {
    this.held.push({ at, values: Float32Array.from(values) });
    if (this.held.length > this.most) this.held.shift();
    this.#soon();
  }

  /** Removes the columns after a step, or all of them. */
  clear(after = -Infinity) {
    this.held = this.held.filter(({ at }) => at <= after);
    this.#soon();
  }

  #soon() {
    this.frame ??= requestAnimationFrame(() => {
      this.frame = undefined;
      this.#draw();
    });
  }

  #draw() {
    if (!this.canvas.isConnected) return; // it has no colours there; the observer calls when it is shown
    const style = getComputedStyle(this.canvas);
    const [none, negative, positive] = ["--card", "--negative", "--positive"].map((name) =>
      rgb(style.getPropertyValue(name)),
    );
    let full = 0;
    for (const { values } of this.held) for (const value of values) if (Math.abs(value) > full) full = Math.abs(value);
    // Few steps are drawn wide.
    this.columns = [FEW, 2 * FEW, 4 * FEW].find((count) => count >= this.held.length && count < this.most) ?? this.most;
    const image = new ImageData(this.columns, this.rows);
    this.held.forEach(({ values }, column) =>
      values.forEach((value, row) => {
        const end = value < 0 ? negative : positive;
        const share = Math.sqrt(full ? Math.abs(value) / full : 0); // small values are seen too
        const place = 4 * (row * this.columns + column);
        for (let part = 0; part < 3; part++) image.data[place + part] = none[part] + share * (end[part] - none[part]);
        image.data[place + 3] = 255;
      }),
    );
    [this.canvas.width, this.canvas.height] = [this.columns, this.rows]; // style.css scales it, pixel by pixel
    this.canvas.getContext("2d").putImageData(image, 0, 0);
    const latest = this.held.at(-1);
    this.canvas.setAttribute(
      "aria-label",
      `${this.label}: ${this.rows} values over ${this.held.length} steps` +
        `${latest ? `, the latest ${latest.at}; the largest size is ${short(full)}` : ""}. Arrow keys read values.`,
    );
  }

  #key(event) {
    const moves = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    if (!(event.key in moves)) return;
    event.preventDefault();
    this.readout.setAttribute("aria-live", "polite");
    const [column, row] = this.place ?? [this.held.length - 1, 0];
    this.#read(column + moves[event.key][0], row + moves[event.key][1]);
  }

  #read(column, row) {
    const held = this.held[Math.min(Math.max(column, 0), this.held.length - 1)];
    if (!held) return;
    this.place = [this.held.indexOf(held), Math.min(Math.max(row, 0), this.rows - 1)];
    this.readout.textContent = `step ${held.at}, ${this.name(this.place[1])}: ${short(held.values[this.place[1]])}`;
  }
}

function rgb(text) {
  const digits = text.trim().slice(1);
  const parts = digits.length === 3 ? [...digits].map((digit) => digit + digit) : digits.match(/../g);
  return parts.map((part) => parseInt(part, 16));
}
