// Sampling text, as in generate.py: from logits to the next token, the generation loop, text.
"use strict";

// --- from logits to the next token. `sorted` has the logits in descending order, (V).

// The distribution that the next token is sampled from: probabilities, most likely token first.
// Applied in this order: temperature divides the logits; top-k keeps the k most likely tokens (0:
// all); top-p keeps of these the smallest set with a total probability of at least top_p.
function adjustLogits(sorted, { temperature, top_k, top_p }) {
  const kept = top_k ? sorted.slice(0, top_k) : sorted; // (k)
  const probs = softmax(kept.map((logit) => (logit - sorted[0]) / Math.max(temperature, 1e-30)));
  if (top_p >= 1) return probs;
  let size = 0;
  for (let sum = 0; size < probs.length && sum < top_p; size++) sum += probs[size];
  return probs.slice(0, size);
}

// Sample the next token: invert the cumulative distribution at `uniform`, in [0, 1). With
// temperature 0, the most likely token.
function sampleLogits(logits, sorted, uniform, settings) {
  if (settings.temperature === 0) return idOfRank(logits, sorted, 0);
  const probs = adjustLogits(sorted, settings); // (k)
  const total = probs.reduce((sum, p) => sum + p, 0);
  let last = probs.length - 1;
  while (probs[last] === 0) last--; // rounding must not choose an impossible token
  let rank = 0;
  for (let sum = probs[0]; rank < last && sum <= uniform * total; rank++) sum += probs[rank + 1];
  return idOfRank(logits, sorted, rank);
}

// The id of the token whose logit is at this place in the order. Of equal logits, the lower id is
// first.
function idOfRank(logits, sorted, rank) {
  let id = logits.indexOf(sorted[rank]);
  for (let ties = rank - sorted.indexOf(sorted[rank]); ties > 0; ties--) {
    id = logits.indexOf(sorted[rank], id + 1);
  }
  return id;
}

// --- the generation loop

// Continue a prompt by at most max_new_tokens tokens, or until one of `ends`. Yields {read, of}
// while it reads the prompt, then {id, logits, sorted} per token. The model sees at most block_size
// tokens: when the text has become longer, or if the prompt is, generation continues from the last
// half window, which fills the cache again.
function* generate(model, prompt, settings, ends) {
  const size = model.config.block_size;
  const random = new PCG64(settings.seed, 0); // sample 0 of generate.py
  const text = [...prompt];
  const cache = new KVCache(model.config);
  let begin = 0; // the window begins at this token
  for (let step = 0; step < settings.max_new_tokens; step++) {
    const end = text.length;
    if (end - begin > size) {
      begin = end - Math.max(size >> 1, 1);
      cache.length = 0;
    }
    while (cache.length < end - begin - 1) {
      model.forward(text[begin + cache.length], cache, false);
      yield { read: cache.length, of: end - begin };
    }
    const logits = model.forward(text[end - 1], cache); // (V)
    const sorted = logits.slice().sort().reverse();
    if (!Number.isFinite(sorted[0])) {
      throw new Error("the model's logits are not finite: its training diverged");
    }
    const id = sampleLogits(logits, sorted, random.random(), settings);
    yield { id, logits, sorted };
    text.push(id);
    if (ends.includes(id)) return;
  }
}

// --- text

const END_OF_TEXT = "<|endoftext|>";
const START_TOKENS = ["<BOS>", END_OF_TEXT]; // the first that the tokenizer has starts a text

const endTokens = ({ specials }) =>
  [END_OF_TEXT, "<EOS>"].filter((text) => specials.has(text)).map((text) => specials.get(text));

// What Python's str.strip removes.
const BLANK =
  "[\\t-\\r\\x1c-\\x20\\x85\\xa0\\u1680\\u2000-\\u200a\\u2028\\u2029\\u202f\\u205f\\u3000]+";
const strip = (text) => text.replace(new RegExp(`^${BLANK}|${BLANK}$`, "g"), "");

const known = (tokenizer, text, unknown = tokenizer.unknown(text)) =>
  [...text].filter((char) => !unknown.includes(char)).join("");

