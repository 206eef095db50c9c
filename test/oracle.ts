/**
 * The oracle: a Llama in plain float64 arithmetic, one token at a time. It shares nothing with the engine but the
 * reading of config.json, so that an agreement of the two means something. Written to be read, not to be fast.
 *
 * Architecture: Touvron et al., "Llama 2", 2023, with the tensor names, and the halves of rotary embedding, of
 * Hugging Face's implementation.
 */
import fs from 'node:fs';
import path from 'node:path';
import { parseHuggingFaceConfig, type LlamaConfig } from '../model/config.js';

/** What has been seen of one sequence: by layer, by position: (KV heads × headSize). */
export interface OracleCache {
  readonly keys: Float64Array[][];
  readonly values: Float64Array[][];
  length: number;
}

interface Layer {
  readonly attentionNorm: Float64Array; // (hidden)
  readonly q: Float64Array; // (query heads × headSize, hidden)
  readonly k: Float64Array; // (KV heads × headSize, hidden)
  readonly v: Float64Array; // (KV heads × headSize, hidden)
  readonly o: Float64Array; // (hidden, query heads × headSize)
  readonly ffnNorm: Float64Array; // (hidden)
  readonly gate: Float64Array; // (ffn, hidden)
  readonly up: Float64Array; // (ffn, hidden)
  readonly down: Float64Array; // (hidden, ffn)
}

export class Oracle {
  readonly config: LlamaConfig;
  readonly #embedding: Float64Array; // (vocabulary, hidden)
  readonly #layers: readonly Layer[];
  readonly #norm: Float64Array; // (hidden)
  readonly #head: Float64Array; // (vocabulary, hidden)

