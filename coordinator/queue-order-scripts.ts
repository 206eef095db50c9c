/**
 * The scripts of a queue's order. BullMQ holds the jobs, their locks and states; which of the waiting ones comes
 * next stands here:
 *
 *   caravan:order:QUEUE:waiting    hash: id → record of a job that waits (see QueuedJob), reserved ones included
 *   caravan:order:QUEUE:lanes      zset of equal scores: TENANT/PRIORITY/DEADLINE OR AGE/…/ID, by text; a tenant's first
 *                                  one is its head, and the next tenant is one step away
 *   caravan:order:QUEUE:ages       zset: id by the time of its submit
 *   caravan:order:QUEUE:due        zset: id by its latest start; promised jobs that wait
 *   caravan:order:QUEUE:demands    hash: LEVEL:SPAN:t and LEVEL:SPAN:o → tokens and output tokens of promised jobs that
 *                                  wait, by their latest start (see demand-spans)
 *   caravan:order:QUEUE:deadlines  zset: id by its deadline; all jobs that have one and wait or run
 *   caravan:order:QUEUE:running    hash: id → record of a job that an engine has, with sinceMs and engine
 *   caravan:order:QUEUE:promoted   hash: id → when an engine chose it; it still waits, first in BullMQ's order
 *   caravan:order:QUEUE:served     hash: tenant → virtual time
 *   caravan:order:QUEUE:loads      hash: priority → tokens that wait
 *   caravan:order:QUEUE:tenants    hash: TENANT/jobs (waiting and running), TENANT/tokens (waiting)
 *   caravan:order:QUEUE:state      hash: floor, turn, jobs and tokens (waiting), version of the promises, pressedFrom
 *   caravan:order:QUEUE:odd        hash: id → since when BullMQ and the order were seen to differ about it (queue-mending)
 *
 *   reserved ──enter──> waiting ──promote──> promoted ──(BullMQ's fetch)──confirm──> running ──forget──> gone
 *                          ^                                                           │
 *                          └────────────────────── putBack ────────────────────────────┘
 *
 * An engine promotes the job that it chose and then fetches from BullMQ, which gives the promoted job that comes first.
 * Two engines that do so at once may get each other's: both were chosen. What a fetch brings unchosen is put back.
 */
import { FACTOR, LEVELS } from './demand-spans.js';
import { Script } from './store-script.js';

/** Parts of the key names, in the order of the scripts' KEYS; BullMQ's own come after them. */
export const orderParts = [
  'waiting',
  'lanes',
  'ages',
  'due',
  'demands',
  'running',
  'promoted',
  'served',
  'loads',
  'tenants',
  'state',
  'deadlines',
  'odd',
] as const;
export const bullParts = [
  'prioritized',
  'wait',
  'delayed',
  'meta',
  'active',
  'completed',
  'failed',
] as const;

/** Another engine leaves a job to the one that promoted it for this long. */
export const PROMOTED_MS = 2_000;