// The ids of a prompt, and the characters that were left out because the tokenizer does not know
// them. With `qa`, the text becomes a question, as in training: <BOS>Question: ...\nAnswer:
// An empty prompt becomes the token that starts a text; without special tokens, a newline or else
// the first token.
function encodePrompt(tokenizer, text, qa) {
  // Half of a surrogate pair, which can be pasted, is no character: it becomes U+FFFD.
  text = new TextDecoder("utf-8", { ignoreBOM: true }).decode(new TextEncoder().encode(text));
  const unknown = tokenizer.unknown(text);
  text = known(tokenizer, text, unknown);
  if (qa && strip(text)) text = `Question: ${strip(text)}\nAnswer:`;
  else if (qa) text = "";
  if (!text && !tokenizer.specials.size && !tokenizer.unknown("\n").length) text = "\n";
  const ids = tokenizer.encode(text);
  if (qa || !text) {
    const start = START_TOKENS.find((token) => tokenizer.specials.has(token));
    ids.unshift(start ? tokenizer.specials.get(start) : 0);
  }
  return { ids, unknown };
}

// A question after the turns of a conversation, [question, answer] each: <BOS>Question: ...\nAnswer:
// ...<EOS><BOS>Question: ... Without the oldest turns, as far as there would be more than `size` ids.
function encodeChat(tokenizer, turns, question, size) {
  const { ids, unknown } = encodePrompt(tokenizer, question, true);
  const past = turns.map(([asked, answer]) => [
    ...encodePrompt(tokenizer, asked, true).ids,
    ...tokenizer.encode(` ${strip(known(tokenizer, answer))}`),
    tokenizer.specials.get("<EOS>"),
  ]);
  while (past.length && past.flat().length + ids.length > size) past.shift();
  return { ids: [...past.flat(), ...ids], question: ids, unknown };
}

// The text of a prompt, without the token that starts an empty one.
function decodePrompt(tokenizer, prompt) {
  const hidden = START_TOKENS.map((token) => tokenizer.specials.get(token));
  return decode(tokenizer, prompt.filter((id) => !hidden.includes(id)));
}

// Turns tokens into text as they come: complete characters only, because a token may end inside
// one, and nothing after an end token or a stop string.
class TextWriter {
  constructor(tokenizer, stops) {
    this.tokenizer = tokenizer;
    this.stops = stops.filter((stop) => stop);
    this.ends = endTokens(tokenizer);
    this.utf8 = new TextDecoder("utf-8", { ignoreBOM: true });
    this.held = ""; // may be the beginning of a stop string
    this.done = false;
  }

  // The text that is complete after one more token.
  add(id) {
    if (this.done || this.ends.includes(id)) return this.finish();
    this.held += this.utf8.decode(this.tokenizer.decodeBytes([id]), { stream: true });
    const found = this.stops.map((stop) => this.held.indexOf(stop)).filter((at) => at >= 0);
    if (found.length) {
      this.done = true;
      return this.held.slice(0, Math.min(...found));
    }
    let keep = 0;
    for (const stop of this.stops) {
      for (let n = 1; n < stop.length; n++)
        if (this.held.endsWith(stop.slice(0, n))) keep = Math.max(keep, n);
    }
    const text = this.held.slice(0, this.held.length - keep);
    this.held = this.held.slice(this.held.length - keep);
    return text;
  }

  // The text still held back; later tokens are ignored.
  finish() {
    const text = this.done ? "" : this.held + this.utf8.decode();
    this.done = true;
    this.held = "";
    return text;
  }
}

const N_ALTERNATIVES = 8;

// Yields what the page shows: the prompt's text, its progress, then the text and the token of each
// step. Probabilities are the model's own, those of temperature 1.
function* streamText(model, tokenizer, settings) {
  const { prompt, qa, turns, max_new_tokens: n } = settings;
  const size = model.config.block_size;
  const room = size - Math.min(n, size >> 2); // the rest is for the answer, as in explore.py chat
  const encoded = qa ? encodeChat(tokenizer, turns, prompt, room) : encodePrompt(tokenizer, prompt);
  const { ids, unknown, question = ids } = encoded;
  yield { prompt: decodePrompt(tokenizer, question), ids, unknown };
  const writer = new TextWriter(tokenizer, settings.stop.split("|"));
  for (const step of generate(model, ids, settings, writer.ends)) {
    if (!step.logits) yield step;
    else yield { text: writer.add(step.id), token: describeToken(tokenizer, step) };
    if (writer.done) return;
  }
  yield { text: writer.finish() };
}

// A token with its probability, and the most likely tokens at its place.
function describeToken(tokenizer, { id, logits, sorted }) {
  const total = sorted.reduce((sum, logit) => sum + Math.exp(logit - sorted[0]), 0);
  const describe = (id) => ({
    id,
    label: decode(tokenizer, [id]),
    probability: Math.exp(logits[id] - sorted[0]) / total,
  });
  const ranks = [...sorted.slice(0, N_ALTERNATIVES).keys()];
  const alternatives = ranks.map((rank) => describe(idOfRank(logits, sorted, rank)));
  return { ...describe(id), alternatives };
}
