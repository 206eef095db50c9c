/**
 * The scripts of the journal. Each is atomic, and all keys of a job share the hash tag {job id}.
 *
 *   caravan:{ID}:job        hash: status, model, request, terms, createdMs, fence, cancel, ending, and of deaths: see below
 *   caravan:{ID}:journal:I  stream of sequence I. An entry's id is <tokens so far>-0, so that Redis
 *                           itself refuses a token twice. The last one, <tokens>-1, says how the sequence
 *                           finished, or how the job ended. The ending of a job of several sequences stands
 *                           in the first stream in any case, as <tokens>-2 if that sequence has finished.
 *   caravan:{ID}:prompt:I   list: the logprobs of the prompt of sequence I, token by token, where asked for.
 *
 * Every take of a job raises its fence: to the time in microseconds, so that no number is handed out
 * twice, even when Redis came back without its last second. A script that brings a lower fence than the
 * stored one is `stale` and changes nothing; a higher one is stored, should Redis have lost the take.
 * Redis may even have lost the job, if it was killed in the job's first second: the engine that runs it is
 * told that it is `missing`, and writes it down anew.
 *
 * A job may be what its engines die of. It is suspected of a death when its engine was gone, Redis was not, and nothing
 * had been written since the take:
 *
 *   progressed   fence of the last take that wrote something; the first write clears suspicion, alone and step
 *   run          the run of Redis at the last take
 *   suspicion    deaths; a job that has 2 runs alone, and only deaths then make it 3 and 4: the end
 *   alone, step  fence of the take that began to run alone, and the last step that it began
 */
import type { JobTerms, Request } from './request.js';
import { Script } from './store-script.js';

/**
 * Of what a job's keys mean. An engine takes jobs of this version and of all before it, and leaves later ones to later
 * engines; a change that an engine of the version before would misread raises it.
 */
export const JOURNAL_VERSION = 1;

/** Names jobs that have ended and are to be told by a webhook. */
export const WEBHOOK_CHANNEL = 'caravan:webhook';
/** Entries of a stream that may leave most of its first node empty. */
const SHORT_ENTRIES = 64;
/** Deaths after which a job runs alone. */
export const ALONE_FROM = 2;
/**
 * Deaths after which a job is dead: two while it ran alone. One alone may be chance, where engines die of other things and
 * a long replay writes nothing.
 */
export const DEAD_FROM = ALONE_FROM + 2;

/** Locals stored, died: counts a death that the job is suspected of. @returns the suspicion. */
const suspect = `
local suspicion = tonumber(redis.call('HGET', KEYS[1], 'suspicion') or '0')
if died and redis.call('HGET', KEYS[1], 'progressed') ~= stored
  and (suspicion < ${ALONE_FROM} or redis.call('HGET', KEYS[1], 'alone') == stored) then
  suspicion = suspicion + 1
  redis.call('HSET', KEYS[1], 'suspicion', suspicion)
end`;

/** Something was written: the take has come further. */
const progress = `
if redis.call('HGET', KEYS[1], 'progressed') ~= ARGV[1] then
  redis.call('HSET', KEYS[1], 'progressed', ARGV[1])
  redis.call('HDEL', KEYS[1], 'suspicion', 'alone', 'step')
end`;

/** Local create: writes down a job. @returns 1, or 0 when the job exists. */
export const createFunction = `
local function create(key, model, request, terms, createdMs)
  if redis.call('EXISTS', key) == 1 then return 0 end
  redis.call('HSET', key, 'version', '${JOURNAL_VERSION}', 'status', 'waiting', 'model', model, 'request', request,
    'terms', terms, 'createdMs', createdMs, 'fence', '0')
  return 1
end`;

/** What `create` is told of a job. */
export const createArgs = (request: Request, terms: JobTerms): (string | number)[] => [
  ...[request.model, JSON.stringify(request), JSON.stringify(terms), Date.now()],
];

/** KEYS job; ARGV as `createArgs`. @returns 1, or 0 when the job exists. */
export const createScript = new Script(`${createFunction}
return create(KEYS[1], unpack(ARGV))`);

/**
 * KEYS job; ARGV engine id, run of Redis.
 * @returns {missing}, {newer, version}, {ended} or {taken, fence, cancel, request, terms, suspicion, step, 1 when nobody
 * took it before: nothing of its sequences is written}.
 */
export const takeScript = new Script(`
local status = redis.call('HGET', KEYS[1], 'status')
if not status then return {'missing'} end
local version = redis.call('HGET', KEYS[1], 'version')
if tonumber(version or '1') > ${JOURNAL_VERSION} then return {'newer', version} end
if redis.call('HEXISTS', KEYS[1], 'ending') == 1 then return {'ended'} end
local stored = redis.call('HGET', KEYS[1], 'fence')
local died = status == 'active' and redis.call('HGET', KEYS[1], 'run') == ARGV[2]
${suspect}
local time = redis.call('TIME')
local now = tonumber(time[1]) * 1000000 + tonumber(time[2])
local fence = math.max(tonumber(stored) + 1, now)
fence = string.format('%.0f', fence)
redis.call('HSET', KEYS[1], 'fence', fence, 'status', 'active', 'engine', ARGV[1], 'run', ARGV[2])
return {'taken', fence, redis.call('HGET', KEYS[1], 'cancel') or '0', redis.call('HGET', KEYS[1], 'request'),
  redis.call('HGET', KEYS[1], 'terms'), suspicion, redis.call('HGET', KEYS[1], 'step') or '', stored == '0' and 1 or 0}`);

