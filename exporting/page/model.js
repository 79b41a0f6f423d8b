// The GPT of model.py in plain JavaScript, for text generation: one token at a time.
//
// The same components in the same order, with the same names. Where model.py handles a batch of
// texts, (B, T, C), this has one token of one text, (C). The tokens before it are in the KV cache.
// Each component is a function that returns another one: what PyTorch calls forward.
//
// Letters in the shape comments: C channels (n_embd), V vocabulary, H heads, K key/value heads
// (n_kv_head), D head size, F hidden width of the MLP (n_inner), S positions attended to.
//
// `weights` has the parameters by the names of model.state_dict(): a vector is a Float32Array, a
// matrix is {rows, scales}. Row i, a typed array, times scales[i] is row i of PyTorch's matrix:
// int8 weights stay int8 in memory, because a browser multiplies them nearly as fast as float32.
"use strict";

const add = (a, b) => a.map((value, i) => value + b[i]);
const matrixRow = ({ rows, scales }, i) => Float32Array.from(rows[i], (value) => value * scales[i]);

// --- norms: what is subtracted before x is divided by the root of its mean square
const NORMS = { layernorm: (x) => mean(x, (value) => value), rmsnorm: () => 0 };

function mean(x, f) {
  let sum = 0;
  for (const value of x) sum += f(value);
  return sum / x.length;
}

function makeNorm(config, weights, name) {
  const weight = weights[`${name}.weight`];
  const bias = weights[`${name}.bias`]; // undefined without biases
  return (x) => {
    const center = NORMS[config.norm](x);
    const variance = mean(x, (value) => (value - center) ** 2);
    const scale = 1 / Math.sqrt(variance + config.norm_eps);
    return x.map((value, i) => (value - center) * scale * weight[i] + (bias ? bias[i] : 0));
  };
}

// --- linear layers: nearly all the time is spent here
function makeLinear(weights, name) {
  const { rows, scales } = weights[`${name}.weight`]; // (n_out, n_in)
  const bias = weights[`${name}.bias`]; // (n_out), or undefined
  return (x) => {
    const y = new Float32Array(rows.length);
    for (let i = 0; i < y.length; i++) y[i] = dot(rows[i], x) * scales[i] + (bias ? bias[i] : 0);
    return y; // (n_out)
  };
}

// The sum of row[i] * x[i]. Four sums, because each addition waits for the previous one of its sum:
// twice as fast as one sum.
function dot(row, x) {
  const end = row.length - (row.length % 4);
  let a = 0,
    b = 0,
    c = 0,
    d = 0;
  for (let i = 0; i < end; i += 4) {
    a += row[i] * x[i];
    b += row[i + 1] * x[i + 1];
    c += row[i + 2] * x[i + 2];
    d += row[i + 3] * x[i + 3];
  }
  for (let i = end; i < row.length; i++) a += row[i] * x[i];
  return a + b + c + d;
}

// --- MLPs: up-project, activate, down-project
const silu = (x) => x / (1 + Math.exp(-x));
const gelu = (x) => 0.5 * x * (1 + Math.tanh(Math.sqrt(2 / Math.PI) * (x + 0.044715 * x ** 3)));
const relu = (x) => Math.max(x, 0);
const ACTIVATIONS = { gelu, relu, silu, relu2: (x) => relu(x) ** 2, swiglu: silu };

function makeMLP(config, weights, name) {
  const fc = makeLinear(weights, `${name}.fc`);
  const proj = makeLinear(weights, `${name}.proj`);
  const activation = ACTIVATIONS[config.mlp];
  return (x) => {
    const y = fc(x); // (F), or with a gate (2 F)
    if (config.mlp !== "swiglu") return proj(y.map((value) => activation(value)));
    const up = y.subarray(config.n_inner); // (F)
    return proj(up.map((value, i) => activation(y[i]) * value)); // (C)
  };
}

// --- positions: each takes a token embedding (C) and its position, and returns it, with a position
// vector added if it has any, and the rotation of queries and keys, [cos, sin] (D/2 each), or null
const POSITIONS = {
  none: () => (x) => [x, null],
  learned: (config, weights) => (x, position) => [
    add(x, matrixRow(weights["pos.table.weight"], position)),
    null,
  ],
  sinusoidal: (config) => (x, position) => {
    const angle = rotationAngles(position, config.n_embd, 10000); // (C/2)
    const wave = (i) => (i % 2 ? Math.cos(angle[i >> 1]) : Math.sin(angle[i >> 1]));
    return [x.map((value, i) => value * Math.sqrt(config.n_embd) + wave(i)), null];
  },
  rope: (config) => (x, position) => {
    const angle = rotationAngles(position, config.head_size, config.rope_theta); // (D/2)
    return [x, [angle.map((a) => Math.cos(a)), angle.map((a) => Math.sin(a))]];
  },
};

// position / theta^(2i/size) for each pair of channels i, (size/2), rounded to float32 where
// PyTorch rounds.
function rotationAngles(position, size, theta) {
  const frequency = new Float32Array(size / 2).map((_, i) => theta ** Math.fround((-2 * i) / size));
  return frequency.map((f) => position * f);
}

// Rotate the channel pairs (i, i + D/2) of x (D) in place.
function rotate(x, [cos, sin]) {
  for (let i = 0, half = x.length / 2; i < half; i++) {
    const [a, b] = [x[i], x[i + half]];
    x[i] = a * cos[i] - b * sin[i];
    x[i + half] = b * cos[i] + a * sin[i];
  }
}

