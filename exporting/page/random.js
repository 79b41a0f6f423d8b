// The random numbers of NumPy's default_rng([seed, stream]), so that the same seed gives the same
// text as generate.py: PCG64 (O'Neill 2014), which SeedSequence initializes.
"use strict";

const mask = (value, bits) => BigInt.asUintN(bits, value);

// Four 64-bit numbers that depend on every bit of the entropy, at most four 32-bit words. The
// constants are those of NumPy's SeedSequence. Math.imul multiplies modulo 2^32.
function seedSequence(entropy) {
  const xorshift = (value) => (value ^ (value >>> 16)) >>> 0;
  let constant = 0x43b0d7e5;
  const hash = (value) => {
    value ^= constant;
    constant = Math.imul(constant, 0x931e8875);
    return xorshift(Math.imul(value, constant));
  };
  const mix = (a, b) => xorshift(Math.imul(0xca01f9dd, a) - Math.imul(0x4973f715, b));
  const pool = [0, 1, 2, 3].map((i) => hash(entropy[i] ?? 0));
  for (let from = 0; from < 4; from++) {
    for (let to = 0; to < 4; to++) if (from !== to) pool[to] = mix(pool[to], hash(pool[from]));
  }
  constant = 0x8b51f9dd;
  const state = Array.from({ length: 8 }, (_, i) => {
    const value = pool[i % 4] ^ constant;
    constant = Math.imul(constant, 0x58f38ded);
    return BigInt(xorshift(Math.imul(value, constant)));
  });
  return [0, 2, 4, 6].map((i) => state[i] | (state[i + 1] << 32n));
}

class PCG64 {
  // A seed below 2^64, as text, is one or two words, the lower one first; a stream is one.
  constructor(seed, stream) {
    const [low, high] = [BigInt(seed), BigInt(seed) >> 32n].map((value) => Number(mask(value, 32)));
    const [a, b, c, d] = seedSequence(high ? [low, high, stream] : [low, stream]);
    this.increment = mask((((c << 64n) | d) << 1n) | 1n, 128);
    this.state = mask(this.increment + ((a << 64n) | b), 128);
    this.step();
    this.half = null; // the second half of a 64-bit number whose first half was used
  }

  step() {
    this.state = mask(this.state * 0x2360ed051fc65da44385df649fccf645n + this.increment, 128);
  }

  // A float32 in [0, 1). Each 64-bit number makes two, the first from its lower half.
  random() {
    let value = this.half;
    this.half = null;
    if (value === null) {
      this.step();
      const xored = mask((this.state >> 64n) ^ this.state, 64);
      const rotation = this.state >> 122n;
      const bits = mask((xored >> rotation) | (xored << (64n - rotation)), 64);
      this.half = Number(bits >> 32n);
      value = Number(bits & 0xffffffffn);
    }
    return (value >>> 8) / 2 ** 24;
  }
}
