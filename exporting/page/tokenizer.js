// Text to token ids and back, as in tokenizer.py: characters and byte pairs.
"use strict";

// --- characters
class CharTokenizer {
  constructor({ chars, specials }) {
    this.specials = new Map(specials.map((text, id) => [text, id]));
    this.texts = [...specials, ...chars];
    this.ids = new Map(chars.map((char, i) => [char, specials.length + i]));
  }

  // The ids of a text. encodePrompt leaves unknown characters out.
  encode(text) {
    return Array.from(text, (char) => this.ids.get(char) ?? this.specials.get("<UNK>"));
  }

  decodeBytes(ids) {
    return new TextEncoder().encode(ids.map((id) => this.texts[id]).join(""));
  }

  // The characters of a text that have no id.
  unknown(text) {
    return [...new Set(text)].filter((char) => !this.ids.has(char));
  }
}

// --- byte-pair encoding

// Byte strings are strings of characters U+0000 to U+00FF, as in the page's `ranks`.
const toByteString = (text) =>
  Array.from(new TextEncoder().encode(text), (byte) => String.fromCharCode(byte)).join("");

class BPETokenizer {
  constructor({ ranks, specials, pattern }) {
    this.ranks = new Map(Object.entries(ranks));
    this.specials = new Map(Object.entries(specials));
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
    return word.map((token) => this.ranks.get(token));
  }

  // The bytes of a sequence of ids; ids without a token are skipped.
  decodeBytes(ids) {
    const bytes = ids.map((id) => this.tokenBytes.get(id) ?? "").join("");
    return Uint8Array.from(bytes, (char) => char.charCodeAt(0));
  }

  unknown() {
    return [];
  }
}

const tokenizerFromDict = (data) =>
  data.kind === "char" ? new CharTokenizer(data) : new BPETokenizer(data);

// ignoreBOM: U+FEFF is a character like any other.
const decode = (tokenizer, ids) =>
  new TextDecoder("utf-8", { ignoreBOM: true }).decode(tokenizer.decodeBytes(ids));
