/**
 * The group of ranks, with the interface of one: a step goes to all, the answers come back in rank order.
 * One long-lived stream per rank; activations never pass here.
 */
import { randomUUID } from 'node:crypto';
import type { ClientDuplexStream } from '@grpc/grpc-js';
import { CaravanError, isOutOfMemory, isErrorCode } from '../proto/errors.js';
import {
  RankClient,
  type Command,
  type DeviceKind,
  type Loaded,
  type LoadProgress,
  type Report,
  type Step,
  type StepResult,
} from '../proto/gen/cluster.js';
import {
  channelCredentials,
  channelSecurityOptions,
  explainUnreached,
  type LinkSecurity,
} from '../proto/link-security.js';
import { keepaliveOptions } from '../proto/keepalive.js';
import { PROTOCOL } from '../proto/protocol.js';
import type { GroupSpec } from './group-spec.js';
import { notesOf } from './rank-notes.js';
import { watched } from './watched-answer.js';

export interface ConnectOptions {
  /** Most time until every rank has taken the call, in milliseconds. */
  readonly connectTimeoutMs?: number;
  /** A rank has taken the call. */
  readonly onReached?: (rank: number) => void;
  readonly onProgress?: (rank: number, progress: LoadProgress) => void;
  readonly signal?: AbortSignal;
  /** Plain links if left out. */
  readonly security?: LinkSecurity | null;
}

const CONNECT_TIMEOUT_MS = 10_000;
/** A rank that reads its weights reports now and then; one that says nothing for this long is gone. */
const LOAD_SILENCE_MS = 120_000;
/** Added to the ranks' own step timeout, so that their message, which names the peer, comes first. */
const ANSWER_GRACE_MS = 2_000;

const channelOptions = (device: DeviceKind) => ({
  'grpc.max_receive_message_length': -1,
  'grpc.max_send_message_length': -1,
  'grpc.use_local_subchannel_pool': 1,
  ...keepaliveOptions(device),
});

export class Ranks {
  readonly #links: readonly RankLink[];
  readonly #answerTimeoutMs: number;
  readonly #warnings: readonly string[];
  /** What every rank said after loading, in rank order. */
  readonly loaded: readonly Loaded[];
  readonly vocabCounts: readonly number[];

  private constructor(
    links: readonly RankLink[],
    loaded: readonly Loaded[],
    timeoutMs: number,
    warnings: readonly string[],
  ) {
    this.#warnings = warnings;
    this.#links = links;
    this.loaded = loaded;
    this.vocabCounts = loaded.map((rank) => rank.vocabCount);
    this.#answerTimeoutMs = timeoutMs + ANSWER_GRACE_MS;
  }

  /**
   * Connects to every rank and has them load their shards and meet each other.
   *
   * @param addresses HOST:PORT of every rank, in rank order. @param warnings of what was refused before.
   * @throws CaravanError `rank_unavailable` naming the rank, or whatever a rank refused with.
   */
  static async connect(
    addresses: readonly string[],
    spec: GroupSpec,
    options: ConnectOptions = {},
    warnings: readonly string[] = [],
  ): Promise<Ranks> {
    try {
      return await Ranks.#connect(addresses, spec, options, warnings);
    } catch (error) {
      if (!isOutOfMemory(error) || spec.smaller === null) throw error;
      const all = [...warnings, `fewer bits: ${error.message}`];
      return Ranks.connect(addresses, spec.smaller, options, all);
    }
  }