// --- attention

// The keys and values of earlier tokens: there is memory for block_size tokens, and `length` are
// filled.
class KVCache {
  constructor(config) {
    this.length = 0;
    const size = config.n_kv_head * config.block_size * config.head_size;
    const tensor = () => new Float32Array(size); // (K, block_size, D)
    const layer = () => ({ keys: tensor(), values: tensor() });
    this.layers = Array.from({ length: config.n_layer }, layer);
    // with token shift: what each token passes to the next one, in each sublayer, (C/2)
    this.shiftState = Array.from({ length: 2 * config.n_layer }, () => []);
    this.record = null; // or what the view "Inside" shows: {streams, attention}, per layer
  }

  // Store what this token passes on, and return what the token before it did: zeros at the start.
  swapShiftState(sublayer, x) {
    const states = this.shiftState[sublayer];
    states[this.length] = x;
    return this.length ? states[this.length - 1] : new Float32Array(x.length);
  }
}

function makeAttention(config, weights, layer) {
  const { n_head: H, n_kv_head: K, head_size: D, block_size } = config;
  const name = `blocks.${layer}.attn`;
  const qkv = makeLinear(weights, `${name}.qkv`);
  const proj = makeLinear(weights, `${name}.proj`);
  const same = (x) => x;
  const qNorm = config.qk_norm ? makeNorm(config, weights, `${name}.q_norm`) : same;
  const kNorm = config.qk_norm ? makeNorm(config, weights, `${name}.k_norm`) : same;
  return (x, rotation, cache) => {
    const { keys, values } = cache.layers[layer]; // (K, block_size, D) both
    const all = qkv(x); // ((H + 2 K) D)
    const head = (i, norm = same) => norm(all.slice(i * D, (i + 1) * D)); // (D)
    for (let i = 0; i < K; i++) {
      const k = head(H + i, kNorm);
      if (rotation) rotate(k, rotation);
      const place = (i * block_size + cache.length) * D;
      keys.set(k, place);
      values.set(head(H + K + i), place);
    }
    const y = new Float32Array(H * D);
    const attention = []; // (H, S)
    for (let h = 0; h < H; h++) {
      const q = head(h, qNorm);
      if (rotation) rotate(q, rotation);
      const start = Math.floor(h / (H / K)) * block_size * D; // of the shared key/value head
      const filled = (tensor) => tensor.subarray(start, start + (cache.length + 1) * D); // (S, D)
      const output = y.subarray(h * D, (h + 1) * D);
      attention.push(plainAttention(q, filled(keys), filled(values), output));
    }
    cache.record?.attention.push(attention);
    return proj(y); // (C)
  };
}

// Attention as in the formula, softmax(q k^T / sqrt(D)) v, for a query (D), keys and values (S, D).
// The output is added to y (D), and the weights (S) are returned.
function plainAttention(q, keys, values, y) {
  const D = q.length;
  const scores = new Float32Array(keys.length / D); // (S)
  for (let s = 0; s < scores.length; s++) {
    let sum = 0;
    for (let i = 0, k = s * D; i < D; i++, k++) sum += q[i] * keys[k];
    scores[s] = sum / Math.sqrt(D);
  }
  const weights = softmax(scores); // (S)
  for (let s = 0; s < weights.length; s++) {
    const weight = weights[s];
    for (let i = 0, v = s * D; i < D; i++, v++) y[i] += weight * values[v];
  }
  return weights;
}

function softmax(x) {
  const highest = x.reduce((a, b) => Math.max(a, b), -Infinity);
  const exponentials = x.map((value) => Math.exp(value - highest));
  const sum = exponentials.reduce((a, b) => a + b, 0);
  return exponentials.map((value) => value / sum);
}

// --- the model
function makeBlock(config, weights, layer) {
  const name = `blocks.${layer}`;
  const norms = [1, 2].map((n) => makeNorm(config, weights, `${name}.norm${n}`));
  const attention = makeAttention(config, weights, layer);
  const mlp = makeMLP(config, weights, `${name}.mlp`);
  return (x, rotation, cache) => {
    for (const [i, sublayer] of [attention, mlp].entries()) {
      let input = config.post_norm ? x : norms[i](x);
      if (config.token_shift) {
        // its second half is that of the previous token
        const half = input.length / 2;
        const previous = cache.swapShiftState(2 * layer + i, input.slice(half)); // (C/2)
        input = input.slice();
        input.set(previous, half);
      }
      x = add(x, sublayer(input, rotation, cache));
      if (config.post_norm) x = norms[i](x);
    }
    return x;
  };
}

class GPT {
  constructor(config, weights) {
    this.config = config;
    this.tok = weights["tok.weight"]; // (V, C)
    this.pos = POSITIONS[config.pos](config, weights);
    this.blocks = Array.from({ length: config.n_layer }, (_, i) => makeBlock(config, weights, i));
    this.norm = config.post_norm ? (x) => x : makeNorm(config, weights, "norm");
    this.head = makeLinear(weights, config.tie_weights ? "tok" : "head");
  }

  // Append a token to the cache and return the logits (V) of the next one, or nothing if they are
  // not needed: in the prompt, only the last token's are.
  forward(token, cache, needLogits = true) {
    let [x, rotation] = this.pos(matrixRow(this.tok, token), cache.length); // (C)
    for (const block of this.blocks) {
      x = block(x, rotation, cache);
      cache.record?.streams.push(x);
    }
    cache.length += 1;
    return needLogits ? this.head(this.norm(x)) : undefined; // (V)
  }
}
