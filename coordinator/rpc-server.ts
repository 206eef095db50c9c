/** What all gRPC services of a gateway have in common: where they listen, and failures as statuses of the one table. */
import {
  Metadata,
  Server,
  type sendUnaryData,
  type ServerUnaryCall,
  type ServerWritableStream,
} from '@grpc/grpc-js';
import { CaravanError, errorTable, toCaravanError } from '../proto/errors.js';
import { serverCredentials, type LinkSecurity } from '../proto/link-security.js';

/** As large as a body over HTTP. */
const MAX_MESSAGE_BYTES = 16 * 1024 * 1024;

const CLOSE_TIMEOUT_MS = 1_000;

export const newRpcServer = (): Server =>
  new Server({ 'grpc.max_receive_message_length': MAX_MESSAGE_BYTES });

/**
 * @param flag names the setting in errors.
 * @param security of its links; plain if left out.
 * @returns the port. @throws CaravanError `bad_usage` when it is taken.
 */
export function listenRpc(
  server: Server,
  host: string,
  port: number,
  flag: string,
  security: LinkSecurity | null = null,
): Promise<number> {
  const address = `${host.includes(':') ? `[${host}]` : host}:${port}`;
  return new Promise((resolve, reject) => {
    server.bindAsync(address, serverCredentials(security), (error, bound) => {
      if (error === null) resolve(bound);
      else reject(new CaravanError('bad_usage', `${flag} ${port}: ${error.message}`));
    });
  });
}

/** Lets calls that end just now send their status. */
export function closeRpc(server: Server): Promise<void> {
  return new Promise((resolve) => {
    const timer = setTimeout(() => {
      server.forceShutdown();
      resolve();
    }, CLOSE_TIMEOUT_MS);
    server.tryShutdown(() => {
      clearTimeout(timer);
      resolve();
    });
  });
}

/** The status of a failure; its code, the field at fault and when to try again are in the trailing metadata. */
export function toStatus(thrown: unknown): {
  readonly code: number;
  readonly details: string;
  readonly metadata: Metadata;
} {
  const error = toCaravanError(thrown);
  const metadata = new Metadata();
  metadata.set('caravan-code', error.code);
  if (error.param !== null) metadata.set('caravan-param', error.param);
  if (error.retryAfterS !== null) metadata.set('caravan-retry-after', String(error.retryAfterS));
  return { code: errorTable[error.code].grpc, details: error.message, metadata };
}

/** What a call says beside its request: the first value of a key of its metadata, as headers are over HTTP. */
export type CallHeader = (key: string) => string | undefined;

const headerOf =
  (metadata: Metadata): CallHeader =>
  (key) =>
    metadata.get(key)[0]?.toString();

/** A handler of single answers. */
export function unary<Q, A>(
  answer: (request: Q, header: CallHeader) => Promise<A>,
): (call: ServerUnaryCall<Q, A>, reply: sendUnaryData<A>) => void {
  return (call, reply) => {
    // What a handler throws at once is an answer, too.
    void Promise.resolve(call.request)
      .then((request) => answer(request, headerOf(call.metadata)))
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

/**
 * A handler of streams, which waits for callers that read slowly.
 *
 * @param answer is told when the caller leaves, its deadline passes, or the server closes.
 */
export function streaming<Q, A>(
  closing: AbortSignal,
  answer: (request: Q, header: CallHeader, signal: AbortSignal) => AsyncIterable<A>,
): (call: ServerWritableStream<Q, A>) => void {
  return (call) => {
    const gone = new AbortController();
    call.on('cancelled', () => {
      gone.abort(new CaravanError('cancelled', 'the caller left'));
    });
    const signal = AbortSignal.any([gone.signal, closing]);
    void (async () => {
      try {
        for await (const message of answer(call.request, headerOf(call.metadata), signal)) {
          if (!call.write(message)) await drained(call, signal);
        }
        call.end();
      } catch (thrown) {
        call.emit('error', toStatus(thrown));
      }
    })();
  };
}

function drained(call: ServerWritableStream<unknown, unknown>, signal: AbortSignal): Promise<void> {
  return new Promise((resolve) => {
    const done = (): void => {
      call.removeListener('drain', done);
      signal.removeEventListener('abort', done);
      resolve();
    };
    call.once('drain', done);
    signal.addEventListener('abort', done);
    if (signal.aborted) done();
  });
}
