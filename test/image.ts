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

/**
 * Where images are built: buildah's store in a folder of its own, and a stand-in for Node's image. Layers are overlays
 * where the kernel has them here, else copies.
 */
export class Workshop {
  readonly #folder: string;
  readonly #driver: 'overlay' | 'vfs';
  /** The stand-in's name. */
  readonly base: string;

  private constructor(folder: string) {
    this.#folder = folder;
    this.#driver = hasOverlays(folder) ? 'overlay' : 'vfs';
    this.base = makeStandIn(folder, (args) => this.#buildah(args));
  }

  /** Makes the stand-in. Takes half a minute. */
  static open(): Workshop {
    const folder = fs.mkdtempSync(path.join(os.tmpdir(), 'caravan-image-'));
    try {
      return new Workshop(folder);
    } catch (error) {
      fs.rmSync(folder, { recursive: true, force: true });
      throw error;
    }
  }

  /**
   * Builds an image of these arguments and secrets (contents by id), and unpacks it.
   *
   * @throws Error with all that the build said.
   */
  build(
    dockerfile: string,
    tag: string,
    args: Readonly<Record<string, string>>,
    secrets: Readonly<Record<string, string>>,
  ): Image {
    const secretArgs = Object.entries(secrets).flatMap(([id, content]) => {
      const file = path.join(this.#folder, id);
      fs.writeFileSync(file, content);
      return ['--secret', `id=${id},src=${file}`];
    });
    const name = `localhost/${tag}`;
    this.#buildah([
      ...bud,
      ...['--format', 'docker'],
      ...Object.entries(args).flatMap(([key, value]) => ['--build-arg', `${key}=${value}`]),
      ...secretArgs,
      ...['--ignorefile', path.join(packageRoot, `${dockerfile}.dockerignore`)],
      ...['--file', path.join(packageRoot, dockerfile), '--tag', name, packageRoot],
    ]);
    const container = this.#buildah(['from', '--pull-never', name]);
    const { Docker } = JSON.parse(this.#buildah(['inspect', container])) as {
      Docker: { config: ImageConfig & { Healthcheck?: { Test: string[] } } };
    };
    const { Healthcheck, ...config } = Docker.config;
    const root = this.#buildah(['mount', container]);
    return new Image(name, root, config, Healthcheck?.Test ?? []);
  }

  /** The stand-in with more of Debian's packages and more programs, by their paths. @returns its name. */
  extend(
    tag: string,
    packages: readonly string[],
    programs: Readonly<Record<string, string>>,
  ): string {
    const context = fs.mkdtempSync(path.join(this.#folder, 'context-'));
    for (const [place, text] of Object.entries(programs)) {
      const file = path.join(context, 'root', place);
      fs.mkdirSync(path.dirname(file), { recursive: true });
      fs.writeFileSync(file, text, { mode: 0o755 });
    }
    const install = `apt-get install -y -qq --no-install-recommends ${packages.join(' ')}`;
    const run = `RUN apt-get update -qq && ${install} >/dev/null`;
    const lines = [`FROM ${this.base}`, run, 'COPY root /', ''];
    const file = path.join(context, 'Dockerfile');
    fs.writeFileSync(file, lines.join('\n'));
    this.#buildah([...bud, '--file', file, '--tag', `localhost/${tag}`, context]);
    return `localhost/${tag}`;
  }

  /** Removes all that was built; nothing of it may run any more. */
  close(): void {
    this.#buildah(['umount', '--all']);
    fs.rmSync(this.#folder, { recursive: true, force: true });
  }

  #buildah(args: readonly string[]): string {
    const [root, run] = ['store', 'run'].map((name) => path.join(this.#folder, name));
    const store = ['--storage-driver', this.#driver, '--root', root!, '--runroot', run!];
    try {
      return execFileSync('buildah', [...store, ...args], {
        encoding: 'utf8',
        stdio: ['ignore', 'pipe', 'pipe'],
        maxBuffer: 64 * 1024 * 1024,
      }).trim();
    } catch (error) {
      const { stderr } = error as { stderr?: string };
      throw stderr === undefined ? error : new Error(stderr, { cause: error });
    }
  }
}

const bud = ['bud', '--quiet', '--isolation', 'chroot', '--pull-never'] as const;

/** Whether overlays can be mounted over this folder: its own file system may be one already. */
function hasOverlays(folder: string): boolean {
  const [lower, upper, work, merged] = ['lower', 'upper', 'work', 'merged'].map((name) => {
    const place = path.join(folder, 'overlay', name);
    fs.mkdirSync(place, { recursive: true });
    return place;
  });
  const options = `lowerdir=${lower!},upperdir=${upper!},workdir=${work!}`;
  const mounting = ['-t', 'overlay', 'overlay', '-o', options, merged!];
  if (spawnSync('mount', mounting).status !== 0) return false;
  execFileSync('umount', [merged!]);
  return true;
}

/** A built image, unpacked. */
export class Image {
  /** For builds that start from it. */
  readonly name: string;
  readonly config: ImageConfig;
  readonly health: readonly string[];
  readonly #root: string;

  constructor(name: string, root: string, config: ImageConfig, health: readonly string[]) {
    this.name = name;
    this.#root = root;
    this.config = config;
    this.health = health;
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
  buildah([...bud, '--file', path.join(folder, 'StandIn'), '--tag', name, folder]);
  fs.rmSync(root, { recursive: true });
  return name;
}

/** npm's settings of this machine, as a secret of the build. */
export function npmSettings(): string {
  const file = path.join(os.homedir(), '.npmrc');
  const own = fs.existsSync(file) ? fs.readFileSync(file, 'utf8') : '';
  return `${own}\ncafile=/etc/ssl/certs/ca-certificates.crt\n`;
}

/** pip's settings of this machine, as a secret of the build. */
export function pipSettings(): string {
  const { error, stdout } = spawnSync('pip', ['config', 'list'], { encoding: 'utf8' });
  // Without pip here there is nothing to take over.
  const listed = error === undefined ? stdout : '';
  const own = [...listed.matchAll(/^[^.]*\.((?:extra-)?index-url|default-timeout)='(.*)'$/gm)].map(
    ([, key, value]) => `${key!} = ${value!}`,
  );
  return ['[global]', ...own, 'cert = /etc/ssl/certs/ca-certificates.crt', ''].join('\n');
}
