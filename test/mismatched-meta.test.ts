/** Folders of Meta's layout whose files do not fit together: each is refused in one line that says why. */
import fs from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { after, before, test } from 'node:test';
import { embeddedModelPath, openCheckpoint } from '../model/checkpoint.js';
import { readPthFile } from '../model/pth.js';
import { rewriteAsMeta } from './meta-checkpoint.js';
import { writePth, type PthTensor } from './pth-writer.js';
import { assertRefused } from './refusal.js';

const scratch = fs.mkdtempSync(path.join(os.tmpdir(), 'caravan-mismatched-'));
after(() => {
  fs.rmSync(scratch, { recursive: true });
});

const good = path.join(scratch, 'good');
before(() => rewriteAsMeta(good, embeddedModelPath(), 4, 'F16'));

/** A copy of a checkpoint of four files. */
function copyOf(name: string): string {
  const folder = path.join(scratch, name);
  fs.mkdirSync(folder);
  for (const entry of fs.readdirSync(good))
    fs.linkSync(path.join(good, entry), path.join(folder, entry));
  return folder;
}

const replace = (folder: string, name: string, content: string): void => {
  fs.rmSync(path.join(folder, name));
  fs.writeFileSync(path.join(folder, name), content);
};

const editParams = (folder: string, change: object): void => {
  const text = fs.readFileSync(path.join(folder, 'params.json'), 'utf8');
  replace(folder, 'params.json', JSON.stringify({ ...(JSON.parse(text) as object), ...change }));
};

/** One tensor of the third file in another shape. */
function reshape(folder: string, name: string, shape: readonly number[]): void {
  const third = path.join(folder, 'consolidated.02.pth');
  const tensors = [...readPthFile(third).tensors].map(([key, tensor], i): PthTensor => {
    const own = key === name ? shape : tensor.shape;
    const elementCount = own.reduce((a, b) => a * b, 1);
    return { name: key, storage: { key: String(i), format: 'F16', elementCount }, shape: own };
  });
  fs.rmSync(third);
  writePth(third, tensors);
}

const refusedFolders: readonly [name: string, damage: (folder: string) => void, says: RegExp][] = [
  [
    'a file missing in the middle',
    (f) => {
      fs.rmSync(`${f}/consolidated.01.pth`);
    },
    /consolidated\.01\.pth: is missing/,
  ],
  [
    'the last file missing',
    (f) => {
      fs.rmSync(`${f}/consolidated.03.pth`);
    },
    /has 3 of the 4 files/,
  ],
  [
    'no file',
    (f) => {
      for (const i of [0, 1, 2, 3]) fs.rmSync(`${f}/consolidated.0${i}.pth`);
    },
    /no consolidated\.00/,
  ],
  [
    'params.json that is no JSON',
    (f) => {
      replace(f, 'params.json', '{"dim":');
    },
    /params\.json: is not valid JSON/,
  ],
  [
    'params.json without dim',
    (f) => {
      editParams(f, { dim: undefined });
    },
    /params\.json: dim/,
  ],
  [
    '10^9 layers',
    (f) => {
      editParams(f, { n_layers: 1e9 });
    },
    /params\.json: n_layers/,
  ],
  [
    'a negative number of heads',
    (f) => {
      editParams(f, { n_heads: -8 });
    },
    /params\.json: n_heads/,
  ],
  [
    'more layers than there are',
    (f) => {
      editParams(f, { n_layers: 7 });
    },
    /layers\.6\.attention_norm.*missing/,
  ],
  [
    'fewer layers than there are',
    (f) => {
      editParams(f, { n_layers: 5 });
    },
    /layers\.5\..*no tensor of a Llama 2/,
  ],
  [
    'Llama 3.1',
    (f) => {
      editParams(f, { use_scaled_rope: true });
    },
    /use_scaled_rope is true/,
  ],
  [
    'no tokenizer for vocab_size -1',
    (f) => {
      fs.rmSync(`${f}/tokenizer.model`);
    },
    /vocab_size is -1.*tokenizer\.model/,
  ],
  [
    'a head in two files',
    (f) => {
      reshape(f, 'layers.2.attention.wk.weight', [24, 128]);
    },
    /consolidated\.02\.pth: layers\.2\.attention\.wk\.weight: has 24 rows, which are not whole heads of 16/,
  ],
  [
    'pieces that do not fit together',
    (f) => {
      reshape(f, 'layers.2.feed_forward.w2.weight', [64, 88]);
    },
    /consolidated\.02\.pth: layers\.2\.feed_forward\.w2\.weight: shape is \[64, 88\]; that of/,
  ],
];

for (const [name, damage, says] of refusedFolders) {
  void test(`a folder is refused: ${name}`, () => {
    const folder = copyOf(`folder-${name.replace(/\W/g, '-')}`);
    damage(folder);
    assertRefused(() => openCheckpoint(folder), says);
  });
}
