// Time steps for any model: from its signature alone, or as a user types them.

import { Problem } from "./api.js";

const SYMBOLS = 64; // an integer without bounds is drawn below this

/** Returns whether the model takes one symbol in a time step, each of whose labels is a character. */
export function takesText({ signature: { inputs }, labels }) {
  return (
    inputs.length === 1 &&
    inputs[0].dtype !== "float32" &&
    !inputs[0].shape.length &&
    Boolean(labels?.length) &&
    labels.every((label) => [...label].length === 1)
  );
}

/** Returns the samples of the test data in the model file: `[{name, x}]`, x a list of time steps. */
export function samplesOf({ samples }) {
  return samples.map(({ x, label }, place) => {
    const name = label ? `${place + 1}, ${label}` : `sample ${place + 1}`;
    return { name, x: Array.isArray(x) ? x : eachStep(x) };
  });
}

function eachStep(inputs) {
  const names = Object.keys(inputs);
  return inputs[names[0]].map((_, step) => Object.fromEntries(names.map((name) => [name, inputs[name][step]])));
}

/** Returns one time step of zeros, or of the lowest integers. */
export function zeroStep(signature) {
  return eachInput(signature, ({ bounds, dtype }) => (dtype === "float32" ? 0 : (bounds?.[0] ?? 0)));
}

/** Returns one time step of random numbers within the bounds. */
export function randomStep(signature) {
  return eachInput(signature, ({ bounds, dtype }) => {
    if (dtype === "float32") return Number(normal().toPrecision(4));
    const [low, high] = bounds ?? [0, SYMBOLS - 1];
    return low + Math.floor(Math.random() * (high - low + 1));
  });
}

/**
 * Returns the time steps in a text: characters for a model of text, otherwise JSON, which has one time step (given
 * `count` times) or a list of them. Throws a Problem that says what is wrong.
 */
export function typedSteps(model, text, count) {
  if (takesText(model)) {
    return Array.from(text, (character) => {
      const symbol = model.labels.indexOf(character);
      if (symbol < 0) throw wrong(`The model does not know the character ${JSON.stringify(character)}.`);
      return symbol;
    });
  }
  let typed;
  try {
    typed = JSON.parse(text);
  } catch {
    throw wrong(`This is no JSON. One time step looks like ${JSON.stringify(zeroStep(model.signature))}`);
  }
  const [input] = model.signature.inputs;
  const several = model.signature.inputs.length === 1 && depth(typed) === input.shape.length + 1;
  return several ? typed : Array(count).fill(typed);
}

/** Returns how many numbers a tensor of a shape has. */
export function sizeOf(shape) {
  return shape.reduce((product, length) => product * length, 1);
}

/** Returns all numbers of an output with their names: `[[name, value], ...]`. */
export function namedOutputs(y, labels) {
  if (typeof y === "object" && !Array.isArray(y)) {
    return Object.entries(y).flatMap(([name, values]) => named(values, name));
  }
  const values = [y].flat(Infinity);
  return values.length === labels?.length ? values.map((value, place) => [labels[place], value]) : named(y, "y");
}

function named(values, name) {
  const flat = [values].flat(Infinity);
  return flat.map((value, place) => [flat.length > 1 ? `${name}[${place}]` : name, value]);
}

function eachInput({ inputs }, value) {
  const array = (spec, [size, ...others]) =>
    size === undefined ? value(spec) : Array.from({ length: size }, () => array(spec, others));
  const arrays = inputs.map((spec) => [spec.name, array(spec, spec.shape)]);
  return arrays.length === 1 ? arrays[0][1] : Object.fromEntries(arrays);
}

function wrong(detail) {
  return new Problem(0, { detail });
}

function depth(value) {
  return Array.isArray(value) ? 1 + depth(value[0]) : 0;
}

function normal() {
  return Math.sqrt(-2 * Math.log(1 - Math.random())) * Math.cos(2 * Math.PI * Math.random());
}
