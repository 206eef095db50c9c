/** Opens the storage of files that a setting names. */
import { FileFolder } from './file-folder.js';
import type { FileStorage } from './file-storage.js';

/**
 * Opens the storage that a setting names: a folder, or `s3://BUCKET/PREFIX?endpoint=URL&region=REGION`.
 * Nothing is made or asked before the first use.
 *
 * @throws CaravanError `bad_usage`.
 */
export async function openStorage(place: string): Promise<FileStorage> {
  if (!place.startsWith('s3:')) return new FileFolder(place);
  // Only those who use it wait for its client to load.
  const { openBucket } = await import('./file-bucket.js');
  return openBucket(place);
}
