/** What the gateway tells Prometheus. */
import { Counter, Gauge, Histogram, Registry } from 'prom-client';
import { RedisMetrics } from './metrics-redis.js';
import type { RedisState } from './store-watch.js';
import type { Work } from './work.js';

const LATENCY_BUCKETS_S = [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30];

export class GatewayMetrics {
  readonly #registry = new Registry();
  readonly #queueJobs = this.#gauge('caravan_queue_jobs', 'Jobs by model and state', [
    'model',
    'state',
  ]);
  readonly #workSeconds = this.#gauge(
    'caravan_work_seconds',
    'Seconds that one engine would need for all jobs that wait or run: what the scaler answers',
    ['model'],
  );
  readonly #oldest = this.#gauge(
    'caravan_queue_oldest_seconds',
    'Age of the oldest job that no engine works on; 0 when none waits',
    ['model'],
  );
  readonly #redis = new RedisMetrics(this.#registry);
  readonly #engines = this.#gauge('caravan_engines', 'Engines that are alive', ['model']);

  readonly requests = new Counter({
    name: 'caravan_http_requests_total',
    help: 'HTTP requests by route and status',
    labelNames: ['route', 'status'],
    registers: [this.#registry],
  });
  readonly tokens = new Counter({
    name: 'caravan_generated_tokens_total',
    help: 'Tokens that were shown to clients',
    labelNames: ['model'],
    registers: [this.#registry],
  });
  readonly timeToFirstToken = new Histogram({
    name: 'caravan_ttft_seconds',
    help: 'Time from a request to its first token (TTFT)',
    labelNames: ['model'],
    buckets: LATENCY_BUCKETS_S,
    registers: [this.#registry],
  });
  readonly interTokenLatency = new Histogram({
    name: 'caravan_itl_seconds',
    help: 'Time between tokens (ITL), as they reach the gateway',
    labelNames: ['model'],
    buckets: LATENCY_BUCKETS_S,
    registers: [this.#registry],
  });
  readonly answersInFlight = this.#gauge(
    'caravan_answers_in_flight',
    'Answers that clients wait for or read',
    [],
  );

  /** Sets the jobs of one model by state. */
  setQueue(model: string, states: Readonly<Record<string, number>>): void {
    for (const [state, count] of Object.entries(states)) {
      this.#queueJobs.set({ model, state }, count);
    }
  }

  /** Sets the work of one model. */
  setWork(model: string, { seconds, oldestWaitingMs }: Work): void {
    this.#workSeconds.set({ model }, seconds);
    this.#oldest.set({ model }, oldestWaitingMs / 1000);
  }

  setRedis(state: RedisState): void {
    this.#redis.set(state);
  }

  /** Sets the engines by model. */
  setEngines(counts: ReadonlyMap<string, number>): void {
    this.#engines.reset();
    for (const [model, count] of counts) this.#engines.set({ model }, count);
  }

  /** Prometheus's text format. */
  async text(): Promise<string> {
    return this.#registry.metrics();
  }

  get contentType(): string {
    return this.#registry.contentType;
  }

  #gauge(name: string, help: string, labelNames: string[]): Gauge {
    return new Gauge({ name, help, labelNames, registers: [this.#registry] });
  }
}
