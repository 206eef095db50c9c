/**
 * The image, really built and really run, on a machine without Docker: buildah builds deploy/Dockerfile on a stand-in for
 * Node's own image (a Debian from debootstrap with this machine's Node), and what it made runs as its own configuration
 * says, in namespaces of its own, as a user without rights, over a root file system that cannot be written.
 */
import { execFileSync, spawn, spawnSync, type ChildProcess } from 'node:child_process';
import { once } from 'node:events';
import fs from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { packageRoot } from '../coordinator/package-root.js';

const needed = ['buildah', 'debootstrap', 'unshare', 'setpriv', 'tini'];

/** For node:test's `skip`: false where images can be built, or in CI, else the reason. */
export const skipWithoutBuildah: string | false = (() => {
  if (process.env['CI'] === 'true') return false;
  if (process.getuid?.() !== 0) return 'images are built by root';
  const missing = needed.filter((name) => spawnSync('which', [name]).status !== 0);
  return missing.length === 0 ? false : `${missing.join(', ')}: not here`;
})();

interface ImageConfig {
  readonly User: string;
  readonly Env: readonly string[];
  readonly Entrypoint: readonly string[];
  readonly Cmd: readonly string[];
  readonly WorkingDir: string;
}

export interface Container {
  readonly process: ChildProcess;
  /** All that it said on stderr. */
  readonly log: () => string;
  /** Ends it with a signal to its init, and says how it ended. */
  readonly stop: (
    signal: NodeJS.Signals,
  ) => Promise<{ code: number | null; signal: string | null }>;
}

/** A built image, unpacked. */
export class Image {
  readonly config: ImageConfig;
  readonly health: readonly string[];
  readonly #folder: string;
  readonly #root: string;

  private constructor(
    folder: string,
    root: string,
    config: ImageConfig,
    health: readonly string[],
  ) {
    this.#folder = folder;
    this.#root = root;
    this.config = config;
    this.health = health;
  }

  /** Builds the stand-in and the image, and unpacks it. Takes a minute or two. */
  static build(dockerfile: string): Image {
    const folder = fs.mkdtempSync(path.join(os.tmpdir(), 'caravan-image-'));
    const buildah = (args: readonly string[]): string => {
      const store = ['--root', path.join(folder, 'store'), '--runroot', path.join(folder, 'run')];
      return execFileSync('buildah', ['--storage-driver', 'vfs', ...store, ...args], {
        encoding: 'utf8',
        stdio: ['ignore', 'pipe', 'pipe'],
        maxBuffer: 64 * 1024 * 1024,
      }).trim();
    };
    try {
      const base = makeStandIn(folder, buildah);
      const npmrc = path.join(folder, 'npmrc');
      fs.writeFileSync(npmrc, npmSettings());
      const bud = ['bud', '--quiet', '--isolation', 'chroot', '--pull-never', '--format', 'docker'];
      buildah([
        ...bud,
        ...['--build-arg', `BASE=${base}`, '--secret', `id=npmrc,src=${npmrc}`],
        ...['--ignorefile', path.join(packageRoot, `${dockerfile}.dockerignore`)],
        ...[
          '--file',
          path.join(packageRoot, dockerfile),
          '--tag',
          'localhost/caravan',
          packageRoot,
        ],
      ]);
      const container = buildah(['from', '--pull-never', 'localhost/caravan']);
      const { Docker } = JSON.parse(buildah(['inspect', container])) as {
        Docker: { config: ImageConfig & { Healthcheck?: { Test: string[] } } };
      };
      const { Healthcheck, ...config } = Docker.config;
      return new Image(folder, buildah(['mount', container]), config, Healthcheck?.Test ?? []);
    } catch (error) {
      fs.rmSync(folder, { recursive: true, force: true });
      const { stderr } = error as { stderr?: string };
      throw stderr === undefined ? error : new Error(stderr, { cause: error });
    }
  }

