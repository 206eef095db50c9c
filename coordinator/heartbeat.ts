/** An engine's sign of life in Redis, and who else gives one. */
import { HEARTBEAT_EVERY_MS, type EngineBeat, type Store } from './store.js';
import { setTimeout as delay } from 'node:timers/promises';

/** How long saying goodbye may take: Redis may be away. */
const RETIRE_TIMEOUT_MS = 500;

export class Heartbeat {
  readonly #store: Store;
  readonly #own: () => EngineBeat;
  readonly #timer: NodeJS.Timeout;
  #engines: readonly EngineBeat[] = [];

  /** Beats at once, and from then on until it is closed. */
  constructor(store: Store, own: () => EngineBeat) {
    this.#store = store;
    this.#own = own;
    this.#timer = setInterval(() => {
      this.beat();
    }, HEARTBEAT_EVERY_MS);
    this.beat();
  }

  /** All engines, as of the last beat. */
  get engines(): readonly EngineBeat[] {
    return this.#engines;
  }

  /** Beats out of turn: something has changed that others should know soon. */
  beat(): void {
    const own = this.#own();
    const beat = async (): Promise<void> => {
      await this.#store.beat(own);
      if (own.ordinal !== undefined) this.#engines = await this.#store.engines();
    };
    // The next beat tries again.
    beat().catch(() => undefined);
  }

  async close(): Promise<void> {
    clearInterval(this.#timer);
    const { model, engineId } = this.#own();
    const retiring = this.#store.retire(model, engineId).catch(() => undefined);
    await Promise.race([retiring, delay(RETIRE_TIMEOUT_MS)]);
  }
}
