/** Checkpoints in Hugging Face's layout, made of another of the same layout: in shards, in bfloat16. */
import fs from 'node:fs';
import path from 'node:path';

interface Entry {
  readonly dtype: string;
  readonly shape: readonly number[];
  readonly data_offsets: readonly [number, number];
}

/**
 * Rewrites model.safetensors (float32) as `shardCount` files of bfloat16, rounded to even, with the index that names
 * them. The other files are copied.
 */
export function rewriteAsBfloat16(folder: string, from: string, shardCount: number): void {
  fs.mkdirSync(folder, { recursive: true });
  for (const entry of fs.readdirSync(from, { withFileTypes: true })) {
    if (!entry.isFile() || entry.name.endsWith('.safetensors')) continue;
    fs.copyFileSync(path.join(from, entry.name), path.join(folder, entry.name));
  }
  const bytes = fs.readFileSync(path.join(from, 'model.safetensors'));
  const dataStart = 8 + Number(bytes.readBigUInt64LE(0));
  const header = JSON.parse(bytes.toString('utf8', 8, dataStart)) as Record<string, Entry>;
  const tensors = Object.entries(header).filter(([name]) => name !== '__metadata__');
  const perShard = Math.ceil(tensors.length / shardCount);
  const weightMap: Record<string, string> = {};
  const digits = (n: number): string => String(n).padStart(5, '0');
  for (let shard = 0; shard < shardCount; shard += 1) {
    const file = `model-${digits(shard + 1)}-of-${digits(shardCount)}.safetensors`;
    const entries: Record<string, Entry> = {};
    const data: Uint8Array[] = [];
    let end = 0;
    for (const [name, { dtype, shape, data_offsets }] of tensors.slice(
      shard * perShard,
      (shard + 1) * perShard,
    )) {
      if (dtype !== 'F32') throw new Error(`${name} is ${dtype}`);
      const [begin, after] = data_offsets;
      const halves = toBfloat16(bytes.subarray(dataStart + begin, dataStart + after));
      entries[name] = { dtype: 'BF16', shape, data_offsets: [end, end + halves.length] };
      end += halves.length;
      data.push(halves);
      weightMap[name] = file;
    }
    const json = Buffer.from(JSON.stringify(entries));
    const length = Buffer.alloc(8);
    length.writeBigUInt64LE(BigInt(json.length));
    fs.writeFileSync(path.join(folder, file), Buffer.concat([length, json, ...data]));
  }
  const index = { metadata: {}, weight_map: weightMap };
  fs.writeFileSync(path.join(folder, 'model.safetensors.index.json'), JSON.stringify(index));
}

/** The upper halves of float32, rounded to even. */
function toBfloat16(floats: Buffer): Buffer {
  const halves = Buffer.alloc(floats.length / 2);
  for (let at = 0; at < floats.length; at += 4) {
    const bits = floats.readUInt32LE(at);
    halves.writeUInt16LE(((bits + 0x7fff + ((bits >>> 16) & 1)) >>> 16) & 0xffff, at / 2);
  }
  return halves;
}
