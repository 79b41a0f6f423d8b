// The GPT of model.py in plain JavaScript, for text generation: one token at a time.
//
// The same components in the same order, with the same names. Where model.py handles a batch of
// texts, (B, T, C), this has one token of one text, (C). The tokens before it are in the KV cache.
//
// Letters in the shape comments: C channels (n_embd), V vocabulary, H heads, K key/value heads
// (n_kv_head), D head size, F hidden width of the MLP (n_inner), S positions attended to.
//
// `weights` has the parameters by the names of model.state_dict(): a vector is a Float32Array, a
// matrix is {rows, scales}. Row i, a typed array, times scales[i] is row i of PyTorch's matrix:
// int8 weights stay int8 in memory, because a browser multiplies them nearly as fast as float32.
"use strict";

// --- norms
const NORMS = {
  layernorm(x, weight, bias, eps) {
    let mean = 0;
    for (const value of x) mean += value / x.length;
    let variance = 0;
    for (const value of x) variance += (value - mean) ** 2 / x.length;
    const scale = 1 / Math.sqrt(variance + eps);
    return x.map((value, i) => (value - mean) * scale * weight[i] + (bias ? bias[i] : 0));
  },
  rmsnorm(x, weight, bias, eps) {
    let square = 0;
    for (const value of x) square += value ** 2 / x.length;
    const scale = 1 / Math.sqrt(square + eps);
    return x.map((value, i) => value * scale * weight[i]);
  },
};

class Norm {
  constructor(config, weights, name) {
    this.norm = NORMS[config.norm];
    this.eps = config.norm_eps;
    this.weight = weights[`${name}.weight`];
    this.bias = weights[`${name}.bias`]; // undefined without biases
  }

  forward(x) {
    return this.norm(x, this.weight, this.bias, this.eps);
  }
}

// --- linear layers: nearly all the time is spent here
class Linear {
  constructor(weights, name) {
    this.weight = weights[`${name}.weight`]; // (n_out, n_in)
    this.bias = weights[`${name}.bias`]; // (n_out), or undefined
  }

  forward(x) {
    const { rows, scales } = this.weight;
    const y = new Float32Array(rows.length);
    for (let i = 0; i < y.length; i++) {
      y[i] = dot(rows[i], x) * scales[i] + (this.bias ? this.bias[i] : 0);
    }
    return y; // (n_out)
  }
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
class MLP {
  constructor(config, weights, name, activation) {
    this.fc = new Linear(weights, `${name}.fc`);
    this.activation = activation;
    this.proj = new Linear(weights, `${name}.proj`);
  }

  forward(x) {
    return this.proj.forward(this.fc.forward(x).map(this.activation)); // (F), then (C)
  }
}

class SwiGLU {
  constructor(config, weights, name) {
    this.fc = new Linear(weights, `${name}.fc`);
    this.proj = new Linear(weights, `${name}.proj`);
    this.size = config.n_inner;
  }

  forward(x) {
    const both = this.fc.forward(x); // (2 F)
    const gate = both.subarray(0, this.size),
      up = both.subarray(this.size); // (F) both
    return this.proj.forward(gate.map((value, i) => silu(value) * up[i])); // (C)
  }
}

const silu = (x) => x / (1 + Math.exp(-x));
const gelu = (x) => 0.5 * x * (1 + Math.tanh(Math.sqrt(2 / Math.PI) * (x + 0.044715 * x ** 3)));
const relu = (x) => Math.max(x, 0);

const MLPS = {
  gelu: (config, weights, name) => new MLP(config, weights, name, (x) => gelu(x)),
  relu: (config, weights, name) => new MLP(config, weights, name, (x) => relu(x)),
  silu: (config, weights, name) => new MLP(config, weights, name, (x) => silu(x)),
  relu2: (config, weights, name) => new MLP(config, weights, name, (x) => relu(x) ** 2),
  swiglu: (config, weights, name) => new SwiGLU(config, weights, name),
};

// --- positions: each takes a token embedding (C) and its position, and returns it, with a position
// vector added if it has any, and the rotation of queries and keys, [cos, sin] (D/2 each), or null
class NoPositions {
  forward(x) {
    return [x, null];
  }
}

class LearnedPositions {
  constructor(config, weights) {
    this.table = weights["pos.table.weight"];
  }

