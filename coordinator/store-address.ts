/**
 * Where Redis is, and how to speak to it, as one URL.
 *
 *   redis://[USER:PASSWORD@]HOST[:PORT][/DB]            rediss:// over TLS
 *   redis+sentinel://[USER:PASSWORD@]HOST[:PORT],HOST[:PORT],…/MASTER[/DB]     rediss+sentinel:// over TLS, Sentinels too
 *   unix://PATH
 *
 * Query: `ca`, `cert`, `key` (PEM files, for TLS), `passwordFile` (instead of a password in the URL),
 * `sentinelPasswordFile`. Files are read at each start of a connection's owner.
 */
import fs from 'node:fs';
import { CaravanError } from '../proto/errors.js';

export interface Endpoint {
  readonly host: string;
  readonly port: number;
}
export interface TlsOptions {
  ca?: string;
  cert?: string;
  key?: string;
}

/** Options of a connection, as ioredis and BullMQ name them. */
export interface RedisAddress {
  host?: string;
  port?: number;
  path?: string;
  username?: string;
  password?: string;
  db?: number;
  tls?: TlsOptions;
  name?: string;
  sentinels?: Endpoint[];
  sentinelPassword?: string;
  sentinelTLS?: TlsOptions;
  enableTLSForSentinelMode?: boolean;
}

const QUERY = ['ca', 'cert', 'key', 'passwordFile', 'sentinelPasswordFile'];
const SHAPE =
  /^(?<scheme>rediss?(?:\+sentinel)?):\/\/(?:(?<user>[^:@/?]*)(?::(?<password>[^@/?]*))?@)?(?<hosts>[^/?]*)(?<path>[^?]*)(?:\?(?<query>.*))?$/;

/** @throws CaravanError `bad_usage` naming what of the URL is wrong; never with its password. */
export function redisAddress(url: string): RedisAddress {
  if (url.startsWith('unix://')) return { path: url.slice('unix://'.length) };
  const parts = SHAPE.exec(url)?.groups;
  if (parts === undefined) throw bad('must be a redis://, rediss:// or redis+sentinel:// URL');
  const { scheme, user, password, hosts, path, query } = parts;
  const params = new URLSearchParams(query ?? '');
  for (const name of params.keys()) {
    if (!QUERY.includes(name)) throw bad(`?${name}= is not known; there are ${QUERY.join(', ')}`);
  }
  const isTls = scheme!.startsWith('rediss');
  const read = (name: string): string | undefined => {
    const file = params.get(name);
    if (file === null) return undefined;
    try {
      return fs.readFileSync(file, 'utf8').trimEnd();
    } catch (cause) {
      throw new CaravanError('bad_usage', `--redis: ?${name}=${file} cannot be read`, { cause });
    }
  };
  const [ca, cert, key] = ['ca', 'cert', 'key'].map(read);
  if (!isTls && (ca ?? cert ?? key) !== undefined) {
    throw bad('certificates are for rediss://, which this URL is not');
  }
  const tls = isTls
    ? {
        ...(ca === undefined ? {} : { ca }),
        ...(cert === undefined ? {} : { cert }),
        ...(key === undefined ? {} : { key }),
      }
    : undefined;
  const secret =
    read('passwordFile') ?? (password === undefined ? '' : decodeURIComponent(password));
  const common: RedisAddress = {
    ...(user === undefined || user === '' ? {} : { username: decodeURIComponent(user) }),
    ...(secret === '' ? {} : { password: secret }),
    ...(tls === undefined ? {} : { tls }),
  };
  const words = path!.split('/').filter((word) => word !== '');
  if (!scheme!.endsWith('+sentinel')) {
    if (hosts!.includes(',')) throw bad('several hosts are for redis+sentinel://');
    const { host, port } = endpoint(hosts! === '' ? '127.0.0.1' : hosts!, 6379);
    return { ...common, host, port, ...database(words[0]) };
  }
  const name = words[0];
  if (name === undefined)
    throw bad('redis+sentinel:// must end with the name of the master, /NAME');
  const sentinelPassword = read('sentinelPasswordFile');
  return {
    ...common,
    name: decodeURIComponent(name),
    sentinels: hosts!.split(',').map((text) => endpoint(text, 26_379)),
    ...(sentinelPassword === undefined ? {} : { sentinelPassword }),
    ...(tls === undefined ? {} : { sentinelTLS: tls, enableTLSForSentinelMode: true }),
    ...database(words[1]),
  };
}

function endpoint(text: string, defaultPort: number): Endpoint {
  const parts = /^(?:\[(?<v6>[^\]]+)\]|(?<host>[^:]+))(?::(?<port>\d{1,5}))?$/.exec(text)?.groups;
  const host = parts?.['v6'] ?? parts?.['host'];
  const port = Number(parts?.['port'] ?? defaultPort);
  if (host === undefined || port > 65_535) throw bad(`${text} is not HOST:PORT`);
  return { host, port };
}

function database(text: string | undefined): { db?: number } {
  if (text === undefined) return {};
  if (!/^\d{1,4}$/.test(text)) throw bad(`/${text} is not the number of a database`);
  return { db: Number(text) };
}

const bad = (message: string): CaravanError => new CaravanError('bad_usage', `--redis: ${message}`);
