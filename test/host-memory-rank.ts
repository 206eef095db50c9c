/**
 * A rank that computes the graphs of a GPU in host memory, through the same bindings, and reads its peers' partials where
 * they lie: in memory that this host's processes share, as GPUs' do through CUDA's handles.
 *
 *   fork(host-memory-rank.js, [KIND, FAULT]) sends { address } when it listens, and { shown } at every message: how many
 *   partials its stream has shown
 *
 * FAULT: `none`; `shares-none`, `opens-none`; `reads-zeros`, for memory that can be opened and is not read right;
 * `no-signals`, for streams that cannot wait for numbers; `stalls`, for one that soon lets the host go on while it waits.
 */
import fs from 'node:fs';
import koffi from 'koffi';
import type { DeviceKind } from '../model/device-name.js';
import { BoundDevice } from '../worker/bound-device.js';
import type { Capturer } from '../worker/device-launch.js';
import type {
  DirectBlock,
  DirectMemory,
  MappedMemory,
  StreamSignals,
} from '../worker/direct-memory.js';
import { Ort } from '../worker/ort.js';
import { RankServer } from '../worker/service.js';

export type DirectFault =
  'none' | 'shares-none' | 'opens-none' | 'reads-zeros' | 'no-signals' | 'stalls';

const libc = koffi.load('libc.so.6');
const mmap = libc.func('void* mmap(void*, size_t, int, int, int, long)') as (
  ...args: unknown[]
) => bigint;
const munmap = libc.func('int munmap(void*, size_t)') as (...args: unknown[]) => number;
const READ_WRITE = 3;
const SHARED = 1;

/** Blocks are files in /dev/shm that lose their names once all peers have had time to open them: at the end. */
class HostDirectMemory implements DirectMemory {
  readonly #fault: DirectFault;
  #made = 0;

  constructor(fault: DirectFault) {
    this.#fault = fault;
  }

  share(byteCount: number): DirectBlock {
    if (this.#fault === 'shares-none') throw new Error('it shares none');
    this.#made += 1;
    const file = `/dev/shm/direct-${process.pid}-${this.#made}`;
    fs.writeFileSync(file, new Uint8Array(byteCount));
    const block = this.#map(file, byteCount);
    return {
      ...block,
      close: () => {
        fs.rmSync(file, { force: true });
        block.close();
      },
    };
  }

  open(handle: string, byteCount: number): DirectBlock {
    if (this.#fault === 'opens-none') throw new Error('peer access is not supported');
    return this.#map(handle, byteCount);
  }

  write(address: bigint, bytes: Uint8Array): void {
    new Uint8Array(koffi.view(address, bytes.length)).set(bytes);
  }

  read(address: bigint, byteCount: number): Uint8Array {
    if (this.#fault === 'reads-zeros') return new Uint8Array(byteCount);
    return new Uint8Array(koffi.view(address, byteCount)).slice();
  }

  #map(file: string, byteCount: number): DirectBlock {
    const descriptor = fs.openSync(file, 'r+');
    const address = mmap(null, byteCount, READ_WRITE, SHARED, descriptor, 0);
    fs.closeSync(descriptor);
    return { address, handle: file, close: () => void munmap(address, byteCount) };
  }
}

/**
 * A stream that does at once what it is told. A wait keeps the host, too, but for so long: then it is as with a GPU's stream,
 * which is not idle.
 */
class HostSignals implements StreamSignals {
  shown = 0;
  readonly #waits: (() => boolean)[] = [];
  readonly #patienceMs: number;
  readonly #nothing = new Int32Array(new SharedArrayBuffer(4));

  constructor(patienceMs: number) {
    this.#patienceMs = patienceMs;
  }

  map(address: bigint): MappedMemory {
    return { address, release: () => undefined };
  }

  show(address: bigint, value: number): void {
    this.shown += 1;
    Atomics.store(new Int32Array(koffi.view(address, 4)), 0, value);
  }

  await(address: bigint, value: number): void {
    const number = new Int32Array(koffi.view(address, 4));
    const isThere = (): boolean => ((Atomics.load(number, 0) - value) | 0) >= 0;
    // What stands still already is not waited for again.
    const lastMs = performance.now() + (this.isIdle() ? this.#patienceMs : 0);
    // Others want the core.
    while (!isThere() && performance.now() < lastMs) Atomics.wait(this.#nothing, 0, 0, 0.1);
    this.#waits.push(isThere);
  }

  isIdle(): boolean {
    while (this.#waits[0]?.() === true) this.#waits.shift();
    return this.#waits.length === 0;
  }
}

/** What was issued is issued again: the same numbers in the same places. */
const capturer: Capturer = {
  capture: (issue) => {
    issue();
    return { launch: issue, release: () => undefined };
  },
};

const [kind, fault] = process.argv.slice(2) as [DeviceKind, DirectFault];
const signals = new HostSignals(fault === 'stalls' ? 300 : 30_000);
const silent = { info: () => undefined, warn: () => undefined };
const device = new BoundDevice(
  new Ort(1),
  { kind: 'cpu' },
  {
    ...{ kind, attentionRows: 64, directMemory: new HostDirectMemory(fault), capturer },
    signals: fault === 'no-signals' ? null : signals,
  },
);
const server = new RankServer(device, silent);
const port = await server.listen('127.0.0.1:0');
process.on('message', () => process.send?.({ shown: signals.shown }));
process.on('disconnect', () => process.exit(0));
process.send?.({ address: `127.0.0.1:${port}` });
