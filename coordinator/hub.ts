/** A Hugging Face hub: what a repository holds, and why it says no. */
import { z } from 'zod';
import type { HubSource } from '../model/hub-folder.js';
import { CaravanError } from '../proto/errors.js';
import type { Checksum } from './checksum.js';
import { reasonOf } from './download.js';
import type { RemoteFile } from './partial-file.js';
import type { Web, WebResponse } from './web.js';

/** The variables that Hugging Face's own tools know. */
export interface HubSettings {
  /** HF_ENDPOINT; https://huggingface.co unless it is set. */
  readonly endpoint: string;
  /** HF_TOKEN, if it is set. It goes to the endpoint and nowhere else. */
  readonly token: string | null;
  /** HF_HUB_OFFLINE: nothing is asked. */
  readonly isOffline: boolean;
}

const ANSWER_TIMEOUT_MS = 30_000;
const MAX_TRIES = 3;

/** @throws CaravanError `bad_usage` when HF_ENDPOINT is no URL. */
export function hubSettings(env: NodeJS.ProcessEnv): HubSettings {
  const endpoint = (env['HF_ENDPOINT'] ?? '').trim() || 'https://huggingface.co';
  if (!URL.canParse(endpoint) || !/^https?:$/.test(new URL(endpoint).protocol)) {
    throw new CaravanError(
      'bad_usage',
      `HF_ENDPOINT must be an http or https URL, got ${endpoint}`,
    );
  }
  const token = (env['HF_TOKEN'] ?? '').trim();
  return {
    endpoint: endpoint.replace(/\/+$/, ''),
    token: token === '' ? null : token,
    isOffline: /^(1|true|yes|on)$/i.test(env['HF_HUB_OFFLINE'] ?? ''),
  };
}

const repository = z.object({
  sha: z.string().regex(/^[0-9a-f]{40,64}$/),
  siblings: z.array(
    z.object({
      rfilename: z.string(),
      size: z.number().int().nonnegative().nullish(),
      blobId: z.string().nullish(),
      lfs: z.object({ sha256: z.string(), size: z.number().int().nonnegative() }).nullish(),
    }),
  ),
});

export interface Repository {
  /** The commit that the revision stands for. */
  readonly commit: string;
  readonly names: readonly string[];
  /** @throws CaravanError `not_found`, or `hub_unavailable` when the hub does not say what the file is. */
  readonly file: (name: string) => RemoteFile;
}

export class Hub {
  readonly #settings: HubSettings;
  readonly #web: Web;

  constructor(settings: HubSettings, web: Web) {
    this.#settings = settings;
    this.#web = web;
  }

  /** For requests to the endpoint. A redirect to another host does not carry them along. */
  get headers(): Readonly<Record<string, string>> {
    const { token } = this.#settings;
    return {
      'user-agent': 'caravan',
      ...(token === null ? {} : { authorization: `Bearer ${token}` }),
    };
  }

  /**
   * What the repository holds at this revision.
   *
   * @throws CaravanError `hub_unavailable`, `unauthorized`, `not_found`.
   */
  async open(source: HubSource, signal: AbortSignal): Promise<Repository> {
    const { endpoint } = this.#settings;
    const id = `${source.organization}/${source.name}`;
    const revision = encodeURIComponent(source.revision);
    const url = `${endpoint}/api/models/${id}/revision/${revision}?blobs=true`;
    const response = await this.#ask(url, source, signal);
    const parsed = repository.safeParse(await response.json().catch(() => null));
    if (!parsed.success) {
      throw new CaravanError(
        'hub_unavailable',
        `hf:${id}: ${endpoint} does not answer as a hub does: ${parsed.error.issues[0]?.path.join('.') ?? ''} is wrong`,
      );
    }
    const { sha, siblings } = parsed.data;
    const byName = new Map(siblings.map((sibling) => [sibling.rfilename, sibling]));
    return {
      commit: sha,
      names: [...byName.keys()],
      file: (name) => {
        const sibling = byName.get(name);
        if (sibling === undefined) throw new CaravanError('not_found', `hf:${id}: has no ${name}`);
        const bytes = sibling.lfs?.size ?? sibling.size;
        const checksum = checksumOf(sibling.lfs?.sha256, sibling.blobId);
        if (bytes == null || checksum === null) {
          throw new CaravanError(
            'hub_unavailable',
            `hf:${id}: ${endpoint} does not say the size and the checksum of ${name}`,
          );
        }
        const path = encodeURIComponent(name);
        return { name, url: `${endpoint}/${id}/resolve/${sha}/${path}`, bytes, checksum };
      },
    };
  }

  async #ask(url: string, source: HubSource, signal: AbortSignal): Promise<WebResponse> {
    const { endpoint, isOffline } = this.#settings;
    const id = `hf:${source.organization}/${source.name}`;
    const unavailable = (reason: string): CaravanError =>
      new CaravanError('hub_unavailable', `${id}: cannot ask ${endpoint}: ${reason}`);
    if (isOffline) throw unavailable('HF_HUB_OFFLINE is set');
    for (let tries = 1; ; tries += 1) {
      const deadline = AbortSignal.timeout(ANSWER_TIMEOUT_MS);
      let problem;
      try {
        const response = await this.#web.fetch(url, {
          headers: this.headers,
          signal: AbortSignal.any([signal, deadline]),
        });
        if (response.ok) return response;
        await response.body?.cancel();
        if (response.status < 500 && response.status !== 429) throw this.explain(response, source);
        problem = `it answered ${response.status}`;
      } catch (error) {
        signal.throwIfAborted();
        if (error instanceof CaravanError) throw error;
        problem = reasonOf(error);
      }
      if (tries === MAX_TRIES) throw unavailable(problem);
    }
  }

  /** What a refusal means, and what mends it. */
  explain(response: WebResponse, source: HubSource, fileName?: string): CaravanError {
    const { endpoint, token } = this.#settings;
    const id = `${source.organization}/${source.name}`;
    const subject = fileName === undefined ? `hf:${id}` : `hf:${id}: ${fileName}`;
    const page = `${endpoint}/${id}`;
    const why = response.headers.get('x-error-code') ?? '';
    switch (response.status) {
      case 401:
      case 403: {
        // A hub says 401 for what is not there, too, so as not to say which private ones there are.
        if (why === 'GatedRepo' || response.status === 403 || fileName !== undefined) {
          const licence = `${subject}: is gated: accept its licence at ${page}`;
          const then = token === null ? 'then set HF_TOKEN' : 'with the account of HF_TOKEN';
          return new CaravanError('unauthorized', `${licence}, ${then} (${response.status})`);
        }
        const reason =
          token === null
            ? 'does not exist, or is private or gated: then set HF_TOKEN'
            : 'does not exist, or the account of HF_TOKEN may not read it, or the token is wrong';
        return new CaravanError('unauthorized', `${subject}: ${reason} (401)`);
      }
      case 404: {
        const what =
          why === 'RevisionNotFound' ? `has no revision ${source.revision}` : 'does not exist';
        return new CaravanError('not_found', `${subject}: ${what} at ${endpoint}`);
      }
      default:
        return new CaravanError(
          'hub_unavailable',
          `${subject}: the hub answered ${response.status}`,
        );
    }
  }
}

function checksumOf(
  sha256: string | undefined,
  blobId: string | null | undefined,
): Checksum | null {
  if (sha256 !== undefined) return { kind: 'sha256', hex: sha256.toLowerCase() };
  return blobId == null ? null : { kind: 'git', hex: blobId.toLowerCase() };
}