  forward(x, position) {
    const vector = matrixRow(this.table, position); // (C)
    return [x.map((value, i) => value + vector[i]), null];
  }
}

class SinusoidalPositions {
  constructor(config) {
    this.size = config.n_embd;
    this.scale = Math.sqrt(config.n_embd);
  }

  forward(x, position) {
    const angle = rotationAngles(position, this.size, 10000); // (C/2)
    const vector = x.map((_, i) => (i % 2 ? Math.cos(angle[i >> 1]) : Math.sin(angle[i >> 1])));
    return [x.map((value, i) => value * this.scale + vector[i]), null];
  }
}

class RotaryPositions {
  constructor(config) {
    this.size = config.head_size;
    this.theta = config.rope_theta;
  }

  forward(x, position) {
    const angle = rotationAngles(position, this.size, this.theta); // (D/2)
    return [x, [angle.map((a) => Math.cos(a)), angle.map((a) => Math.sin(a))]];
  }
}

// position / theta^(2i/size) for each pair of channels i, (size/2), rounded to float32 where
// PyTorch rounds.
function rotationAngles(position, size, theta) {
  const frequency = new Float32Array(size / 2).map((_, i) => theta ** Math.fround((-2 * i) / size));
  return frequency.map((f) => position * f);
}

// Rotate the channel pairs (i, i + D/2) of x (D) in place.
function rotate(x, [cos, sin]) {
  for (let i = 0, half = x.length / 2; i < half; i++) {
    const a = x[i],
      b = x[i + half];
    x[i] = a * cos[i] - b * sin[i];
    x[i + half] = b * cos[i] + a * sin[i];
  }
}

const POSITIONS = {
  none: () => new NoPositions(),
  learned: (config, weights) => new LearnedPositions(config, weights),
  sinusoidal: (config) => new SinusoidalPositions(config),
  rope: (config) => new RotaryPositions(config),
};

function matrixRow({ rows, scales }, i) {
  return Float32Array.from(rows[i], (value) => value * scales[i]);
}

// --- attention

// The keys and values of earlier tokens: there is memory for block_size tokens, and `length` are
// filled.
class KVCache {
  constructor(config) {
    this.length = 0;
    const size = config.n_kv_head * config.block_size * config.head_size;
    const tensor = () => new Float32Array(size); // (K, block_size, D)
    this.layers = Array.from({ length: config.n_layer }, () => ({
      keys: tensor(),
      values: tensor(),
    }));
    // with token shift: what the last token passes to the next one, in each sublayer, (C/2)
    this.shiftState = [];
  }

  // Store what this token passes on, and return what the token before it did: zeros at the start.
  swapShiftState(sublayer, x) {
    const before = this.length ? this.shiftState[sublayer] : new Float32Array(x.length);
    this.shiftState[sublayer] = x;
    return before;
  }
}

class Attention {
  constructor(config, weights, layer) {
    const name = `blocks.${layer}.attn`;
    this.config = config;
    this.layer = layer;
    this.qkv = new Linear(weights, `${name}.qkv`);
    this.proj = new Linear(weights, `${name}.proj`);
    this.qNorm = config.qk_norm ? new Norm(config, weights, `${name}.q_norm`) : null;
    this.kNorm = config.qk_norm ? new Norm(config, weights, `${name}.k_norm`) : null;
  }

