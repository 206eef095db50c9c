/**
 * Extra material that a developer's machine and CI have beside the project. Tests that need it are skipped by
 * name elsewhere; in CI they must run.
 */
import fs from 'node:fs';
import path from 'node:path';
import { packageRoot } from '../coordinator/package-root.js';

const folder = path.resolve(packageRoot, '../shared');

/** The path of a shared file or folder. */
export const sharedPath = (name: string): string => path.join(folder, name);

/** For node:test's `skip`: false where the file is there, or in CI, else the reason. */
export const skipWithout = (name: string): string | false =>
  fs.existsSync(sharedPath(name)) || process.env['CI'] === 'true'
    ? false
    : `../shared/${name} is not here`;