  static async #connect(
    addresses: readonly string[],
    spec: GroupSpec,
    options: ConnectOptions,
    warnings: readonly string[],
  ): Promise<Ranks> {
    const links = addresses.map(
      (address, rank) => new RankLink(rank, address, spec.device, options.security ?? null),
    );
    const close = (): void => {
      for (const link of links) link.close();
    };
    options.signal?.addEventListener('abort', close, { once: true });
    try {
      const timeoutMs = options.connectTimeoutMs ?? CONNECT_TIMEOUT_MS;
      await Promise.all(
        links.map(async (link, rank) => {
          await link.open(timeoutMs);
          options.onReached?.(rank);
        }),
      );
      const group = randomUUID();
      const loaded = await Promise.all(
        links.map((link, rank) =>
          link.load(
            { ...spec, protocol: PROTOCOL, rank, peers: [...addresses], group },
            (progress) => options.onProgress?.(rank, progress),
          ),
        ),
      );
      return new Ranks(links, loaded, spec.stepTimeoutMs, warnings);
    } catch (error) {
      close();
      throw options.signal?.aborted === true
        ? new CaravanError('cancelled', 'connecting was cancelled', { cause: error })
        : error;
    } finally {
      options.signal?.removeEventListener('abort', close);
    }
  }

  /** Why weights have fewer bits, or were not kept for the next start: a line for each reason, not for each rank. */
  get warnings(): string[] {
    const faults = this.loaded.map(({ cacheFault }) => cacheFault).filter((fault) => fault !== '');
    return [...this.#warnings, ...new Set(faults)];
  }

  /** How partials go between ranks; empty for a lone one. */
  get transport(): string {
    return [...new Set(this.loaded.map(({ transport }) => transport))].join(', ');
  }

  /** What could be quicker, and why it is not. */
  get notes(): string[] {
    return notesOf(this.loaded);
  }

  /** Resolves, with the reason, when any rank is lost. */
  get lost(): Promise<CaravanError> {
    return Promise.race(this.#links.map((link) => link.lost));
  }

  /**
   * One forward pass on all ranks.
   *
   * @throws CaravanError `rank_failed` or `timeout`; the group must be closed then.
   */
  async forward(step: Step): Promise<StepResult[]> {
    const kind = { $case: 'step', step } as const;
    const asking = this.#askAll(() => kind);
    const answers = await watched(asking, this.loaded);
    return answers.map((answer) => {
      if (answer.$case !== 'stepResult' || answer.stepResult.number !== step.number) {
        throw new CaravanError(
          'internal',
          `a rank answered ${answer.$case} to step ${step.number}`,
        );
      }
      return answer.stepResult;
    });
  }

  /** All logits, (vocabulary), of a sampled row of the last step: as the model gave them, or as adjusted. */
  async fetchRow(
    stepNumber: number,
    row: number,
    kind: 'raw' | 'adjusted' = 'raw',
  ): Promise<Float32Array> {
    const fetchRow = { stepNumber, row, isAdjusted: kind === 'adjusted' };
    const answers = await this.#askAll(() => ({ $case: 'fetchRow', fetchRow }));
    const logits = new Float32Array(this.vocabCounts.reduce((sum, count) => sum + count, 0));
    let at = 0;
    answers.forEach((answer, rank) => {
      if (answer.$case !== 'row' || answer.row.logits.length !== 4 * this.vocabCounts[rank]!) {
        throw new CaravanError('internal', `rank ${rank} answered ${answer.$case} to fetchRow`);
      }
      new Uint8Array(logits.buffer, at).set(answer.row.logits);
      at += answer.row.logits.length;
    });
    return logits;
  }

  /** Round trip to every rank, in milliseconds; ranks answer also while they compute. */
  async ping(): Promise<number[]> {
    return Promise.all(this.#links.map((link) => link.ping(this.#answerTimeoutMs)));
  }

  /** Lets the ranks go; they keep their weights for a while. */
  close(): void {
    for (const link of this.#links) link.close();
  }

  /** Asks every rank; a failure that names its cause wins over one that only says that a peer left. */
  async #askAll(
    kindOf: (rank: number) => NonNullable<Command['kind']>,
  ): Promise<NonNullable<Report['kind']>[]> {
    const settled = await Promise.allSettled(
      this.#links.map((link, rank) => link.ask(kindOf(rank), this.#answerTimeoutMs)),
    );
    const errors = settled.flatMap((answer) =>
      answer.status === 'rejected' ? [answer.reason as CaravanError] : [],
    );
    if (errors.length > 0) throw errors.find((e) => e.code !== 'rank_failed') ?? errors[0]!;
    return settled.map(
      (answer) => (answer as PromiseFulfilledResult<NonNullable<Report['kind']>>).value,
    );
  }
}

interface Waiter {
  resolve(kind: NonNullable<Report['kind']>): void;
  reject(error: CaravanError): void;
}

/** The stream to one rank. Answers come in the order of the questions; pongs by their token. */
class RankLink {
  readonly #rank: number;
  readonly #address: string;
  readonly #security: LinkSecurity | null;
  readonly #client: RankClient;
  /** Null until the rank is reached. */
  #call: ClientDuplexStream<Command, Report> | null = null;
  readonly #waiters: Waiter[] = [];
  readonly #pongs = new Map<number, () => void>();
  #onProgress: (progress: LoadProgress) => void = () => undefined;
  #pingToken = 0;
  #error: CaravanError | null = null;
  #markLost: (error: CaravanError) => void = () => undefined;
  readonly lost: Promise<CaravanError>;

  constructor(rank: number, address: string, device: DeviceKind, security: LinkSecurity | null) {
    this.#rank = rank;
    this.#address = address;
    this.lost = new Promise((resolve) => (this.#markLost = resolve));
    this.#security = security;
    this.#client = new RankClient(address, channelCredentials(security), {
      ...channelOptions(device),
      ...channelSecurityOptions(security),
    });
  }

  /** Waits until the rank is reached, however often that must be tried, and opens the stream. */
  async open(timeoutMs: number): Promise<void> {
    await new Promise<void>((resolve, reject) => {
      void this.lost.then(reject);
      this.#client.waitForReady(Date.now() + timeoutMs, (error) => {
        if (error === undefined) {
          resolve();
          return;
        }
        void explainUnreached(this.#address, this.#security).then((reason) => {
          const why = reason === null ? '' : `: ${reason}`;
          reject(this.#describe('rank_unavailable', `not reached within ${timeoutMs} ms${why}`));
        });
      });
    });
    const call = this.#client.drive();
    this.#call = call;
    call.on('data', ({ kind }: Report) => {
      if (kind !== undefined) this.#receive(kind);
    });
    call.on('error', (error: Error) => {
      this.#fail('rank_failed', `the stream broke: ${error.message}`);
    });
    call.on('end', () => {
      this.#fail('rank_failed', 'the rank ended the stream');
    });
  }

  async load(
    load: Extract<NonNullable<Command['kind']>, { $case: 'load' }>['load'],
    onProgress: (progress: LoadProgress) => void,
  ): Promise<Loaded> {
    const answer = await new Promise<NonNullable<Report['kind']>>((resolve, reject) => {
      let timer: NodeJS.Timeout;
      const watch = (): void => {
        timer = setTimeout(() => {
          this.#fail('timeout', `silent for ${LOAD_SILENCE_MS} ms while loading`);
        }, LOAD_SILENCE_MS);
      };
      watch();
      this.#onProgress = (progress) => {
        clearTimeout(timer);
        watch();
        onProgress(progress);
      };
      this.#send(
        { $case: 'load', load },
        {
          resolve: (kind) => {
            clearTimeout(timer);
            resolve(kind);
          },
          reject: (error) => {
            clearTimeout(timer);
            reject(error);
          },
        },
      );
    });
    if (answer.$case !== 'loaded') throw this.#describe('internal', `answered ${answer.$case}`);
    return answer.loaded;
  }

  async ask(
    kind: NonNullable<Command['kind']>,
    timeoutMs: number,
  ): Promise<NonNullable<Report['kind']>> {
    let timer: NodeJS.Timeout | undefined;
    try {
      return await new Promise((resolve, reject) => {
        timer = setTimeout(() => {
          this.#fail('timeout', `no answer to ${kind.$case} within ${timeoutMs} ms`);
        }, timeoutMs);
        this.#send(kind, { resolve, reject });
      });
    } finally {
      clearTimeout(timer);
    }
  }

  async ping(timeoutMs: number): Promise<number> {
    const startMs = performance.now();
    const token = (this.#pingToken += 1);
    if (this.#error !== null) throw this.#error;
    await new Promise<void>((resolve, reject) => {
      const timer = setTimeout(() => {
        this.#pongs.delete(token);
        reject(this.#describe('timeout', `no pong within ${timeoutMs} ms`));
      }, timeoutMs);
      this.#pongs.set(token, () => {
        clearTimeout(timer);
        resolve();
      });
      this.#call?.write({ kind: { $case: 'ping', ping: { token } } });
    });
    return performance.now() - startMs;
  }

  close(): void {
    this.#fail('cancelled', 'closed');
  }

  #send(kind: NonNullable<Command['kind']>, waiter: Waiter): void {
    if (this.#error !== null) {
      waiter.reject(this.#error);
      return;
    }
    this.#waiters.push(waiter);
    this.#call?.write({ kind });
  }

  #receive(kind: NonNullable<Report['kind']>): void {
    switch (kind.$case) {
      case 'loadProgress':
        this.#onProgress(kind.loadProgress);
        return;
      case 'pong':
        this.#pongs.get(kind.pong.token)?.();
        this.#pongs.delete(kind.pong.token);
        return;
      case 'failure': {
        const { code, message } = kind.failure;
        this.#fail(isErrorCode(code) ? code : 'internal', message);
        return;
      }
      default:
        this.#waiters.shift()?.resolve(kind);
    }
  }

  #describe(code: CaravanError['code'], message: string): CaravanError {
    return new CaravanError(code, `rank ${this.#rank} at ${this.#address}: ${message}`);
  }

  /** The first reason stands; everything that waits hears of it. */
  #fail(code: CaravanError['code'], message: string): void {
    if (this.#error !== null) return;
    this.#error = this.#describe(code, message);
    for (const waiter of this.#waiters.splice(0)) waiter.reject(this.#error);
    this.#call?.cancel();
    this.#client.close();
    this.#markLost(this.#error);
  }
}
