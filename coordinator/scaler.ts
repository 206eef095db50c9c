/**
 * KEDA's external scaler over gRPC: how much work a model has, so that engines come and go with it.
 *
 * A trigger's metadata: `model` (required), `targetSeconds` of work that one engine should have (default 30), and
 * `tokensPerSecond` to reckon with until an engine was measured. A model that no engine has ever served is active:
 * one must come and publish its card, or no gateway would take its requests. While a group reads its weights nobody is taken
 * away: it would be the first. Without certificates links are plain: a NetworkPolicy should let only KEDA in.
 */
import { setTimeout as delay } from 'node:timers/promises';
import { CaravanError } from '../proto/errors.js';
import {
  ExternalScalerService,
  type ExternalScalerServer,
  type ScaledObjectRef,
} from '../proto/gen/externalscaler.js';
import type { LinkSecurity } from '../proto/link-security.js';
import { listenRpc, newRpcServer, streaming, unary } from './rpc-server.js';
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
  readonly #security: LinkSecurity | null;
  readonly #server = newRpcServer();
  readonly #closing = new AbortController();

  /** @param security of its links; KEDA takes `caCert`, `tlsClientCert` and `tlsClientKey`. */
  constructor(work: WorkMeter, security: LinkSecurity | null = null) {
    this.#work = work;
    this.#security = security;
    const service: ExternalScalerServer = {
      isActive: unary((ref: ScaledObjectRef) => this.#isActive(ref)),
      streamIsActive: streaming(this.#closing.signal, (ref: ScaledObjectRef, _header, signal) =>
        this.#stream(ref, signal),
      ),
      getMetricSpec: unary((ref: ScaledObjectRef) => {
        const { targetSeconds } = targetOf(ref);
        const targetSize = Math.max(1, Math.round(targetSeconds));
        return Promise.resolve({
          metricSpecs: [{ metricName: METRIC_NAME, targetSize, targetSizeFloat: targetSeconds }],
        });
      }),
      getMetrics: unary(async ({ scaledObjectRef, metricName }) => {
        if (metricName !== '' && metricName !== METRIC_NAME) {
          throw new CaravanError(
            'not_found',
            `metricName: must be ${METRIC_NAME}, got ${metricName}`,
          );
        }
        const { target, work } = await this.#measure(scaledObjectRef);
        const held = work.loading > 0 ? work.engines * target.targetSeconds : 0;
        const seconds = Math.max(work.seconds, held);
        const value = { metricValue: Math.ceil(seconds), metricValueFloat: seconds };
        return { metricValues: [{ metricName: METRIC_NAME, ...value }] };
      }),
    };
    this.#server.addService(ExternalScalerService, service);
  }

  /** @returns the port. @throws CaravanError `bad_usage` when it is taken. */
  listen(host: string, port: number): Promise<number> {
    return listenRpc(this.#server, host, port, '--scaler-port', this.#security);
  }

  /** Ends open streams too: KEDA calls again, at another gateway. */
  close(): void {
    this.#closing.abort();
    this.#server.forceShutdown();
  }

  async #isActive(ref: ScaledObjectRef | undefined): Promise<{ result: boolean }> {
    const { work } = await this.#measure(ref);
    return { result: work.jobs > 0 || work.loading > 0 || !work.isKnown };
  }

  async #measure(ref: ScaledObjectRef | undefined): Promise<{ target: Target; work: Work }> {
    const target = targetOf(ref);
    const work = await this.#work.measure(target.model, target.tokensPerSecond);
    return { target, work };
  }

  async *#stream(ref: ScaledObjectRef, signal: AbortSignal): AsyncGenerator<{ result: boolean }> {
    let last: boolean | null = null;
    while (!signal.aborted) {
      const answer = await this.#isActive(ref);
      if (answer.result !== last) yield answer;
      last = answer.result;
      await delay(STREAM_POLL_MS, undefined, { signal }).catch(() => undefined);
    }
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
