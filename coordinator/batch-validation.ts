/** Reads a batch's input file once before anything of it is run: every line must be a request of its own. */
import { createHash } from 'node:crypto';
import type { BatchFault, BatchOrder } from './batch.js';
import { LineFault, LineReader, parseLine, type RawLine } from './batch-lines.js';
import type { FileStorage } from './file-storage.js';
import { fileKey } from './store-files.js';

/** So many faults are told one by one. */
const MAX_FAULTS = 100;

export interface Validated {
  /** Lines that are not blank. */
  readonly total: number;
  /** The model that all lines name, or null. */
  readonly model: string | null;
  /** Empty when the batch can run. */
  readonly faults: readonly BatchFault[];
}

interface ValidationRules {
  readonly mostLines: number;
  /** Names of the models that there are. */
  readonly models: ReadonlySet<string>;
}

/** @throws as FileStorage.read, or the signal's reason. */
export async function validateInput(
  storage: FileStorage,
  { inputFileId, endpoint }: BatchOrder,
  { mostLines, models }: ValidationRules,
  signal: AbortSignal,
): Promise<Validated> {
  const reader = new LineReader(storage, fileKey(inputFileId), { offset: 0, line: 1 });
  const faults = new Faults();
  // 16 bytes of a digest each: ids may be long, and there may be many.
  const ids = new Set<string>();
  const named = new Set<string | null>();
  let total = 0;
  for (let line = await reader.next(); line !== null; line = await reader.next()) {
    signal.throwIfAborted();
    total += 1;
    if (total > mostLines) {
      const message = `the file has more than ${mostLines} requests, the most of a batch`;
      return {
        total: 0,
        model: null,
        faults: [{ code: 'too_many_requests', message, param: null, line: null }],
      };
    }
    try {
      const model = checkLine(line, endpoint, ids, models);
      if (named.size < 2) named.add(model);
    } catch (error) {
      if (!(error instanceof LineFault)) throw error;
      faults.add({ code: error.code, message: error.message, param: error.param, line: line.line });
    }
  }
  if (total === 0) {
    faults.add({
      code: 'empty_file',
      message: 'the file has no requests',
      param: null,
      line: null,
    });
  }
  const model = named.size === 1 ? [...named][0]! : null;
  return { total, model, faults: faults.list };
}

/** @returns the model that the line names. @throws LineFault. */
function checkLine(
  line: RawLine,
  endpoint: string,
  ids: Set<string>,
  models: ReadonlySet<string>,
): string | null {
  const { customId, body } = parseLine(line, endpoint);
  const digest = createHash('sha256').update(customId).digest().toString('latin1', 0, 16);
  if (ids.has(digest)) {
    throw new LineFault(
      'duplicate_custom_id',
      'custom_id: another line of the file has the same; each must be unique',
      'custom_id',
    );
  }
  ids.add(digest);
  const { model } = body as { model?: unknown };
  // Whatever else is wrong with a body is told in the error file, as it would be over HTTP.
  if (typeof model !== 'string') return null;
  if (models.has(model)) return model;
  const shown = model.slice(0, 100);
  throw new LineFault(
    'model_not_found',
    `body.model: the model ${shown} does not exist`,
    'body.model',
  );
}

class Faults {
  readonly #told: BatchFault[] = [];
  #untoldCount = 0;

  add(fault: BatchFault): void {
    if (this.#told.length < MAX_FAULTS) this.#told.push(fault);
    else this.#untoldCount += 1;
  }

  get list(): readonly BatchFault[] {
    if (this.#untoldCount === 0) return this.#told;
    const message = `${this.#untoldCount} more lines are wrong`;
    return [...this.#told, { code: 'too_many_errors', message, param: null, line: null }];
  }
}
