/**
 * KEDA's external scaler over gRPC: how much work a model has, so that engines come and go with it.
 *
 * A trigger's metadata: `model` (required), `targetSeconds` of work that one engine should have (default 30), and
 * `tokensPerSecond` to reckon with until an engine was measured. A model that no engine has ever served is active:
 * one must come and publish its card, or no gateway would take its requests. Links are not encrypted: a
 * NetworkPolicy should let only KEDA in.
 */
import { Server, ServerCredentials, type ServerUnaryCall, type sendUnaryData } from '@grpc/grpc-js';
import { setTimeout as delay } from 'node:timers/promises';
import { CaravanError, errorTable, toCaravanError } from '../proto/errors.js';
import {
  ExternalScalerService,
  type ExternalScalerServer,
  type ScaledObjectRef,
} from '../proto/gen/externalscaler.js';
import type { Work, WorkMeter } from './work.js';

export const METRIC_NAME = 'caravan-work-seconds';
const DEFAULT_TARGET_SECONDS = 30;
/** How often a stream looks for a change. */
const STREAM_POLL_MS = 1_000;

interface Target {
  readonly model: string;
  readonly targetSeconds: number;
  readonly tokensPerSecond: number | undefined;
}

export class ScalerServer {
  readonly #work: WorkMeter;
  readonly #server = new Server();
  readonly #closing = new AbortController();

  constructor(work: WorkMeter) {
    this.#work = work;
    const service: ExternalScalerServer = {
      isActive: this.#unary((ref: ScaledObjectRef) => this.#isActive(ref)),
      streamIsActive: (call) => {
        const gone = new AbortController();
        call.on('cancelled', () => {
          gone.abort();
        });
        const over = AbortSignal.any([gone.signal, this.#closing.signal]);
        void this.#stream(call.request, (answer) => call.write(answer), over).then(
          () => call.end(),
          (thrown: unknown) => call.emit('error', toStatus(thrown)),
        );
      },
      getMetricSpec: this.#unary((ref: ScaledObjectRef) => {
        const { targetSeconds } = targetOf(ref);
        const targetSize = Math.max(1, Math.round(targetSeconds));
        return Promise.resolve({
          metricSpecs: [{ metricName: METRIC_NAME, targetSize, targetSizeFloat: targetSeconds }],
        });
      }),
      getMetrics: this.#unary(async ({ scaledObjectRef, metricName }) => {
        if (metricName !== '' && metricName !== METRIC_NAME) {
          throw new CaravanError(
            'not_found',
            `metricName: must be ${METRIC_NAME}, got ${metricName}`,
          );
        }
        const { work } = await this.#measure(scaledObjectRef);
        const value = { metricValue: Math.ceil(work.seconds), metricValueFloat: work.seconds };
        return { metricValues: [{ metricName: METRIC_NAME, ...value }] };
      }),
    };
    this.#server.addService(ExternalScalerService, service);
  }

  /** @returns the port. @throws CaravanError `bad_usage` when it is taken. */
  listen(host: string, port: number): Promise<number> {
    const address = `${host.includes(':') ? `[${host}]` : host}:${port}`;
    return new Promise((resolve, reject) => {
      this.#server.bindAsync(address, ServerCredentials.createInsecure(), (error, bound) => {
        if (error === null) resolve(bound);
        else reject(new CaravanError('bad_usage', `--scaler-port ${port}: ${error.message}`));
      });
    });
  }

  /** Ends open streams too: KEDA calls again, at another gateway. */
  close(): void {
    this.#closing.abort();
    this.#server.forceShutdown();
  }

  async #isActive(ref: ScaledObjectRef | undefined): Promise<{ result: boolean }> {
    const { work } = await this.#measure(ref);
    return { result: work.jobs > 0 || !work.isKnown };
  }

  async #measure(ref: ScaledObjectRef | undefined): Promise<{ target: Target; work: Work }> {
    const target = targetOf(ref);
    const work = await this.#work.measure(target.model, target.tokensPerSecond);
    return { target, work };
  }

  async #stream(
    ref: ScaledObjectRef,
    write: (answer: { result: boolean }) => void,
    signal: AbortSignal,
  ): Promise<void> {
    let last: boolean | null = null;
    while (!signal.aborted) {
      const answer = await this.#isActive(ref);
      if (answer.result !== last) write(answer);
      last = answer.result;
      await delay(STREAM_POLL_MS, undefined, { signal }).catch(() => undefined);
    }
  }

  #unary<Q, A>(
    answer: (request: Q) => Promise<A>,
  ): (call: ServerUnaryCall<Q, A>, reply: sendUnaryData<A>) => void {
    return (call, reply) => {
      // What a handler throws at once is an answer, too.
      void Promise.resolve(call.request)
        .then(answer)
        .then(
          (value) => {
            reply(null, value);
          },
          (thrown: unknown) => {
            reply(toStatus(thrown));
          },
        );
    };
  }
}

function targetOf(ref: ScaledObjectRef | undefined): Target {
  const metadata = ref?.scalerMetadata ?? {};
  const model = metadata['model'];
  if (model === undefined || model === '') {
    throw new CaravanError('invalid_request', 'metadata.model: must name a model');
  }
  const positive = (name: string): number | undefined => {
    const text = metadata[name];
    if (text === undefined) return undefined;
    const value = Number(text);
    if (value > 0 && Number.isFinite(value)) return value;
    throw new CaravanError('invalid_request', `metadata.${name}: must be above 0, got ${text}`);
  };
  return {
    model,
    targetSeconds: positive('targetSeconds') ?? DEFAULT_TARGET_SECONDS,
    tokensPerSecond: positive('tokensPerSecond'),
  };
}

function toStatus(thrown: unknown): { readonly code: number; readonly details: string } {
  const error = toCaravanError(thrown);
  return { code: errorTable[error.code].grpc, details: error.message };
}
