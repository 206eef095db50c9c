/** The lines of a batch's input file: read in pieces, so that memory does not grow with the file. */
import { z } from 'zod';
import type { LinePlace } from './batch.js';
import type { FileStorage } from './file-storage.js';
import { parseJson } from './json-text.js';

const PIECE_BYTES = 1024 * 1024;
/** The most that one request may have, as over HTTP. */
export const MAX_LINE_BYTES = 16 * 1024 * 1024;
const MAX_ID_CHARACTERS = 512;

const NEWLINE = 0x0a;
const BYTE_ORDER_MARK = '\ufeff';

export interface RawLine extends LinePlace {
  /** Without its newline; null for one of more than MAX_LINE_BYTES. */
  readonly bytes: Buffer | null;
  readonly next: LinePlace;
}

/** Reads lines from a place on. Blank ones are passed over, and counted. */
export class LineReader {
  readonly #storage: FileStorage;
  readonly #key: string;
  #next: LinePlace;
  /** What is read and not given out: begins at `#next`. */
  #rest: Buffer = Buffer.alloc(0);
  #readTo: number;
  #isAtEnd = false;

  constructor(storage: FileStorage, key: string, start: LinePlace) {
    this.#storage = storage;
    this.#key = key;
    this.#next = start;
    this.#readTo = start.offset;
  }

  /** The place after the last line that was given out, and after the blank ones that follow. */
  get place(): LinePlace {
    return this.#next;
  }

  /** The next line that is not blank, or null at the end. @throws as FileStorage.read. */
  async next(): Promise<RawLine | null> {
    for (;;) {
      const line = await this.#line();
      if (line === null || line.bytes === null || !isBlank(line.bytes)) return line;
    }
  }

  async #line(): Promise<RawLine | null> {
    const { offset, line } = this.#next;
    const parts: Buffer[] = [];
    let length = 0;
    for (;;) {
      const at = this.#rest.indexOf(NEWLINE);
      const piece = at < 0 ? this.#rest : this.#rest.subarray(0, at);
      length += piece.length;
      if (length <= MAX_LINE_BYTES) parts.push(piece);
      else parts.length = 0;
      if (at >= 0 || this.#isAtEnd) {
        if (at < 0 && length === 0) return null;
        this.#rest = this.#rest.subarray(piece.length + (at < 0 ? 0 : 1));
        this.#next = { offset: offset + length + (at < 0 ? 0 : 1), line: line + 1 };
        const bytes = length > MAX_LINE_BYTES ? null : Buffer.concat(parts);
        return { offset, line, bytes, next: this.#next };
      }
      this.#rest = await this.#storage.read(this.#key, this.#readTo, this.#readTo + PIECE_BYTES);
      this.#readTo += this.#rest.length;
      this.#isAtEnd = this.#rest.length < PIECE_BYTES;
    }
  }
}

const isBlank = (bytes: Buffer): boolean => bytes.length < 64 && bytes.toString().trim() === '';

/** One request of a batch. */
export interface BatchLine {
  readonly customId: string;
  /** Looked at when the line's turn comes. */
  readonly body: unknown;
}

/** Why a line is no request, in the words that a client sees. */
export class LineFault extends Error {
  readonly code: string;
  readonly param: string | null;

  constructor(code: string, message: string, param: string | null) {
    super(message);
    this.code = code;
    this.param = param;
  }
}

const envelope = z.object({
  custom_id: z.string().min(1).max(MAX_ID_CHARACTERS),
  method: z.literal('POST'),
  url: z.string(),
  body: z.record(z.string(), z.unknown()),
});

const rules: Readonly<Record<string, string>> = {
  custom_id: `must be a text of 1 to ${MAX_ID_CHARACTERS} characters`,
  method: 'must be POST',
  url: 'must be the endpoint of the batch',
  body: 'must be an object',
};

const utf8 = new TextDecoder('utf-8', { fatal: true, ignoreBOM: true });

/** @throws LineFault, whose message names the field and the rule. */
export function parseLine(
  { bytes, line }: Pick<RawLine, 'bytes' | 'line'>,
  endpoint: string,
): BatchLine {
  if (bytes === null) {
    throw new LineFault('line_too_long', `the line has more than ${MAX_LINE_BYTES} bytes`, null);
  }
  let json: unknown;
  try {
    const text = utf8.decode(bytes);
    json = parseJson(line === 1 && text.startsWith(BYTE_ORDER_MARK) ? text.slice(1) : text);
  } catch {
    throw new LineFault('invalid_json_line', 'the line is not valid JSON in UTF-8', null);
  }
  if (typeof json !== 'object' || json === null || Array.isArray(json)) {
    throw new LineFault('invalid_json_line', 'the line must be a JSON object', null);
  }
  const parsed = envelope.safeParse(json);
  if (!parsed.success) {
    const field = String(parsed.error.issues[0]?.path[0]);
    const isMissing = (json as Record<string, unknown>)[field] === undefined;
    const code = isMissing ? 'missing_required_parameter' : `invalid_${field}`;
    throw new LineFault(
      code,
      `${field}: ${isMissing ? 'is missing; it ' : ''}${rules[field]!}`,
      field,
    );
  }
  const { custom_id: customId, url, body } = parsed.data;
  if (url !== endpoint) {
    const shown = JSON.stringify(url.slice(0, 100));
    throw new LineFault(
      'mismatched_url',
      `url: must be ${endpoint}, the batch's endpoint, got ${shown}`,
      'url',
    );
  }
  return { customId, body };
}