const prelude = `
local waiting, lanes, ages, due, demands, running, promoted, served, loads, tenants, state = unpack(KEYS, 1, 11)
local deadlines, odd = unpack(KEYS, 12, 13)
local prioritized, wait, delayed, meta, active, completed, failed = unpack(KEYS, 14, 20)
local call = redis.call
local function add(key, field, by)
  if by ~= 0 and call('HINCRBY', key, field, string.format('%.0f', by)) == 0 then call('HDEL', key, field) end
end
local function countWaiting(job, sign)
  add(loads, job.priority, sign * job.tokens)
  add(tenants, job.tenant .. '/tokens', sign * job.tokens)
  add(state, 'tokens', sign * job.tokens)
  add(state, 'jobs', sign)
  if not job.latestStartMs then return end
  for level = 0, ${LEVELS - 1} do
    local span = string.format('%d:%.0f', level, math.floor(job.latestStartMs / 1000 / ${FACTOR} ^ level))
    add(demands, span .. ':t', sign * job.tokens)
    add(demands, span .. ':o', sign * job.outputTokens)
  end
end
local function enter(job)
  call('ZADD', lanes, 0, job.lane)
  call('ZADD', ages, string.format('%.0f', job.queuedMs), job.id)
  if job.latestStartMs then call('ZADD', due, string.format('%.0f', job.latestStartMs), job.id) end
end
local function leave(job)
  call('ZREM', lanes, job.lane)
  call('ZREM', ages, job.id)
  call('ZREM', due, job.id)
end
local function reserve(job, text)
  call('HSET', waiting, job.id, text)
  countWaiting(job, 1)
  add(tenants, job.tenant .. '/jobs', 1)
  if job.deadlineMs then call('ZADD', deadlines, string.format('%.0f', job.deadlineMs), job.id) end
  if job.latestStartMs then call('HINCRBY', state, 'version', 1) end
end
local function number(text) return tonumber(text or '0') or 0 end
local function refund(job, tokens)
  if not job.charge then return end
  local back = math.max(0, tokens) / job.weight
  local stands = number(call('HGET', served, job.tenant))
  call('HSET', served, job.tenant, string.format('%.17g', stands - math.min(back, job.charge)))
end
local function wakeOf() return string.gsub(state, ':state$', ':wake') end
local function putBack(job, tokens, outputTokens, preemptions)
  job.tokens = tokens
  job.outputTokens = outputTokens
  job.preemptions = preemptions
  job.sinceMs = nil
  job.charge = nil
  job.engine = nil
  call('HDEL', running, job.id)
  call('HSET', waiting, job.id, cjson.encode(job))
  countWaiting(job, 1)
  enter(job)
end
local function forget(id, unusedTokens)
  local isWaiting = call('HGET', waiting, id)
  local text = isWaiting or call('HGET', running, id)
  if not text then return 0 end
  local job = cjson.decode(text)
  if isWaiting then
    leave(job)
    countWaiting(job, -1)
    refund(job, job.tokens)
  else
    refund(job, unusedTokens)
  end
  call('HDEL', waiting, id)
  call('HDEL', running, id)
  call('HDEL', promoted, id)
  call('ZREM', deadlines, id)
  if job.latestStartMs then call('HINCRBY', state, 'version', 1) end
  add(tenants, job.tenant .. '/jobs', -1)
  return 1
end
local function run(job, now, engine)
  leave(job)
  countWaiting(job, -1)
  call('HDEL', waiting, job.id)
  call('HDEL', promoted, job.id)
  job.sinceMs = now
  job.engine = engine
  local text = cjson.encode(job)
  call('HSET', running, job.id, text)
  return text
end
local function bullKeyOf(id) return string.gsub(wait, 'wait$', '') .. id end
-- Where BullMQ has a job that has not ended for it.
local function standing(id)
  if call('ZSCORE', prioritized, id) then return 'prioritized' end
  if call('LPOS', active, id) then return 'active' end
  if call('ZSCORE', delayed, id) then return 'delayed' end
  if call('LPOS', wait, id) then return 'wait' end
end
-- BullMQ knows the job, and it stands nowhere: it waits again. Adding it anew would do nothing.
local function revive(job)
  local key = bullKeyOf(job.id)
  if call('EXISTS', key) == 0 then return false end
  call('ZREM', completed, job.id)
  call('ZREM', failed, job.id)
  call('HDEL', key, 'finishedOn', 'processedOn', 'returnvalue', 'failedReason', 'stacktrace')
  call('HSET', key, 'priority', job.priority)
  call('ZADD', prioritized, job.priority * 0x100000000, job.id)
  return true
end
`;

export const script = (text: string): Script => new Script(`${prelude}${text}`);

