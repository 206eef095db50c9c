/** What an engine tells Prometheus. All of it carries the model as a label. */
import { collectDefaultMetrics, Counter, Gauge, Histogram, Registry } from 'prom-client';
import type { EngineHealth } from './engine-health.js';
import { RedisMetrics } from './metrics-redis.js';
import type { RedisState } from './store-watch.js';

const STEP_BUCKETS_S = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10];

export class EngineMetrics {
  readonly #registry = new Registry();
  readonly #redis = new RedisMetrics(this.#registry);
  readonly #up = this.#gauge('caravan_engine_up', '1 while a whole group of ranks serves');
  readonly #draining = this.#gauge('caravan_engine_draining', '1 while no more jobs are taken');
  readonly #ranks = this.#gauge('caravan_engine_ranks', 'Ranks that the engine needs');
  readonly #connected = this.#gauge('caravan_engine_ranks_connected', 'Ranks that are reached');
  readonly #slots = this.#gauge('caravan_engine_slots', 'Slots: sequences that can run at once');
  readonly #slotsUsed = this.#gauge('caravan_engine_slots_used', 'Slots that sequences hold');
  readonly #kv = this.#gauge('caravan_engine_kv_positions', 'Positions of all slots');
  readonly #kvUsed = this.#gauge(
    'caravan_engine_kv_positions_used',
    'Positions of slots that are filled',
  );
  readonly #capacity = this.#gauge(
    'caravan_engine_tokens_per_second',
    'Prompt and output tokens that the engine computes in a second of steps, as measured',
  );
  readonly #loadBytes = this.#gauge(
    'caravan_engine_load_bytes',
    'Bytes of weights read while loading, all ranks together',
  );
  readonly #loadBytesTotal = this.#gauge(
    'caravan_engine_load_bytes_expected',
    'Bytes of weights that loading reads; 0 where the ranks still held them',
  );
  readonly #unmoved = this.#gauge(
    'caravan_engine_unmoved_seconds',
    'Time since a step ended while there is work; 0 without',
  );
  readonly #steps = new Histogram({
    name: 'caravan_engine_step_seconds',
    help: 'Time of a step, from planning to the last token handed on',
    labelNames: ['model'],
    buckets: STEP_BUCKETS_S,
    registers: [this.#registry],
  });
  readonly #computed = new Counter({
    name: 'caravan_engine_tokens_total',
    help: 'Prompt and output tokens that were computed',
    labelNames: ['model'],
    registers: [this.#registry],
  });
  readonly #drafts = new Counter({
    name: 'caravan_engine_draft_tokens_total',
    help: 'Tokens that were guessed and computed with others; accepted ones came true',
    labelNames: ['model', 'outcome'],
    registers: [this.#registry],
  });
  readonly #jobs = new Counter({
    name: 'caravan_engine_jobs_total',
    help: 'Jobs that left the engine, by how: completed, failed, cancelled, expired, given back, …',
    labelNames: ['model', 'outcome'],
    registers: [this.#registry],
  });
  readonly #model: string;

  constructor(model: string) {
    this.#model = model;
    collectDefaultMetrics({ register: this.#registry });
    this.#computed.inc({ model }, 0);
  }

  step(rows: number, totalMs: number): void {
    this.#steps.observe({ model: this.#model }, totalMs / 1000);
    this.#computed.inc({ model: this.#model }, rows);
  }

  /** Guessed tokens of a step, and those that came true. */
  drafts(count: number, accepted: number): void {
    this.#drafts.inc({ model: this.#model, outcome: 'accepted' }, accepted);
    this.#drafts.inc({ model: this.#model, outcome: 'rejected' }, count - accepted);
  }

  jobLeft(outcome: string): void {
    this.#jobs.inc({ model: this.#model, outcome: outcome.replaceAll(' ', '_') });
  }

  /** Prometheus's text format. @param tokensPerSecond null before anything was measured. */
  async text(
    health: EngineHealth,
    redis: RedisState,
    tokensPerSecond: number | null,
  ): Promise<string> {
    const { size, load, loading } = health;
    this.#redis.set(redis);
    this.#set(this.#up, Number(health.phase === 'serving'));
    this.#set(this.#draining, Number(health.isDraining));
    this.#set(this.#ranks, size.tp);
    this.#set(this.#connected, health.ranksConnected);
    this.#set(this.#slots, size.slots);
    this.#set(this.#slotsUsed, load.slotsUsed);
    this.#set(this.#kv, size.kvPositions);
    this.#set(this.#kvUsed, load.kvPositionsUsed);
    this.#set(this.#capacity, tokensPerSecond ?? 0);
    this.#set(this.#loadBytes, loading.read);
    this.#set(this.#loadBytesTotal, loading.total);
    this.#set(this.#unmoved, load.unmovedMs / 1000);
    return this.#registry.metrics();
  }

  get contentType(): string {
    return this.#registry.contentType;
  }

  #set(gauge: Gauge, value: number): void {
    gauge.set({ model: this.#model }, value);
  }

  #gauge(name: string, help: string): Gauge {
    return new Gauge({ name, help, labelNames: ['model'], registers: [this.#registry] });
  }
}
