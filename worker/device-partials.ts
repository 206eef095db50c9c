/**
 * Partials on a device, (1, rows, hidden) of the activations' type: of every rank, in three buffers (`direct-memory`).
 * Either each rank reads its peers' where they lie, or ours are copied to the host for the exchange, and theirs from it.
 */
import type { AllReduce, Turn } from './all-reduce.js';
import type { DeviceShape } from './device-graph-builder.js';
import { runAll, type Made } from './device-runs.js';
import { PARTIAL_BUFFERS, type PartialBuffer } from './direct-memory.js';
import { elementType } from './ort.js';
import { tensorBytes, type Copy, type DeviceTensor } from './device-tensor.js';
import type { OrtDevice } from './ort-device.js';

/** Partials of a number of rows, with what brings ours to the peers and theirs to us. */
export interface BoundPartials {
  /** (3 buffers, tp) */
  readonly tensors: readonly (readonly DeviceTensor[])[];
  /** Ours is where peers look for it when this returns. */
  send(turn: Turn, buffer: PartialBuffer): void;
  /** Those of the peers, once they have been exchanged. */
  receive(turn: Turn, buffer: PartialBuffer): void;
}

export class DevicePartials {
  readonly #device: OrtDevice;
  readonly #shape: DeviceShape;
  readonly #allReduce: AllReduce;
  /** (3 buffers, tp) of the largest step. */
  readonly #whole: readonly (readonly DeviceTensor[])[];

  /** @param made has the tensors as long as they are used. */
  constructor(
    device: OrtDevice,
    made: Made,
    shape: DeviceShape,
    maxRows: number,
    allReduce: AllReduce,
  ) {
    this.#device = device;
    this.#shape = shape;
    this.#allReduce = allReduce;
    const { activations, config, plan } = shape;
    const size = [1, maxRows, config.hiddenSize];
    const { direct } = allReduce;
    this.#whole = Array.from({ length: PARTIAL_BUFFERS }, (_, buffer) =>
      Array.from({ length: plan.tp }, (__, rank) =>
        direct === null
          ? made.allocateZeros(activations, size)
          : made.over(direct.addresses[buffer]![rank]!, activations, size),
      ),
    );
  }

  /** How many numbers of 32 bits a partial of so many rows takes. */
  words(rowCount: number): number {
    const { config, activations } = this.#shape;
    return tensorBytes(activations, [rowCount, config.hiddenSize]) / 4;
  }

  /** (3 buffers, tp) of so many rows. */
  views(made: Made, rowCount: number): DeviceTensor[][] {
    const { hiddenSize } = this.#shape.config;
    return this.#whole.map((ranks) =>
      ranks.map((whole) => made.view(whole, [1, rowCount, hiddenSize])),
    );
  }

  bind(made: Made, rowCount: number): BoundPartials {
    const device = this.#device;
    const { plan } = this.#shape;
    const tensors = this.views(made, rowCount);
    if (plan.tp === 1) return { tensors, send: () => undefined, receive: () => undefined };
    if (this.#allReduce.direct !== null) {
      const send = (): void => {
        device.synchronize();
      };
      return { tensors, send, receive: () => undefined };
    }
    const words = this.words(rowCount);
    // As they are, whatever their type.
    const onHost = this.#allReduce.partials.map((ranks) =>
      ranks.map(({ buffer, byteOffset }) => new Int32Array(buffer, byteOffset, words)),
    );
    const onDevice = this.#whole.map((ranks) =>
      ranks.map((whole) => made.view(whole, [words], elementType.int32)),
    );
    const each = (copy: (turn: number, buffer: number) => readonly Copy[]) =>
      [0, 1].map((turn) => onDevice.map((_, buffer) => copy(turn, buffer)));
    const out = each((turn, buffer) => [
      made.copy(device.copyOut(onDevice[buffer]![plan.rank]!, onHost[turn]![plan.rank]!)),
    ]);
    const peers = onHost[0]!.map((_, rank) => rank).filter((rank) => rank !== plan.rank);
    const back = each((turn, buffer) =>
      peers.map((rank) => made.copy(device.copyIn(onHost[turn]![rank]!, onDevice[buffer]![rank]!))),
    );
    return {
      tensors,
      send: (turn, buffer) => {
        runAll(out[turn]![buffer]!);
      },
      receive: (turn, buffer) => {
        runAll(back[turn]![buffer]!);
      },
    };
  }
}
