// Plays a classifier: a sequence is stepped or played, and the classes' probabilities run.

import { call } from "./api.js";
import { Bars, HeatStrip } from "./charts.js";
import { announce, h, short } from "./dom.js";
import { sequenceSource } from "./source.js";
import { Player, Stepper } from "./stepper.js";

const MOST = 200; // columns of the strips

export function playClassifier(view, model, signal) {
  const [{ shape }] = model.signature.inputs;
  const features = shape.length ? shape[0] : 1;
  const stepper = new Stepper(model, signal);
  const bars = new Bars("Classes", model.labels, { max: 1, text: (value) => value.toFixed(3) });
  const name = h("p", { class: "dim" });
  const verdict = h("p", { class: "verdict" }, " ");
  const classes = h("div", {});
  const inputs = h("div", {});
  let [steps, done, outputs] = [[], 0, []];
  let [heard, said] = [null, null]; // the strips of the sequence

  const show = (x, y) => {
    outputs = y;
    bars.set(y);
    const best = y.indexOf(Math.max(...y));
    verdict.textContent = `step ${done} of ${steps.length}: ${model.labels[best]}, ${short(y[best])}`;
    return verdict.textContent;
  };
  const restart = () => {
    stepper.end();
    done = 0;
    const columns = Math.min(Math.max(steps.length, 10), MOST);
    heard = new HeatStrip("What it hears: each row a feature", features, {
      columns,
      name: (row) => `feature ${row + 1}`,
      height: Math.min(Math.max(8 * features, 24), 160),
    });
    said = new HeatStrip("What it says: each row a class", model.labels.length, {
      columns,
      name: (row) => model.labels[row],
      height: Math.min(Math.max(14 * model.labels.length, 24), 200),
    });
    inputs.replaceChildren(heard.element);
    classes.replaceChildren(said.element);
    bars.set(model.labels.map(() => 0));
    verdict.textContent = " ";
  };
  const take = (taken, y) => {
    taken.forEach((x, place) => {
      done += 1;
      heard.push(shape.length ? x : [x], done);
      said.push(y[place], done);
    });
    return show(taken.at(-1), y.at(-1));
  };
  const wholeOnly = model.signature.predict_only;
  const player = new Player({
    signal,
    rate: 10,
    left: () => steps.length - done,
    restart,
    async advance(count) {
      const taken = steps.slice(done, done + count);
      return take(taken, (await stepper.step(taken, { outputs: "all" })).y);
    },
  });
  const predict = h(
    "button",
    {
      type: "button",
      class: "first",
      onclick: async () => {
        const {
          outputs: [y],
        } = await call("POST", "predict", { model: `${model.name}:${model.version}`, sequences: [steps] }, { signal });
        restart();
        done = steps.length;
        const last = Array.isArray(y[0]) ? y.at(-1) : y;
        steps.forEach((x, place) => heard.push(shape.length ? x : [x], place + 1));
        announce(show(steps.at(-1), last));
      },
    },
    "Predict the whole sequence",
  );
  const source = sequenceSource(model, async (chosen, from) => {
    await player.stop();
    [steps, name.textContent] = [chosen, from];
    restart();
    player.update();
  });
  view.append(
    source.element,
    h(
      "section",
      { class: "card" },
      h("h2", {}, "Classes"),
      name,
      wholeOnly ? h("div", { class: "row" }, predict) : player.element,
      verdict,
      h("div", { class: "columns" }, bars.element, h("div", {}, wholeOnly ? null : classes, inputs)),
      h("p", {}, stepper.link),
    ),
  );
  restart();
  source.first();
}