/**
 * ARGV now, how long a promoted job is left alone.
 * @returns {paused} or {view, heads, due, oldest, served of their tenants, floor, turn, the promised job that must start
 * first or empty, from when on promised jobs need the engines for themselves or empty, 1 when BullMQ would hand jobs out unchosen, and three numbers that are 0 when BullMQ and we agree}.
 */
export const lookScript = script(`
local now = tonumber(ARGV[1])
if call('HEXISTS', meta, 'paused') == 1 then return {'paused'} end
local function isFree(id)
  local since = call('HGET', promoted, id)
  return not since or now - tonumber(since) >= tonumber(ARGV[2])
end
local theirs, ours = call('ZCARD', prioritized), call('ZCARD', lanes)
local hasStrays = call('LLEN', wait) > 0 or
  #call('ZRANGEBYSCORE', delayed, 0, string.format('%.0f', (now + 1) * 4096 - 1), 'LIMIT', 0, 1) > 0
local heads, times, known = {}, {}, {}
local function know(text)
  local tenant = cjson.decode(text).tenant
  if known[tenant] then return end
  known[tenant] = true
  table.insert(times, tenant)
  table.insert(times, call('HGET', served, tenant) or '0')
end
local from = '-'
for _ = 1, 4096 do
  local tenant = nil
  for step = 0, 63 do
    local lane = call('ZRANGEBYLEX', lanes, from, '+', 'LIMIT', step, 1)[1]
    if not lane then break end
    local owner, id = string.match(lane, '^([^/]*)/.*/([^/]*)$')
    tenant = tenant or owner
    if owner ~= tenant then break end
    local text = isFree(id) and call('HGET', waiting, id)
    if text then
      table.insert(heads, text)
      know(text)
      break
    end
  end
  if not tenant then break end
  -- '0' is the character after '/'.
  from = '[' .. tenant .. '0'
end
local dues = {}
for _, id in ipairs(call('ZRANGEBYSCORE', due, '-inf', ARGV[1], 'LIMIT', 0, 64)) do
  local text = isFree(id) and call('HGET', waiting, id)
  if text then
    table.insert(dues, text)
    know(text)
  end
end
local oldest = ''
for _, id in ipairs(call('ZRANGE', ages, 0, 63)) do
  local text = oldest == '' and isFree(id) and call('HGET', waiting, id)
  if text then
    oldest = text
    know(text)
  end
end
local nextDue = ''
for _, id in ipairs(call('ZRANGE', due, 0, 63)) do
  nextDue = nextDue == '' and isFree(id) and call('HGET', waiting, id) or nextDue
end
if nextDue ~= '' then know(nextDue) end
return {'view', heads, dues, oldest, times, call('HGET', state, 'floor') or '0', call('HGET', state, 'turn') or '0',
  nextDue, call('HGET', state, 'pressedFrom') or '', hasStrays and 1 or 0,
  theirs - ours, call('HLEN', waiting) - ours, call('LLEN', active) - call('HLEN', running)}`);

/**
 * ARGV id, now, how long a promoted job is left alone, place among promoted jobs (below that of any priority), tenant,
 * start, charge, floor.
 * @returns promoted, raced (another engine has chosen it), or absent (BullMQ does not have it).
 */
export const promoteScript = script(`
local id, now = ARGV[1], tonumber(ARGV[2])
local since = call('HGET', promoted, id)
if since and now - tonumber(since) < tonumber(ARGV[3]) then return 'raced' end
if call('HEXISTS', waiting, id) == 0 then return 'raced' end
if not call('ZSCORE', prioritized, id) then return 'absent' end
call('ZADD', prioritized, ARGV[4], id)
call('HSET', promoted, id, ARGV[2])
local text = call('HGET', waiting, id)
local job = cjson.decode(text)
-- An engine that chose it before has died.
refund(job, job.tokens)
job.charge = tonumber(ARGV[7])
call('HSET', waiting, id, cjson.encode(job))
local stands = math.max(number(call('HGET', served, ARGV[5])), tonumber(ARGV[6]))
call('HSET', served, ARGV[5], string.format('%.17g', stands + tonumber(ARGV[7])))
local floor = math.max(number(call('HGET', state, 'floor')), tonumber(ARGV[8]))
call('HSET', state, 'floor', string.format('%.17g', floor))
call('HINCRBY', state, 'turn', 1)
return 'promoted'`);

