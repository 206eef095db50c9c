/**
 * Whatever is wrong with a checkpoint or a group: one line that names file, field or rule, a non-zero exit, no stack
 * trace, and no waiting.
 */
import assert from 'node:assert/strict';
import fs from 'node:fs';
import net from 'node:net';
import os from 'node:os';
import path from 'node:path';
import { after, test } from 'node:test';
import { planGroup } from '../coordinator/group-spec.js';
import { startLocalRank, stopLocalRank } from '../coordinator/local-ranks.js';
import { Ranks } from '../coordinator/ranks.js';
import { openCheckpoint } from '../model/checkpoint.js';
import type { LlamaConfig } from '../model/config.js';
import { CaravanError, type ErrorCode } from '../proto/errors.js';
import { runCli } from './cli.js';
import { writeRandomCheckpoint } from './random-checkpoint.js';

const config: LlamaConfig = {
  hiddenSize: 32,
  ffnSize: 48,
  layerCount: 2,
  headCount: 4,
  kvHeadCount: 2,
  headSize: 8,
  vocabSize: 64,
  maxPositions: 64,
  normEps: 1e-5,
  ropeTheta: 10_000,
  isHeadTied: false,
};

const scratch = fs.mkdtempSync(path.join(os.tmpdir(), 'caravan-bad-'));
after(() => {
  fs.rmSync(scratch, { recursive: true });
});
const tokens = path.join(scratch, 'tokens.json');
fs.writeFileSync(tokens, '[1, 2, 3]');

let made = 0;
function goodCheckpoint(shardCount: number): string {
  const folder = path.join(scratch, `model-${(made += 1)}`);
  writeRandomCheckpoint(folder, { config, seed: 1, format: 'F32', shardCount });
  return folder;
}

interface Header {
  [tensor: string]: { dtype: string; shape: number[]; data_offsets: [number, number] };
}

/** Rewrites the header of a file; the data stay as they are. */
function editHeader(folder: string, edit: (header: Header) => void): void {
  const file = path.join(folder, 'model.safetensors');
  const bytes = fs.readFileSync(file);
  const dataStart = 8 + Number(bytes.readBigUInt64LE(0));
  const header = JSON.parse(bytes.toString('utf8', 8, dataStart)) as Header;
  edit(header);
  writeHeader(file, JSON.stringify(header), bytes.subarray(dataStart));
}

function writeHeader(file: string, text: string, data: Uint8Array): void {
  const length = Buffer.alloc(8);
  length.writeBigUInt64LE(BigInt(Buffer.byteLength(text)));
  fs.writeFileSync(file, Buffer.concat([length, Buffer.from(text), data]));
}

const q = 'model.layers.1.self_attn.q_proj.weight';
const down = 'model.layers.0.mlp.down_proj.weight';

interface Damage {
  readonly name: string;
  readonly shardCount?: number;
  readonly damage: (folder: string) => void;
  /** Must all be in the one line. */
  readonly says: readonly RegExp[];
}

const truncate = (file: string, byteCount: number): void => {
  fs.truncateSync(file, fs.statSync(file).size - byteCount);
};

