/** Every setting that a process or a command may have: its flag, its rule in words and as a schema, its default. */
import { z } from 'zod';
import { isDeviceName } from '../model/device-name.js';
import { EMBEDDED_MODEL } from './package-root.js';
import { processSettings } from './process-settings.js';
import {
  addresses,
  byteCount,
  defaulted,
  fromText,
  number,
  onOff,
  onOffRule,
  optional,
  redisUrl,
  text,
  whole,
} from './setting.js';
import { WebhookPolicy } from './webhook-target.js';

const hosts = z.preprocess(
  (value) => (typeof value === 'string' ? value.split(',') : value),
  z.array(text).refine((entries) => {
    try {
      return new WebhookPolicy(entries) instanceof WebhookPolicy;
    } catch {
      return false;
    }
  }),
) as unknown as z.ZodType<readonly string[]>;

/** Every setting that more than one command or process shares. */
export const settingTable = {
  model: defaulted(EMBEDDED_MODEL, {
    argument: '<model>',
    description: 'folder of the checkpoint, hf:ORG/NAME, or caravan-tiny',
    rule: 'a folder or hf:ORG/NAME',
    schema: text,
  }),
  servedModelName: optional({
    argument: '<name>',
    description: "name that requests use (default: the folder's, or the file's)",
    rule: 'a name of letters, digits and . _ - /',
    schema: z.string().regex(/^[\w.\-/]{1,128}$/),
  }),
  tp: defaulted(1, {
    argument: '<n>',
    description: 'ranks to cut the model into',
    rule: 'a whole number from 1 to 256',
    schema: whole(1, 256),
  }),
  device: defaulted('cpu', {
    argument: '<device>',
    description: 'what ranks compute on: cpu, webgpu, cuda (rank i has GPU i) or cuda:N',
    rule: 'cpu, webgpu, cuda or cuda:N',
    schema: text.refine(isDeviceName),
  }),
  weights: defaulted('auto', {
    argument: '<mode>',
    description: 'how weights are held; auto takes the fastest that fits into memory',
    rule: 'one of auto, fp32, fp16, int8, int4, int4+int8',
    schema: z.enum(['auto', 'fp32', 'fp16', 'int8', 'int4', 'int4+int8']),
  }),
  kv: defaulted('auto', {
    argument: '<form>',
    description:
      'how keys and values are held: floats (auto), or int8, a quarter of the memory on a CPU',
    rule: 'one of auto, int8',
    schema: z.enum(['auto', 'int8']),
  }),
  exact: defaulted(false, {
    argument: null,
    description: 'same request, same tokens, bit for bit, whatever else runs',
    rule: onOffRule,
    schema: onOff,
  }),
  transport: defaulted('auto', {
    argument: '<transport>',
    description:
      'how ranks exchange partials: direct (GPU to GPU), shm (on one host), grpc, or auto',
    rule: 'one of auto, grpc, shm, direct',
    schema: z.enum(['auto', 'grpc', 'shm', 'direct']),
  }),
  speculation: defaulted('auto', {
    argument: '<when>',
    description: 'guess tokens from the text so far, and verify them: auto where it pays, or off',
    rule: 'one of auto, off',
    schema: z.enum(['auto', 'off']),
  }),
  weightCache: optional({
    argument: '<folder>',
    description:
      "folder where ranks keep their weights for the next start, or off (default: in the rank's cache folder)",
    rule: 'a folder or off',
    schema: text,
  }),
  weightCacheMax: defaulted(100e9, {
    argument: '<bytes>',
    description:
      'most bytes of all weights kept there, as 500MB or 1.5TB; the least recently used go',
    rule: 'a number of bytes up to 1PB, as 1000000, 500MB or 1.5TB',
    schema: byteCount(0, 1e15),
  }),
  maxSeqLen: optional({
    argument: '<n>',
    description: "positions of a slot, prompt and answer together (default: the model's context)",
    rule: 'a whole number from 2 to 1048576',
    schema: whole(2, 1_048_576),
  }),
  maxBatchSize: defaulted(16, {
    argument: '<n>',
    description: 'slots: sequences that run at once',
    rule: 'a whole number from 1 to 1024',
    schema: whole(1, 1024),
  }),
  host: defaulted('127.0.0.1', {
    argument: '<host>',
    description: 'address that the gateway, or the probes of an engine, listen on',
    rule: 'a host name or an IP address',
    schema: z.string().regex(/^[\w.:-]+$/),
  }),
  port: defaulted(8080, {
    argument: '<port>',
    description: 'port that the gateway listens on; 0 takes a free one',
    rule: 'a whole number from 0 to 65535',
    schema: whole(0, 65_535),
  }),
  scalerPort: optional({
    argument: '<port>',
    description:
      "port that answers KEDA's external scaler calls; 0 takes a free one (default: none)",
    rule: 'a whole number from 0 to 65535',
    schema: whole(0, 65_535),
  }),
  grpcPort: optional({
    argument: '<port>',
    description: 'port that serves jobs over gRPC; 0 takes a free one (default: none)',
    rule: 'a whole number from 0 to 65535',
    schema: whole(0, 65_535),
  }),
  redis: optional({
    argument: '<url>',
    description: 'Redis to use, redis://HOST:PORT',
    rule: 'a redis://, rediss://, redis+sentinel://, rediss+sentinel:// or unix:// URL',
    schema: redisUrl,
  }),
  ranks: optional({
    argument: '<addresses>',
    description: 'addresses of the ranks in rank order, HOST:PORT,HOST:PORT,…',
    rule: 'HOST:PORT,HOST:PORT,…',
    schema: addresses,
  }),
  url: defaulted('http://127.0.0.1:8080', {
    argument: '<url>',
    description: 'address of the gateway',
    rule: 'an http:// or https:// URL',
    schema: z.string().regex(/^https?:\/\/[^\s/]+\/?$/),
  }),
  apiKey: optional({
    argument: '<key>',
    description: 'key to show to the gateway',
    rule: 'a text without spaces',
    schema: z.string().regex(/^[\x21-\x7e]+$/),
  }),
  stateDir: optional({
    argument: '<folder>',
    description: "where the private Redis keeps its jobs (default: the user's data folder)",
    rule: 'a folder',
    schema: text,
  }),
  files: optional({
    argument: '<place>',
    description:
      "folder, or s3://BUCKET/PREFIX, of uploaded files and batch results (default: in the user's data folder)",
    rule: 'a folder or s3://BUCKET/PREFIX',
    schema: text,
  }),
  maxFileBytes: defaulted(209_715_200, {
    argument: '<n>',
    description: 'most bytes of one uploaded file',
    rule: 'a whole number from 1024 to 1099511627776',
    schema: whole(1024, 2 ** 40),
  }),
  maxStoredBytes: defaulted(2 ** 40, {
    argument: '<n>',
    description: 'most bytes of all files together',
    rule: 'a whole number from 1024 to 1125899906842624',
    schema: whole(1024, 2 ** 50),
  }),
  maxBatches: defaulted(100, {
    argument: '<n>',
    description: 'most batches that have not ended',
    rule: 'a whole number from 1 to 10000',
    schema: whole(1, 10_000),
  }),
  maxBatchLines: defaulted(50_000, {
    argument: '<n>',
    description: 'most requests of one batch',
    rule: 'a whole number from 1 to 10000000',
    schema: whole(1, 10_000_000),
  }),
  batchLinesInFlight: defaulted(256, {
    argument: '<n>',
    description: 'most requests of batches that a gateway has in the queue at once',
    rule: 'a whole number from 1 to 10000',
    schema: whole(1, 10_000),
  }),
  queueBoard: defaulted('read', {
    argument: '<mode>',
    description:
      "Bull Board under /queues: read, manage (BullMQ's jobs can be removed there) or off",
    rule: 'one of read, manage, off',
    schema: z.enum(['read', 'manage', 'off']),
  }),
  operators: optional({
    argument: '<tenants>',
    description:
      'tenants whose keys open Bull Board, where the jobs of all tenants stand, by comma',
    rule: 'names of tenants, separated by commas',
    schema: z.string().regex(/^[\w.-]{1,64}(,[\w.-]{1,64})*$/),
  }),
  webhookSecret: optional({
    argument: '<secret>',
    description: 'signs webhooks, whsec_… or any text; without it there are none',
    rule: 'at least 16 characters without spaces, whsec_ before base64',
    schema: z.string().regex(/^(whsec_[A-Za-z0-9+/]{22,}={0,2}|(?!whsec_)[\x21-\x7e]{16,})$/),
  }),
  webhookAllow: defaulted<readonly string[]>([], {
    argument: '<hosts>',
    description:
      'hosts, addresses and ranges that webhooks may call beside the public internet, by comma',
    rule: 'host names, addresses and ranges such as 10.0.0.0/8, separated by commas',
    schema: hosts,
  }),
  logLevel: defaulted('info', {
    argument: '<level>',
    description: 'least level of log lines on stderr: debug, info, warn, error or silent',
    rule: 'one of debug, info, warn, error, silent',
    schema: z.enum(['debug', 'info', 'warn', 'error', 'silent']),
  }),
  ...processSettings,
  json: defaulted(false, {
    argument: null,
    description: 'print JSON on stdout',
    rule: onOffRule,
    schema: onOff,
    isFlagOnly: true,
  }),
  prompt: optional({
    argument: '<text>',
    description: 'text to continue',
    rule: 'a text',
    schema: z.string(),
    isFlagOnly: true,
  }),
  chat: optional({
    argument: '<file>',
    description: 'JSON file of messages, [{"role", "content"}, …], to answer',
    rule: 'a file',
    schema: text,
    isFlagOnly: true,
  }),
  maxTokens: optional({
    argument: '<n>',
    description: 'most tokens to generate (default: what the context leaves)',
    rule: 'a whole number from 1 to 1048576',
    schema: whole(1, 1_048_576),
  }),
  temperature: optional({
    argument: '<t>',
    description: '0 takes the most likely token, higher is more varied',
    rule: 'a number from 0 to 2',
    schema: number(0, 2),
  }),
  topP: optional({
    argument: '<p>',
    description: 'draw from the most likely tokens whose probabilities reach this sum',
    rule: 'a number above 0 and up to 1',
    schema: z.preprocess(fromText, z.number().gt(0).max(1)),
  }),
  topK: optional({
    argument: '<k>',
    description: 'draw from the k most likely tokens; 0 keeps all',
    rule: 'a whole number from 0 to 1048576',
    schema: whole(0, 1_048_576),
  }),
  seed: optional({
    argument: '<n>',
    description: 'the same seed draws the same coins (default: drawn, and kept with the job)',
    rule: 'a whole number from 0 to 9007199254740991',
    schema: whole(0, Number.MAX_SAFE_INTEGER),
  }),
  stop: optional({
    argument: '<text>',
    description: 'text that ends the answer; may be given up to 16 times',
    rule: 'up to 16 texts, none empty',
    schema: z.array(text).max(16),
    isRepeatable: true,
    isFlagOnly: true,
  }),
  ignoreEos: defaulted(false, {
    argument: null,
    description: "do not stop at the model's end-of-sequence token",
    rule: onOffRule,
    schema: onOff,
    isFlagOnly: true,
  }),
  priority: optional({
    argument: '<n>',
    description: '1 is the most urgent, 1000 the least (default: 100)',
    rule: 'a whole number from 1 to 1000',
    schema: whole(1, 1000),
  }),
  tenant: optional({
    argument: '<name>',
    description: 'whose job it is (default: default)',
    rule: '1 to 64 letters, digits and . _ -',
    schema: z.string().regex(/^[\w.-]{1,64}$/),
  }),
  tenants: optional({
    argument: '<file>',
    description:
      'JSON file of tenants: their keys, weights and quotas (default: everybody is equal)',
    rule: 'a file',
    schema: text,
  }),
  apiKeys: optional({
    argument: '<file>',
    description: 'file of API keys, TENANT:KEY on each line; all calls need one then',
    rule: 'a file',
    schema: text,
  }),
  admission: defaulted('estimate', {
    argument: '<mode>',
    description: 'estimate refuses deadlines that the measured speed cannot meet; off takes all',
    rule: 'one of estimate, off',
    schema: z.enum(['estimate', 'off']),
  }),
  maxQueuedJobs: defaulted(100_000, {
    argument: '<n>',
    description: 'most jobs of a model that wait',
    rule: 'a whole number from 1 to 10000000',
    schema: whole(1, 10_000_000),
  }),
  maxQueuedTokens: defaulted(10_000_000_000, {
    argument: '<n>',
    description: 'most prompt and output tokens of a model that wait',
    rule: 'a whole number from 1 to 9007199254740991',
    schema: whole(1, Number.MAX_SAFE_INTEGER),
  }),
  maxBodyBytes: defaulted(16_777_216, {
    argument: '<n>',
    description: 'most bytes of a request, but for uploaded files',
    rule: 'a whole number from 1024 to 1073741824',
    schema: whole(1024, 2 ** 30),
  }),
  retention: defaulted(86_400, {
    argument: '<seconds>',
    description: 'how long jobs and their answers are kept once they have ended',
    rule: 'a whole number of seconds from 60 to 31536000',
    schema: whole(60, 31_536_000),
  }),
  aging: defaulted(600, {
    argument: '<seconds>',
    description: 'after this long a waiting job gets its turn whatever else there is',
    rule: 'a whole number of seconds from 1 to 31536000',
    schema: whole(1, 31_536_000),
  }),
  jobLock: defaulted(6, {
    argument: '<seconds>',
    description: 'how long an engine that has died keeps its jobs from others',
    rule: 'a whole number of seconds from 1 to 600',
    schema: whole(1, 600),
  }),
  deadline: optional({
    argument: '<seconds>',
    description: 'seconds from now after which the job expires',
    rule: 'a number of seconds above 0 and up to 31536000',
    schema: z.preprocess(fromText, z.number().gt(0).max(31_536_000)),
    isFlagOnly: true,
  }),
} as const;
