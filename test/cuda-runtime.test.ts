/** What of CUDA's own library is called, with which arguments, and what becomes of its errors: no GPU is needed for it. */
import assert from 'node:assert/strict';
import { test } from 'node:test';
import { CaravanError } from '../proto/errors.js';
import { Capturing, Launch, type Captured } from '../worker/device-launch.js';
import { CudaRuntime } from '../worker/ort-cuda.js';
import type { CudaFunction, CudaLibrary } from '../worker/ort-cuda-library.js';

const STREAM = 70n;

/** A library that notes its calls, and answers errors by function. */
function library(errors: Record<string, number> = {}) {
  const calls: [name: string, ...args: unknown[]][] = [];
  const outs: Record<string, unknown> = {
    ...{ streamCreate: STREAM, malloc: 4096n, ipcOpenMemHandle: 8192n },
    ...{
      streamEndCapture: 11n,
      graphInstantiate: 12n,
      getDeviceCount: 3,
      hostGetDevicePointer: 8n,
    },
  };
  const table = new Proxy({} as CudaLibrary, {
    get: (_, name: string) => {
      if (name === 'getErrorString') return (code: number) => `error ${code} in words`;
      const call: CudaFunction = (...args) => {
        calls.push([name, ...args]);
        const out = args.find((arg): arg is unknown[] => Array.isArray(arg));
        if (out !== undefined) out[0] = outs[name];
        if (name === 'deviceCanAccessPeer') out![0] = args[2] === 2 ? 0 : 1;
        if (name === 'ipcGetMemHandle') (args[0] as Buffer).fill(9);
        return errors[name] ?? 0;
      };
      return call;
    },
  });
  return { calls, table, names: () => calls.map(([name]) => name) };
}

const says = (pattern: RegExp) => (error: unknown) =>
  error instanceof CaravanError && error.code === 'bad_usage' && pattern.test(error.message);

void test("memory for peers is a block of its own, under CUDA's handle, and stays for the next group", () => {
  const { calls, table, names } = library();
  const cuda = new CudaRuntime(table, 3);
  const block = cuda.share(1000);
  assert.equal(block.address, 4096n);
  assert.equal(block.handle, Buffer.alloc(64, 9).toString('base64'));
  block.close();
  assert.equal(cuda.share(600).handle, block.handle);
  assert.equal(cuda.share(1000).handle, block.handle);
  assert.equal(names().filter((name) => name === 'malloc').length, 1);
  // Nobody may meet what the last group left.
  assert.deepEqual(
    calls
      .filter(([name]) => name === 'memsetAsync')
      .map(([, address, , bytes]) => [address, bytes]),
    [1000, 600, 1000].map((bytes) => [4096n, bytes]),
  );
  cuda.share(2000);
  assert.equal(names().filter((name) => name === 'malloc').length, 2);
  assert.equal(names().filter((name) => name === 'free').length, 1);
});

void test("a peer's memory is opened by its handle, by value, and closed once", () => {
  const { calls, table } = library();
  const cuda = new CudaRuntime(table, 0);
  const block = cuda.open(Buffer.alloc(64, 7).toString('base64'));
  const [, out, handle, flags] = calls.find(([name]) => name === 'ipcOpenMemHandle')!;
  assert.deepEqual(out, [8192n]);
  assert.deepEqual(handle, { reserved: new Uint8Array(64).fill(7) });
  assert.equal(flags, 1);
  assert.equal(block.address, 8192n);
  block.close();
  assert.deepEqual(calls.at(-1), ['ipcCloseMemHandle', 8192n]);
  assert.throws(() => cuda.open('short'), /handle has \d+ bytes/);
});

void test('what CUDA refuses is said in its words, and is no error of whoever asks next', () => {
  for (const [name, act, says1] of [
    [
      'ipcOpenMemHandle',
      (c: CudaRuntime) => c.open(Buffer.alloc(64).toString('base64')),
      /cuda:1: a peer's memory: error 217 in words/,
    ],
    [
      'ipcGetMemHandle',
      (c: CudaRuntime) => c.share(10),
      /cuda:1: a handle for other processes: error 217/,
    ],
    ['malloc', (c: CudaRuntime) => c.share(10), /cuda:1: 10 bytes that peers can read: error 217/],
  ] as const) {
    const { table, names } = library({ [name]: 217 });
    const cuda = new CudaRuntime(table, 1);
    assert.throws(() => act(cuda), says(says1));
    assert.ok(names().lastIndexOf('getLastError') > names().indexOf(name));
    // A block without a handle is not kept.
    assert.equal(names().includes('free'), name === 'ipcGetMemHandle');
  }
});

void test('a GPU knows whose memory it can read', () => {
  assert.deepEqual(new CudaRuntime(library().table, 2).readablePeers(), [0, 1, 2]);
  assert.deepEqual(new CudaRuntime(library().table, 0).readablePeers(), [0, 1]);
});

