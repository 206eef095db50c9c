/**
 * Where a webhook may go. A client names the address, and a gateway stands inside of a network: so only addresses of the
 * public internet are called, by https, unless an operator has allowed others. What a name stands for is looked at when
 * the connection is made, so that it cannot change in between.
 */
import dns from 'node:dns';
import net, { type LookupFunction } from 'node:net';
import { CaravanError } from '../proto/errors.js';

const MAX_URL_CHARACTERS = 2048;

/** Ranges that are not of the public internet (IANA's special-purpose registries), or that lead elsewhere. */
const specialRanges: readonly string[] = [
  ...['0.0.0.0/8', '10.0.0.0/8', '100.64.0.0/10', '127.0.0.0/8', '169.254.0.0/16', '172.16.0.0/12'],
  ...['192.0.0.0/24', '192.0.2.0/24', '192.88.99.0/24', '192.168.0.0/16', '198.18.0.0/15'],
  ...['198.51.100.0/24', '203.0.113.0/24', '224.0.0.0/4', '240.0.0.0/4'],
  ...['::/96', '::ffff:0:0/96', '64:ff9b::/96', '64:ff9b:1::/48', '100::/64', '2001::/23'],
  ...['2001:db8::/32', '2002::/16', 'fc00::/7', 'fe80::/10', 'ff00::/8'],
];

function listOf(ranges: readonly string[]): net.BlockList {
  const list = new net.BlockList();
  for (const range of ranges) {
    const [address, bits] = range.split('/');
    list.addSubnet(address!, Number(bits), familyOf(address!));
  }
  return list;
}

const familyOf = (address: string): 'ipv4' | 'ipv6' => (net.isIPv6(address) ? 'ipv6' : 'ipv4');

/** @returns `10.0.0.0/8` for an address or a range, or null for a host's name. @throws RangeError. */
function rangeOf(entry: string): string | null {
  const [address, bits, ...more] = entry.split('/');
  if (net.isIP(address!) === 0) {
    if (bits === undefined && /^[a-z0-9.-]+$/i.test(entry)) return null;
    throw new RangeError(`${entry} is no host, address or range`);
  }
  const most = net.isIPv6(address!) ? 128 : 32;
  const count = bits === undefined ? most : Number(bits);
  if (more.length > 0 || !Number.isInteger(count) || count < 0 || count > most) {
    throw new RangeError(`${entry} is no range of addresses`);
  }
  return `${address!}/${count}`;
}

export class WebhookPolicy {
  readonly #hosts: ReadonlySet<string>;
  readonly #allowed: net.BlockList;
  readonly #special = listOf(specialRanges);

  /** @param allowed hosts, addresses and ranges that may be called beside the public internet. @throws RangeError. */
  constructor(allowed: readonly string[]) {
    const ranges = allowed.map((entry) => ({ entry, range: rangeOf(entry) }));
    this.#hosts = new Set(
      ranges.flatMap(({ entry, range }) => (range === null ? [entry.toLowerCase()] : [])),
    );
    this.#allowed = listOf(ranges.flatMap(({ range }) => range ?? []));
  }

  /** @throws CaravanError `invalid_request` for what will never be called. */
  check(text: string): URL {
    const refuse = (reason: string): never => {
      throw new CaravanError('invalid_request', `webhook.url: ${reason}`, { param: 'webhook.url' });
    };
    if (text.length > MAX_URL_CHARACTERS) {
      refuse(`has ${text.length} characters; at most ${MAX_URL_CHARACTERS} are taken`);
    }
    if (!URL.canParse(text)) refuse(`${JSON.stringify(text)} is no URL`);
    const url = new URL(text);
    if (url.protocol !== 'https:' && url.protocol !== 'http:') refuse('must begin with https://');
    if (url.username !== '' || url.password !== '') refuse('must not hold a password');
    const host = hostOf(url);
    const isNamed = this.#hosts.has(host);
    const isAddress = net.isIP(host) !== 0;
    const isAllowed = isNamed || (isAddress && this.#isAllowed(host));
    if (url.protocol === 'http:' && !isAllowed) refuse('must begin with https://');
    if (isAddress && !isAllowed && !this.#isPublic(host)) {
      refuse(`${host} is not of the public internet, and not allowed by --webhook-allow`);
    }
    return url;
  }

  /** For a connection to the URL's host: fails where no address of it may be called. */
  lookup(url: URL): LookupFunction {
    const isNamed = this.#hosts.has(hostOf(url));
    return (name, options, callback) => {
      dns.lookup(name, { ...options, all: true }, (error, found) => {
        const usable = (error === null ? found : []).filter(
          ({ address }) => isNamed || this.#isAllowed(address) || this.#isPublic(address),
        );
        const first = usable[0];
        if (error !== null || first === undefined) {
          const reason = 'no address of it is of the public internet or allowed';
          callback(error ?? new Error(`${name}: ${reason}`), '', 0);
        } else if (options.all === true) callback(null, usable);
        else callback(null, first.address, first.family);
      });
    };
  }

  #isAllowed(address: string): boolean {
    return this.#allowed.check(address, familyOf(address));
  }

  #isPublic(address: string): boolean {
    return !this.#special.check(address, familyOf(address));
  }
}

/** In lower case, and an IPv6 address without its brackets. */
const hostOf = ({ hostname }: URL): string => hostname.toLowerCase().replace(/^\[|\]$/g, '');
