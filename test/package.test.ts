/** The package as `npm pack` makes it: another program imports it, with its types, and its command runs. */
import assert from 'node:assert/strict';
import { execFile } from 'node:child_process';
import fs from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { after, test } from 'node:test';
import { promisify } from 'node:util';
import { packageRoot } from '../coordinator/package-root.js';

const run = promisify(execFile);
const scratch = fs.mkdtempSync(path.join(os.tmpdir(), 'caravan-package-'));
after(() => {
  fs.rmSync(scratch, { recursive: true });
});

/** Unpacks the package into a folder beside the modules that it depends on. @returns the folder. */
async function install(): Promise<string> {
  const packing = ['pack', '--json', '--pack-destination', scratch];
  const { stdout } = await run('npm', packing, { cwd: packageRoot });
  const [{ filename }] = JSON.parse(stdout) as [{ filename: string }];
  const modules = path.join(scratch, 'node_modules');
  const installed = path.join(modules, 'caravan');
  fs.mkdirSync(installed, { recursive: true });
  const unpacking = ['-xzf', path.join(scratch, filename), '-C', installed];
  await run('tar', [...unpacking, '--strip-components=1']);
  const own = path.join(packageRoot, 'node_modules');
  for (const name of fs.readdirSync(own)) {
    fs.symlinkSync(path.join(own, name), path.join(modules, name));
  }
  return installed;
}

const program = `
import { CaravanClient } from 'caravan/client';
import { CaravanError, Llama, type ChatPrediction, type Dialog } from 'caravan';

const llama = await Llama.build();
const dialog: Dialog = [{ role: 'user', content: 'Tell me a story about a fox.' }];
const [answer]: ChatPrediction[] = await llama.chatCompletion([dialog], { temperature: 0, maxGenLen: 6 });
const text: string = answer!.generation.content;
const refusal: unknown = await llama.textCompletion(['a'], { topP: 2 }).catch((error: unknown) => error);
console.log(JSON.stringify([text, refusal instanceof CaravanError && refusal.code]));
await llama.close();
const stream: AsyncIterable<{ choices: { delta: { content?: string | undefined } }[] }> = new CaravanClient().streamChat({ messages: [] });
void stream;
`;

void test('a program imports the packed package and its types, and the packed command runs', async () => {
  const installed = await install();
  assert.ok(!fs.existsSync(path.join(installed, 'dist/test')));
  fs.writeFileSync(path.join(scratch, 'package.json'), '{"type": "module"}');
  fs.writeFileSync(path.join(scratch, 'program.ts'), program);
  const tsc = path.join(packageRoot, 'node_modules/typescript/bin/tsc');
  const strict = ['--strict', '--noUncheckedIndexedAccess', '--skipLibCheck', '--types', 'node'];
  const target = ['--module', 'nodenext', '--target', 'es2023'];
  await run(process.execPath, [tsc, ...strict, ...target, 'program.ts'], { cwd: scratch });
  const { stdout } = await run(process.execPath, ['program.js'], { cwd: scratch });
  const [text, code] = JSON.parse(stdout) as [string, string];
  assert.ok(text.length > 5, text);
  assert.equal(code, 'invalid_request');
  const tokenized = await run(path.join(installed, 'caravan'), ['tokenize', '--json', 'A llama'], {
    cwd: scratch,
  });
  assert.equal((JSON.parse(tokenized.stdout) as { ids: number[] }).ids.length, 2);
});
