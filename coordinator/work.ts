/** Work as seconds: what one engine would need for all jobs of a model that wait or run. */
import { capacityOf } from './engine-speed.js';
import type { Backlog } from './queue-backlog.js';
import type { Store } from './store.js';

/** Until an engine of the model has been measured and nobody says better. */
const GUESSED_TOKENS_PER_SECOND = 100;

export interface Work {
  readonly jobs: number;
  readonly tokens: number;
  /** Age of the oldest job that no engine works on; 0 when none waits. */
  readonly oldestWaitingMs: number;
  /** Of one engine: as the busiest of those that live have shown it, or of those that were. */
  readonly tokensPerSecond: number;
  readonly seconds: number;
  /** Whether an engine has ever served it: without a card, gateways refuse its requests. */
  readonly isKnown: boolean;
  /** Engines that serve or load, and do not drain. */
  readonly engines: number;
  /** Of them, those whose weights are being read. */
  readonly loading: number;
}

type EngineStore = Pick<Store, 'card' | 'engines' | 'loadingEngines' | 'rememberedSpeeds'>;

/** An engine that was started again has a new id, on the same host: its old one may still be known. */
const placeOf = (engineId: string): string => engineId.replace(/-[0-9a-f]{8}$/, '');

export class WorkMeter {
  readonly #backlog: Pick<Backlog, 'count'>;
  readonly #store: EngineStore;

  constructor(backlog: Pick<Backlog, 'count'>, store: EngineStore) {
    this.#backlog = backlog;
    this.#store = store;
  }

  /**
   * @param guessedRate tokens a second to reckon with until an engine was measured with half of its slots in use.
   * @throws CaravanError `redis_unavailable`.
   */
  async measure(model: string, guessedRate?: number): Promise<Work> {
    const card = await this.#store.card(model);
    const { jobs, tokens, oldestWaitingMs } = await this.#backlog.count(
      model,
      card?.maxSeqLen ?? null,
    );
    const own = (await this.#store.engines()).filter((engine) => engine.model === model);
    const living = own.map(({ speeds = [] }) => speeds);
    const serving = own.filter(({ isDraining = false }) => !isDraining);
    const served = new Set(serving.map(({ engineId }) => engineId));
    const loading = (await this.#store.loadingEngines(model)).filter((id) => !served.has(id));
    const remembered = await this.#store.rememberedSpeeds(model);
    const capacity = capacityOf(living, remembered, card?.maxBatchSize ?? Infinity);
    const measured =
      capacity !== null && (capacity.isUnderLoad || guessedRate === undefined)
        ? capacity.tokensPerSecond
        : undefined;
    const tokensPerSecond = measured ?? guessedRate ?? GUESSED_TOKENS_PER_SECOND;
    return {
      jobs,
      tokens,
      oldestWaitingMs,
      tokensPerSecond,
      seconds: tokens / tokensPerSecond,
      isKnown: card !== null,
      engines: new Set([...served, ...loading].map(placeOf)).size,
      loading: loading.length,
    };
  }
}
