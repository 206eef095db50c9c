/**
 * The gRPC face of a rank.
 *
 *   idle ──Load──> loading ──> serving ──stream ends or a step fails──> idle
 *
 * One coordinator holds the rank at a time, by its Drive stream. When the stream ends, a step under way
 * is aborted, the group is left, and the weights stay for the next Load of the same shard.
 */
import { setMaxListeners } from 'node:events';
import { Server, type ServerDuplexStream } from '@grpc/grpc-js';
import { openCheckpoint } from '../model/checkpoint.js';
import { deviceCodes, type DeviceKind } from '../model/device-name.js';
import { planRanks } from '../model/plan.js';
import {
  modesOfDevice,
  weightForms,
  weightsCodes,
  weightsModes,
  type WeightsMode,
} from '../model/weights.js';
import { CaravanError, isOutOfMemory, toCaravanError } from '../proto/errors.js';
import {
  RankService,
  type Command,
  type Load,
  type LoadProgress,
  type Report,
} from '../proto/gen/cluster.js';
import { serverCredentials, type LinkSecurity } from '../proto/link-security.js';
import { PROTOCOL } from '../proto/protocol.js';
import type { Device, LoadedShard } from './device.js';
import { checkLoad, Group } from './group.js';
import type { Progress } from './health-port.js';
import { Lobby, type PeerCall } from './lobby.js';
import { gatherHugePages } from './huge-pages.js';
import { collectGarbage, holdLargeBlocks } from './ort-memory.js';
import { partialsMethod } from './partial-codec.js';
import { peerChannelOptions } from './peers.js';

/**
 * A GPU's rank watches for its next step: waking up takes longer than a kernel, and the GPU has nothing to do meanwhile. A CPU's
 * rank leaves its core to those that compute.
 */
const watchMsOf = (kind: DeviceKind): number => (kind === 'cpu' ? 0 : 2);

type DriveCall = ServerDuplexStream<Command, Report>;

/** Loading progress is reported at most this often. */
const PROGRESS_EVERY_MS = 200;
const MOST_REFUSALS = 16;

export interface RankLog {
  info(fields: object, message: string): void;
  warn(fields: object, message: string): void;
}

export class RankServer {
  readonly #device: Device;
  readonly #log: RankLog;
  readonly #security: LinkSecurity | null;
  readonly #server: Server;
  readonly #lobby = new Lobby();
  #kept: { readonly key: string; readonly shard: LoadedShard } | null = null;
  /** What the device had no room for, though nothing else was loaded. */
  readonly #refused = new Map<string, CaravanError>();
  /** Resolves when the coordinator that holds the rank has let it go; null while nobody does. */
  #held: Promise<void> | null = null;
  #isHolderAlive = false;
  #state: Progress['state'] = 'idle';
  /** When what is under way last moved; null while nothing is. */
  #movedMs: number | null = null;