  forward(x, rotation, cache) {
    const { n_head: H, n_kv_head: K, head_size: D, block_size } = this.config;
    const { keys, values } = cache.layers[this.layer]; // (K, block_size, D) both
    const qkv = this.qkv.forward(x); // ((H + 2 K) D)
    const head = (i) => qkv.slice(i * D, (i + 1) * D); // (D)
    for (let i = 0; i < K; i++) {
      const place = (i * block_size + cache.length) * D;
      keys.set(this.prepare(head(H + i), this.kNorm, rotation), place);
      values.set(head(H + K + i), place);
    }
    const y = new Float32Array(H * D);
    for (let h = 0; h < H; h++) {
      const q = this.prepare(head(h), this.qNorm, rotation); // (D)
      const shared = Math.floor(h / (H / K)); // the key/value head of this query head
      const start = shared * block_size * D,
        end = start + (cache.length + 1) * D;
      plainAttention(
        q,
        keys.subarray(start, end),
        values.subarray(start, end),
        y.subarray(h * D, (h + 1) * D),
      );
    }
    return this.proj.forward(y); // (C)
  }

  // Normalize and rotate a query or a key (D).
  prepare(x, norm, rotation) {
    x = norm ? norm.forward(x) : x;
    if (rotation) rotate(x, rotation);
    return x;
  }
}

// Attention as in the formula, softmax(q k^T / sqrt(D)) v, for a query (D), keys and values (S, D).
// The output is added to y (D).
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
}

function softmax(x) {
  let highest = -Infinity,
    sum = 0;
  for (const value of x) highest = Math.max(highest, value);
  const exponentials = x.map((value) => Math.exp(value - highest));
  for (const value of exponentials) sum += value;
  return exponentials.map((value) => value / sum);
}

// x (C) with its second half replaced by that of the previous token, (C/2).
function shiftTokens(x, previous) {
  const shifted = x.slice();
  shifted.set(previous, x.length / 2);
  return shifted;
}

const add = (a, b) => a.map((value, i) => value + b[i]);

// --- the model
class Block {
  constructor(config, weights, layer) {
    const name = `blocks.${layer}`;
    this.norm1 = new Norm(config, weights, `${name}.norm1`);
    this.attn = new Attention(config, weights, layer);
    this.norm2 = new Norm(config, weights, `${name}.norm2`);
    this.mlp = MLPS[config.mlp](config, weights, `${name}.mlp`);
    this.layer = layer;
    this.postNorm = config.post_norm;
    this.tokenShift = config.token_shift;
  }

  forward(x, rotation, cache) {
    x = add(x, this.attn.forward(this.sublayerInput(x, 0, cache), rotation, cache));
    x = this.postNorm ? this.norm1.forward(x) : x;
    x = add(x, this.mlp.forward(this.sublayerInput(x, 1, cache)));
    return this.postNorm ? this.norm2.forward(x) : x;
  }

  // What attention (sublayer 0) or the MLP (sublayer 1) reads from the residual stream.
  sublayerInput(x, sublayer, cache) {
    if (!this.postNorm) x = (sublayer ? this.norm2 : this.norm1).forward(x);
    if (!this.tokenShift) return x;
    const last = x.slice(x.length / 2); // (C/2), for the next token
    return shiftTokens(x, cache.swapShiftState(2 * this.layer + sublayer, last));
  }
}

class GPT {
  constructor(config, weights) {
    this.config = config;
    this.tok = weights["tok.weight"]; // (V, C)
    this.pos = POSITIONS[config.pos](config, weights);
    this.blocks = Array.from({ length: config.n_layer }, (_, i) => new Block(config, weights, i));
    this.norm = config.post_norm ? null : new Norm(config, weights, "norm");
    this.head = new Linear(weights, config.tie_weights ? "tok" : "head");
  }

  // Append a token to the cache and return the logits (V) of the next one, or nothing if they are
  // not needed: in the prompt, only the last token's are.
  forward(token, cache, needLogits = true) {
    let [x, rotation] = this.pos.forward(matrixRow(this.tok, token), cache.length); // (C)
    for (const block of this.blocks) x = block.forward(x, rotation, cache);
    cache.length += 1;
    if (!needLogits) return undefined;
    return this.head.forward(this.norm ? this.norm.forward(x) : x); // (V)
  }
}
