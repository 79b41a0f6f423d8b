// Text to token ids and back, as in tokenizer.py. A character tokenizer is one of byte pairs whose
// pieces are the characters: each piece is a token, or unknown.
"use strict";

// Byte strings are strings of characters U+0000 to U+00FF, as in the page's `ranks`.
const toByteString = (text) =>
  Array.from(new TextEncoder().encode(text), (byte) => String.fromCharCode(byte)).join("");

class Tokenizer {
  constructor({ ranks, specials, pattern }) {
    this.ranks = new Map(Object.entries(ranks));
    this.specials = new Map(Object.entries(specials));
    this.unk = this.specials.get("<UNK>");
    this.pattern = new RegExp(pattern, "gu"); // translated to JavaScript's syntax
    this.tokenBytes = new Map([...this.ranks].map(([token, id]) => [id, token]));
    for (const [text, id] of this.specials) this.tokenBytes.set(id, toByteString(text));
  }

  encode(text) {
    return Array.from(text.matchAll(this.pattern), ([piece]) => this.encodePiece(piece)).flat();
  }

  // In a piece, merge the pair of neighbors whose token has the lowest rank, the leftmost first,
  // until no pair is a token.
  encodePiece(piece) {
    const bytes = toByteString(piece);
    if (this.ranks.has(bytes)) return [this.ranks.get(bytes)];
    const word = [...bytes];
    const last = (i) => i + 1 === word.length;
    const rank = (i) => (last(i) ? Infinity : (this.ranks.get(word[i] + word[i + 1]) ?? Infinity));
    const pairs = word.map((_, i) => rank(i)); // the rank of each token with the next one
    while (word.length > 1) {
      let best = 0;
      for (let i = 1; i < pairs.length; i++) if (pairs[i] < pairs[best]) best = i;
      if (pairs[best] === Infinity) break;
      word.splice(best, 2, word[best] + word[best + 1]);
      pairs.splice(best, 1);
      for (const i of [best - 1, best]) if (i >= 0) pairs[i] = rank(i);
    }
    const ids = word.map((token) => this.ranks.get(token));
    return ids.includes(undefined) ? [this.unk] : ids; // of an unknown character
  }

  // The bytes of a sequence of ids; ids without a token are skipped.
  decodeBytes(ids) {
    const bytes = ids.map((id) => this.tokenBytes.get(id) ?? "").join("");
    return Uint8Array.from(bytes, (char) => char.charCodeAt(0));
  }

  // The characters of a text that have no id. encodePrompt leaves them out.
  unknown(text) {
    return [...new Set(text)].filter((char) => this.encode(char).includes(this.unk));
  }
}

// ignoreBOM: U+FEFF is a character like any other.
const decode = (tokenizer, ids) =>
  new TextDecoder("utf-8", { ignoreBOM: true }).decode(tokenizer.decodeBytes(ids));
