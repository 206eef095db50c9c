/**
 * The KV cache on a device: keys and values of every layer and slot, allocated once, never copied.
 *
 *   a layer's keys    (slots, KV heads, maxSeqLen, headSize)      values alike
 *
 * Where a tensor cannot begin within another one's memory, each slot has tensors of its own, and attention takes one
 * slot at a time.
 */
import type { LlamaConfig } from '../model/config.js';
import type { RankPlan } from '../model/plan.js';
import type { ElementType } from './ort.js';
import { tensorBytes, type DeviceTensor } from './device-tensor.js';
import type { OrtDevice } from './ort-device.js';

/** Keys and values of one layer, for some neighbouring slots. */
export interface DeviceKvTensors {
  readonly keys: DeviceTensor;
  readonly values: DeviceTensor;
}

export class DeviceKv {
  readonly maxSeqLen: number;
  readonly slotCount: number;
  readonly byteCount: number;
  /** Positions in use, by slot. */
  readonly lengths: Int32Array;
  /** Most slots that one run of attention takes. */
  readonly slotsPerRun: number;
  readonly #device: OrtDevice;
  readonly #type: ElementType;
  readonly #slotShape: readonly [kvHeads: number, maxSeqLen: number, headSize: number];
  /** (layers) of tensors, each over `slotsPerRun` slots. */
  readonly #layers: DeviceKvTensors[][] = [];
  readonly #views = new Map<number, readonly DeviceKvTensors[]>();

  /** @throws CaravanError in the runtime's words when the device has too little memory. */
  constructor(
    device: OrtDevice,
    config: LlamaConfig,
    plan: RankPlan,
    type: ElementType,
    maxSeqLen: number,
    slotCount: number,
  ) {
    this.#device = device;
    this.#type = type;
    this.maxSeqLen = maxSeqLen;
    this.slotCount = slotCount;
    this.lengths = new Int32Array(slotCount);
    this.slotsPerRun = device.provider.hasOffsets ? slotCount : 1;
    this.#slotShape = [plan.kvHeads.count, maxSeqLen, config.headSize];
    const shape = [this.slotsPerRun, ...this.#slotShape];
    const count = slotCount / this.slotsPerRun;
    this.byteCount = 2 * config.layerCount * count * tensorBytes(type, shape);
    try {
      for (let l = 0; l < config.layerCount; l += 1) {
        this.#layers.push(
          Array.from({ length: count }, () => ({
            keys: device.allocateZeros(type, shape),
            values: device.allocateZeros(type, shape),
          })),
        );
      }
    } catch (error) {
      this.release();
      throw error;
    }
  }

  /** Tensors over slots `first` to `first + count - 1`, by layer; made once and kept. */
  view(first: number, count: number): readonly DeviceKvTensors[] {
    const key = first * (this.slotCount + 1) + count;
    let view = this.#views.get(key);
    if (view === undefined) {
      view = this.#layers.map((tensors) => {
        if (this.slotsPerRun === 1) return tensors[first]!;
        const offset = first * tensorBytes(this.#type, this.#slotShape);
        const part = (whole: DeviceTensor) =>
          this.#device.view(whole, [count, ...this.#slotShape], this.#type, offset);
        return { keys: part(tensors[0]!.keys), values: part(tensors[0]!.values) };
      });
      this.#views.set(key, view);
    }
    return view;
  }

  /**
   * Copies a slot's keys and values into another slot, within the device. All positions go: handles of WebGPU have no
   * parts, and a prompt is far more expensive.
   */
  copy(from: number, to: number): void {
    const [source, target] = [this.view(from, 1), this.view(to, 1)];
    source.forEach(({ keys, values }, l) => {
      this.#device.copyWithin(keys, target[l]!.keys);
      this.#device.copyWithin(values, target[l]!.values);
    });
  }

  release(): void {
    const own = this.#layers.flat();
    for (const { keys, values } of [...this.#views.values()].flat()) {
      if (!own.some((tensors) => tensors.keys === keys)) this.#device.release(keys, values);
    }
    for (const { keys, values } of own) this.#device.release(keys, values);
    this.#views.clear();
    this.#layers.length = 0;
  }
}
