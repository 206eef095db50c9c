/** Zip archives as torch.save writes them: entries as they are, at multiples of 64 bytes, zip64 where it is needed. */
import fs from 'node:fs';
import zlib from 'node:zlib';

export interface ZipEntry {
  readonly name: string;
  /** Bytes, or how many there are: a hole in the file, which takes no space. */
  readonly content: Uint8Array | number;
  /** 8 stands for deflate; what is written is the content all the same. */
  readonly method?: number;
}

const ALIGNMENT = 64;

const sizeOf = ({ content }: ZipEntry): number =>
  typeof content === 'number' ? content : content.length;

/** Holes have no CRC: it would be that of gigabytes of zeros. */
const crcOf = ({ content }: ZipEntry): number =>
  typeof content === 'number' ? 0 : zlib.crc32(content);

/** Bytes of a small archive. */
export function zipBytes(entries: readonly ZipEntry[]): Buffer {
  const parts: Buffer[] = [];
  layOut(entries, (bytes, at, holeBytes) => {
    const length = parts.reduce((sum, part) => sum + part.length, 0);
    parts.push(Buffer.alloc(at - length), Buffer.from(bytes), Buffer.alloc(holeBytes));
  });
  return Buffer.concat(parts);
}

export function writeZip(file: string, entries: readonly ZipEntry[]): void {
  const descriptor = fs.openSync(file, 'w');
  try {
    layOut(entries, (bytes, at, holeBytes) => {
      for (let done = 0; done < bytes.length;) {
        done += fs.writeSync(descriptor, bytes, done, bytes.length - done, at + done);
      }
      if (holeBytes > 0) fs.ftruncateSync(descriptor, at + bytes.length + holeBytes);
    });
  } finally {
    fs.closeSync(descriptor);
  }
}

type Put = (bytes: Uint8Array, at: number, holeBytes: number) => void;

function layOut(entries: readonly ZipEntry[], put: Put): void {
  const records: Buffer[] = [];
  let at = 0;
  for (const entry of entries) {
    const name = Buffer.from(entry.name);
    const headerOffset = at;
    const bare = at + 30 + name.length + 4;
    const padding = (ALIGNMENT - (bare % ALIGNMENT)) % ALIGNMENT;
    const header = Buffer.alloc(34 + name.length + padding, 'Z');
    // Sizes are in the directory.
    writeFields(header, 0, 0x04034b50, entry, name.length, 4 + padding);
    name.copy(header, 30);
    header.write('FB', 30 + name.length);
    header.writeUInt16LE(padding, 32 + name.length);
    const { content } = entry;
    put(header, at, 0);
    at += header.length;
    if (typeof content === 'number') put(new Uint8Array(0), at, content);
    else put(content, at, 0);
    at += sizeOf(entry);
    records.push(recordOf(entry, name, headerOffset));
  }
  const directory = Buffer.concat(records);
  put(directory, at, 0);
  put(endOf(entries.length, directory.length, at), at + directory.length, 0);
}

function writeFields(
  header: Buffer,
  from: number,
  signature: number,
  entry: ZipEntry,
  nameBytes: number,
  extraBytes: number,
): void {
  const isRecord = signature === 0x02014b50;
  const size = Math.min(sizeOf(entry), 0xffffffff);
  header.writeUInt32LE(signature, from);
  const at = from + (isRecord ? 6 : 4);
  if (isRecord) header.writeUInt16LE(0, from + 4);
  header.writeUInt16LE(0, at);
  header.writeUInt16LE(0x0808, at + 2);
  header.writeUInt16LE(entry.method ?? 0, at + 4);
  header.writeUInt32LE(0, at + 6);
  header.writeUInt32LE(crcOf(entry), at + 10);
  header.writeUInt32LE(size, at + 14);
  header.writeUInt32LE(size, at + 18);
  header.writeUInt16LE(nameBytes, at + 22);
  header.writeUInt16LE(extraBytes, at + 24);
}

function recordOf(entry: ZipEntry, name: Buffer, headerOffset: number): Buffer {
  const size = sizeOf(entry);
  const wide = [
    ...(size >= 0xffffffff ? [size, size] : []),
    ...(headerOffset >= 0xffffffff ? [headerOffset] : []),
  ];
  const extra = Buffer.alloc(wide.length === 0 ? 0 : 4 + 8 * wide.length);
  if (wide.length > 0) {
    extra.writeUInt16LE(1, 0);
    extra.writeUInt16LE(8 * wide.length, 2);
    wide.forEach((value, i) => extra.writeBigUInt64LE(BigInt(value), 4 + 8 * i));
  }
  const record = Buffer.alloc(46);
  writeFields(record, 0, 0x02014b50, entry, name.length, extra.length);
  record.writeUInt32LE(Math.min(headerOffset, 0xffffffff), 42);
  return Buffer.concat([record, name, extra]);
}

/** PyTorch writes the zip64 end always. */
function endOf(entryCount: number, directoryBytes: number, directoryOffset: number): Buffer {
  const end = Buffer.alloc(56 + 20 + 22);
  end.writeUInt32LE(0x06064b50, 0);
  end.writeBigUInt64LE(44n, 4);
  end.writeUInt16LE(45, 14);
  end.writeBigUInt64LE(BigInt(entryCount), 24);
  end.writeBigUInt64LE(BigInt(entryCount), 32);
  end.writeBigUInt64LE(BigInt(directoryBytes), 40);
  end.writeBigUInt64LE(BigInt(directoryOffset), 48);
  end.writeUInt32LE(0x07064b50, 56);
  end.writeBigUInt64LE(BigInt(directoryOffset + directoryBytes), 64);
  end.writeUInt32LE(1, 72);
  end.writeUInt32LE(0x06054b50, 76);
  end.writeUInt16LE(Math.min(entryCount, 0xffff), 84);
  end.writeUInt16LE(Math.min(entryCount, 0xffff), 86);
  end.writeUInt32LE(Math.min(directoryBytes, 0xffffffff), 88);
  end.writeUInt32LE(Math.min(directoryOffset, 0xffffffff), 92);
  return end;
}
