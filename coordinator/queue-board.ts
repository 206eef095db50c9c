/** Bull Board over the queues of all models: what BullMQ knows of jobs, in every state, for people to look at. */
import { createBullBoard } from '@bull-board/api';
import { BullMQAdapter } from '@bull-board/api/bullMQAdapter';
import { FastifyAdapter } from '@bull-board/fastify';
import { Queue } from 'bullmq';
import { connectionOf, queueName } from './queue-connection.js';

/** `manage` also lets people retry, promote and remove BullMQ's jobs. */
export type BoardMode = 'off' | 'read' | 'manage';

export class QueueBoard {
  readonly #url: string;
  readonly #mode: Exclude<BoardMode, 'off'>;
  readonly #onError: (error: Error) => void;
  readonly #adapter = new FastifyAdapter();
  readonly #board: ReturnType<typeof createBullBoard>;
  readonly #queues = new Map<string, Queue>();

  constructor(
    url: string,
    basePath: string,
    mode: Exclude<BoardMode, 'off'>,
    onError: (error: Error) => void,
  ) {
    this.#url = url;
    this.#mode = mode;
    this.#onError = onError;
    this.#adapter.setBasePath(basePath);
    this.#board = createBullBoard({
      queues: [],
      serverAdapter: this.#adapter,
      options: { uiConfig: { boardTitle: 'Caravan', hideRedisDetails: true } },
    });
  }

  /** For Fastify, under the base path. */
  plugin(): ReturnType<FastifyAdapter['registerPlugin']> {
    return this.#adapter.registerPlugin();
  }

  /** Shows the queues of these models. */
  show(models: readonly string[]): void {
    for (const model of models) {
      if (this.#queues.has(model)) continue;
      const queue = new Queue(queueName(model), {
        connection: connectionOf(this.#url, 'impatient'),
      });
      queue.on('error', this.#onError);
      this.#queues.set(model, queue);
      this.#board.addQueue(
        new BullMQAdapter(queue, {
          displayName: model,
          readOnlyMode: this.#mode === 'read',
          allowRetries: this.#mode === 'manage',
          externalJobUrl: ({ id }) => ({ href: `/v1/jobs/${String(id)}`, displayText: 'job' }),
        }),
      );
    }
  }

  async close(): Promise<void> {
    await Promise.all([...this.#queues.values()].map((queue) => queue.close()));
  }
}
