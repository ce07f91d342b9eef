// States in safetensors (https://github.com/huggingface/safetensors, "Format"): eight bytes with the header's size, the
// header in JSON, then the tensors.

const ARRAYS = { F32: Float32Array, I32: Int32Array, I64: BigInt64Array }; // the types that a state may have

/** Returns the metadata of a state's ArrayBuffer and its tensors, each a list of numbers, by their names. */
export function readState(buffer) {
  const start = 8 + Number(new DataView(buffer).getBigUint64(0, true));
  const header = new TextDecoder().decode(new Uint8Array(buffer, 8, start - 8));
  const { __metadata__: metadata, ...described } = JSON.parse(header);
  const tensors = {};
  for (const [
    name,
    {
      dtype,
      data_offsets: [from, to],
    },
  ] of Object.entries(described)) {
    tensors[name] = Array.from(new ARRAYS[dtype](buffer.slice(start + from, start + to)), Number);
  }
  return { metadata, tensors };
}
