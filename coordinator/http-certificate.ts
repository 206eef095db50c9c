/**
 * The certificate of the gateway's HTTP. Whoever renews it (cert-manager, certbot) replaces its files: a gateway looks at
 * them again while it serves, and open connections stay.
 */
import fs from 'node:fs';
import type { Server } from 'node:https';
import tls from 'node:tls';
import type { Logger } from 'pino';
import { CaravanError } from '../proto/errors.js';

const LOOK_EVERY_MS = 30_000;

export interface CertificateFiles {
  readonly cert: Buffer;
  readonly key: Buffer;
}

export class HttpCertificate {
  readonly #certPath: string;
  readonly #keyPath: string;
  #files: CertificateFiles;
  #server: Pick<Server, 'setSecureContext'> | null = null;
  #timer: NodeJS.Timeout | undefined;

  private constructor(certPath: string, keyPath: string) {
    this.#certPath = certPath;
    this.#keyPath = keyPath;
    this.#files = read(certPath, keyPath);
  }

  /**
   * @returns null for plain HTTP: neither is given.
   * @throws CaravanError `bad_usage` when only one is, or they cannot be used together.
   */
  static open(settings: {
    readonly httpsCert?: string | undefined;
    readonly httpsKey?: string | undefined;
  }): HttpCertificate | null {
    const { httpsCert, httpsKey } = settings;
    if (httpsCert === undefined && httpsKey === undefined) return null;
    if (httpsCert === undefined || httpsKey === undefined) {
      throw new CaravanError('bad_usage', '--https-cert and --https-key belong together');
    }
    return new HttpCertificate(httpsCert, httpsKey);
  }

  get files(): CertificateFiles {
    return this.#files;
  }

  /** From now on this server has what the files have, until `close`. */
  follow(server: Pick<Server, 'setSecureContext'>, log: Logger): void {
    this.#server = server;
    this.#timer = setInterval(() => {
      this.look(log);
    }, LOOK_EVERY_MS);
    this.#timer.unref();
  }

  /** Takes over what is new in the files; what is no certificate with its key is left for the next look. */
  look(log: Logger): void {
    let files: CertificateFiles;
    try {
      files = read(this.#certPath, this.#keyPath);
    } catch (error) {
      log.warn({ https: (error as Error).message }, 'the certificate stays as it was');
      return;
    }
    if (files.cert.equals(this.#files.cert) && files.key.equals(this.#files.key)) return;
    this.#files = files;
    this.#server?.setSecureContext({ ...files });
    log.info({ https: this.#certPath }, 'the certificate is new');
  }

  close(): void {
    clearInterval(this.#timer);
  }
}

/** @throws CaravanError `bad_usage` naming the flag and the file. */
function read(certPath: string, keyPath: string): CertificateFiles {
  const content = (flag: string, path: string): Buffer => {
    try {
      return fs.readFileSync(path);
    } catch (cause) {
      throw new CaravanError('bad_usage', `${flag} ${path}: cannot be read`, { cause });
    }
  };
  const files = { cert: content('--https-cert', certPath), key: content('--https-key', keyPath) };
  try {
    tls.createSecureContext(files);
  } catch (cause) {
    const reason = cause instanceof Error ? cause.message : String(cause);
    const which = `--https-cert ${certPath}, --https-key ${keyPath}`;
    throw new CaravanError('bad_usage', `${which}: ${reason}`, { cause });
  }
  return files;
}
