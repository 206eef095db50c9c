/**
 * Tells Kubernetes which Pods are cheap to take away: a ReplicaSet that shrinks takes those with the lowest
 * `controller.kubernetes.io/pod-deletion-cost` first. An engine keeps its own Pod's up to date: a group that loads is the
 * dearest, a busy one costs its sequences, an idle one nothing, one that drains less than that.
 *
 * Needs a service account that may `patch` `pods`, and the Pod's name in POD_NAME (else the host name).
 */
import fs from 'node:fs/promises';
import { request } from 'node:https';
import os from 'node:os';
import path from 'node:path';
import { setTimeout as delay } from 'node:timers/promises';
import { CaravanError } from '../proto/errors.js';
import type { EngineHealth } from './engine-health.js';

const ACCOUNT_FOLDER = '/var/run/secrets/kubernetes.io/serviceaccount';
const ANNOTATION = 'controller.kubernetes.io/pod-deletion-cost';
const LOADING_COST = 1_000_000;
const DRAINING_COST = -1;
/** Kubernetes asks not to change annotations all the time. */
const LOOK_EVERY_MS = 2_000;
const BUSY_CHANGE_EVERY_MS = 30_000;
const REQUEST_TIMEOUT_MS = 5_000;
const CLOSE_TIMEOUT_MS = 1_000;

/** What a Pod should cost now. Powers of two, so that it changes seldom. */
export function deletionCost({ phase, isDraining, load }: EngineHealth): number {
  if (isDraining) return DRAINING_COST;
  if (phase !== 'serving') return LOADING_COST;
  return load.sequences === 0 ? 0 : 2 ** Math.floor(Math.log2(load.sequences));
}

/** Where the API server is, and who we are to it. */
export interface PodIdentity {
  readonly host: string;
  readonly port: number;
  /** Holds `token`, `ca.crt` and `namespace`; the token is read each time, since it is renewed. */
  readonly accountFolder: string;
  readonly pod: string;
}

/** @throws CaravanError `bad_usage` outside of a Pod. */
export function podIdentity(env: NodeJS.ProcessEnv): PodIdentity {
  const host = env['KUBERNETES_SERVICE_HOST'];
  const port = Number(env['KUBERNETES_SERVICE_PORT']);
  if (host === undefined || !(port > 0)) {
    throw new CaravanError(
      'bad_usage',
      '--pod-deletion-cost: KUBERNETES_SERVICE_HOST and KUBERNETES_SERVICE_PORT are not set: not in a Pod',
    );
  }
  const accountFolder = env['CARAVAN_SERVICE_ACCOUNT_DIR'] ?? ACCOUNT_FOLDER;
  return { host, port, accountFolder, pod: env['POD_NAME'] ?? os.hostname() };
}

export class PodDeletionCost {
  readonly #identity: PodIdentity;
  readonly #health: EngineHealth;
  readonly #onError: (message: string) => void;
  readonly #timer: NodeJS.Timeout;
  #told: { readonly cost: number; readonly atMs: number } | null = null;
  #telling: Promise<void> | null = null;
  #lastError = '';

  /** @param onError hears of every new kind of failure; the next look tries again. */
  constructor(identity: PodIdentity, health: EngineHealth, onError: (message: string) => void) {
    this.#identity = identity;
    this.#health = health;
    this.#onError = onError;
    this.#timer = setInterval(() => void this.look(), LOOK_EVERY_MS);
    void this.look();
  }

  /** Tells the API server if the cost has changed. */
  async look(): Promise<void> {
    while (this.#telling !== null) await this.#telling;
    const cost = deletionCost(this.#health);
    if (cost === this.#told?.cost) return;
    const nowMs = performance.now();
    // From busy to busier is no news that cannot wait; from idle to busy is.
    const told = this.#told;
    const isMinor = cost > 0 && told !== null && told.cost > 0;
    if (isMinor && nowMs - told.atMs < BUSY_CHANGE_EVERY_MS) return;
    this.#telling = this.#tell(cost, nowMs);
    await this.#telling;
  }

  async #tell(cost: number, nowMs: number): Promise<void> {
    try {
      await this.#patch(cost);
      this.#told = { cost, atMs: nowMs };
      this.#lastError = '';
    } catch (error) {
      const message = error instanceof Error ? error.message : String(error);
      if (message !== this.#lastError) this.#onError(message);
      this.#lastError = message;
    } finally {
      this.#telling = null;
    }
  }

  /** Tells the last change, if that can be done soon. */
  async close(): Promise<void> {
    clearInterval(this.#timer);
    await Promise.race([this.look(), delay(CLOSE_TIMEOUT_MS, undefined, { ref: false })]);
  }

  async #patch(cost: number): Promise<void> {
    const { host, port, accountFolder, pod } = this.#identity;
    const read = async (name: string): Promise<string> =>
      (await fs.readFile(path.join(accountFolder, name), 'utf8')).trim();
    const [token, ca, namespace] = await Promise.all(['token', 'ca.crt', 'namespace'].map(read));
    const body = JSON.stringify({ metadata: { annotations: { [ANNOTATION]: String(cost) } } });
    const url = `/api/v1/namespaces/${encodeURIComponent(namespace!)}/pods/${encodeURIComponent(pod)}`;
    const headers = {
      authorization: `Bearer ${token!}`,
      'content-type': 'application/merge-patch+json',
      'content-length': Buffer.byteLength(body),
    };
    const signal = AbortSignal.timeout(REQUEST_TIMEOUT_MS);
    await new Promise<void>((resolve, reject) => {
      const options = { host, port, path: url, method: 'PATCH', headers, ca, signal };
      const call = request(options, (response) => {
        response.resume();
        response.once('end', () => {
          if (response.statusCode === 200) resolve();
          else reject(new Error(`PATCH ${url} was answered ${response.statusCode ?? '?'}`));
        });
        response.once('error', reject);
      });
      call.once('error', reject);
      call.end(body);
    });
  }
}