  /** Reads a whole checkpoint in Hugging Face layout. */
  constructor(folder: string) {
    const config = fs.readFileSync(path.join(folder, 'config.json'), 'utf8');
    this.config = parseHuggingFaceConfig(config, 'config.json');
    const tensors = readTensors(folder);
    const tensor = (name: string): Float64Array => {
      const values = tensors.get(name);
      if (values === undefined) throw new Error(`${folder}: no tensor ${name}`);
      return values;
    };
    this.#embedding = tensor('model.embed_tokens.weight');
    this.#layers = Array.from({ length: this.config.layerCount }, (_, i) => {
      const inLayer = (name: string) => tensor(`model.layers.${i}.${name}.weight`);
      return {
        attentionNorm: inLayer('input_layernorm'),
        q: inLayer('self_attn.q_proj'),
        k: inLayer('self_attn.k_proj'),
        v: inLayer('self_attn.v_proj'),
        o: inLayer('self_attn.o_proj'),
        ffnNorm: inLayer('post_attention_layernorm'),
        gate: inLayer('mlp.gate_proj'),
        up: inLayer('mlp.up_proj'),
        down: inLayer('mlp.down_proj'),
      };
    });
    this.#norm = tensor('model.norm.weight');
    this.#head = this.config.isHeadTied ? this.#embedding : tensor('lm_head.weight');
  }

  /** The cache of a sequence that has no token yet. */
  start(): OracleCache {
    const empty = () => Array.from({ length: this.config.layerCount }, () => []);
    return { keys: empty(), values: empty(), length: 0 };
  }

  /**
   * Appends one token to a sequence.
   *
   * @returns (vocabulary) the logits of the token that follows it.
   */
  next(cache: OracleCache, token: number): Float64Array {
    const x = this.step(cache, token);
    return multiply(this.#head, rmsNorm(x, this.#norm, this.config.normEps));
  }

  /** As `next`, without the head: (hidden). Prompts need no more, except at their end. */
  step(cache: OracleCache, token: number): Float64Array {
    const { hiddenSize, normEps } = this.config;
    const x = this.#embedding.slice(token * hiddenSize, (token + 1) * hiddenSize);
    this.#layers.forEach((layer, l) => {
      add(x, this.#attention(layer, l, cache, rmsNorm(x, layer.attentionNorm, normEps)));
      const normed = rmsNorm(x, layer.ffnNorm, normEps);
      const gate = multiply(layer.gate, normed);
      const up = multiply(layer.up, normed);
      const swiglu = gate.map((g, i) => (g / (1 + Math.exp(-g))) * up[i]!);
      add(x, multiply(layer.down, swiglu));
    });
    cache.length += 1;
    return x;
  }

  #attention(layer: Layer, l: number, cache: OracleCache, normed: Float64Array): Float64Array {
    const { headCount, kvHeadCount, headSize } = this.config;
    const position = cache.length;
    const q = this.#rotate(multiply(layer.q, normed), position);
    const keys = cache.keys[l]!;
    const values = cache.values[l]!;
    keys.push(this.#rotate(multiply(layer.k, normed), position));
    values.push(multiply(layer.v, normed));
    const attended = new Float64Array(headCount * headSize);
    for (let head = 0; head < headCount; head += 1) {
      const kvOffset = Math.floor(head / (headCount / kvHeadCount)) * headSize;
      const qOffset = head * headSize;
      const scores = keys.map((key) => {
        let dot = 0;
        for (let i = 0; i < headSize; i += 1) dot += q[qOffset + i]! * key[kvOffset + i]!;
        return dot / Math.sqrt(headSize);
      });
      const max = Math.max(...scores);
      const weights = scores.map((score) => Math.exp(score - max));
      const sum = weights.reduce((a, b) => a + b, 0);
      weights.forEach((weight, p) => {
        const value = values[p]!;
        for (let i = 0; i < headSize; i += 1) {
          attended[qOffset + i]! += (weight / sum) * value[kvOffset + i]!;
        }
      });
    }
    return multiply(layer.o, attended);
  }

  /** Rotary embedding of every head: channel i turns with channel i + headSize / 2. */
  #rotate(x: Float64Array, position: number): Float64Array {
    const { headSize } = this.config;
    const half = headSize / 2;
    const turned = new Float64Array(x.length);
    for (let start = 0; start < x.length; start += headSize) {
      for (let i = 0; i < half; i += 1) {
        const angle = rotaryAngle(this.config, position, i);
        const a = x[start + i]!;
        const b = x[start + half + i]!;
        turned[start + i] = a * Math.cos(angle) - b * Math.sin(angle);
        turned[start + half + i] = b * Math.cos(angle) + a * Math.sin(angle);
      }
    }
    return turned;
  }
}

/**
 * How far pair i of the token at a position is turned, as transformers writes it: inverse frequencies and wavelengths.
 * Dynamic NTK takes the base of a sequence that ends with the token.
 */
function rotaryAngle(config: LlamaConfig, position: number, i: number): number {
  const { headSize: dim, ropeScaling: scaling } = config;
  let base = config.ropeTheta;
  if (scaling?.kind === 'dynamic') {
    const { factor, originalPositions: original } = scaling;
    const length = Math.max(position + 1, original);
    base *= ((factor * length) / original - (factor - 1)) ** (dim / (dim - 2));
  }
  const inverseFrequency = 1 / base ** ((2 * i) / dim);
  if (scaling?.kind === 'linear') return position * (inverseFrequency / scaling.factor);
  if (scaling?.kind === 'llama3') {
    const { factor, lowFrequencyFactor: low, highFrequencyFactor: high } = scaling;
    const original = scaling.originalPositions;
    const wavelength = (2 * Math.PI) / inverseFrequency;
    if (wavelength > original / low) return position * (inverseFrequency / factor);
    if (wavelength < original / high) return position * inverseFrequency;
    const smooth = (original / wavelength - low) / (high - low);
    return position * ((1 - smooth) * (inverseFrequency / factor) + smooth * inverseFrequency);
  }
  return position * inverseFrequency;
}

/** Index of the largest; of equal ones the first. */
export function argmax(xs: ArrayLike<number>): number {
  let best = 0;
  for (let i = 1; i < xs.length; i += 1) if (xs[i]! > xs[best]!) best = i;
  return best;
}

