/**
 * How the ranks of a group meet: each calls each other, says on which host it lives, and hears the same. Ranks of
 * one host show each other their partials in shared memory, or on their devices; the streams between them only tell when
 * one is gone.
 */
import { Client, type ClientReadableStream } from '@grpc/grpc-js';
import { CaravanError } from '../proto/errors.js';
import {
  channelCredentials,
  channelSecurityOptions,
  type LinkSecurity,
} from '../proto/link-security.js';
import { Transport, type DeviceKind, type Load, type RankPartial } from '../proto/gen/cluster.js';
import { keepaliveOptions } from '../proto/keepalive.js';
import type { Lobby, PeerCall } from './lobby.js';
import { decodePartial, partialsMethod } from './partial-codec.js';
import { DirectNegotiation, type DirectExchange, type DirectWord } from './direct-exchange.js';
import type { DirectMemory } from './direct-memory.js';
import { sharedMemoryHost, SharedSegment } from './shared-memory.js';

/** What joins us to a peer: a stream it sends on, one we send on, and its segment if we share a host. */
export interface PeerLink {
  readonly incoming: ClientReadableStream<RankPartial>;
  readonly outgoing: PeerCall;
  readonly segment: SharedSegment | null;
}

export interface Peers {
  /** By rank; null at our own place. */
  readonly links: readonly (PeerLink | null)[];
  /** Ours, if any peer shares our host. */
  readonly segment: SharedSegment | null;
  /** Whether partials stay on the devices. */
  readonly direct: DirectExchange;
}

/** How partials go, in words, and why not on the devices. */
export function describePeers({ links, direct }: Peers) {
  const others = links.flatMap((link) => (link === null ? [] : [link]));
  const isNear = others.some(({ segment }) => segment !== null);
  const isFar = others.some(({ segment }) => segment === null);
  const ways = [isNear ? 'shm' : [], isFar ? 'grpc' : []].flat();
  return {
    transport: direct.partials === null ? ways.join(' and ') : 'direct',
    directFault: direct.fault,
  };
}

/** Options of every stream between ranks: large messages, large windows, dead peers noticed. */
export const peerChannelOptions = (device: DeviceKind) => ({
  'grpc.max_receive_message_length': -1,
  'grpc.max_send_message_length': -1,
  // Honoured by the calling side only, which is why the receiver of partials is the caller.
  'grpc-node.flow_control_window': 64 * 1024 * 1024,
  ...keepaliveOptions(device),
});

/** How often an address is tried again until the signal aborts. */
const RETRY_MS = 100;

/**
 * Calls every peer and waits for the calls of all.
 *
 * @param capacity elements of the largest partial.
 * @param memory of our device that peers could read; null where it has none.
 * @throws CaravanError `rank_unavailable`, `invalid_request` when shared or direct memory is demanded and cannot be had, or
 *   the signal's reason.
 */
export async function meetPeers(
  load: Pick<Load, 'peers' | 'group' | 'rank' | 'transport' | 'device'>,
  capacity: number,
  lobby: Lobby,
  signal: AbortSignal,
  security: LinkSecurity | null = null,
  memory: DirectMemory | null = null,
): Promise<Peers> {
  const { peers, group, rank, transport } = load;
  if (peers.length === 1) {
    return { links: [null], segment: null, direct: { partials: null, fault: '' } };
  }
  const segment = openOwnSegment(load, capacity);
  const host = segment === null ? '' : sharedMemoryHost()!;
  const mapped: SharedSegment[] = [];
  const negotiation = new DirectNegotiation(load, capacity, memory, segment !== null);
  const words = peers.map((): DirectWord => negotiation.word);
  try {
    const links = await Promise.all(
      peers.map(async (address, peer): Promise<PeerLink | null> => {
        if (peer === rank) return null;
        const own = { host, segment: segment?.name ?? '', direct: negotiation.word };
        const [called, outgoing] = await Promise.all([
          callPeer(address, { group, rank, host }, load.device, signal, security),
          lobby.meet({ group, rank: peer }, own, signal),
        ]);
        const { incoming, itsHost, itsSegment } = called;
        words[peer] = called.itsDirect;
        negotiation.hear(peer, called.itsDirect);
        if (host === '' || itsHost !== host) {
          if (transport === Transport.TRANSPORT_SHM) {
            throw new CaravanError(
              'invalid_request',
              `--transport shm: rank ${peer} at ${address} shares no memory with rank ${rank}`,
            );
          }
          return { incoming, outgoing, segment: null };
        }
        const shared = SharedSegment.open(itsSegment, capacity);
        mapped.push(shared);
        return { incoming, outgoing, segment: shared };
      }),
    );
    const offers = links.map((link, peer) =>
      link === null ? null : { segment: link.segment, ...words[peer]! },
    );
    const direct = await negotiation.agree(offers, segment, signal);
    if (mapped.length > 0) return { links, segment, direct };
    segment?.close();
    return { links, segment: null, direct };
  } catch (error) {
    negotiation.close();
    for (const shared of mapped) shared.close();
    segment?.close();
    throw error;
  }
}

