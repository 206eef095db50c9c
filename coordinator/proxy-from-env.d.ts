/** The package has no declarations of its own. */
declare module 'proxy-from-env' {
  /** The proxy's URL, by HTTPS_PROXY, HTTP_PROXY, ALL_PROXY and NO_PROXY of this process; empty for none. */
  export function getProxyForUrl(url: string): string;
}
