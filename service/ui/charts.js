// Charts of this page: lines over steps, bars, and strips of colour. Each is an object with an `element`.
//
// They take their colours from style.css (`--s1` to `--s4`), so they follow its two schemes.

import { h, short, svg } from "./dom.js";

export { HeatStrip } from "./heat_strip.js";

const MARGIN = { left: 52, right: 14, top: 10, bottom: 26 };

/**
 * A chart of lines over steps.
 *
 * @param label What it shows, for those who do not see it.
 * @param series A list of `{name, kind}`; kind is "line" (default), "dashed", "dots" or "area".
 * @param options `height` in pixels; `min` and `max` fix the vertical axis; `steps` is the least width in steps;
 *   `x` names the horizontal axis, `scale` is its length of a step, and `at` turns a place on it into its text.
 */
export class LineChart {
  constructor(label, series, { height = 240, min, max, steps = 1, x = "step", scale = 1, at = short } = {}) {
    Object.assign(this, { label, series, height, min, max, steps, x, scale, at });
    this.lists = series.map(() => []);
    this.from = 0;
    this.cursor = null;
    this.svg = svg("svg", { class: "chart", role: "img", "aria-label": label, tabindex: 0, height });
    this.readout = h("p", { class: "readout" }, " ");
    const legend = h(
      "ul",
      { class: "legend" },
      series.map(({ name, kind = "line" }, place) =>
        h(
          "li",
          {},
          svg(
            "svg",
            { width: 22, height: 10, "aria-hidden": "true" },
            svg("line", { x1: 1, x2: 21, y1: 5, y2: 5, class: `stroke s${place + 1} ${kind}` }),
          ),
          name,
        ),
      ),
    );
    this.element = h("figure", { class: "line-chart" }, series.length > 1 ? legend : null, this.svg, this.readout);
    this.svg.addEventListener("pointermove", (event) => this.#point(this.#stepAt(event.offsetX)));
    this.svg.addEventListener("pointerleave", () => this.#point(null));
    this.svg.addEventListener("blur", () => this.#point(null));
    this.svg.addEventListener("keydown", (event) => this.#key(event));
    new ResizeObserver(() => this.#soon()).observe(this.element);
  }

  /** Draws lists of values, one per series, `null` where there is none; the first step has the number `from`. */
  draw(lists, from = 0) {
    this.lists = lists;
    this.from = from;
    this.#soon();
  }

  get #length() {
    return Math.max(this.steps, ...this.lists.map((list) => list.length));
  }

  #soon() {
    // Many steps may come between two frames of the screen.
    this.frame ??= requestAnimationFrame(() => {
      this.frame = undefined;
      this.#draw();
    });
  }

  #draw() {
    const width = Math.max(this.element.clientWidth, 200);
    const seen = this.lists.flat().filter((value) => Number.isFinite(value));
    let low = this.min ?? Math.min(...(seen.length ? seen : [0]));
    let high = this.max ?? Math.max(...(seen.length ? seen : [1]));
    if (low === high) [low, high] = [low - (this.min === undefined ? 0.5 : 0), high + 0.5];
    const ticks = niceTicks(low, high, Math.max(2, Math.floor(this.height / 55)));
    if (this.min === undefined) low = Math.min(low, ticks[0]);
    if (this.max === undefined) high = Math.max(high, ticks.at(-1));
    const last = Math.max(this.#length - 1, 1);
    const right = width - MARGIN.right;
    const bottom = this.height - MARGIN.bottom;
    const across = (step) => MARGIN.left + ((right - MARGIN.left) * step) / last;
    const down = (value) => bottom - ((bottom - MARGIN.top) * (value - low)) / (high - low);
    Object.assign(this, { across, down, width });
    const parts = ticks
      .filter((tick) => tick >= low && tick <= high)
      .flatMap((tick) => [
        svg("line", { class: "grid", x1: MARGIN.left, x2: right, y1: down(tick), y2: down(tick) }),
        svg("text", { x: MARGIN.left - 7, y: down(tick) + 4, "text-anchor": "end" }, short(tick)),
      ]);
    for (const tick of this.#placeTicks(last, width)) {
      const x = across(tick / this.scale - this.from);
      parts.push(svg("text", { x, y: this.height - 8, "text-anchor": "middle" }, this.at(tick)));
    }
    this.lists.forEach((list, place) => parts.push(...this.#line(list, place, across, down, bottom)));
    this.mark = svg("g", {});
    this.svg.replaceChildren(...parts, this.mark);
    this.svg.setAttribute("viewBox", `0 0 ${width} ${this.height}`);
    this.svg.setAttribute("width", width);
    this.svg.setAttribute("aria-label", this.#told());
    this.#point(this.cursor);
  }

  #line(list, place, across, down, bottom) {
    const { kind = "line" } = this.series[place];
    const stroke = `stroke s${place + 1} ${kind}`;
    const runs = [[]];
    list.forEach((value, step) => {
      if (Number.isFinite(value)) runs.at(-1).push([across(step).toFixed(1), down(value).toFixed(1)]);
      else if (runs.at(-1).length) runs.push([]);
    });
    return runs
      .filter((run) => run.length)
      .flatMap((run) => {
        if (kind === "dots" || run.length === 1) {
          return run.map(([x, y]) => svg("circle", { class: `fill s${place + 1}`, cx: x, cy: y, r: 2.5 }));
        }
        const points = run.map((point) => point.join(",")).join(" ");
        if (kind !== "area") return [svg("polyline", { class: stroke, points })];
        const ends = ` ${run.at(-1)[0]},${bottom} ${run[0][0]},${bottom}`;
        return [svg("polygon", { class: `shade s${place + 1}`, points: points + ends })];
      });
  }

  #placeTicks(last, width) {
    const [first, end] = [this.from * this.scale, (this.from + last) * this.scale];
    const ticks = niceTicks(first, end, Math.max(2, Math.floor(width / 130)));
    return ticks.filter((tick) => tick >= first && tick <= end && (this.scale !== 1 || Number.isInteger(tick)));
  }

  #text(step) {
    return this.at(Number(((step + this.from) * this.scale).toPrecision(6)));
  }

  #told() {
    const latest = this.series
      .map(({ name }, place) => {
        const step = this.lists[place].findLastIndex((value) => Number.isFinite(value));
        return step < 0 ? null : `${name} ${short(this.lists[place][step])} at ${this.x} ${this.#text(step)}`;
      })
      .filter(Boolean);
    const what = latest.length ? `Latest: ${latest.join("; ")}.` : "Nothing drawn yet.";
    return `${this.label}. ${what} Arrow keys read values.`;
  }

  #stepAt(pixels) {
    if (!this.across) return null;
    const share = (pixels - MARGIN.left) / (this.width - MARGIN.right - MARGIN.left);
    return Math.round(Math.min(Math.max(share, 0), 1) * Math.max(this.#length - 1, 1));
  }

  #key(event) {
    const last = this.#length - 1;
    const moves = { ArrowLeft: -1, ArrowRight: 1, PageUp: -10, PageDown: 10, Home: -Infinity, End: Infinity };
    if (!(event.key in moves)) return;
    event.preventDefault();
    this.readout.setAttribute("aria-live", "polite");
    this.#point(Math.min(Math.max((this.cursor ?? last) + moves[event.key], 0), last));
  }

  #point(step) {
    this.cursor = step;
    if (!this.mark) return;
    if (step === null) {
      this.mark.replaceChildren();
      this.readout.textContent = " ";
      return;
    }
    const parts = [
      svg("line", {
        class: "cursor",
        x1: this.across(step),
        x2: this.across(step),
        y1: MARGIN.top,
        y2: this.height - MARGIN.bottom,
      }),
    ];
    const told = [];
    this.lists.forEach((list, place) => {
      if (!Number.isFinite(list[step])) return;
      told.push(`${this.series[place].name} ${short(list[step])}`);
      parts.push(
        svg("circle", { class: `fill s${place + 1}`, cx: this.across(step), cy: this.down(list[step]), r: 4 }),
      );
    });
    this.mark.replaceChildren(...parts);
    this.readout.textContent = `${this.x} ${this.#text(step)}: ${told.join(", ") || "no value"}`;
  }
}

/** Returns round numbers that cover a range. */
export function niceTicks(low, high, about) {
  const rough = (high - low) / about;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((size) => size >= rough);
  const first = Math.floor(low / step + 1e-9);
  const last = Math.ceil(high / step - 1e-9);
  return Array.from({ length: last - first + 1 }, (_, place) => Number(((first + place) * step).toPrecision(12)));
}

/**
 * Bars of named values, as a list: each has its name and its number beside it.
 *
 * @param label What it shows.
 * @param names The names, in the order of the values.
 * @param options `max` is the value of a full bar (default: the largest); with `top` only so many are shown, the
 *   largest first; `text` turns a value into its text.
 */
export class Bars {
  constructor(label, names, { max, top, text = short } = {}) {
    Object.assign(this, { names, max, top, text });
    this.element = h("ul", { class: "bars", "aria-label": label });
    this.rows = Array.from({ length: Math.min(top ?? names.length, names.length) }, () => {
      const row = {
        name: h("span", { class: "name" }),
        fill: h("span", { class: "bar" }),
        value: h("span", { class: "value" }),
      };
      row.item = h("li", {}, row.name, h("span", { class: "track", "aria-hidden": "true" }, row.fill), row.value);
      return row;
    });
    this.element.append(...this.rows.map((row) => row.item));
    this.set(names.map(() => 0));
  }

  /** Shows values; the largest is marked. */
  set(values) {
    const order = values.map((_, place) => place);
    const largest = order.reduce((best, place) => (values[place] > values[best] ? place : best), 0);
    if (this.top) order.sort((one, other) => values[other] - values[one] || one - other);
    const full = this.max ?? Math.max(...values.map(Math.abs), 1e-30);
    this.rows.forEach((row, place) => {
      const value = values[order[place]];
      row.name.textContent = this.names[order[place]];
      row.value.textContent = this.text(value);
      row.fill.style.width = `${Math.min(100, (100 * Math.max(value, 0)) / full)}%`;
      row.item.classList.toggle("largest", order[place] === largest && value > 0);
    });
  }
}
