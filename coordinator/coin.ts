/**
 * Random coins that need no state: a coin is a function of what it is for, so that a generation which is
 * resumed on another engine draws what it would have drawn.
 *
 * Philox4x32-10: J. Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011.
 */

/** What a coin is drawn for; coins of different purposes are independent. */
export const purpose = { sample: 0 } as const;
export type Purpose = (typeof purpose)[keyof typeof purpose];

type Words4 = readonly [number, number, number, number];

const MULTIPLIER_0 = 0xd2511f53;
const MULTIPLIER_1 = 0xcd9e8d57;
const WEYL_0 = 0x9e3779b9;
const WEYL_1 = 0xbb67ae85;
const ROUNDS = 10;

/** Ten rounds of Philox over a counter of four 32-bit words, with a key of two. */
export function philox(counter: Words4, key: readonly [number, number]): Words4 {
  let [c0, c1, c2, c3] = counter;
  let [k0, k1] = key;
  for (let round = 0; round < ROUNDS; round += 1) {
    const high0 = multiplyHigh(MULTIPLIER_0, c0);
    const low0 = Math.imul(MULTIPLIER_0, c0) >>> 0;
    const high1 = multiplyHigh(MULTIPLIER_1, c2);
    const low1 = Math.imul(MULTIPLIER_1, c2) >>> 0;
    c0 = (high1 ^ c1 ^ k0) >>> 0;
    c1 = low1;
    c2 = (high0 ^ c3 ^ k1) >>> 0;
    c3 = low0;
    k0 = (k0 + WEYL_0) >>> 0;
    k1 = (k1 + WEYL_1) >>> 0;
  }
  return [c0, c1, c2, c3];
}

/** The upper 32 bits of the 64-bit product of two unsigned words. */
function multiplyHigh(a: number, b: number): number {
  const aLow = a & 0xffff;
  const aHigh = a >>> 16;
  const bLow = b & 0xffff;
  const bHigh = b >>> 16;
  const middle = aHigh * bLow + ((aLow * bLow) >>> 16);
  const carry = (middle & 0xffff) + aLow * bHigh;
  return (aHigh * bHigh + Math.floor(middle / 65536) + Math.floor(carry / 65536)) >>> 0;
}

/**
 * A coin in [0, 1), with 53 random bits.
 *
 * @param seed an integer; its lower 64 bits count.
 * @param sequenceIndex number of the sequence within its job.
 * @param position number of the generated token.
 */
export function coin(
  seed: number,
  sequenceIndex: number,
  position: number,
  drawnFor: Purpose,
): number {
  const bits = BigInt.asUintN(64, BigInt(seed));
  const key = [Number(bits & 0xffffffffn), Number(bits >> 32n)] as const;
  const [a, b] = philox([position >>> 0, sequenceIndex >>> 0, drawnFor, 0], key);
  return ((a >>> 5) * 2 ** 26 + (b >>> 6)) / 2 ** 53;
}
