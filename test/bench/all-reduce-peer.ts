/**
 * One of two processes that exchange partials as ranks do, with work in between; forked by step-overhead. It is told
 * the addresses of both over IPC, and answers with what every exchange took.
 */
import { Server, ServerCredentials } from '@grpc/grpc-js';
import { DeviceKind, Transport } from '../../proto/gen/cluster.js';
import { GroupAllReduce, type Turn } from '../../worker/all-reduce.js';
import { Lobby, type PeerCall } from '../../worker/lobby.js';
import { Pacer } from '../../worker/pacer.js';
import { partialsMethod } from '../../worker/partial-codec.js';
import { meetPeers, peerChannelOptions } from '../../worker/peers.js';

/** What the parent asks for: `rounds` exchanges of each size, with this much work before each. */
export interface PeerTask {
  readonly rank: number;
  readonly addresses: readonly string[];
  readonly byteCounts: readonly number[];
  readonly rounds: number;
  readonly workMs: number;
  readonly group: string;
  readonly transport: 'shm' | 'grpc';
}

/** By size: (rounds) milliseconds from handing over our partial until the peer's is whole. */
export interface PeerResult {
  readonly waitsMs: readonly (readonly number[])[];
}

const WARM_UP_ROUNDS = 50;
const TIMEOUT_MS = 30_000;

const lobby = new Lobby();
const server = new Server(peerChannelOptions(DeviceKind.DEVICE_KIND_UNSPECIFIED));
server.addService(
  { partials: partialsMethod },
  {
    partials: (call: PeerCall) => {
      lobby.enter(call);
    },
  },
);

/** As a segment does: the event loop hears nothing meanwhile. */
function compute(workMs: number): void {
  const endMs = performance.now() + workMs;
  let x = 1;
  while (performance.now() < endMs) for (let i = 0; i < 500; i += 1) x = Math.sqrt(x + i);
  if (x < 0) throw new Error('never');
}

async function measure(task: PeerTask): Promise<PeerResult> {
  const { rank, addresses, byteCounts, rounds, workMs, group } = task;
  const { signal } = new AbortController();
  const capacity = Math.max(...byteCounts) / 4;
  const transport = task.transport === 'shm' ? Transport.TRANSPORT_SHM : Transport.TRANSPORT_GRPC;
  const device = DeviceKind.DEVICE_KIND_UNSPECIFIED;
  const load = { peers: [...addresses], group, rank, transport, device };
  const peers = await meetPeers(load, capacity, lobby, signal);
  const allReduce = new GroupAllReduce(rank, peers, capacity, TIMEOUT_MS, new Pacer());
  let turn: Turn = 0;
  const waitsMs: number[][] = [];
  for (const byteCount of byteCounts) {
    const waits: number[] = [];
    for (let round = -WARM_UP_ROUNDS; round < rounds; round += 1) {
      compute(workMs);
      const startMs = performance.now();
      await allReduce.exchange(turn, byteCount / 4);
      if (round >= 0) waits.push(performance.now() - startMs);
      turn = turn === 0 ? 1 : 0;
    }
    waitsMs.push(waits);
  }
  return { waitsMs };
}

process.on('message', (task: PeerTask) => {
  void measure(task).then((result) => {
    process.send!(result);
  });
});
process.on('disconnect', () => {
  process.exit(0);
});
server.bindAsync('127.0.0.1:0', ServerCredentials.createInsecure(), (error, port) => {
  if (error !== null) throw error;
  process.send!(`127.0.0.1:${port}`);
});