  /** @param security of all its links; plain if left out. */
  constructor(device: Device, log: RankLog, security: LinkSecurity | null = null) {
    this.#device = device;
    this.#log = log;
    this.#security = security;
    this.#server = new Server(peerChannelOptions(deviceCodes[device.kind]));
    this.#server.addService(RankService, {
      drive: (call: DriveCall) => {
        void this.#drive(call);
      },
    });
    this.#server.addService(
      { partials: partialsMethod },
      {
        partials: (call: PeerCall) => {
          this.#lobby.enter(call);
        },
      },
    );
  }

  /** @returns the port. @throws CaravanError `bad_usage` when the address cannot be bound. */
  listen(address: string): Promise<number> {
    return new Promise((resolve, reject) => {
      this.#server.bindAsync(address, serverCredentials(this.#security), (error, port) => {
        if (error === null) resolve(port);
        else reject(new CaravanError('bad_usage', `--listen ${address}: ${error.message}`));
      });
    });
  }

  /** What the rank is doing, for its probe. */
  get progress(): Progress {
    const unmovedMs = this.#movedMs === null ? 0 : performance.now() - this.#movedMs;
    return { state: this.#state, unmovedMs };
  }

  get isHeld(): boolean {
    return this.#isHolderAlive;
  }

  /** Resolves when no coordinator holds the rank. */
  async released(): Promise<void> {
    while (this.#held !== null) await this.#held;
  }

  /** Ends every stream at once. */
  stop(): void {
    this.#server.forceShutdown();
  }

  async #drive(call: DriveCall): Promise<void> {
    const commands = new CommandQueue(call, watchMsOf(this.#device.kind));
    // The stream may break at any moment; the queue ends then, and there is nothing else to do.
    call.on('error', () => undefined);
    try {
      if (this.#isHolderAlive) {
        throw new CaravanError('rank_busy', 'another coordinator holds this rank');
      }
      this.#isHolderAlive = true;
      // The last holder is gone but its step may still be ending.
      while (this.#held !== null) await this.#held;
      const serving = this.#serve(call, commands);
      this.#held = serving.then(
        () => undefined,
        () => undefined,
      );
      try {
        await serving;
      } finally {
        this.#held = null;
        this.#isHolderAlive = false;
        this.#state = 'idle';
        this.#movedMs = null;
      }
      call.end();
    } catch (thrown) {
      const error = toCaravanError(thrown);
      if (!call.cancelled) {
        this.#log.warn({ code: error.code }, error.message);
        const { code, message } = error;
        call.write({ kind: { $case: 'failure', failure: { code, message } } });
      }
      call.end();
    }
  }

  async #serve(call: DriveCall, commands: CommandQueue): Promise<void> {
    const first = await commands.next();
    if (first === null) return;
    if (first.$case !== 'load') {
      throw new CaravanError('internal', `the first command is ${first.$case}, not load`);
    }
    this.#state = 'loading';
    this.#movedMs = performance.now();
    const group = await this.#load(call, first.load, commands.ended);
    this.#state = 'serving';
    this.#movedMs = null;
    const onEnd = (): void => {
      group.abort(new CaravanError('cancelled', 'the coordinator is gone'));
    };
    commands.ended.addEventListener('abort', onEnd, { once: true });
    try {
      for (;;) {
        const command = await commands.next();
        if (command === null) return;
        this.#movedMs = performance.now();
        const kind = await answer(command, group);
        this.#movedMs = null;
        call.write({ kind });
      }
    } catch (thrown) {
      if (commands.ended.aborted) return;
      throw thrown;
    } finally {
      commands.ended.removeEventListener('abort', onEnd);
      group.close();
    }
  }

  async #load(call: DriveCall, load: Load, signal: AbortSignal): Promise<Group> {
    if (load.protocol !== PROTOCOL) {
      throw new CaravanError(
        'protocol_mismatch',
        `the coordinator speaks protocol ${load.protocol}, this rank ${PROTOCOL}`,
      );
    }
    const shard = await this.#shardFor(call, load, signal);
    // Peers that load more slowly are no fault of ours.
    this.#movedMs = null;
    const group = await Group.join(shard.shard, load, this.#lobby, signal, this.#security);
    const { vocab } = shard.shard.plan;
    const loaded = {
      weightBytes: shard.shard.weightBytes,
      ...group.figures,
      captureFault: shard.shard.captureFault(),
      bytesRead: shard.bytesRead,
      vocabStart: vocab.start,
      vocabCount: vocab.count,
      copiesSlots: group.forward.copiesSlots,
      cachedBytes: shard.shard.cachedBytes,
      cacheFault: shard.cacheFault,
      device: this.#device.name,
    };
    call.write({ kind: { $case: 'loaded', loaded } });
    this.#log.info({ rank: load.rank, tp: load.peers.length, ...loaded }, 'loaded');
    return group;
  }

  /** The shard of the last Load when it is the same, else a new one; the old one goes first. */
  async #shardFor(
    call: DriveCall,
    load: Load,
    signal: AbortSignal,
  ): Promise<{ shard: LoadedShard; bytesRead: number; cacheFault: string }> {
    const checkpoint = openCheckpoint(load.modelPath);
    checkLoad(load, checkpoint);
    const tp = load.peers.length;
    const mode = weightsModes.find((name) => weightsCodes[name] === load.weights);
    if (mode === undefined) {
      throw new CaravanError('invalid_request', `weights mode ${load.weights} is not known`);
    }
    checkDevice(load, this.#device, mode);
    const { digest, localStamp } = checkpoint;
    const key = [digest, localStamp, mode, load.isExact, load.rank, tp].join('\n');
    if (this.#kept?.key === key) {
      return { shard: this.#kept.shard, bytesRead: 0, cacheFault: '' };
    }
    // Whoever asks for the most bits first, as `auto` does each time, is not to cost us those that fitted.
    const asked = [key, load.maxSeqLen, load.maxBatchSize, load.maxStepRows].join('\n');
    const refusal = this.#refused.get(asked);
    if (refusal !== undefined && this.#kept !== null) throw refusal;
    this.#kept?.shard.release();
    this.#kept = null;
    const forms = weightForms(checkpoint.config, tp, mode, load.isExact, this.#device.kind);
    const plan = planRanks(checkpoint.config, tp, forms.ffnGrid)[load.rank]!;
    let reportedMs = 0;
    let latest: LoadProgress | null = null;
    const report = (loadProgress: LoadProgress): void => {
      latest = loadProgress;
      const nowMs = performance.now();
      this.#movedMs = nowMs;
      const isEnd = loadProgress.bytesRead >= loadProgress.bytesTotal;
      if (nowMs - reportedMs < PROGRESS_EVERY_MS && !isEnd) return;
      reportedMs = nowMs;
      call.write({ kind: { $case: 'loadProgress', loadProgress } });
    };
    holdLargeBlocks('loading');
    const origin = { checkpoint, plan, mode, forms };
    const shard = await this.#device.load(origin, load, report, signal).catch((error: unknown) => {
      if (isOutOfMemory(error) && this.#refused.size < MOST_REFUSALS)
        this.#refused.set(asked, error);
      throw error;
    });
    this.#kept = { key, shard };
    collectGarbage();
    holdLargeBlocks('running');
    if (this.#device.kind === 'cpu') {
      const startMs = performance.now();
      const hugeBytes = await gatherHugePages(signal, () => {
        if (latest !== null) report(latest);
      });
      const ms = Math.round(performance.now() - startMs);
      this.#log.info({ hugeBytes, ms }, 'weights in huge pages');
    }
    return { shard, bytesRead: shard.bytesRead, cacheFault: shard.cacheFault };
  }
}

/** Ranks on other devices than the plan's would cut the model elsewhere. */
function checkDevice({ device, rank }: Load, { kind, name }: Device, mode: WeightsMode): void {
  if (device !== deviceCodes[kind]) {
    const planned = Object.entries(deviceCodes).find(([, code]) => code === device)?.[0] ?? device;
    throw new CaravanError(
      'invalid_request',
      `the coordinator plans for --device ${planned}, rank ${rank} is on ${name}: give both the same`,
    );
  }
  if (!modesOfDevice[kind].includes(mode)) {
    const modes = modesOfDevice[kind].join(', ');
    throw new CaravanError('invalid_request', `--weights ${mode}: ${name} takes ${modes}`);
  }
}

async function answer(
  command: NonNullable<Command['kind']>,
  group: Group,
): Promise<NonNullable<Report['kind']>> {
  switch (command.$case) {
    case 'step':
      return { $case: 'stepResult', stepResult: await group.forward.run(command.step) };
    case 'fetchRow': {
      const { stepNumber, row } = command.fetchRow;
      const slice = group.forward.row(command.fetchRow);
      const logits = Buffer.from(slice.buffer, slice.byteOffset, slice.byteLength);
      return { $case: 'row', row: { stepNumber, row, logits } };
    }
    case 'ping':
    case 'load':
      throw new CaravanError('internal', `a ${command.$case} in the wrong place`);
  }
}

/** Commands in order, except pings, which are answered at once. */
class CommandQueue {
  readonly #waiting: NonNullable<Command['kind']>[] = [];
  readonly #ended = new AbortController();
  readonly #watchMs: number;
  #wake: (() => void) | null = null;

  /** @param watchMs how long the next command is watched for before the process sleeps until it comes. */
  constructor(call: DriveCall, watchMs: number) {
    this.#watchMs = watchMs;
    // Every peer of a large group listens to it.
    setMaxListeners(0, this.#ended.signal);
    call.on('data', ({ kind }: Command) => {
      if (kind === undefined) return;
      if (kind.$case === 'ping') {
        call.write({ kind: { $case: 'pong', pong: kind.ping } });
        return;
      }
      this.#waiting.push(kind);
      this.#wake?.();
    });
    const end = (): void => {
      this.#ended.abort(new CaravanError('cancelled', 'the coordinator is gone'));
      this.#wake?.();
    };
    call.on('end', end);
    call.on('cancelled', end);
    call.on('error', end);
  }

  /** Aborts when the coordinator is gone. */
  get ended(): AbortSignal {
    return this.#ended.signal;
  }

  /** The next command, or null when there will be none. */
  async next(): Promise<NonNullable<Command['kind']> | null> {
    const watchedUntilMs = performance.now() + this.#watchMs;
    while (this.#waiting.length === 0) {
      if (this.#ended.signal.aborted) return null;
      await new Promise<void>((resolve) => {
        this.#wake = resolve;
        // Not asleep, but for another turn of the event loop.
        if (performance.now() < watchedUntilMs) setImmediate(resolve);
      });
      this.#wake = null;
    }
    return this.#ended.signal.aborted ? null : this.#waiting.shift()!;
  }
}
