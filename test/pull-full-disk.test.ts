/** A disk that fills while a pull writes: one line, nothing that looks whole, and the next pull goes on. */
import assert from 'node:assert/strict';
import { execFileSync } from 'node:child_process';
import fs from 'node:fs';
import path from 'node:path';
import { test } from 'node:test';
import { hubSettings } from '../coordinator/hub.js';
import { pullFromHub } from '../coordinator/pull.js';
import { MANIFEST_FILE, parseHubSource } from '../model/hub-folder.js';
import {
  environment,
  files,
  first,
  id,
  newFolder,
  options,
  refusal,
  server,
  wanted,
  wantedBytes,
} from './pull-world.js';

const cannotMount = process.getuid?.() === 0 ? false : 'only root can mount a small file system';

/** Writes until nothing is free; the pull goes on writing meanwhile, so that nobody knows how much that is. */
function fill(filler: string): void {
  const { bavail, bsize } = fs.statfsSync(path.dirname(filler));
  try {
    fs.writeFileSync(filler, Buffer.alloc((bavail + 1) * bsize));
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code !== 'ENOSPC') throw error;
  }
}

void test('a disk that fills in the middle', { skip: cannotMount }, async (t) => {
  const folder = newFolder();
  fs.mkdirSync(folder);
  try {
    execFileSync('mount', ['-t', 'tmpfs', '-o', 'size=1m', 'tmpfs', folder], { stdio: 'pipe' });
  } catch (error) {
    t.skip(`nothing can be mounted here: ${String(error)}`);
    return;
  }
  const pull = () =>
    pullFromHub(parseHubSource(`hf:${id}`), hubSettings(environment()), options(folder));
  const filler = path.join(folder, 'somebody-else');
  try {
    // When its seventh piece is asked for, three of the first weights' are whole: then somebody else takes what is left.
    server.fault = ({ path: asked, range }) => {
      if (asked.endsWith(first) && range!.startsWith('bytes=300000-') && !fs.existsSync(filler)) {
        fill(filler);
      }
      return 'as usual';
    };
    await assert.rejects(
      pull(),
      refusal('disk_full', /safetensors: the disk is full; what is there is kept/),
    );
    assert.ok(fs.existsSync(filler));
    assert.ok(!fs.existsSync(path.join(folder, first)));
    assert.ok(!fs.existsSync(path.join(folder, MANIFEST_FILE)));
    // Nothing is free: then not even a byte is asked for.
    server.takeSentBytes();
    await assert.rejects(pull(), refusal('disk_full'));
    assert.equal(server.takeSentBytes(), 0);
    fs.rmSync(filler);
    server.fault = () => 'as usual';
    const { fetchedBytes } = await pull();
    for (const name of wanted) {
      assert.ok(fs.readFileSync(path.join(folder, name)).equals(files.get(name)!), name);
    }
    assert.equal(fetchedBytes, server.takeSentBytes());
    assert.ok(fetchedBytes <= wantedBytes - 150_000, `${fetchedBytes} of ${wantedBytes}`);
  } finally {
    execFileSync('umount', [folder]);
  }
});
