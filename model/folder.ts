/** Folders that a user names. */
import fs from 'node:fs';
import path from 'node:path';

/**
 * Makes a folder and those above it that are missing. Node's own recursive call never returns where the system refuses
 * with ENOENT inside of a folder that is there, as in /proc.
 *
 * @throws the system's error.
 */
export function makeFolder(folder: string): void {
  const above = path.dirname(path.resolve(folder));
  try {
    fs.mkdirSync(folder);
  } catch (error) {
    const { code } = error as NodeJS.ErrnoException;
    if (code === 'EEXIST' && fs.statSync(folder).isDirectory()) return;
    if (code !== 'ENOENT' || fs.existsSync(above)) throw error;
    makeFolder(above);
    makeFolder(folder);
  }
}