function openOwnSegment(
  { peers, group, rank, transport }: Pick<Load, 'peers' | 'group' | 'rank' | 'transport'>,
  capacity: number,
): SharedSegment | null {
  if (peers.length === 1 || transport === Transport.TRANSPORT_GRPC) return null;
  const isDemanded = transport === Transport.TRANSPORT_SHM;
  if (sharedMemoryHost() === null) {
    if (!isDemanded) return null;
    throw new CaravanError(
      'invalid_request',
      '--transport shm: this machine has no /dev/shm that ranks can share',
    );
  }
  try {
    return SharedSegment.create(group, rank, capacity);
  } catch (error) {
    // Containers often have 64 MB of it: gRPC needs none.
    if (isDemanded) throw error;
    return null;
  }
}

interface Called {
  readonly incoming: ClientReadableStream<RankPartial>;
  readonly itsHost: string;
  readonly itsSegment: string;
  readonly itsDirect: DirectWord;
}

type Caller = Parameters<(typeof partialsMethod)['requestSerialize']>[0];

/**
 * Calls a peer for its partials, and waits until it has taken us into the group.
 *
 * @throws CaravanError `rank_unavailable` when the signal aborts before.
 */
async function callPeer(
  address: string,
  caller: Caller,
  device: DeviceKind,
  signal: AbortSignal,
  security: LinkSecurity | null,
): Promise<Called> {
  for (;;) {
    const outcome = await callOnce(address, caller, device, signal, security);
    if (!(outcome instanceof Error)) return outcome;
    if (signal.aborted) {
      throw new CaravanError(
        'rank_unavailable',
        `the peer at ${address} does not answer: ${outcome.message}`,
        { cause: outcome },
      );
    }
    await new Promise((resolve) => setTimeout(resolve, RETRY_MS));
  }
}

async function callOnce(
  address: string,
  caller: Caller,
  device: DeviceKind,
  signal: AbortSignal,
  security: LinkSecurity | null,
): Promise<Called | Error> {
  const client = new Client(address, channelCredentials(security), {
    ...peerChannelOptions(device),
    ...channelSecurityOptions(security),
    'grpc.use_local_subchannel_pool': 1,
  });
  const call = client.makeServerStreamRequest(
    partialsMethod.path,
    partialsMethod.requestSerialize,
    decodePartial,
    caller,
  );
  call.on('close', () => {
    client.close();
  });
  return new Promise((resolve) => {
    const cancel = (): void => {
      call.cancel();
    };
    signal.addEventListener('abort', cancel, { once: true });
    call.once('metadata', (metadata) => {
      signal.removeEventListener('abort', cancel);
      const said = (key: string): string => metadata.get(key)[0]?.toString() ?? '';
      resolve({
        incoming: call,
        itsHost: said('caravan-host'),
        itsSegment: said('caravan-segment'),
        itsDirect: { handle: said('caravan-direct'), fault: said('caravan-direct-fault') },
      });
    });
    call.on('error', (error: Error) => {
      signal.removeEventListener('abort', cancel);
      client.close();
      resolve(error);
    });
  });
}
