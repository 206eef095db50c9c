/** The files of a folder that say how its checkpoint is tokenized. */
import fs from 'node:fs';
import path from 'node:path';
import { TOKENIZER_FILES } from './tokenizer.js';

/**
 * Contents by name, of those in TOKENIZER_FILES that are there: what `openTokenizer` takes. Beside params.json there
 * may be no tokenizer.model: Meta's download puts it one folder above, for all models.
 */
export function readFolderTokenizer(folder: string): Map<string, Uint8Array> {
  const files = new Map<string, Uint8Array>();
  for (const name of TOKENIZER_FILES) {
    const file = path.join(folder, name);
    if (fs.existsSync(file)) files.set(name, fs.readFileSync(file));
  }
  const above = path.join(folder, '..', 'tokenizer.model');
  const isMeta = fs.existsSync(path.join(folder, 'params.json'));
  if (isMeta && !files.has('tokenizer.model') && fs.existsSync(above)) {
    files.set('tokenizer.model', fs.readFileSync(above));
  }
  return files;
}
