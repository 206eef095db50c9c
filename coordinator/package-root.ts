/** Where the installed package lies, whichever folder the compiler wrote this file to. */
import { existsSync, readFileSync } from 'node:fs';
import path from 'node:path';
import { fileURLToPath } from 'node:url';

const here = path.dirname(fileURLToPath(import.meta.url));

function findRoot(): string {
  let folder = here;
  while (!existsSync(path.join(folder, 'package.json'))) {
    const parent = path.dirname(folder);
    if (parent === folder) throw new Error(`no package.json above ${here}`);
    folder = parent;
  }
  return folder;
}

/** Folder of package.json. */
export const packageRoot: string = findRoot();

/** The compiled entry of a rank process. */
export const workerEntry: string = path.resolve(here, '../worker/main.js');

/** The compiled entry of the command line. */
export const cliEntry: string = path.resolve(here, 'cli/main.js');

/** Version of this release, as in package.json. */
export function packageVersion(): string {
  const text = readFileSync(path.join(packageRoot, 'package.json'), 'utf8');
  return (JSON.parse(text) as { version: string }).version;
}

/** The name of the model that comes with the package, as `--model` takes it. */
export const EMBEDDED_MODEL = 'caravan-tiny';
