// Plays a forecaster: the series is drawn step by step with the prediction made at each, then rolled out.

import { LineChart } from "./charts.js";
import { announce, field, h, short } from "./dom.js";
import { sequenceSource } from "./source.js";
import { Player, Stepper } from "./stepper.js";

const MOST = 500; // steps of a rollout

export function playForecaster(view, model, signal) {
  const [{ shape }] = model.signature.inputs;
  const features = shape.length ? shape[0] : 1;
  const stepper = new Stepper(model, signal);
  const chart = new LineChart(
    "The series and its forecast",
    [{ name: "given" }, { name: "predicted one step ahead", kind: "dashed" }, { name: "rolled out" }],
    { height: 320 },
  );
  const name = h("p", { class: "dim" });
  const score = h("p", { class: "readout" }, " ");
  const feature = h(
    "select",
    {},
    Array.from({ length: features }, (_, place) => h("option", { value: place }, `feature ${place + 1}`)),
  );
  const slider = h("input", { type: "range", min: 0, max: MOST, value: 0, disabled: true });
  let steps = []; // the whole sequence
  let done = 0; // steps that were taken
  let predictions = []; // after each step: what comes next
  let rolled = []; // from the next step on
  let rolling = new AbortController();

  const number = (step) => (shape.length ? step[feature.value] : step);
  const draw = () => {
    const given = steps.slice(0, done).map(number);
    const predicted = [null, ...predictions.map(number)];
    const future = rolled.length ? [...Array(done - 1).fill(null), given.at(-1), ...rolled.map(number)] : [];
    chart.draw([given, predicted, future]);
    score.textContent = told(given, predicted);
  };
  const told = (given, predicted) => {
    if (given.length < 2) return " ";
    const errors = (guess) =>
      Math.sqrt(
        given.slice(1).reduce((sum, value, place) => sum + (value - guess(place + 1)) ** 2, 0) / (given.length - 1),
      );
    return (
      `step ${done} of ${steps.length}. Root mean square error so far: ` +
      `${short(errors((place) => predicted[place]))}; ` +
      `of repeating the last value: ${short(errors((place) => given[place - 1]))}`
    );
  };
  const forget = () => {
    rolling.abort();
    rolled = [];
    slider.value = 0;
    tell();
  };
  const restart = () => {
    stepper.end();
    forget();
    [done, predictions] = [0, []];
    slider.disabled = true;
    draw();
  };
  const player = new Player({
    signal,
    left: () => steps.length - done,
    restart,
    async advance(count) {
      forget();
      const taken = steps.slice(done, done + count);
      const { y } = await stepper.step(taken, { outputs: "all" });
      predictions.push(...y);
      done += taken.length;
      slider.disabled = false;
      draw();
      const [given, next] = [taken, predictions].map((list) => short(number(list.at(-1))));
      return `Step ${done} of ${steps.length}: given ${given}, next is predicted ${next}.`;
    },
  });
  const valueText = h("output", {}, "");
  const tell = () => {
    valueText.textContent = `${slider.value} steps`;
    slider.setAttribute("aria-valuetext", valueText.textContent);
  };
  const rollOut = async () => {
    tell();
    rolling.abort();
    rolling = new AbortController();
    const ours = rolling.signal;
    const wanted = Number(slider.value);
    await new Promise((resolve) => setTimeout(resolve, 60)); // while the slider moves only the last place counts
    if (ours.aborted) return;
    try {
      // The last prediction is the first value; fed back, it gives the others.
      const last = predictions.at(-1);
      const more =
        wanted > 1
          ? (await stepper.rolloutOfFork({ x: [last], steps: wanted - 1 }, AbortSignal.any([ours, signal]))).y
          : [];
      if (ours.aborted) return;
      rolled = wanted ? [last, ...more] : [];
      draw();
      if (wanted) announce(`Rolled out ${wanted} steps: the last is ${short(number(rolled.at(-1)))}.`);
    } catch (error) {
      if (error.name !== "AbortError") throw error;
    }
  };
  slider.addEventListener("input", rollOut);
  feature.addEventListener("change", draw);
  tell();
  const slide = field(
    "Roll out from here",
    slider,
    "The model goes on from its own predictions; the session stays where it is.",
  );
  slide.firstChild.append(": ", valueText);
  slide.classList.add("wide-field");

  const source = sequenceSource(model, async (chosen, from) => {
    await player.stop();
    [steps, name.textContent] = [chosen, from];
    chart.steps = Math.min(steps.length + 1, 600);
    restart();
    player.update();
  });
  view.append(
    source.element,
    h(
      "section",
      { class: "card" },
      h("h2", {}, "Forecast"),
      name,
      player.element,
      features > 1 && field("Drawn", feature),
      chart.element,
      score,
      h("div", { class: "row" }, slide),
      h("p", {}, stepper.link),
    ),
  );
  draw();
  source.first();
}
