// The worker that runs the model, so that the page stays responsive. The page sends the weights,
// {tensor: ...}, then {model: ...}; {start: ...} begins a text, {inside: ...} a pass over a text,
// and {next: true} asks for more of it. {look: ...} asks how one token of that text was predicted.
"use strict";

const SLICE_MS = 30; // of work per message: the page is updated that often, and can stop in between
const weights = {}; // name -> vector or matrix
let model, tokenizer, inside, stream, number; // the stream of steps of text `number`

const receive = {
  tensor({ name, shape, kind, base64 }) {
    weights[name] = readTensor(shape, kind, bytesFromBase64(base64));
  },
  model({ config, tokenizer: data }) {
    model = new GPT(config, weights);
    tokenizer = new Tokenizer(data);
    postMessage({ ready: true });
  },
  start({ number: started, settings }) {
    number = started;
    stream = streamText(model, tokenizer, settings);
    receive.next();
  },
  inside({ number: started, ids }) {
    number = started;
    inside = new Inside(model, tokenizer, ids);
    stream = inside.surprise();
    receive.next();
  },
  look(request) {
    postMessage({ look: { ...request, ...inside.look(request.at) } });
  },
  next() {
    const steps = [];
    const begin = performance.now();
    let result = { done: false };
    while (!result.done && performance.now() - begin < SLICE_MS) {
      result = stream.next();
      if (!result.done) steps.push(result.value);
    }
    postMessage({ number, steps, done: result.done, ms: performance.now() - begin });
  },
};

onmessage = ({ data }) => {
  try {
    for (const [kind, content] of Object.entries(data)) receive[kind](content);
  } catch (error) {
    if (!tokenizer) onmessage = null; // the model could not be loaded: ignore what follows
    postMessage({ error: error.message });
  }
};

// --- the weights in the page: little-endian, as in the memory of all current devices

function bytesFromBase64(text) {
  const binary = atob(text);
  const bytes = new Uint8Array(binary.length);
  for (let i = 0; i < bytes.length; i++) bytes[i] = binary.charCodeAt(i);
  return bytes;
}

// A vector or a matrix: float16 or float32 numbers, or int8 after the scale of each row in float32.
function readTensor(shape, kind, { buffer }) {
  const [n, width] = shape;
  if (kind === "float32") return new Float32Array(buffer);
  if (kind === "int8")
    return matrix(new Int8Array(buffer, 4 * n), new Float32Array(buffer, 0, n), width);
  const bits = new Uint16Array(buffer);
  const values = new Float32Array(bits.length);
  for (let i = 0; i < bits.length; i++) values[i] = FLOAT16[bits[i]];
  return shape.length === 1 ? values : matrix(values, new Float32Array(n).fill(1), width);
}

const matrix = (values, scales, width) => ({
  rows: Array.from(scales, (_, i) => values.subarray(i * width, (i + 1) * width)),
  scales,
});

// The value of each 16-bit pattern: a sign, 5 bits of exponent, 10 of fraction.
const FLOAT16 = Float32Array.from({ length: 1 << 16 }, (_, bits) => {
  const sign = bits >> 15 ? -1 : 1,
    exponent = (bits >> 10) & 31,
    fraction = (bits & 1023) / 1024;
  return sign * (exponent ? 2 ** (exponent - 15) * (1 + fraction) : 2 ** -14 * fraction);
});
