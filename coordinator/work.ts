/** Work as seconds: what one engine would need for all jobs of a model that wait or run. */
import type { Backlog } from './queue-backlog.js';
import type { Store } from './store.js';

/** Until an engine of the model has been measured and nobody says better. */
const GUESSED_TOKENS_PER_SECOND = 100;

export interface Work {
  readonly jobs: number;
  readonly tokens: number;
  /** Age of the oldest job that no engine works on; 0 when none waits. */
  readonly oldestWaitingMs: number;
  /** Of one engine: the mean of those that live, or the last one measured. */
  readonly tokensPerSecond: number;
  readonly seconds: number;
  /** Whether an engine has ever served it: without a card, gateways refuse its requests. */
  readonly isKnown: boolean;
}

export class WorkMeter {
  readonly #backlog: Backlog;
  readonly #store: Store;

  constructor(backlog: Backlog, store: Store) {
    this.#backlog = backlog;
    this.#store = store;
  }

  /**
   * @param guessedRate tokens a second to reckon with before an engine was measured.
   * @throws CaravanError `redis_unavailable`.
   */
  async measure(model: string, guessedRate = GUESSED_TOKENS_PER_SECOND): Promise<Work> {
    const card = await this.#store.card(model);
    const { jobs, tokens, oldestWaitingMs } = await this.#backlog.count(
      model,
      card?.maxSeqLen ?? null,
    );
    const rates = (await this.#store.engines()).flatMap((engine) =>
      engine.model === model && engine.tokensPerSecond !== undefined
        ? [engine.tokensPerSecond]
        : [],
    );
    const measured =
      rates.length > 0
        ? rates.reduce((sum, rate) => sum + rate, 0) / rates.length
        : await this.#store.lastRate(model);
    const tokensPerSecond = measured !== null && measured > 0 ? measured : guessedRate;
    return {
      jobs,
      tokens,
      oldestWaitingMs,
      tokensPerSecond,
      seconds: tokens / tokensPerSecond,
      isKnown: card !== null,
    };
  }
}
