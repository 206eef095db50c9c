/** Known answers: of stories260K beside the project, of caravan-tiny in test/golden. */
import fs from 'node:fs';
import path from 'node:path';
import { packageRoot } from '../coordinator/package-root.js';
import { sharedPath } from './shared.js';

export interface SharedGolden {
  readonly prompt: string;
  readonly ids: readonly number[];
  /** By position: (vocabulary). */
  readonly logits: ReadonlyMap<number, readonly number[]>;
  /** (ids) most likely next token. */
  readonly argmax: readonly number[];
}

/** stories260K: float64 logits that were made outside of this project. */
export const sharedGolden = {
  model: 'models/stories260k/hf',
  file: 'data/golden/stories260K_logits.json',
  /** 200 tokens after an empty prompt, greedily. */
  text: 'data/golden/stories260K_expected_stdout_n200.txt',
  read(): SharedGolden[] {
    const { cases } = JSON.parse(fs.readFileSync(sharedPath(this.file), 'utf8')) as {
      cases: {
        prompt: string;
        ids: number[];
        logit_positions: number[];
        logits_f64_numpy: number[][];
        argmax: number[];
      }[];
    };
    return cases.map(({ prompt, ids, logit_positions, logits_f64_numpy, argmax }) => ({
      prompt,
      ids,
      argmax,
      logits: new Map(logit_positions.map((position, i) => [position, logits_f64_numpy[i]!])),
    }));
  },
};

export interface TinyGolden {
  /** A text to continue, or the one user message of a chat. */
  readonly prompt: string;
  readonly isChat: boolean;
  readonly promptIds: readonly number[];
  /** What greedy decoding puts after it; EOS is a token like others. */
  readonly ids: readonly number[];
  /** (vocabulary) after the prompt. */
  readonly firstLogits: readonly number[];
  /** The least distance between the two largest logits of all steps. */
  readonly leastMargin: number;
}

/** Where test/golden/make-caravan-tiny.ts writes, and tests read. */
export const tinyGoldenFile = path.join(packageRoot, 'test/golden/caravan-tiny.json');

export const readTinyGolden = (): TinyGolden[] =>
  JSON.parse(fs.readFileSync(tinyGoldenFile, 'utf8')) as TinyGolden[];
