// Plays an audio model: the microphone or a file, resampled here, streamed over `WS /stream`, its output drawn live.

import { LineChart } from "./charts.js";
import { announce, field, h, short } from "./dom.js";
import { Resampler } from "./resample.js";
import { SoundStream } from "./sound_stream.js";
import { dropZone } from "./source.js";

const SHOWN_SECONDS = 20; // of the microphone

export function playAudio(view, model, signal) {
  const rate = model.sample_rate;
  const chunk = model.signature.inputs[0].shape[0];
  const outputs = model.signature.outputs[0].shape[0] ?? 1;
  const names =
    model.labels ??
    (outputs === 1 ? ["probability"] : Array.from({ length: outputs }, (_, place) => `output ${place + 1}`));
  const shown = names.slice(0, 3);
  const chart = new LineChart(
    "The model's output",
    [...shown.map((name) => ({ name })), { name: "loudness", kind: "area" }],
    { height: 280, min: 0, max: 1, x: "second", scale: chunk / rate },
  );
  const state = h("p", { class: "verdict" }, " ");
  let running = null; // ends what is played
  let lists;
  let from;

  const clear = (steps) => {
    lists = [...shown.map(() => []), []];
    from = 0;
    chart.steps = steps;
    chart.draw(lists);
  };
  const show = (y, loudness, most) => {
    shown.forEach((_, place) => lists[place].push(y[place]));
    lists.at(-1).push(loudness);
    if (lists[0].length > most) {
      lists.forEach((list) => list.shift());
      from += 1;
    }
    chart.draw(lists, from);
  };

  /** Plays what `feed(push, ended)` pushes, until it is done or stopped, and draws the last `most` steps. */
  const play = async (what, most, feed) => {
    running?.abort();
    const ours = new AbortController();
    const ended = AbortSignal.any([ours.signal, signal]);
    running = ours;
    update();
    clear(most);
    let steps = 0;
    let largest = -Infinity;
    const onstep = (y, samples) => {
      if (running !== ours) return; // another sound is shown by now
      steps += 1;
      largest = Math.max(largest, y[0]);
      show(y, loudness(samples), most);
      const told = shown.map((name, place) => `${name} ${short(y[place])}`).join(", ");
      state.textContent = `${what}, ${((steps * chunk) / rate).toFixed(1)} s: ${told}`;
    };
    try {
      const stream = await SoundStream.open(model, onstep);
      try {
        await feed((samples) => stream.push(samples, ended), ended);
      } finally {
        await stream.end();
      }
      if (steps) announce(`${what}: ${steps} steps, the largest ${shown[0]} is ${short(largest)}.`);
    } finally {
      if (running === ours) running = null;
      update();
    }
  };

  const listen = async () => {
    const context = new AudioContext();
    let media;
    try {
      media = await navigator.mediaDevices.getUserMedia({ audio: { channelCount: 1, echoCancellation: false } });
    } catch (error) {
      context.close();
      state.textContent = `The microphone cannot be used: ${error.message}. Allow it in the browser, or drop a file.`;
      return;
    }
    try {
      await play("microphone", Math.ceil((SHOWN_SECONDS * rate) / chunk), async (push, ended) => {
        await context.audioWorklet.addModule(new URL("microphone.js", import.meta.url));
        const resampler = new Resampler(context.sampleRate, rate);
        const node = new AudioWorkletNode(context, "microphone", { numberOfOutputs: 0 });
        context.createMediaStreamSource(media).connect(node);
        await context.resume();
        await new Promise((resolve, reject) => {
          let pushed = Promise.resolve();
          node.port.onmessage = ({ data }) => (pushed = pushed.then(() => push(resampler.push(data))).catch(reject));
          if (ended.aborted) resolve();
          ended.addEventListener("abort", resolve);
        });
      });
    } finally {
      media.getTracks().forEach((track) => track.stop());
      context.close();
    }
  };

  const load = async (file) => {
    if (!file) return;
    let sound;
    try {
      // Decoded, it has the context's rate.
      sound = await new OfflineAudioContext(1, 1, rate).decodeAudioData(await file.arrayBuffer());
    } catch {
      state.textContent = `${file.name} is no sound that this browser can read: drop a WAV file, say.`;
      return;
    }
    const samples = new Float32Array(sound.length);
    for (let channel = 0; channel < sound.numberOfChannels; channel++) {
      sound.getChannelData(channel).forEach((value, place) => (samples[place] += value / sound.numberOfChannels));
    }
    await play(file.name, Math.floor(samples.length / chunk), (push) => push(samples));
  };

  const file = h("input", { type: "file", accept: "audio/*,.wav" });
  file.addEventListener("change", () => load(file.files[0]));
  const button = h("button", { type: "button", class: "first", onclick: () => (running ? running.abort() : listen()) });
  const heard = isSecureContext && navigator.mediaDevices;
  const update = () => {
    button.textContent = running ? "Stop" : "Listen to the microphone";
    button.disabled = !running && !heard;
  };
  update();
  clear(100);
  view.append(
    h(
      "section",
      { class: "card" },
      h("h2", {}, "Sound"),
      h(
        "p",
        { class: "dim" },
        `The model takes ${chunk} samples at ${rate} Hz in a step: ${short((1000 * chunk) / rate)} ms. `,
        "What you play is resampled here, in this page.",
      ),
      !heard &&
        h(
          "p",
          { class: "bad" },
          `A browser gives the microphone only to pages from HTTPS or localhost, and this one is from `,
          `${location.origin}. Files can be played all the same.`,
        ),
      h("div", { class: "row" }, button),
      dropZone(load, field("A sound file: choose it, or drop it here", file)),
    ),
    h("section", { class: "card" }, h("h2", {}, "What it says"), state, chart.element),
  );
}

/** Returns the loudness of samples, from 0 to 1. */
function loudness(samples) {
  return Math.min(1, 4 * Math.sqrt(samples.reduce((sum, value) => sum + value * value, 0) / samples.length));
}