const fenced = `
if redis.call('HEXISTS', KEYS[1], 'status') == 0 then return {'missing'} end
local stored = tonumber(redis.call('HGET', KEYS[1], 'fence') or '0')
if tonumber(ARGV[1]) < stored then return {'stale'} end
if tonumber(ARGV[1]) > stored then redis.call('HSET', KEYS[1], 'fence', ARGV[1]) end`;

/** KEYS job; ARGV fence, step. A suspected job begins a step, alone. @returns {stale}, {missing} or {written}. */
export const stepScript = new Script(`${fenced}
redis.call('HSET', KEYS[1], 'alone', ARGV[1], 'step', ARGV[2])
return {'written'}`);

/** Where a stream stands: its tokens, and whether its last entry says that it is over. */
const streams = `
local function standOf(key)
  local last = redis.call('XREVRANGE', key, '+', '-', 'COUNT', 1)
  if not last[1] then return 0, false end
  local tokens, part = string.match(last[1][1], '^(%d+)-(%d+)$')
  return tonumber(tokens), part ~= '0'
end
local function writeEnding(count, ending, text)
  for i = 1, count do
    local offset, isOver = standOf(KEYS[i + 1])
    if not isOver then
      redis.call('XADD', KEYS[i + 1], offset .. '-1', 'ending', ending, 'text', i == 1 and text or '')
    elseif i == 1 then
      redis.call('XADD', KEYS[2], offset .. '-2', 'ending', ending, 'text', '')
    end
  end
end
-- Whoever is to be told by a webhook is told soon; a lost message costs some seconds.
local function tellWebhook()
  local terms = redis.call('HGET', KEYS[1], 'terms')
  if terms and string.find(terms, '"webhook":', 1, true) then
    redis.call('PUBLISH', '${WEBHOOK_CHANNEL}', string.match(KEYS[1], '{(.*)}'))
  end
end
local function expireAll(seconds)
  local terms = redis.call('HGET', KEYS[1], 'terms')
  seconds = terms and cjson.decode(terms).retentionS or seconds
  for _, key in ipairs(KEYS) do redis.call('EXPIRE', key, seconds) end
  -- A stream begins with 4 KB of room; one that was read from a dump takes what it needs. Nothing more comes.
  for _, key in ipairs(KEYS) do
    if redis.call('TYPE', key).ok == 'stream' and redis.call('XLEN', key) <= ${SHORT_ENTRIES} then
      local dump = redis.pcall('DUMP', key)
      if type(dump) == 'string' then redis.pcall('RESTORE', key, seconds * 1000, dump, 'REPLACE') end
    end
  end
end`;

/**
 * KEYS job, stream; ARGV fence, start, count, tokens, texts, channel, logprobs or empty.
 * @returns {stale}, {missing}, or {offset, where the stream ends} when that is not start, or {appended, cancel}.
 * A take that Redis lost (the stored fence is lower) is stale too when another engine has written since.
 */
export const appendScript = new Script(`${fenced}
if redis.call('HEXISTS', KEYS[1], 'ending') == 1 then return {'stale'} end
${streams}
local offset, isOver = standOf(KEYS[2])
if isOver or (stored < tonumber(ARGV[1]) and offset > tonumber(ARGV[2])) then return {'stale'} end
if offset ~= tonumber(ARGV[2]) then return {'offset', offset} end
local fields = {'tokens', ARGV[4], 'texts', ARGV[5]}
if ARGV[7] ~= '' then fields[5] = 'logprobs'; fields[6] = ARGV[7] end
redis.call('XADD', KEYS[2], (offset + tonumber(ARGV[3])) .. '-0', unpack(fields))
${progress}
redis.call('PUBLISH', ARGV[6], '')
return {'appended', redis.call('HGET', KEYS[1], 'cancel') or '0'}`);

/**
 * KEYS job, list; ARGV fence, start, channel, then logprobs, one a token of the prompt.
 * @returns {stale}, {missing}, or {offset, length of the list} when that is not start, or {appended}.
 */
export const appendPromptScript = new Script(`${fenced}
if redis.call('HEXISTS', KEYS[1], 'ending') == 1 then return {'stale'} end
local length = redis.call('LLEN', KEYS[2])
if length ~= tonumber(ARGV[2]) then return {'offset', length} end
redis.call('RPUSH', KEYS[2], unpack(ARGV, 4))
${progress}
redis.call('PUBLISH', ARGV[3], '')
return {'appended'}`);

