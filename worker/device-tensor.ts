/** Tensors in a device's memory, and the copies that are made between it and the host's. */
import { elementType, type ElementType } from './ort.js';

/** A tensor in device memory, or a view of one. */
export interface DeviceTensor {
  /** The OrtValue. */
  readonly pointer: bigint;
  /** The device's address or handle. */
  readonly address: bigint;
  readonly type: ElementType;
  readonly shape: readonly number[];
}

/** Bytes that crossed between host and device since the start, and the time that was spent on it. */
export interface Traffic {
  toDevice: number;
  toHost: number;
  ms: number;
}

/** A copy that is made again and again between the same two tensors. */
export interface Copy {
  run(): void;
  release(): void;
}

const bytesOf: Readonly<Record<ElementType, number>> = {
  [elementType.float32]: 4,
  [elementType.uint8]: 1,
  [elementType.int8]: 1,
  [elementType.int32]: 4,
  [elementType.int64]: 8,
  [elementType.float16]: 2,
  [elementType.bfloat16]: 2,
  [elementType.uint4]: 0.5,
};

export const elementCount = (shape: readonly number[]): number => shape.reduce((a, b) => a * b, 1);
export const tensorBytes = (type: ElementType, shape: readonly number[]): number =>
  bytesOf[type] * elementCount(shape);
