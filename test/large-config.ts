import type { LlamaConfig } from '../model/config.js';

/** A Llama of about this many gigabytes in float32: layers of 0.2 GB, and a vocabulary for the rest. */
export function largeConfig(gigabytes: number): LlamaConfig {
  const hiddenSize = gigabytes < 1 ? 1024 : 2048;
  const ffnSize = (hiddenSize * 43) / 16;
  const layerElements = 4 * hiddenSize ** 2 + 3 * hiddenSize * ffnSize;
  const vocabSize = 8 * hiddenSize;
  const elements = (gigabytes * 1.05e9) / 4 - 2 * vocabSize * hiddenSize;
  return {
    hiddenSize,
    ffnSize,
    layerCount: Math.max(1, Math.ceil(elements / layerElements)),
    headCount: hiddenSize / 64,
    kvHeadCount: hiddenSize / 128,
    headSize: 64,
    vocabSize,
    maxPositions: 2048,
    normEps: 1e-5,
    ropeTheta: 10_000,
    isHeadTied: false,
  };
}