const damages: Damage[] = [
  {
    name: 'a safetensors file that ends early',
    damage: (folder) => {
      truncate(path.join(folder, 'model.safetensors'), 100);
    },
    says: [/model\.safetensors/, /data_offsets/, /outside/],
  },
  {
    name: 'a shard that ends within its header',
    shardCount: 3,
    damage: (folder) => {
      fs.truncateSync(path.join(folder, 'model-00002-of-00003.safetensors'), 60);
    },
    says: [/model-00002-of-00003\.safetensors/, /header/, /60 bytes/],
  },
  {
    name: 'a file of three bytes',
    damage: (folder) => {
      fs.writeFileSync(path.join(folder, 'model.safetensors'), 'abc');
    },
    says: [/model\.safetensors/, /8 bytes/],
  },
  {
    name: 'a header longer than the file',
    damage: (folder) => {
      const length = Buffer.alloc(8);
      length.writeBigUInt64LE(1_000_000n);
      fs.writeFileSync(path.join(folder, 'model.safetensors'), length);
    },
    says: [/model\.safetensors/, /header of 1000000 bytes/],
  },
  {
    name: 'a header of absurd length',
    damage: (folder) => {
      fs.writeFileSync(path.join(folder, 'model.safetensors'), Buffer.alloc(64, 0xff));
    },
    says: [/model\.safetensors/, /header of \d+ bytes/],
  },
  {
    name: 'a header that is no JSON',
    damage: (folder) => {
      writeHeader(path.join(folder, 'model.safetensors'), '{"a": ', new Uint8Array(8));
    },
    says: [/model\.safetensors/, /header/, /JSON/],
  },
  {
    name: 'offsets that are no numbers',
    damage: (folder) => {
      editHeader(folder, (header) => {
        header[q]!.data_offsets = ['0', '4'] as unknown as [number, number];
      });
    },
    says: [/model\.safetensors/, /q_proj/, /data_offsets/],
  },
  {
    name: 'tensors that overlap',
    damage: (folder) => {
      editHeader(folder, (header) => {
        const [begin, end] = header[down]!.data_offsets;
        header[down]!.data_offsets = [begin - 4, end - 4];
      });
    },
    says: [/model\.safetensors/, /down_proj/, /overlap/],
  },
  {
    name: 'a tensor of the wrong shape',
    damage: (folder) => {
      editHeader(folder, (header) => {
        header[down]!.shape = [48, 32];
      });
    },
    says: [/down_proj/, /shape is \[48, 32\]/, /\[32, 48\]/],
  },
  {
    name: 'a shape that does not fit its bytes',
    damage: (folder) => {
      editHeader(folder, (header) => {
        header[q]!.shape = [32, 33];
      });
    },
    says: [/q_proj/, /\[32, 33\]/, /needs 4224 bytes, has 4096/],
  },
  {
    name: 'a dtype that is not supported',
    damage: (folder) => {
      editHeader(folder, (header) => {
        header[q]!.dtype = 'I32';
      });
    },
    says: [/q_proj/, /I32/, /F32, F16, BF16/],
  },
  {
    name: 'a dtype that does not fit its bytes',
    damage: (folder) => {
      editHeader(folder, (header) => {
        header[q]!.dtype = 'F16';
      });
    },
    says: [/q_proj/, /F16/, /bytes/],
  },
  {
    name: 'a tensor that is missing',
    damage: (folder) => {
      editHeader(folder, (header) => {
        Reflect.deleteProperty(header, q);
      });
    },
    says: [/q_proj/, /missing/],
  },
  {
    name: 'a shard of the index that is missing',
    shardCount: 3,
    damage: (folder) => {
      fs.rmSync(path.join(folder, 'model-00003-of-00003.safetensors'));
    },
    says: [/model-00003-of-00003\.safetensors/, /does not exist/],
  },
  {
    name: 'an index that is no JSON',
    shardCount: 2,
    damage: (folder) => {
      fs.writeFileSync(path.join(folder, 'model.safetensors.index.json'), '{');
    },
    says: [/model\.safetensors\.index\.json/],
  },
  {
    name: 'an index that leads out of the folder',
    shardCount: 2,
    damage: (folder) => {
      const index = { weight_map: { [q]: '../model.safetensors' } };
      fs.writeFileSync(path.join(folder, 'model.safetensors.index.json'), JSON.stringify(index));
    },
    says: [/index\.json/, /\.\.\/model\.safetensors/, /outside/],
  },
  {
    name: 'a config.json that is no JSON',
    damage: (folder) => {
      fs.writeFileSync(path.join(folder, 'config.json'), '{"hidden_size": 32,');
    },
    says: [/config\.json/, /JSON/],
  },
  {
    name: 'a config.json without a field',
    damage: (folder) => {
      const file = path.join(folder, 'config.json');
      const json = JSON.parse(fs.readFileSync(file, 'utf8')) as object;
      Reflect.deleteProperty(json, 'hidden_size');
      fs.writeFileSync(file, JSON.stringify(json));
    },
    says: [/config\.json/, /hidden_size/],
  },
  {
    name: 'no weights at all',
    damage: (folder) => {
      fs.rmSync(path.join(folder, 'model.safetensors'));
    },
    says: [/model\.safetensors/],
  },
];

async function assertRefused(args: readonly string[], says: readonly RegExp[]): Promise<void> {
  const { code, stdout, stderr } = await runCli(args);
  assert.ok(code === 1 || code === 2, `exit ${code ?? 'killed'}: ${stderr}`);
  assert.equal(stdout, '');
  const all = stderr.trimEnd().split('\n');
  // On a busy machine loading takes so long that its bars are shown.
  const lines = all.filter((line) => !/^rank \d+ [█░]/.test(line));
  assert.equal(lines.length, 1, stderr);
  assert.match(lines[0]!, /^caravan: /);
  for (const pattern of says) assert.match(lines[0]!, pattern);
  assert.doesNotMatch(stderr, /\bat .*\.(js|ts):\d+/);
}