/** How far the largest is above the second largest. */
export function margin(xs: ArrayLike<number>): number {
  const best = argmax(xs);
  let second = -Infinity;
  for (let i = 0; i < xs.length; i += 1) if (i !== best && xs[i]! > second) second = xs[i]!;
  return xs[best]! - second;
}

/** The logits that follow a prompt, and the cache to go on with. */
export function prefill(oracle: Oracle, prompt: readonly number[]) {
  const cache = oracle.start();
  for (const token of prompt.slice(0, -1)) oracle.step(cache, token);
  return { cache, logits: oracle.next(cache, prompt.at(-1)!) };
}

/** The `count` tokens that greedy decoding puts after a prompt. EOS is a token like others. */
export function greedy(oracle: Oracle, prompt: readonly number[], count: number): number[] {
  const { cache, logits: first } = prefill(oracle, prompt);
  let logits = first;
  const tokens: number[] = [];
  while (tokens.length < count) {
    const token = argmax(logits);
    tokens.push(token);
    if (tokens.length < count) logits = oracle.next(cache, token);
  }
  return tokens;
}

/** y = W x, where W has x.length columns. */
function multiply(w: Float64Array, x: Float64Array): Float64Array {
  const columns = x.length;
  const y = new Float64Array(w.length / columns);
  for (let row = 0; row < y.length; row += 1) {
    let sum = 0;
    const start = row * columns;
    for (let i = 0; i < columns; i += 1) sum += w[start + i]! * x[i]!;
    y[row] = sum;
  }
  return y;
}

function add(x: Float64Array, y: Float64Array): void {
  for (let i = 0; i < x.length; i += 1) x[i]! += y[i]!;
}

function rmsNorm(x: Float64Array, weight: Float64Array, eps: number): Float64Array {
  const scale = 1 / Math.sqrt(x.reduce((sum, v) => sum + v * v, 0) / x.length + eps);
  return x.map((v, i) => v * scale * weight[i]!);
}

/** Every tensor of every safetensors file of a folder. */
function readTensors(folder: string): Map<string, Float64Array> {
  const tensors = new Map<string, Float64Array>();
  for (const file of fs.readdirSync(folder).filter((name) => name.endsWith('.safetensors'))) {
    const bytes = fs.readFileSync(path.join(folder, file));
    const dataStart = 8 + Number(bytes.readBigUInt64LE(0));
    const header = JSON.parse(bytes.toString('utf8', 8, dataStart)) as Record<
      string,
      { dtype: string; data_offsets: [number, number] }
    >;
    for (const [name, { dtype, data_offsets }] of Object.entries(header)) {
      if (name === '__metadata__') continue;
      const [begin, end] = data_offsets;
      tensors.set(name, toFloat64(dtype, bytes.subarray(dataStart + begin, dataStart + end)));
    }
  }
  return tensors;
}

function toFloat64(dtype: string, bytes: Buffer): Float64Array {
  switch (dtype) {
    case 'F32':
      return Float64Array.from({ length: bytes.length / 4 }, (_, i) => bytes.readFloatLE(4 * i));
    case 'F16':
      return Float64Array.from({ length: bytes.length / 2 }, (_, i) =>
        halfToNumber(bytes.readUInt16LE(2 * i)),
      );
    case 'BF16': {
      const word = Buffer.alloc(4);
      return Float64Array.from({ length: bytes.length / 2 }, (_, i) => {
        word.writeUInt16LE(bytes.readUInt16LE(2 * i), 2);
        return word.readFloatLE(0);
      });
    }
    default:
      throw new Error(`the oracle reads no ${dtype}`);
  }
}

function halfToNumber(bits: number): number {
  const sign = bits >> 15 === 0 ? 1 : -1;
  const exponent = (bits >> 10) & 0x1f;
  const fraction = bits & 0x3ff;
  return exponent === 0
    ? sign * fraction * 2 ** -24
    : sign * (1024 + fraction) * 2 ** (exponent - 25);
}
