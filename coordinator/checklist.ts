/** Files of Meta's download held to its checklist.chk: MD5 sums, as md5sum writes them. */
import { createHash } from 'node:crypto';
import fs from 'node:fs';
import path from 'node:path';
import { CaravanError } from '../proto/errors.js';
import { parseChecklist } from './meta-download.js';
import { ProgressBar, type Screen } from './progress-bar.js';

const CHECKLIST = 'checklist.chk';
const READ_BYTES = 1 << 20;

/**
 * Reads every file that the checklist of a folder names, from end to end.
 *
 * @param screen for a bar, or null for none.
 * @returns their names.
 * @throws CaravanError `bad_usage` where there is no checklist, `invalid_checkpoint` naming the file that is missing or
 *   not what the checklist says.
 */
export async function verifyChecklist(folder: string, screen: Screen | null): Promise<string[]> {
  const list = path.join(folder, CHECKLIST);
  if (!fs.existsSync(list)) {
    throw new CaravanError(
      'bad_usage',
      `--verify: ${folder} has no ${CHECKLIST}, as Meta's downloads do`,
    );
  }
  const checksums = parseChecklist(fs.readFileSync(list), CHECKLIST);
  const bar = screen === null ? null : new ProgressBar('checking', screen);
  for (const name of checksums.keys()) {
    const stat = fs.statSync(path.join(folder, name), { throwIfNoEntry: false });
    if (stat?.isFile() !== true) {
      throw new CaravanError(
        'invalid_checkpoint',
        `${name}: is named by ${CHECKLIST} and is not in ${folder}`,
      );
    }
    bar?.expect(stat.size);
  }
  try {
    for (const [name, { hex }] of checksums) {
      bar?.note(name);
      const found = await md5Of(path.join(folder, name), (byteCount) => {
        bar?.advance(byteCount, true);
      });
      if (found === hex) continue;
      throw new CaravanError(
        'invalid_checkpoint',
        `${name}: its MD5 is ${found}, and ${CHECKLIST} says ${hex}: damaged, or of another download`,
      );
    }
  } finally {
    bar?.end();
  }
  return [...checksums.keys()];
}

async function md5Of(file: string, onRead: (byteCount: number) => void): Promise<string> {
  const hash = createHash('md5');
  for await (const chunk of fs.createReadStream(file, { highWaterMark: READ_BYTES })) {
    hash.update(chunk as Buffer);
    onRead((chunk as Buffer).length);
  }
  return hash.digest('hex');
}