  /** Bytes of all files. */
  get byteCount(): number {
    return Number(execFileSync('du', ['-sb', this.#root], { encoding: 'utf8' }).split('\t')[0]);
  }

  /**
   * Runs a command by the image's entrypoint, in namespaces of mounts, processes and host names of its own.
   *
   * @param sharedMemory folder that its /dev/shm is.
   */
  run(command: readonly string[], sharedMemory: string, env: readonly string[] = []): Container {
    const { config } = this;
    const script = [
      'set -e',
      // Read-only from here on, also for root.
      'mount --bind "$ROOT" "$ROOT"',
      'mount -t proc proc "$ROOT/proc"',
      'mount -t tmpfs -o mode=755 dev "$ROOT/dev"',
      'for name in null zero random urandom; do touch "$ROOT/dev/$name"; mount --bind /dev/$name "$ROOT/dev/$name"; done',
      'mkdir "$ROOT/dev/shm"',
      'mount --bind "$SHM" "$ROOT/dev/shm"',
      'mount -o remount,bind,ro "$ROOT"',
      'exec setpriv --no-new-privs chroot --userspec="$USERSPEC" --groups= "$ROOT" /usr/bin/env -i "$@"',
    ].join('\n');
    const inner = `cd ${config.WorkingDir} && exec "$@"`;
    const args = ['--mount', '--pid', '--uts', '--ipc', '--fork'];
    const child = spawn(
      'unshare',
      [
        ...[...args, 'bash', '-c', script, 'container', ...config.Env, ...env],
        ...['sh', '-c', inner, 'sh', ...config.Entrypoint, ...command],
      ],
      {
        env: {
          PATH: process.env['PATH'],
          ROOT: this.#root,
          SHM: sharedMemory,
          USERSPEC: config.User,
        },
        stdio: ['ignore', 'pipe', 'pipe'],
      },
    );
    let said = '';
    for (const stream of [child.stdout, child.stderr]) {
      stream.setEncoding('utf8').on('data', (text: string) => (said += text));
    }
    const gone = once(child, 'exit') as Promise<[number | null, string | null]>;
    return {
      process: child,
      log: () => said,
      stop: async (signal) => {
        // unshare itself waits for its child, the container's init, whose end ends all that is in it. (It would not
        // end with unshare: who changes users loses that bond.)
        const init = initOf(child.pid!);
        if (init !== null) process.kill(init, signal);
        const [code, by] = await gone;
        return { code, signal: by };
      },
    };
  }

  remove(): void {
    fs.rmSync(this.#folder, { recursive: true, force: true });
  }
}

/** The process that unshare forked: number 1 in its namespace. */
export function initOf(unsharePid: number): number | null {
  try {
    const children = fs.readFileSync(`/proc/${unsharePid}/task/${unsharePid}/children`, 'utf8');
    return Number(children.split(' ')[0]) || null;
  } catch {
    return null;
  }
}

/** A Debian with this machine's Node and npm: as good as Node's own image, which no registry brings here. */
function makeStandIn(folder: string, buildah: (args: readonly string[]) => string): string {
  const root = path.join(folder, 'stand-in');
  const packages = '--include=ca-certificates,tini';
  execFileSync('debootstrap', ['--variant=minbase', packages, 'bookworm', root], {
    stdio: ['ignore', 'ignore', 'pipe'],
  });
  fs.copyFileSync(fs.realpathSync(process.execPath), path.join(root, 'usr/local/bin/node'));
  const npm = fs.realpathSync(execFileSync('which', ['npm'], { encoding: 'utf8' }).trim());
  const npmFolder = path.dirname(path.dirname(npm));
  const target = path.join(root, 'usr/local/lib/node_modules/npm');
  fs.cpSync(npmFolder, target, { recursive: true });
  fs.symlinkSync('../lib/node_modules/npm/bin/npm-cli.js', path.join(root, 'usr/local/bin/npm'));
  // This machine may trust more than Debian does.
  const certificates = 'etc/ssl/certs/ca-certificates.crt';
  if (fs.existsSync(`/${certificates}`)) {
    fs.copyFileSync(`/${certificates}`, path.join(root, certificates));
  }
  fs.writeFileSync(path.join(folder, 'StandIn'), 'FROM scratch\nCOPY stand-in /\n');
  const name = 'localhost/node-stand-in';
  const bud = ['bud', '--quiet', '--isolation', 'chroot', '--pull-never'];
  buildah([...bud, '--file', path.join(folder, 'StandIn'), '--tag', name, folder]);
  fs.rmSync(root, { recursive: true });
  return name;
}

/** npm's settings of this machine, as a secret of the build. */
function npmSettings(): string {
  const file = path.join(os.homedir(), '.npmrc');
  const own = fs.existsSync(file) ? fs.readFileSync(file, 'utf8') : '';
  return `${own}\ncafile=/etc/ssl/certs/ca-certificates.crt\n`;
}
