/** Takes in the wish to be told of an end, before the job or batch that ends is written down. */
import { CaravanError } from '../proto/errors.js';
import type { WebhookRecords } from './store-webhooks.js';

/** The first look, should nobody tell of the end. */
const FIRST_LOOK_MS = 1_000;

export interface UrlPolicy {
  /** @throws CaravanError `invalid_request`. */
  check(url: string): unknown;
}

export class WebhookIntake {
  readonly #records: WebhookRecords;
  readonly #policy: UrlPolicy | null;

  /** @param policy null where nobody here signs webhooks. */
  constructor(records: WebhookRecords, policy: UrlPolicy | null) {
    this.#records = records;
    this.#policy = policy;
  }

  /** @throws CaravanError `invalid_request` for a wish that will not be granted. */
  check(webhook: { readonly url: string } | null | undefined): void {
    if (webhook == null) return;
    if (this.#policy === null) {
      throw new CaravanError(
        'invalid_request',
        'webhook: this gateway tells nobody: it has no --webhook-secret to sign with',
        { param: 'webhook' },
      );
    }
    this.#policy.check(webhook.url);
  }

  /** Can be repeated. @returns whether the wish is new. @throws CaravanError `redis_unavailable`. */
  async add(id: string, webhook: { readonly url: string } | null | undefined): Promise<boolean> {
    if (webhook == null) return false;
    return this.#records.add(id, webhook.url, Date.now() + FIRST_LOOK_MS);
  }

  /** What it was about was not let in. */
  async remove(id: string): Promise<void> {
    await this.#records.remove(id);
  }
}
