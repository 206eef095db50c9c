/**
 * A rank whose weights are random and made in memory: of any size, in seconds, from a checkpoint that has only headers.
 *
 *   fork(random-rank.js, ['--device', 'cuda:0']) sends { address } when it listens
 */
import path from 'node:path';
import { setImmediate } from 'node:timers/promises';
import { parseDevice } from '../../model/device-name.js';
import type { TensorSlice } from '../../model/plan.js';
import type { WeightForm } from '../../model/weights.js';
import { BoundDevice } from '../../worker/bound-device.js';
import type { Device, LoadTerms } from '../../worker/device.js';
import type { MatrixSource } from '../../worker/device-shard.js';
import type { Linear } from '../../worker/linear.js';
import { Ort } from '../../worker/ort.js';
import { RankServer } from '../../worker/service.js';
import type { WeightsOrigin } from '../../worker/weight-cache.js';
import { Random } from '../random.js';

const BLOCK = 1 << 20;

type BlockedForm = Extract<WeightForm, { kind: 'int4' | 'int8Blocks' }>;

/** One block of random numbers, repeated; matrices of one shape share their memory on the host. */
class RandomSource implements MatrixSource {
  readonly bytesRead = 0;
  readonly #made = new Map<string, Linear>();
  readonly #block: Float32Array;

  constructor() {
    const random = new Random(1);
    this.#block = Float32Array.from({ length: BLOCK }, () => random.next() - 0.5);
  }

  vector(slice: TensorSlice): Promise<Float32Array> {
    return Promise.resolve(new Float32Array(slice.columns.count).fill(1));
  }

  async matrix(forms: readonly WeightForm[], ...parts: TensorSlice[]): Promise<Linear[]> {
    // Who reads a checkpoint waits for it, and answers meanwhile.
    await setImmediate();
    const outputs = parts.reduce((sum, part) => sum + part.rows.count, 0);
    const inputs = parts[0]!.columns.count;
    return forms.map((form) => this.#make(form, outputs, inputs));
  }

  giveBack(): void {
    // The next layer has the same ones.
  }

  close(): void {
    this.#made.clear();
  }

  #make(form: WeightForm, outputs: number, inputs: number): Linear {
    const block = 'block' in form ? form.block : 0;
    const key = [form.kind, block, outputs, inputs].join();
    let linear = this.#made.get(key);
    if (linear === undefined) {
      linear =
        form.kind === 'int4' || form.kind === 'int8Blocks'
          ? this.#blocks(form, outputs, inputs)
          : { kind: 'fp32', outputs, inputs, values: this.#floats(outputs * inputs, inputs) };
      this.#made.set(key, linear);
    }
    return linear;
  }

  /** Scaled so that activations stay near 1. */
  #floats(count: number, inputs: number): Float32Array {
    const scale = Math.sqrt(12 / inputs);
    return repeat(
      new Float32Array(count),
      this.#block.map((x) => x * scale),
    );
  }

  #blocks(form: BlockedForm, outputs: number, inputs: number): Linear {
    const { kind, block } = form;
    const bytes = Uint8Array.from(this.#block, (x) => Math.floor((x + 0.5) * 256));
    const blocks = (outputs * inputs) / block;
    const levels = kind === 'int4' ? 16 : 256;
    const own = {
      ...{ outputs, inputs, block },
      values: repeat(new Uint8Array((outputs * inputs) / (kind === 'int4' ? 2 : 1)), bytes),
      scales: new Float32Array(blocks).fill(Math.sqrt(12 / inputs) / levels),
    };
    if (kind === 'int8Blocks') return { ...own, kind };
    const zeroBytes = outputs * Math.ceil(inputs / block / 2);
    return {
      ...{ ...own, kind },
      zeros: form.isCentred === true ? null : new Uint8Array(zeroBytes).fill(0x88),
    };
  }
}

function repeat<T extends Float32Array | Uint8Array>(target: T, block: T): T {
  for (let at = 0; at < target.length; at += block.length) {
    target.set(block.subarray(0, Math.min(block.length, target.length - at)), at);
  }
  return target;
}

class RandomDevice implements Device {
  readonly name: string;
  readonly kind: Device['kind'];
  readonly #device: BoundDevice;

  constructor(device: BoundDevice) {
    this.#device = device;
    this.name = device.name;
    this.kind = device.kind;
  }

  memory() {
    return this.#device.memory();
  }

  readablePeers() {
    return this.#device.readablePeers();
  }

  load(origin: WeightsOrigin, terms: LoadTerms) {
    return this.#device.loadFrom(new RandomSource(), origin, terms);
  }
}

const device = process.argv[process.argv.indexOf('--device') + 1]!;
const log = {
  info: () => undefined,
  warn: (fields: object, message: string): void => {
    process.stderr.write(`${path.basename(process.argv[1]!)} on ${device}: ${message}\n`);
  },
};
const ort = new Ort(1, process.env['CARAVAN_ORT_LIBRARY']);
const captures = process.env['CARAVAN_CUDA_GRAPHS'] !== 'off';
const bound = new BoundDevice(ort, parseDevice(device), { captures });
const server = new RankServer(new RandomDevice(bound), log);
const port = await server.listen('127.0.0.1:0');
process.on('disconnect', () => process.exit(0));
process.send?.({ address: `127.0.0.1:${port}` });
