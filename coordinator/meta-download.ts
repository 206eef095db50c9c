/**
 * Meta's own download of Llama 2, by the signed URL of its e-mail: files at the URL with its `*` replaced by their path.
 * A model's checklist.chk names its files and their MD5.
 */
import { CaravanError } from '../proto/errors.js';
import type { DownloadOptions } from './download.js';
import { reasonOf } from './download.js';
import type { Checksum } from './checksum.js';
import type { RemoteFile } from './partial-file.js';
import { intoFolder, type Pulled, type PullOptions } from './pull.js';
import type { Web, WebResponse } from './web.js';

/** Checklists and licences have a few KB. */
const MAX_SMALL_BYTES = 1 << 20;
const ANSWER_TIMEOUT_MS = 30_000;

export interface MetaSource {
  /** With exactly one `*`. It is a key: it is never printed. */
  readonly signedUrl: string;
  /** The folder at Meta's: llama-2-70b-chat. */
  readonly model: string;
}

/**
 * @param url `meta:SIGNED_URL`. @param name `7b`, `70b-chat` …, or a folder's full name.
 * @throws CaravanError `bad_usage`.
 */
export function parseMetaSource(url: string, name: string): MetaSource {
  const signedUrl = url.slice('meta:'.length);
  const refuse = (message: string): never => {
    throw new CaravanError('bad_usage', `meta:SIGNED_URL: ${message}`);
  };
  if (!URL.canParse(signedUrl) || !/^https?:$/.test(new URL(signedUrl).protocol)) {
    refuse("must be the whole URL of Meta's e-mail, between quotes");
  }
  const star = signedUrl.indexOf('*');
  const query = signedUrl.indexOf('?');
  if (star === -1 || (query !== -1 && star > query)) {
    refuse("has no * where files' names go; copy the link's text, and put quotes around it");
  }
  const short = /^\d+b(-chat)?$/i.test(name);
  if (!short && !/^[\w-][\w.-]*$/.test(name)) {
    throw new CaravanError('bad_usage', `${name}: must be a model's name such as 7b or 70b-chat`);
  }
  return { signedUrl, model: short ? `llama-2-${name.toLowerCase()}` : name };
}

/**
 * Fetches a model: its pieces, params.json and checklist.chk, and the tokenizer and licence beside it.
 *
 * @throws CaravanError `unauthorized` for a link that has expired, `not_found`, `hub_unavailable`,
 *   `checksum_mismatch`, `disk_full`.
 */
export function pullFromMeta(source: MetaSource, options: PullOptions): Promise<Pulled> {
  const { model } = source;
  const urlOf = (path: string): string => source.signedUrl.replace('*', () => path);
  const how = { headers: { 'user-agent': 'caravan' }, explain };
  return intoFolder(options, async (fetchAll) => {
    const { web, signal } = options;
    const small = (path: string) => fetchSmall(web, urlOf(path), path, signal);
    const checklist = await small(`${model}/checklist.chk`);
    const files: RemoteFile[] = [];
    const expect = async (path: string, checksum: Checksum | null): Promise<void> => {
      const bytes = await sizeOf(web, urlOf(path), path, signal);
      files.push({ name: path.split('/').at(-1)!, url: urlOf(path), bytes, checksum });
    };
    await expect('LICENSE', null);
    await expect('USE_POLICY.md', null);
    const tokenizers = parseChecklist(
      await small('tokenizer_checklist.chk'),
      'tokenizer_checklist.chk',
    );
    await expect('tokenizer.model', tokenizers.get('tokenizer.model') ?? null);
    for (const [name, checksum] of parseChecklist(checklist, 'checklist.chk')) {
      await expect(`${model}/${name}`, checksum);
    }
    if (!files.some(({ name }) => name === 'params.json')) {
      throw new CaravanError('invalid_checkpoint', `${model}/checklist.chk: names no params.json`);
    }
    files.push({
      name: 'checklist.chk',
      url: urlOf(`${model}/checklist.chk`),
      bytes: checklist.length,
      checksum: null,
    });
    await fetchAll(files, how);
    return { source: `meta:${model}`, revision: null, files };
  });
}

/** Lines of an MD5, spaces and a file's name, as md5sum writes them. @throws CaravanError `invalid_checkpoint`. */
export function parseChecklist(bytes: Uint8Array, name: string): Map<string, Checksum> {
  const lines = Buffer.from(bytes).toString('utf8').split('\n');
  const entries = lines
    .filter((line) => line.trim() !== '')
    .map((line) => {
      const [, hex, file] = /^([0-9a-fA-F]{32})\s+\*?([\w-][\w.-]*)\s*$/.exec(line) ?? [];
      if (hex === undefined || file === undefined) {
        throw new CaravanError(
          'invalid_checkpoint',
          `${name}: is not a list of MD5 sums and names`,
        );
      }
      return [file, { kind: 'md5', hex: hex.toLowerCase() }] as const;
    });
  return new Map(entries);
}

const explain: DownloadOptions['explain'] = (response, name) => {
  switch (response.status) {
    case 401:
    case 403:
      return new CaravanError(
        'unauthorized',
        `${name}: Meta's link has expired, is used up, or is not for this model (${response.status}): ` +
          'links live for 24 hours; ask for a new one where the first came from, and run the same command with it',
      );
    case 404:
      return new CaravanError(
        'not_found',
        `${name}: is not at Meta's link; is the model's name right?`,
      );
    default:
      return new CaravanError('hub_unavailable', `${name}: the server answered ${response.status}`);
  }
};

/** Asks for a byte: signed URLs may be read, and nothing else. */
async function sizeOf(web: Web, url: string, name: string, signal: AbortSignal): Promise<number> {
  const response = await ask(web, url, name, { range: 'bytes=0-0' }, signal);
  await response.body?.cancel();
  const range = /\/(\d+)$/.exec(response.headers.get('content-range') ?? '')?.[1];
  const bytes = range ?? (response.status === 200 ? response.headers.get('content-length') : null);
  if (bytes !== null) return Number(bytes);
  throw new CaravanError('hub_unavailable', `${name}: the server does not say how long it is`);
}

async function fetchSmall(
  web: Web,
  url: string,
  name: string,
  signal: AbortSignal,
): Promise<Buffer> {
  const response = await ask(web, url, name, {}, signal);
  const bytes = Buffer.from(await response.arrayBuffer());
  if (bytes.length <= MAX_SMALL_BYTES) return bytes;
  throw new CaravanError(
    'hub_unavailable',
    `${name}: has ${bytes.length} bytes, too many for a list`,
  );
}

async function ask(
  web: Web,
  url: string,
  name: string,
  headers: Readonly<Record<string, string>>,
  signal: AbortSignal,
): Promise<WebResponse> {
  const deadline = AbortSignal.timeout(ANSWER_TIMEOUT_MS);
  try {
    const response = await web.fetch(url, {
      headers: { 'user-agent': 'caravan', 'accept-encoding': 'identity', ...headers },
      signal: AbortSignal.any([signal, deadline]),
    });
    if (response.ok) return response;
    await response.body?.cancel();
    throw explain(response, name);
  } catch (error) {
    signal.throwIfAborted();
    if (error instanceof CaravanError) throw error;
    throw new CaravanError('hub_unavailable', `${name}: cannot be asked for: ${reasonOf(error)}`);
  }
}
