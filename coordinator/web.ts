/**
 * HTTP to servers outside: directly, or through the proxies that the environment names. The one door to undici: of the
 * copy inside of Node only fetch can be reached, which knows no proxies.
 */
import { getProxyForUrl } from 'proxy-from-env';
import { Agent, Dispatcher, fetch, ProxyAgent, type Response as WebResponse } from 'undici';
import { CaravanError } from '../proto/errors.js';

export type { WebResponse };

export interface WebRequest {
  readonly headers: Readonly<Record<string, string>>;
  readonly signal: AbortSignal;
}

export class Web {
  readonly #routes: Routes;

  /**
   * @param proxyOf the URL of the proxy for a URL, or the empty text; by the variables that curl and others know if left
   *   out: HTTPS_PROXY, HTTP_PROXY, ALL_PROXY and NO_PROXY, in small letters first.
   */
  constructor(proxyOf: (url: string) => string = getProxyForUrl) {
    this.#routes = new Routes(proxyOf);
  }

  /** As the global fetch. @throws CaravanError `bad_usage` where a proxy is named that is no http or https URL. */
  fetch(url: string, { headers, signal }: WebRequest): Promise<WebResponse> {
    this.#routes.to(new URL(url).origin);
    return fetch(url, { headers, signal, dispatcher: this.#routes });
  }

  /** Lets go of connections; nothing may be fetched any more. */
  async close(): Promise<void> {
    await this.#routes.destroy();
  }
}

/** The way to each server: a redirect may lead to one that another proxy, or none, stands before. */
class Routes extends Dispatcher {
  readonly #proxyOf: (url: string) => string;
  /** By the proxy's URL; of the empty text, the one without a proxy. */
  readonly #agents = new Map<string, Agent | ProxyAgent>();

  constructor(proxyOf: (url: string) => string) {
    super();
    this.#proxyOf = proxyOf;
  }

  to(origin: string): Agent | ProxyAgent {
    const proxy = this.#proxyOf(origin);
    let agent = this.#agents.get(proxy);
    if (agent === undefined) {
      agent = proxy === '' ? new Agent() : proxyAgent(proxy, origin);
      this.#agents.set(proxy, agent);
    }
    return agent;
  }

  override dispatch(
    options: Dispatcher.DispatchOptions,
    handler: Dispatcher.DispatchHandlers,
  ): boolean {
    return this.to(String(options.origin)).dispatch(options, handler);
  }

  override async destroy(): Promise<void> {
    await Promise.all([...this.#agents.values()].map((agent) => agent.destroy()));
  }
}

function proxyAgent(proxy: string, origin: string): ProxyAgent {
  if (!URL.canParse(proxy) || !/^https?:$/.test(new URL(proxy).protocol)) {
    // It may hold a password, and is not shown.
    throw new CaravanError(
      'bad_usage',
      `HTTPS_PROXY, HTTP_PROXY or ALL_PROXY: what it names for ${origin} is no http or https URL`,
    );
  }
  const { username, password, origin: uri } = new URL(proxy);
  const user = `${decodeURIComponent(username)}:${decodeURIComponent(password)}`;
  if (username === '') return new ProxyAgent(uri);
  return new ProxyAgent({ uri, token: `Basic ${Buffer.from(user).toString('base64')}` });
}
