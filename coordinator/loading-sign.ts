/**
 * Tells gateways that a group reads its weights, so that the scaler does not let it be taken away: controllers take Pods
 * that are not ready before all others, whatever they cost.
 */
import type { EngineHealth } from './engine-health.js';
import { HEARTBEAT_EVERY_MS, type Store } from './store.js';

export class LoadingSign {
  readonly #store: Pick<Store, 'beatLoading' | 'endLoading'>;
  readonly #model: string;
  readonly #engineId: string;
  readonly #health: EngineHealth;
  readonly #timer: NodeJS.Timeout;
  #isTold = false;

  /** Looks every two seconds, until it is closed. */
  constructor(
    store: Pick<Store, 'beatLoading' | 'endLoading'>,
    model: string,
    engineId: string,
    health: EngineHealth,
  ) {
    this.#store = store;
    this.#model = model;
    this.#engineId = engineId;
    this.#health = health;
    this.#timer = setInterval(() => void this.look(), HEARTBEAT_EVERY_MS);
  }

  /** Says what is so now. Redis may be away: the next look tries again. */
  async look(): Promise<void> {
    const { phase, isDraining } = this.#health;
    // Whose loading stands still is started again, and need not be kept.
    const isLoading = phase === 'loading' && !isDraining && this.#health.alive().isOk;
    if (!isLoading && !this.#isTold) return;
    const telling = isLoading
      ? this.#store.beatLoading(this.#model, this.#engineId)
      : this.#store.endLoading(this.#model, this.#engineId);
    this.#isTold = true;
    try {
      await telling;
      this.#isTold = isLoading;
    } catch {
      // It expires by itself.
    }
  }

  close(): void {
    clearInterval(this.#timer);
  }
}
