/** Checkpoints in Hugging Face layout: config.json beside safetensors. */
import { createHash } from 'node:crypto';
import fs from 'node:fs';
import path from 'node:path';
import { z } from 'zod';
import { CaravanError } from '../proto/errors.js';
import { quoted } from './quoted.js';
import type { Checkpoint } from './checkpoint.js';
import { parseHuggingFaceConfig } from './config.js';
import { readSafetensorsHeader } from './safetensors.js';
import { wholeTensor, type TensorSource } from './stored-tensor.js';
import { readFolderTokenizer } from './tokenizer-files.js';

const indexFile = z.object({ weight_map: z.record(z.string(), z.string()) });

/**
 * Opens a folder in Hugging Face layout: config.json beside model.safetensors, or beside
 * model.safetensors.index.json and the files that it names. Reads headers only.
 *
 * @throws CaravanError `invalid_checkpoint` or `unsupported_model`, naming file, field and rule.
 */
export function openHuggingFace(folder: string): Checkpoint {
  const configPath = path.join(folder, 'config.json');
  if (!fs.existsSync(configPath)) {
    const gguf = fs.readdirSync(folder).find((name) => name.endsWith('.gguf'));
    const hint = gguf === undefined ? '' : `; to open ${quoted(gguf)}, name the file itself`;
    throw new CaravanError(
      'unsupported_model',
      `${folder}: has neither config.json, as Hugging Face's layout has, nor params.json, as Meta's${hint}`,
    );
  }
  const configText = fs.readFileSync(configPath, 'utf8');
  const config = parseHuggingFaceConfig(configText, 'config.json');
  const hash = createHash('sha256').update(configText);
  const stamps: string[] = [];
  const tensors = new Map<string, TensorSource>();
  let headerBytes = Buffer.byteLength(configText);
  for (const file of safetensorsFiles(folder)) {
    const header = readSafetensorsHeader(file);
    headerBytes += 8 + header.bytes.length;
    hash.update(path.basename(file)).update(header.bytes);
    const stat = fs.statSync(file);
    stamps.push(`${file} ${stat.size} ${stat.mtimeMs}`);
    for (const [name, tensor] of header.tensors) tensors.set(name, wholeTensor(tensor));
  }
  return {
    path: folder,
    layout: 'huggingface',
    config,
    tensors,
    digest: hash.digest('hex'),
    localStamp: stamps.join('\n'),
    headerBytes,
    readTokenizerFiles: () => readFolderTokenizer(folder),
  };
}

function safetensorsFiles(folder: string): string[] {
  const single = path.join(folder, 'model.safetensors');
  const index = path.join(folder, 'model.safetensors.index.json');
  if (!fs.existsSync(index)) {
    if (fs.existsSync(single)) return [single];
    throw new CaravanError(
      'invalid_checkpoint',
      `${folder}: has neither model.safetensors nor model.safetensors.index.json`,
    );
  }
  let parsed;
  try {
    parsed = indexFile.parse(JSON.parse(fs.readFileSync(index, 'utf8')));
  } catch (cause) {
    throw new CaravanError(
      'invalid_checkpoint',
      `${path.basename(index)}: weight_map is not a map of tensor to file`,
      { cause },
    );
  }
  const names = [...new Set(Object.values(parsed.weight_map))].sort();
  for (const name of names) {
    if (path.basename(name) !== name) {
      throw new CaravanError(
        'invalid_checkpoint',
        `${path.basename(index)}: ${name} lies outside the folder`,
      );
    }
  }
  return names.map((name) => path.join(folder, name));
}
