// An audio worklet that hands on what the microphone hears, in its own thread.

registerProcessor(
  "microphone",
  class extends AudioWorkletProcessor {
    process([[samples]]) {
      if (samples) this.port.postMessage(samples.slice());
      return true;
    }
  },
);
