/** What the settings of a gateway say of files and batches. */
import type { BatchLimits } from './batches.js';
import type { Config, SettingName } from './config.js';
import { openStorage } from './file-place.js';
import type { FileStorage } from './file-storage.js';
import type { FileLimits } from './files.js';

export const fileSettingNames = [
  'files',
  'maxFileBytes',
  'maxStoredBytes',
  'maxBatches',
  'maxBatchLines',
  'batchLinesInFlight',
] as const satisfies readonly SettingName[];

/** @param folder where files are kept when no setting names a place. @throws CaravanError `bad_usage`. */
export async function fileSettings(
  config: Pick<Config, (typeof fileSettingNames)[number]>,
  folder: string,
): Promise<{
  readonly storage: FileStorage;
  readonly fileLimits: FileLimits;
  readonly batchLimits: BatchLimits;
}> {
  return {
    storage: await openStorage(config.files ?? folder),
    fileLimits: { fileBytes: config.maxFileBytes, storedBytes: config.maxStoredBytes },
    batchLimits: {
      lines: config.maxBatchLines,
      open: config.maxBatches,
      linesInFlight: config.batchLinesInFlight,
    },
  };
}
