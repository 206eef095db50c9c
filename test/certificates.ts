/** A certificate authority for one test file, and leaves that it signs; openssl does the work. */
import { execFileSync } from 'node:child_process';
import fs from 'node:fs';
import os from 'node:os';
import path from 'node:path';

export interface Leaf {
  readonly certPath: string;
  readonly keyPath: string;
}

const openssl = (...args: readonly string[]): void => {
  execFileSync('openssl', args, { stdio: ['ignore', 'ignore', 'pipe'] });
};
const newKey = ['-newkey', 'ec', '-pkeyopt', 'ec_paramgen_curve:prime256v1', '-nodes'];

export class Authority {
  readonly folder = fs.mkdtempSync(path.join(os.tmpdir(), 'caravan-tls-'));
  readonly caPath = path.join(this.folder, 'ca.crt');
  readonly #keyPath = path.join(this.folder, 'ca.key');

  constructor() {
    const subject = ['-subj', '/CN=Caravan test authority', '-days', '2'];
    openssl('req', '-x509', ...newKey, '-keyout', this.#keyPath, '-out', this.caPath, ...subject);
  }

  /**
   * A certificate for the loopback interface.
   *
   * @param days that it is valid; below 0 it has expired. @param hosts that it is for, too.
   */
  leaf(name: string, days = 1, hosts: readonly string[] = []): Leaf {
    const of = (ending: string): string => path.join(this.folder, `${name}.${ending}`);
    const [certPath, keyPath, request, extensions] = ['crt', 'key', 'csr', 'ext'].map(of) as [
      string,
      string,
      string,
      string,
    ];
    const names = ['IP:127.0.0.1', 'DNS:localhost', ...hosts.map((host) => `DNS:${host}`)];
    fs.writeFileSync(extensions, `subjectAltName=${names.join()}\n`);
    openssl('req', '-new', ...newKey, '-keyout', keyPath, '-out', request, '-subj', `/CN=${name}`);
    const signer = ['-CA', this.caPath, '-CAkey', this.#keyPath, '-CAcreateserial'];
    const validity = ['-days', String(days)];
    openssl(
      'x509',
      '-req',
      '-in',
      request,
      ...signer,
      '-extfile',
      extensions,
      '-out',
      certPath,
      ...validity,
    );
    return { certPath, keyPath };
  }

  remove(): void {
    fs.rmSync(this.folder, { recursive: true, force: true });
  }
}