/**
 * KEYS job, stream; ARGV fence, tokens, reason, held-back text, channel. One of several sequences is over.
 * @returns {stale}, {missing}, {already}, {offset, where the stream ends} or {finished}.
 */
export const finishScript = new Script(`${fenced}
if redis.call('HEXISTS', KEYS[1], 'ending') == 1 then return {'stale'} end
${streams}
local offset, isOver = standOf(KEYS[2])
if stored < tonumber(ARGV[1]) and offset > tonumber(ARGV[2]) then return {'stale'} end
if offset ~= tonumber(ARGV[2]) then return {'offset', offset} end
if isOver then return {'already'} end
redis.call('XADD', KEYS[2], offset .. '-1', 'finish', ARGV[3], 'text', ARGV[4])
${progress}
redis.call('PUBLISH', ARGV[5], '')
return {'finished'}`);

/**
 * KEYS job, streams, lists; ARGV fence, status, ending, held-back text, retention in seconds, channel, then of every
 * stream its tokens, negative and less 1 if its sequence must have finished: -1 for none.
 * @returns {stale}, {missing}, {already}, {offset, where a stream ends, number of the stream} or {ended}.
 */
export const endScript = new Script(`
if redis.call('HEXISTS', KEYS[1], 'ending') == 1 then return {'already'} end
${fenced}
${streams}
local count = #ARGV - 6
for i = 1, count do
  local wanted = tonumber(ARGV[i + 6])
  local mustBeOver = wanted < 0
  if mustBeOver then wanted = -wanted - 1 end
  local offset, isOver = standOf(KEYS[i + 1])
  if stored < tonumber(ARGV[1]) and offset > wanted then return {'stale'} end
  if offset ~= wanted or (mustBeOver and not isOver) then return {'offset', offset, i - 1} end
end
writeEnding(count, ARGV[3], ARGV[4])
redis.call('HSET', KEYS[1], 'status', ARGV[2], 'ending', ARGV[3])
expireAll(ARGV[5])
redis.call('PUBLISH', ARGV[6], '')
tellWebhook()
return {'ended'}`);

/** KEYS job; ARGV model, request, terms, createdMs, fence. Writes down a job that Redis lost. */
export const restoreScript = new Script(`
if redis.call('EXISTS', KEYS[1]) == 1 then return 0 end
redis.call('HSET', KEYS[1], 'version', '${JOURNAL_VERSION}', 'status', 'active', 'model', ARGV[1], 'request', ARGV[2],
  'terms', ARGV[3], 'createdMs', ARGV[4], 'fence', ARGV[5])
return 1`);

/**
 * KEYS job; ARGV fence, 1 when the engine is dead. Gives the job back: nobody holds it.
 * @returns {stale}, {missing} or {released, suspicion}.
 */
export const releaseScript = new Script(`${fenced}
stored = ARGV[1]
local died = ARGV[2] == '1'
${suspect}
if redis.call('HEXISTS', KEYS[1], 'ending') == 0 then redis.call('HSET', KEYS[1], 'status', 'waiting') end
return {'released', suspicion}`);

/**
 * KEYS job, streams, lists; ARGV ending, retention in seconds, channel, number of streams, channel of engines, id. A
 * waiting job ends at once; an active one is asked to. @returns missing, already, cancelled or requested.
 */
export const cancelScript = new Script(`
local status = redis.call('HGET', KEYS[1], 'status')
if not status then return 'missing' end
if redis.call('HEXISTS', KEYS[1], 'ending') == 1 then return 'already' end
redis.call('HSET', KEYS[1], 'cancel', '1')
if status ~= 'waiting' then
  redis.call('PUBLISH', ARGV[5], ARGV[6])
  return 'requested'
end
${streams}
writeEnding(tonumber(ARGV[4]), ARGV[1], '')
redis.call('HSET', KEYS[1], 'status', 'cancelled', 'ending', ARGV[1])
expireAll(ARGV[2])
redis.call('PUBLISH', ARGV[3], '')
tellWebhook()
return 'cancelled'`);

/**
 * KEYS job, streams, lists; ARGV ending if somebody asked for the cancellation, ending if not, retention in seconds,
 * channel, number of streams. Ends a job that no engine ends. @returns missing, already or ended.
 */
export const endUnheldScript = new Script(`
if redis.call('HEXISTS', KEYS[1], 'status') == 0 then return 'missing' end
if redis.call('HEXISTS', KEYS[1], 'ending') == 1 then return 'already' end
local ending = redis.call('HGET', KEYS[1], 'cancel') == '1' and ARGV[1] or ARGV[2]
${streams}
writeEnding(tonumber(ARGV[5]), ending, '')
redis.call('HSET', KEYS[1], 'status', cjson.decode(ending).status, 'ending', ending)
expireAll(ARGV[3])
redis.call('PUBLISH', ARGV[4], '')
tellWebhook()
return 'ended'`);