for (const { name, shardCount, damage, says } of damages) {
  void test(`refused in one line: ${name}`, async () => {
    const folder = goodCheckpoint(shardCount ?? 1);
    damage(folder);
    await assertRefused(['eval', '--model', folder, '--tokens', tokens, '--tp', '2'], says);
  });
}

void test('refused in one line: a tp that cannot be', async () => {
  const folder = goodCheckpoint(1);
  for (const [tp, rule] of [
    ['5', /from 1 to 4/],
    ['0', /tp/],
    ['two', /tp/],
  ] as const) {
    const args = ['eval', '--model', folder, '--tokens', tokens, '--tp', tp];
    await assertRefused(args, [/tp/, new RegExp(tp), rule]);
  }
});

void test('refused in one line: more tokens than the context, or than the vocabulary', async () => {
  const folder = goodCheckpoint(1);
  const long = path.join(scratch, 'long.json');
  fs.writeFileSync(long, JSON.stringify(new Array(65).fill(1)));
  await assertRefused(['eval', '--model', folder, '--tokens', long], [/65 tokens/, /64 positions/]);
  const wrong = path.join(scratch, 'wrong.json');
  fs.writeFileSync(wrong, '[1, 64]');
  await assertRefused(['eval', '--model', folder, '--tokens', wrong], [/token 64/, /64/]);
});

void test('refused in one line: a model that is not there', async () => {
  const args = ['eval', '--tokens', tokens, '--model', path.join(scratch, 'nothing')];
  await assertRefused(args, [/nothing/, /no such file/]);
});

void test('a checkpoint that is whole is not refused', async () => {
  const { code, stderr } = await runCli([
    ...['eval', '--model', goodCheckpoint(3)],
    ...['--tokens', tokens, '--tp', '2'],
  ]);
  assert.equal(code, 0, stderr);
});

const isRefusal =
  (code: ErrorCode, ...says: RegExp[]) =>
  (error: unknown): boolean => {
    assert.ok(error instanceof CaravanError);
    assert.equal(error.code, code, error.message);
    for (const pattern of says) assert.match(error.message, pattern);
    return true;
  };

const spec = (folder: string) =>
  planGroup(openCheckpoint(folder), 1, {
    ...({ weights: 'auto', exact: false, maxSeqLen: undefined } as const),
    ...{ maxBatchSize: 1, maxStepRows: 16 },
  }).spec;

void test('a rank that is not there is named, also beside one that is', async () => {
  const folder = goodCheckpoint(1);
  const rank = await startLocalRank({ threads: 1, device: 'cpu', logLevel: 'silent' });
  // A port that was free a moment ago.
  const server = net.createServer().listen(0, '127.0.0.1');
  await new Promise((resolve) => server.once('listening', resolve));
  const { port } = server.address() as net.AddressInfo;
  await new Promise((resolve) => server.close(resolve));
  try {
    await assert.rejects(
      // Long enough for the rank that is there, on a busy machine too.
      Ranks.connect([rank.address, `127.0.0.1:${port}`], spec(folder), { connectTimeoutMs: 3_000 }),
      isRefusal('rank_unavailable', /rank 1/, new RegExp(String(port)), /3000 ms/),
    );
  } finally {
    await stopLocalRank(rank);
  }
});

void test('something else than a rank at the address is named', async () => {
  const folder = goodCheckpoint(1);
  // Takes connections and says nothing.
  const sockets = new Set<net.Socket>();
  const server = net.createServer((socket) => sockets.add(socket)).listen(0, '127.0.0.1');
  await new Promise((resolve) => server.once('listening', resolve));
  const { port } = server.address() as net.AddressInfo;
  try {
    await assert.rejects(
      Ranks.connect([`127.0.0.1:${port}`], spec(folder), { connectTimeoutMs: 500 }),
      isRefusal('rank_unavailable', /rank 0/),
    );
  } finally {
    for (const socket of sockets) socket.destroy();
    server.close();
  }
});

void test('a rank refuses a checkpoint that is not the coordinator’s, and stays usable', async () => {
  const folder = goodCheckpoint(1);
  const rank = await startLocalRank({ threads: 1, device: 'cpu', logLevel: 'silent' });
  try {
    const wrong = { ...spec(folder), checkpointDigest: '00' };
    await assert.rejects(
      Ranks.connect([rank.address], wrong),
      isRefusal('invalid_checkpoint', /digest/),
    );
    const ranks = await Ranks.connect([rank.address], spec(folder));
    ranks.close();
  } finally {
    await stopLocalRank(rank);
  }
});
