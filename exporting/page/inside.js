// What the model computes for each token of a text, for the view "Inside": the numbers of
// viz/internals.py.
"use strict";

// Where the window begins in which generate() predicts the token at `at`.
function windowBegin(at, size) {
  const step = size + 1 - Math.max(size >> 1, 1);
  return step * Math.max(0, Math.ceil((at - size) / step));
}

class Inside {
  constructor(model, tokenizer, text) {
    Object.assign(this, { model, tokenizer, text }); // text: ids
    this.cache = new KVCache(model.config);
    this.begin = 0; // of the window that is in the cache
    this.filled = 0; // tokens of it that have been computed
  }

  // Run the model on the token before `at`, and return the logits (V) of the token at `at` with
  // what was recorded: the residual streams (n_layer, C) and the attention weights (n_layer, H, S).
  predict(at) {
    const { model, text, cache } = this;
    const begin = windowBegin(at, model.config.block_size);
    if (begin !== this.begin) this.filled = 0;
    this.begin = begin;
    cache.length = Math.min(this.filled, at - 1 - begin);
    while (cache.length < at - 1 - begin) model.forward(text[begin + cache.length], cache, false);
    const record = { streams: [], attention: [] };
    cache.record = record;
    const logits = model.forward(text[at - 1], cache);
    cache.record = null;
    this.filled = Math.max(this.filled, cache.length);
    return { logits, ...record };
  }

  // The probability that the model gave to each token, and the entropy of its prediction in nats;
  // nothing predicts the first token.
  *surprise() {
    for (const [at, id] of this.text.entries()) {
      const label = decode(this.tokenizer, [id]);
      if (!at) yield { label };
      else {
        const probs = softmax(this.predict(at).logits); // (V)
        const entropy = probs.reduce((sum, p) => sum - (p && p * Math.log(p)), 0);
        yield { label, probability: probs[id], entropy };
      }
    }
  }

  // What each layer would predict for the token at `at`, if the final norm and the output layer
  // read the residual stream after it (the logit lens), and the attention weights of each head for
  // the tokens from `begin` on.
  look(at) {
    const { streams, attention } = this.predict(at);
    const lens = streams.map((x) => {
      const logits = this.model.head(this.model.norm(x)); // (V)
      const sorted = logits.slice().sort().reverse();
      return describeToken(this.tokenizer, { id: this.text[at], logits, sorted });
    });
    return { lens, attention, begin: this.begin };
  }
}
