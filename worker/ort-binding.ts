/** Sessions of a device, with their inputs and outputs in place. */
import type { Graph } from './graph-builder.js';
import type { OrtApi } from './ort-api.js';

/** What runs are made by. */
interface Runner {
  readonly api: OrtApi;
  /** OrtRunOptions. */
  readonly runOptions: bigint;
}

/** One loaded graph whose inputs and outputs are bound once and computed many times. */
export class DeviceSession {
  readonly inputs: readonly string[];
  readonly outputs: readonly string[];
  readonly #device: Runner;
  readonly #pointer: bigint;
  /** What the runtime reads where it is, as long as the session lives. */
  readonly kept: Graph['weights'];

  constructor(
    device: Runner,
    pointer: bigint,
    { inputs, outputs }: Graph,
    kept: Graph['weights'] = [],
  ) {
    this.#device = device;
    this.#pointer = pointer;
    this.inputs = inputs;
    this.outputs = outputs;
    this.kept = kept;
  }

  get pointer(): bigint {
    return this.#pointer;
  }

  /**
   * Binds every input and output by name. Tensors in host memory that the device's kernels read on the device are
   * copied here, once.
   */
  bind(values: ReadonlyMap<string, { readonly pointer: bigint }>): BoundRun {
    const { api } = this.#device;
    const binding = api.create('CreateIoBinding', this.#pointer);
    const valueOf = (name: string): bigint => {
      const value = values.get(name);
      if (value === undefined) throw new Error(`${name} is not bound`);
      return value.pointer;
    };
    for (const name of this.inputs) api.check(api.native.BindInput(binding, name, valueOf(name)));
    for (const name of this.outputs) api.check(api.native.BindOutput(binding, name, valueOf(name)));
    return new BoundRun(this.#device, this.#pointer, binding);
  }

  release(): void {
    this.#device.api.native.ReleaseSession(this.#pointer);
  }
}

/** A session with all of its inputs and outputs in place. */
export class BoundRun {
  readonly #device: Runner;
  readonly #session: bigint;
  readonly #binding: bigint;

  constructor(device: Runner, session: bigint, binding: bigint) {
    this.#device = device;
    this.#session = session;
    this.#binding = binding;
  }

  /** Computes; the device may still be at it when this returns. */
  run(): void {
    const { api, runOptions } = this.#device;
    api.check(api.native.RunWithBinding(this.#session, runOptions, this.#binding));
  }

  /** Binds an input again: what lies in host memory is copied now. */
  rebind(name: string, value: { readonly pointer: bigint }): void {
    const { api } = this.#device;
    api.check(api.native.BindInput(this.#binding, name, value.pointer));
  }

  synchronize(): void {
    const { api } = this.#device;
    api.check(api.native.SynchronizeBoundOutputs(this.#binding));
  }

  release(): void {
    this.#device.api.native.ReleaseIoBinding(this.#binding);
  }
}
