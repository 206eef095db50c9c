/**
 * RankPartial on the wire, without the copies of the generated codec: a partial that is sent lies in memory with
 * room for the rest of its message, and what is received is a view. Byte for byte the message of cluster.proto; a test
 * holds it against that.
 */
import type { MethodDefinition } from '@grpc/grpc-js';
import { CaravanError } from '../proto/errors.js';
import { PeerService, type Membership, type RankPartial } from '../proto/gen/cluster.js';
import { allocateBytes } from './memory.js';

const SEQUENCE_TAG = 0x0d; // field 1, fixed32
const DATA_TAG = 0x12; // field 2, length-delimited
/** More than what stands before the data of a message; elements stay where kernels like them. */
const HEADROOM = 64;

/** A buffer of elements that can be sent as they lie there. */
export class FramedPartial {
  readonly data: Float32Array<ArrayBuffer>;
  readonly #bytes: Buffer;

  /** @param capacity elements. @throws CaravanError `out_of_memory`. */
  constructor(capacity: number) {
    const memory = allocateBytes(HEADROOM + 4 * capacity);
    this.data = new Float32Array(memory, HEADROOM);
    this.#bytes = Buffer.from(memory);
  }

  /** The message of the first `count` elements: a view of them, so that they may not change before it was received. */
  message(sequence: number, count: number): Buffer {
    const byteCount = 4 * count;
    const lengthBytes = varintBytes(byteCount);
    const start = HEADROOM - 6 - lengthBytes;
    const bytes = this.#bytes;
    bytes[start] = SEQUENCE_TAG;
    bytes.writeUInt32LE(sequence >>> 0, start + 1);
    bytes[start + 5] = DATA_TAG;
    let left = byteCount;
    for (let i = 0; i < lengthBytes; i += 1) {
      bytes[start + 6 + i] = (left & 0x7f) | (i + 1 < lengthBytes ? 0x80 : 0);
      left >>>= 7;
    }
    return bytes.subarray(start, HEADROOM + byteCount);
  }
}

/** The message; `data` is a view of `message`. @throws CaravanError `internal` for any other bytes. */
export function decodePartial(message: Buffer): RankPartial {
  let length = 0;
  let at = 6;
  for (let shift = 0; shift < 35 && at < message.length; shift += 7) {
    const byte = message[at]!;
    at += 1;
    length += (byte & 0x7f) * 2 ** shift;
    if (byte < 0x80) break;
  }
  const isWhole = message.length > 6 && length === message.length - at;
  if (message[0] !== SEQUENCE_TAG || message[5] !== DATA_TAG || !isWhole) {
    throw new CaravanError('internal', `a peer sent ${message.length} bytes that are no partial`);
  }
  return { sequence: message.readUInt32LE(1), data: message.subarray(at) };
}

const varintBytes = (value: number): number => Math.max(1, Math.ceil((32 - Math.clz32(value)) / 7));

const { partials } = PeerService;

/** Peer.Partials for the answering side: what is written is encoded already. */
export const partialsMethod: MethodDefinition<Membership, Buffer> = {
  ...partials,
  responseSerialize: (message: Buffer) => message,
  responseDeserialize: (message: Buffer) => message,
};