/**
 * ARGV id, now, engine. BullMQ gave it to this engine.
 * @returns its record, or nothing when no engine had chosen it.
 */
export const confirmScript = script(`
local id = ARGV[1]
local text = call('HDEL', promoted, id) == 1 and call('HGET', waiting, id)
if text then return run(cjson.decode(text), tonumber(ARGV[2]), ARGV[3]) end
-- Asked again after a lost answer; or it took so long that it was put here as nobody's.
text = call('HGET', running, id)
local job = text and cjson.decode(text)
if not job or (job.engine ~= '' and job.engine ~= ARGV[3]) then return nil end
job.engine = ARGV[3]
text = cjson.encode(job)
call('HSET', running, id, text)
return text`);

/** ARGV id, tokens that are left, output tokens that are left, 1 when it made room for another. BullMQ has it back. */
export const putBackScript = script(`
local text = call('HGET', running, ARGV[1])
if not text then return 0 end
local job = cjson.decode(text)
local left = ARGV[2] == '' and job.tokens or tonumber(ARGV[2])
refund(job, left)
putBack(job, left, ARGV[3] == '' and job.outputTokens or tonumber(ARGV[3]), job.preemptions + tonumber(ARGV[4]))
call('PUBLISH', wakeOf(), '')
return 1`);

/** ARGV id, tokens of what it was charged for that it did not use. It waits and runs no more. */
export const forgetScript = script(`return forget(ARGV[1], tonumber(ARGV[2]))`);

/**
 * What stands in the queue, for an estimate. ARGV most running jobs, then fields of the demands.
 * @returns {those fields' values, records of running jobs, loads, waiting jobs, version of the promises}.
 */
export const standScript = script(`
local values = {}
if call('EXISTS', demands) == 1 then values = call('HMGET', demands, unpack(ARGV, 2)) end
local runningJobs = {}
for i, text in ipairs(call('HVALS', running)) do
  if i <= tonumber(ARGV[1]) then table.insert(runningJobs, text) end
end
return {values, runningJobs, call('HGETALL', loads), number(call('HGET', state, 'jobs')),
  number(call('HGET', state, 'version'))}`);

/**
 * ARGV prefix of BullMQ's keys, now. Takes in what BullMQ has put where it would be fetched unchosen: jobs whose
 * engine died, jobs without a priority, delayed ones that are due.
 * @returns ids that we do not know.
 */
export const adoptScript = script(`
local unknown = {}
local function adopt(id)
  local priority = number(call('HGET', ARGV[1] .. id, 'priority'))
  if priority == 0 then
    priority = 100
    call('HSET', ARGV[1] .. id, 'priority', priority)
  end
  call('ZADD', prioritized, priority * 0x100000000, id)
  local text = call('HGET', running, id)
  if text then
    local job = cjson.decode(text)
    refund(job, job.tokens)
    putBack(job, job.tokens, job.outputTokens, job.preemptions)
  else
    text = call('HGET', waiting, id)
    if text then enter(cjson.decode(text)) else table.insert(unknown, id) end
  end
end
for _ = 1, 1000 do
  local id = call('RPOP', wait)
  if not id then break end
  if string.sub(id, 1, 2) ~= '0:' then adopt(id) end
end
local last = string.format('%.0f', (tonumber(ARGV[2]) + 1) * 4096 - 1)
for _, id in ipairs(call('ZRANGEBYSCORE', delayed, 0, last, 'LIMIT', 0, 1000)) do
  call('ZREM', delayed, id)
  call('HSET', ARGV[1] .. id, 'delay', 0)
  adopt(id)
end
return unknown`);
