/**
 * The scripts of the journal. Each is atomic, and all keys of a job share the hash tag {job id}.
 *
 *   caravan:{ID}:job        hash: status, model, request, terms, createdMs, fence, cancel, ending
 *   caravan:{ID}:journal:I  stream of sequence I. An entry's id is <tokens so far>-0, so that Redis
 *                           itself refuses a token twice; the last one, <tokens>-1, has the ending.
 *
 * Every take of a job raises its fence: to the time in microseconds, so that no number is handed out
 * twice, even when Redis came back without its last second. A script that brings a lower fence than the
 * stored one is `stale` and changes nothing; a higher one is stored, should Redis have lost the take.
 * Redis may even have lost the job, if it was killed in the job's first second: the engine that runs it is
 * told that it is `missing`, and writes it down anew.
 */

/** KEYS job; ARGV model, request, terms, createdMs. @returns 1, or 0 when the job exists. */
export const createScript = `
if redis.call('EXISTS', KEYS[1]) == 1 then return 0 end
redis.call('HSET', KEYS[1], 'version', '1', 'status', 'waiting', 'model', ARGV[1], 'request', ARGV[2],
  'terms', ARGV[3], 'createdMs', ARGV[4], 'fence', '0')
return 1`;

/** KEYS job; ARGV engine id. @returns {missing} or {ended} or {taken, fence, cancel, request, terms}. */
export const takeScript = `
local status = redis.call('HGET', KEYS[1], 'status')
if not status then return {'missing'} end
if redis.call('HEXISTS', KEYS[1], 'ending') == 1 then return {'ended'} end
local time = redis.call('TIME')
local now = tonumber(time[1]) * 1000000 + tonumber(time[2])
local fence = math.max(tonumber(redis.call('HGET', KEYS[1], 'fence')) + 1, now)
fence = string.format('%.0f', fence)
redis.call('HSET', KEYS[1], 'fence', fence, 'status', 'active', 'engine', ARGV[1])
return {'taken', fence, redis.call('HGET', KEYS[1], 'cancel') or '0',
  redis.call('HGET', KEYS[1], 'request'), redis.call('HGET', KEYS[1], 'terms')}`;

const fenced = `
if redis.call('HEXISTS', KEYS[1], 'status') == 0 then return {'missing'} end
local stored = tonumber(redis.call('HGET', KEYS[1], 'fence') or '0')
if tonumber(ARGV[1]) < stored then return {'stale'} end
if tonumber(ARGV[1]) > stored then redis.call('HSET', KEYS[1], 'fence', ARGV[1]) end`;

const endOffset = `
local last = redis.call('XREVRANGE', KEYS[2], '+', '-', 'COUNT', 1)
local offset = 0
if last[1] then offset = tonumber(string.match(last[1][1], '^%d+')) end`;

/**
 * KEYS job, stream; ARGV fence, start, count, tokens, texts, channel.
 * @returns {stale}, {missing}, or {offset, where the stream ends} when that is not start, or {appended}.
 * A take that Redis lost (the stored fence is lower) is stale too when another engine has written since.
 */
export const appendScript = `${fenced}
if redis.call('HEXISTS', KEYS[1], 'ending') == 1 then return {'stale'} end
${endOffset}
if stored < tonumber(ARGV[1]) and offset > tonumber(ARGV[2]) then return {'stale'} end
if offset ~= tonumber(ARGV[2]) then return {'offset', offset} end
redis.call('XADD', KEYS[2], (offset + tonumber(ARGV[3])) .. '-0', 'tokens', ARGV[4], 'texts', ARGV[5])
redis.call('PUBLISH', ARGV[6], '')
return {'appended'}`;

/**
 * KEYS job, stream; ARGV fence, tokens, status, ending, held-back text, retention in seconds, channel.
 * @returns {stale}, {missing}, {already}, {offset, where the stream ends} or {ended}.
 */
export const endScript = `
if redis.call('HEXISTS', KEYS[1], 'ending') == 1 then return {'already'} end
${fenced}
${endOffset}
if stored < tonumber(ARGV[1]) and offset > tonumber(ARGV[2]) then return {'stale'} end
if offset ~= tonumber(ARGV[2]) then return {'offset', offset} end
redis.call('XADD', KEYS[2], offset .. '-1', 'ending', ARGV[4], 'text', ARGV[5])
redis.call('HSET', KEYS[1], 'status', ARGV[3], 'ending', ARGV[4])
redis.call('EXPIRE', KEYS[1], ARGV[6])
redis.call('EXPIRE', KEYS[2], ARGV[6])
redis.call('PUBLISH', ARGV[7], '')
return {'ended'}`;

/** KEYS job; ARGV model, request, terms, createdMs, fence. Writes down a job that Redis lost. */
export const restoreScript = `
if redis.call('EXISTS', KEYS[1]) == 1 then return 0 end
redis.call('HSET', KEYS[1], 'version', '1', 'status', 'active', 'model', ARGV[1], 'request', ARGV[2],
  'terms', ARGV[3], 'createdMs', ARGV[4], 'fence', ARGV[5])
return 1`;

/** KEYS job; ARGV fence. Gives the job back: nobody holds it. @returns {stale}, {missing} or {released}. */
export const releaseScript = `${fenced}
if redis.call('HEXISTS', KEYS[1], 'ending') == 0 then redis.call('HSET', KEYS[1], 'status', 'waiting') end
return {'released'}`;

/**
 * KEYS job, stream; ARGV ending, retention in seconds, channel. A waiting job ends at once; an active one
 * is asked to. @returns missing, already, cancelled or requested.
 */
export const cancelScript = `
local status = redis.call('HGET', KEYS[1], 'status')
if not status then return 'missing' end
if redis.call('HEXISTS', KEYS[1], 'ending') == 1 then return 'already' end
redis.call('HSET', KEYS[1], 'cancel', '1')
if status ~= 'waiting' then return 'requested' end
${endOffset}
redis.call('XADD', KEYS[2], offset .. '-1', 'ending', ARGV[1], 'text', '')
redis.call('HSET', KEYS[1], 'status', 'cancelled', 'ending', ARGV[1])
redis.call('EXPIRE', KEYS[1], ARGV[2])
redis.call('EXPIRE', KEYS[2], ARGV[2])
redis.call('PUBLISH', ARGV[3], '')
return 'cancelled'`;
