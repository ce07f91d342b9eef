// Plays a text model: the next characters' probabilities as one types, and a text that the model writes on.

import { call, events, path, post } from "./api.js";
import { Bars } from "./charts.js";
import { announce, field, h } from "./dom.js";
import { Stepper } from "./stepper.js";

const CHARACTERS = { "\n": "line break", " ": "space", "\t": "tab" };
const BEGINNING = 60; // characters of an example

export function playText(view, model, signal) {
  const [{ bounds }] = model.signature.inputs;
  const symbols = new Map(model.labels.map((label, place) => [label, place + bounds[0]]));
  const reader = new Stepper(model, signal); // has read the text, to say what comes next
  const text = h("textarea", { rows: 8, spellcheck: "false", class: "writing" });
  const bars = new Bars(
    "Next characters",
    model.labels.map((label) => CHARACTERS[label] ?? label),
    { max: 1, top: 10, text: (value) => `${(100 * value).toFixed(1)} %` },
  );
  const unknown = h("p", { class: "bad", role: "alert" });
  const [temperature, topK, seed, length] = [
    h("input", { type: "range", min: 0, max: 2, step: 0.05, value: 0.7 }),
    h("input", { type: "number", min: 1, max: model.labels.length, placeholder: "all" }),
    h("input", { type: "number", min: 0, step: 1, value: 1 }),
    h("input", { type: "number", min: 1, max: 4096, value: 400 }),
  ];
  let read = ""; // what the reader has read
  let reading = Promise.resolve();
  let writing = null; // ends what is being written

  const known = (given) => [...given].filter((character) => symbols.has(character)).join("");
  const readOn = () => {
    reading = reading.then(async () => {
      const wanted = known(text.value);
      if (wanted === read || !wanted || signal.aborted) return;
      if (!wanted.startsWith(read)) {
        reader.end();
        read = "";
      }
      const x = [...wanted.slice(read.length)].map((character) => symbols.get(character));
      const { y } = await reader.step(x, { outputs: "last" });
      read = wanted;
      bars.set(probabilities(y, model.rollout));
    });
    return reading;
  };
  text.addEventListener("input", () => {
    const strange = [...new Set([...text.value].filter((character) => !symbols.has(character)))];
    unknown.textContent = strange.length
      ? `The model does not know ${strange.map((one) => JSON.stringify(one)).join(", ")}: left out.`
      : "";
    readOn();
  });

  const write = async () => {
    const begun = known(text.value);
    if (!begun) {
      unknown.textContent = "Type a character first: the model goes on from it.";
      return;
    }
    text.value = begun;
    writing = new AbortController();
    const ours = AbortSignal.any([writing.signal, signal]);
    update();
    // A session of its own, so that the draws depend on text and seed alone: they are drawn by seed and position. What
    // goes on after a stop is what would have come without it.
    const { session } = await post("sessions", { model: `${model.name}:${model.version}` });
    const request = {
      text: begun,
      steps: Number(length.value || 1),
      temperature: Number(temperature.value),
      top_k: topK.value ? Number(topK.value) : null,
      seed: Number(seed.value || 0),
    };
    try {
      for await (const { event, data } of events(path("sessions", session, "rollout"), request, { signal: ours })) {
        if (event !== "message") continue;
        text.value += data.text;
        text.scrollTop = text.scrollHeight;
      }
      announce(`Written: ${text.value.slice(begun.length)}`);
    } catch (error) {
      if (error.name !== "AbortError") throw error;
      announce("Stopped.");
    } finally {
      writing = null;
      update();
      call("DELETE", path("sessions", session)).catch(() => {});
      await readOn();
    }
  };
  const writeButton = h(
    "button",
    { type: "button", class: "first", onclick: () => (writing ? writing.abort() : write()) },
    "Write on",
  );
  const clear = h(
    "button",
    {
      type: "button",
      onclick: () => {
        text.value = "";
        text.dispatchEvent(new Event("input"));
        bars.set(model.labels.map(() => 0));
        text.focus();
      },
    },
    "Clear",
  );
  const update = () => {
    writeButton.textContent = writing ? "Stop" : "Write on";
    text.readOnly = clear.disabled = Boolean(writing);
  };
  const warm = h("output", {});
  const tell = () => (warm.textContent = Number(temperature.value).toFixed(2));
  temperature.addEventListener("input", tell);
  tell();
  const warmth = field("Temperature", temperature, "0: always the most probable character.");
  warmth.firstChild.append(": ", warm);
  view.append(
    h(
      "div",
      { class: "columns" },
      h(
        "section",
        { class: "card" },
        h("h2", {}, "Text"),
        field("Type, and let the model write on", text),
        unknown,
        h("div", { class: "row" }, writeButton, clear),
        h("div", { class: "row" }, warmth, field("Top k", topK), field("Seed", seed), field("Characters", length)),
        h("p", {}, reader.link),
      ),
      h("section", { class: "card" }, h("h2", {}, "What comes next"), bars.element),
    ),
  );
  const example = model.samples[0]?.x
    .slice(0, BEGINNING)
    .map((symbol) => model.labels[symbol - bounds[0]])
    .join("");
  text.value = example?.slice(example.indexOf(" ") + 1) ?? ""; // it may begin within a word
  return readOn();
}

/** Returns the probabilities of an output. */
function probabilities(y, rollout) {
  if (rollout === "probabilities") return y;
  const largest = Math.max(...y);
  const weights = y.map((value) => Math.exp(value - largest));
  const total = weights.reduce((sum, weight) => sum + weight, 0);
  return weights.map((weight) => weight / total);
}
