/** Looks now and then whether Redis answers, and whether it keeps what it is given. */
import { setTimeout as delay } from 'node:timers/promises';
import type { RedisHealth, Store } from './store.js';

const EVERY_MS = 5_000;
/** A patient connection waits for long; who asks for health does not. */
const ANSWER_TIMEOUT_MS = 2_500;

export interface RedisState {
  readonly isUp: boolean;
  /** What it last said; null before it has said anything. */
  readonly health: RedisHealth | null;
}

export class RedisWatch {
  readonly #store: Pick<Store, 'health'>;
  readonly #timer: NodeJS.Timeout;
  #state: RedisState = { isUp: false, health: null };
  #asking: Promise<void> | null = null;

  constructor(store: Pick<Store, 'health'>) {
    this.#store = store;
    this.#timer = setInterval(() => void this.look(), EVERY_MS);
    void this.look();
  }

  get state(): RedisState {
    return this.#state;
  }

  /** Asks now. While Redis is away one question waits for it, not one for every look. */
  async look(): Promise<RedisState> {
    this.#asking ??= this.#store
      .health()
      .then(
        (health) => {
          this.#state = { isUp: true, health };
        },
        () => {
          this.#state = { ...this.#state, isUp: false };
        },
      )
      .finally(() => {
        this.#asking = null;
      });
    const late = delay(ANSWER_TIMEOUT_MS, 'late' as const, { ref: false });
    if ((await Promise.race([this.#asking, late])) === 'late') {
      this.#state = { ...this.#state, isUp: false };
    }
    return this.#state;
  }

  close(): void {
    clearInterval(this.#timer);
  }
}