void test('what is captured is begun, ended, made a graph and launched on the stream', () => {
  const { calls, table, names } = library();
  const cuda = new CudaRuntime(table, 0);
  const before = calls.length;
  const captured = cuda.capture(() => {
    cuda.clear(5n, 8);
  });
  captured.launch();
  captured.launch();
  captured.release();
  assert.deepEqual(names().slice(before), [
    ...['streamBeginCapture', 'memsetAsync', 'streamEndCapture', 'graphInstantiate'],
    ...['graphDestroy', 'graphLaunch', 'graphLaunch', 'graphExecDestroy'],
  ]);
  assert.deepEqual(calls[before], ['streamBeginCapture', STREAM, 2]);
  assert.deepEqual(calls.at(-2), ['graphLaunch', 12n, STREAM]);
});

void test('the stream writes and awaits numbers in memory of the host, which it is shown and forgets', () => {
  const { calls, table, names } = library();
  const told: unknown[][] = [];
  const driver = {
    streamWriteValue: (...args: unknown[]) => told.push(['write', ...args]) * 0,
    streamWaitValue: (...args: unknown[]) => told.push(['wait', ...args]) * 0,
  };
  assert.equal(new CudaRuntime(table, 0).signals, null);
  const { signals } = new CudaRuntime(table, 0, driver);
  const page = signals!.map(4096n, 4096);
  assert.equal(page.address, 8n);
  assert.deepEqual(calls.at(-2), ['hostRegister', 4096n, 4096, 2]);
  // Numbers wrap.
  signals!.show(page.address, 7);
  signals!.await(page.address, -1);
  assert.deepEqual(told, [
    ['write', STREAM, 8n, 7, 0],
    ['wait', STREAM, 8n, 0xffffffff, 0],
  ]);
  page.release();
  assert.deepEqual(calls.at(-1), ['hostUnregister', 4096n]);
  assert.ok(signals!.isIdle());
  const busy = new CudaRuntime(library({ streamQuery: 600 }).table, 0, driver);
  assert.ok(!busy.signals!.isIdle());
  const lost = new CudaRuntime(library({ streamQuery: 700 }).table, 0, driver);
  assert.throws(() => lost.signals!.isIdle(), says(/the stream: error 700 in words/));
  const refusing = { ...driver, streamWaitValue: () => 801 };
  const none = new CudaRuntime(table, 5, refusing).signals!;
  assert.throws(
    () => {
      none.await(8n, 1);
    },
    says(/cuda:5: .*CUresult 801/),
  );
  assert.ok(names().includes('streamQuery'));
});

void test('a capture that fails is ended, and the runs are made one by one from then on', () => {
  const cases: [Record<string, number>, boolean, RegExp][] = [
    [{ streamBeginCapture: 900 }, false, /begin of capture: error 900/],
    [{ streamEndCapture: 901 }, false, /capture: error 901/],
    [{ graphInstantiate: 902 }, false, /a captured graph: error 902/],
    [{}, true, /a kernel that waits/],
  ];
  for (const [errors, throws, fault] of cases) {
    const { table, names } = library(errors);
    const cuda = new CudaRuntime(table, 0);
    const capturing = new Capturing(cuda, '');
    let isCapturing = 0;
    const run = (): void => {
      isCapturing += 1;
      if (throws && names().at(-1) === 'streamBeginCapture') throw new Error('a kernel that waits');
    };
    const launch = new Launch([{ run }], capturing);
    for (let i = 0; i < 5; i += 1) launch.run(256);
    assert.match(capturing.fault ?? '', fault);
    assert.ok(!launch.isCaptured);
    assert.ok(!names().includes('graphLaunch'));
    // Whatever was begun is ended, once, and all five are computed.
    const count = (name: string): number => names().filter((own) => own === name).length;
    assert.equal(count('streamEndCapture'), 'streamBeginCapture' in errors ? 0 : 1);
    assert.equal(isCapturing, 'streamBeginCapture' in errors ? 5 : 6);
  }
});

void test('runs are captured at their third use, and anew when a length grows', () => {
  const log: string[] = [];
  let graph = 0;
  let total = 0;
  const run = (): void => void log.push(`run ${total}`);
  const capturer = {
    capture: (issue: () => void): Captured => {
      graph += 1;
      const name = `graph ${graph}`;
      log.push(`${name}:`);
      issue();
      return {
        launch: () => void log.push(name),
        release: () => void log.push(`${name} ends`),
      };
    },
  };
  const launch = new Launch([{ run }], new Capturing(capturer, ''));
  for (total of [256, 256, 256, 256, 512, 512, 512]) launch.run(total);
  launch.release();
  assert.deepEqual(log, [
    ...['run 256', 'run 256', 'graph 1:', 'run 256', 'graph 1', 'graph 1'],
    ...['graph 1 ends', 'run 512', 'graph 2:', 'run 512', 'graph 2', 'graph 2', 'graph 2 ends'],
  ]);
  const plain = new Launch([{ run }], null);
  for (let i = 0; i < 4; i += 1) plain.run(1);
  assert.ok(!plain.isCaptured);
});
