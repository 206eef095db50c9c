/** What an engine and a gateway tell Prometheus of their Redis. */
import { Gauge, type Registry } from 'prom-client';
import type { RedisState } from './store-watch.js';

export class RedisMetrics {
  readonly #up: Gauge;
  readonly #durable: Gauge;
  readonly #facts: Gauge;

  constructor(registry: Registry) {
    const registers = [registry];
    this.#up = new Gauge({ name: 'caravan_redis_up', help: '1 while Redis answers', registers });
    this.#durable = new Gauge({
      name: 'caravan_redis_durable',
      help: '1 while Redis keeps jobs: append-only file on and written, noeviction',
      registers,
    });
    this.#facts = new Gauge({
      name: 'caravan_redis_condition',
      help: '1 where the condition holds: aof_enabled, aof_last_write_ok, noeviction, not_loading',
      labelNames: ['condition'],
      registers,
    });
  }

  /** Conditions stay as they were last seen while Redis is away. */
  set({ isUp, health }: RedisState): void {
    this.#up.set(Number(isUp));
    if (health === null) return;
    const conditions = {
      aof_enabled: health.isAppendOnly,
      aof_last_write_ok: health.isAofWritten,
      noeviction: health.maxmemoryPolicy === 'noeviction',
      not_loading: !health.isLoading,
    };
    for (const [condition, holds] of Object.entries(conditions)) {
      this.#facts.set({ condition }, Number(holds));
    }
    const { aof_enabled, aof_last_write_ok, noeviction } = conditions;
    this.#durable.set(Number(aof_enabled && aof_last_write_ok && noeviction));
  }
}
