/**
 * RankPartial on the wire, without the copies of the generated codec: encoded once for all peers, and
 * decoded as a view. Byte for byte the message of cluster.proto; a test holds it against that.
 */
import type { MethodDefinition } from '@grpc/grpc-js';
import { CaravanError } from '../proto/errors.js';
import { PeerService, type Membership, type RankPartial } from '../proto/gen/cluster.js';

const SEQUENCE_TAG = 0x0d; // field 1, fixed32
const DATA_TAG = 0x12; // field 2, length-delimited

/** The message, encoded; `data` is copied. */
export function encodePartial(sequence: number, data: Uint8Array): Buffer {
  const lengthBytes = varintBytes(data.length);
  const message = Buffer.allocUnsafe(6 + lengthBytes + data.length);
  message[0] = SEQUENCE_TAG;
  message.writeUInt32LE(sequence >>> 0, 1);
  message[5] = DATA_TAG;
  let left = data.length;
  for (let i = 0; i < lengthBytes; i += 1) {
    message[6 + i] = (left & 0x7f) | (i + 1 < lengthBytes ? 0x80 : 0);
    left >>>= 7;
  }
  message.set(data, 6 + lengthBytes);
  return message;
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
