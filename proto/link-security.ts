/**
 * How processes of a cluster trust each other: mutual TLS on every gRPC link, with one authority for all of them.
 *
 * Without files links are plain, for a private network. With them both sides show a certificate of the authority; who has
 * none, an expired one, or one of another authority is refused. Certificates must name the addresses that are dialled,
 * or all of them one name that is given as `serverName`.
 */
import fs from 'node:fs';
import tls from 'node:tls';
import {
  credentials,
  ServerCredentials,
  type ChannelCredentials,
  type ChannelOptions,
} from '@grpc/grpc-js';
import { CaravanError } from './errors.js';

/** PEM files, read when a server starts and again at every new channel. */
export interface LinkSecurity {
  readonly certPath: string;
  readonly keyPath: string;
  readonly caPath: string;
  /** What certificates of peers must name instead of the address that was dialled. */
  readonly serverName?: string | undefined;
}

/** As flags or variables give it. */
export interface LinkSettings {
  readonly tlsCert?: string | undefined;
  readonly tlsKey?: string | undefined;
  readonly tlsCa?: string | undefined;
  readonly tlsServerName?: string | undefined;
}

/** The variables of all processes that have links. */
export const linkVariables = {
  tlsCert: 'CARAVAN_TLS_CERT',
  tlsKey: 'CARAVAN_TLS_KEY',
  tlsCa: 'CARAVAN_TLS_CA',
  tlsServerName: 'CARAVAN_TLS_SERVER_NAME',
} as const;

/** Flags, and what the environment says where there are none; a variable that is set to nothing says nothing. */
export function withLinkVariables(flags: LinkSettings, env: NodeJS.ProcessEnv): LinkSettings {
  const names = Object.entries(linkVariables) as [keyof LinkSettings, string][];
  return Object.fromEntries(
    names.map(([name, key]) => [name, flags[name] ?? (env[key] || undefined)]),
  );
}

/** @throws CaravanError `bad_usage` when only some of the three files are given. */
export function linkSecurity(settings: LinkSettings): LinkSecurity | null {
  const { tlsCert, tlsKey, tlsCa, tlsServerName } = settings;
  if (tlsCert === undefined && tlsKey === undefined && tlsCa === undefined) return null;
  if (tlsCert === undefined || tlsKey === undefined || tlsCa === undefined) {
    throw new CaravanError('bad_usage', '--tls-cert, --tls-key and --tls-ca belong together');
  }
  const security = { certPath: tlsCert, keyPath: tlsKey, caPath: tlsCa, serverName: tlsServerName };
  readFiles(security);
  return security;
}

/** @throws CaravanError `bad_usage` naming the file that cannot be read. */
function readFiles({ certPath, keyPath, caPath }: LinkSecurity) {
  const read = (flag: string, path: string): Buffer => {
    try {
      return fs.readFileSync(path);
    } catch (cause) {
      throw new CaravanError('bad_usage', `${flag} ${path}: cannot be read`, { cause });
    }
  };
  const cert = read('--tls-cert', certPath);
  const key = read('--tls-key', keyPath);
  const ca = read('--tls-ca', caPath);
  try {
    tls.createSecureContext({ cert, key, ca });
  } catch (cause) {
    const reason = cause instanceof Error ? cause.message : String(cause);
    throw new CaravanError('bad_usage', `--tls-cert ${certPath}, --tls-key ${keyPath}: ${reason}`, {
      cause,
    });
  }
  return { cert, key, ca };
}

export function serverCredentials(security: LinkSecurity | null): ServerCredentials {
  if (security === null) return ServerCredentials.createInsecure();
  const { cert, key, ca } = readFiles(security);
  return ServerCredentials.createSsl(ca, [{ cert_chain: cert, private_key: key }], true);
}

export function channelCredentials(security: LinkSecurity | null): ChannelCredentials {
  if (security === null) return credentials.createInsecure();
  const { cert, key, ca } = readFiles(security);
  return credentials.createSsl(ca, key, cert);
}

/** Options that a channel needs beside its credentials. */
export const channelSecurityOptions = (security: LinkSecurity | null): ChannelOptions =>
  security?.serverName === undefined
    ? {}
    : { 'grpc.ssl_target_name_override': security.serverName };

const PROBE_TIMEOUT_MS = 2_000;
/** With TLS 1.3 a server refuses our certificate after the handshake. */
const REFUSAL_WAIT_MS = 1_000;

/**
 * Why a process that could not be reached may not want to talk: gRPC itself only says that it was not reached.
 *
 * @returns a reason to end a sentence with, or null when TLS is not the cause.
 */
export async function explainUnreached(
  address: string,
  security: LinkSecurity | null,
): Promise<string | null> {
  const { hostname, port } = new URL(`tcp://${address}`);
  const host = hostname.replace(/^\[|\]$/g, '');
  const own = security === null ? { rejectUnauthorized: false } : readFiles(security);
  const checked = security?.serverName;
  return new Promise((resolve) => {
    const socket = tls.connect({
      ...{ host, port: Number(port), ALPNProtocols: ['h2'], ...own },
      ...(checked === undefined ? {} : { servername: checked }),
    });
    const end = (reason: string | null): void => {
      clearTimeout(timer);
      socket.destroy();
      resolve(reason);
    };
    const timer = setTimeout(end, PROBE_TIMEOUT_MS, null);
    socket.once('secureConnect', () => {
      if (security === null) end('it asks for TLS, and --tls-cert is not given');
      else {
        setTimeout(end, REFUSAL_WAIT_MS, null);
        socket.once('close', () => {
          end('it refuses our certificate (it hung up)');
        });
      }
    });
    socket.once('error', (error: NodeJS.ErrnoException) => {
      end(security === null ? null : reasonOf(error));
    });
  });
}

function reasonOf({ code = '', message }: NodeJS.ErrnoException): string | null {
  if (code === 'CERT_HAS_EXPIRED') return 'its certificate has expired';
  if (code === 'ERR_TLS_CERT_ALTNAME_INVALID') {
    return `its certificate does not name it (${message.replace(/^.*altnames: /, '')})`;
  }
  if (/SELF_SIGNED|UNABLE_TO_VERIFY|UNABLE_TO_GET_ISSUER|SIGNATURE/.test(code)) {
    return 'its certificate is of another authority';
  }
  if (/alert/i.test(`${code} ${message}`)) {
    const alert = /alert ([a-z ]+)/i.exec(message)?.[1] ?? code;
    return `it refuses our certificate (${alert.trim()})`;
  }
  if (/WRONG_VERSION_NUMBER|PACKET_LENGTH_TOO_LONG|HTTP_REQUEST/.test(code) || code === 'EPROTO') {
    return 'it speaks no TLS';
  }
  // A plain gRPC server hangs up on a handshake.
  return code === 'ECONNRESET' ? 'it speaks no TLS, or hung up' : null;
}
