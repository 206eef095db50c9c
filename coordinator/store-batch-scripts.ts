/**
 * The scripts of batches. Each is atomic.
 *
 *   caravan:{batches}:batch:ID      hash: order, status, counts, moments, cursor, version; fence, holder, leaseMs
 *   caravan:{batches}:started:ID    hash: line → the line that has a job and no recorded result
 *   caravan:{batches}:parts:ID      list: stored parts of the results
 *   caravan:{batches}:created       sorted set: id by the time of creation, in milliseconds
 *   caravan:{batches}:open          set: ids of batches that have not ended
 *
 * A holder's writes carry its fence and the version that it knows. A lower fence is `stale`. Another version is
 * `diverged`: Redis was killed and has lost what the holder wrote last, who must read everything again.
 */
import { Script } from './store-script.js';

const nowMs = `
local time = redis.call('TIME')
local now = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)`;

/** KEYS batch, created, open; ARGV id, createdMs, most open batches, order. @returns added, or full. */
export const createScript = new Script(`
if redis.call('SCARD', KEYS[3]) >= tonumber(ARGV[3]) then return 'full' end
redis.call('HSET', KEYS[1], 'order', ARGV[4], 'status', 'validating', 'version', '0', 'fence', '0')
redis.call('ZADD', KEYS[2], ARGV[2], ARGV[1])
redis.call('SADD', KEYS[3], ARGV[1])
return 'added'`);

/** KEYS batch; ARGV holder, lease in ms. @returns {missing}, {held} or {taken, fence}. */
export const takeScript = new Script(`
if redis.call('EXISTS', KEYS[1]) == 0 then return {'missing'} end
${nowMs}
local lease = tonumber(redis.call('HGET', KEYS[1], 'leaseMs') or '0')
if lease > now then return {'held'} end
local fence = math.max(tonumber(redis.call('HGET', KEYS[1], 'fence')) + 1, now * 1000)
fence = string.format('%.0f', fence)
redis.call('HSET', KEYS[1], 'fence', fence, 'holder', ARGV[1],
  'leaseMs', string.format('%.0f', now + tonumber(ARGV[2])))
return {'taken', fence}`);

const fenced = `
local stored = tonumber(redis.call('HGET', KEYS[1], 'fence') or '-1')
if stored ~= tonumber(ARGV[1]) then return {'stale'} end`;

const versioned = `${fenced}
if redis.call('HGET', KEYS[1], 'version') ~= ARGV[2] then return {'diverged'} end`;

/** KEYS batch; ARGV fence, lease in ms (0 gives it up). @returns {stale} or {held, status}. */
export const renewScript = new Script(`${fenced}
${nowMs}
redis.call('HSET', KEYS[1], 'leaseMs', string.format('%.0f', now + tonumber(ARGV[2])))
return {'held', redis.call('HGET', KEYS[1], 'status')}`);

/**
 * KEYS batch, started; ARGV fence, version, next offset, next line, then line, record of each line that gets
 * a job. @returns {stale}, {diverged}, {closing} when no line may start any more, or {written}.
 */
export const startScript = new Script(`${versioned}
if redis.call('HGET', KEYS[1], 'status') ~= 'in_progress' then return {'closing'} end
redis.call('HSET', KEYS[1], 'offset', ARGV[3], 'line', ARGV[4])
for i = 5, #ARGV, 2 do redis.call('HSET', KEYS[2], ARGV[i], ARGV[i + 1]) end
redis.call('HINCRBY', KEYS[1], 'version', 1)
return {'written'}`);

/**
 * KEYS batch, started, parts; ARGV fence, version, part, completed, failed, input tokens, output tokens, next
 * offset and line or '' and '', then the lines whose results the part has.
 * @returns {stale}, {diverged} or {written}.
 */
export const recordScript = new Script(`${versioned}
redis.call('RPUSH', KEYS[3], ARGV[3])
for i, field in ipairs({'completed', 'failed', 'inputTokens', 'outputTokens'}) do
  redis.call('HINCRBY', KEYS[1], field, ARGV[3 + i])
end
if ARGV[8] ~= '' then redis.call('HSET', KEYS[1], 'offset', ARGV[8], 'line', ARGV[9]) end
for i = 10, #ARGV do redis.call('HDEL', KEYS[2], ARGV[i]) end
redis.call('HINCRBY', KEYS[1], 'version', 1)
return {'written'}`);

/**
 * KEYS batch, open, started, parts; ARGV fence, version, id, status that it must have, status that it gets, retention in
 * seconds or '' while it goes on, then field, value of what is new.
 * @returns {stale}, {diverged}, {closing} when it has another status, or {written}.
 */
export const moveScript = new Script(`${versioned}
if redis.call('HGET', KEYS[1], 'status') ~= ARGV[4] then return {'closing'} end
redis.call('HSET', KEYS[1], 'status', ARGV[5])
for i = 7, #ARGV, 2 do redis.call('HSET', KEYS[1], ARGV[i], ARGV[i + 1]) end
redis.call('HINCRBY', KEYS[1], 'version', 1)
if ARGV[6] ~= '' then
  redis.call('SREM', KEYS[2], ARGV[3])
  for _, key in ipairs({KEYS[1], KEYS[3], KEYS[4]}) do redis.call('EXPIRE', key, ARGV[6]) end
end
return {'written'}`);

/** KEYS batch; ARGV now in seconds. @returns missing, or the status after the wish. */
export const cancelScript = new Script(`
local status = redis.call('HGET', KEYS[1], 'status')
if not status then return 'missing' end
if status ~= 'validating' and status ~= 'in_progress' then return status end
redis.call('HSET', KEYS[1], 'status', 'cancelling', 'at:cancelling', ARGV[1])
return 'cancelling'`);
