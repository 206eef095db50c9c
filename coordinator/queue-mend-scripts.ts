/**
 * The scripts that bring a queue's order, BullMQ and the journal together when they differ. Each of the three changes by
 * scripts, one after the other, so that a process that dies, or a Redis that forgets its last second, can leave a job
 * between any two:
 *
 *   BullMQ has it   the order has it    then
 *   waiting         as running          it waits
 *   waiting         not entered         it enters
 *   waiting         not at all          it is taken in, by what the journal knows
 *   active          as waiting          it runs, for nobody until its engine says so
 *   nowhere         waiting, running    it waits again, or is forgotten if the journal has its ending, or nothing of it
 *
 * What differs may be on its way from one to the other: it is left alone until it has differed for a while.
 */
import { script } from './queue-order-scripts.js';

/** A job that was reserved may be on its way into the journal and into BullMQ for this long. */
const RESERVED_MS = 10_000;

/**
 * ARGV now, how long a job must have differed, ids: all that are known to differ.
 * @returns {ids that we do not know, ids of jobs that BullMQ must be given anew, their terms}.
 */
export const mendScript = script(`
local now, settledMs = tonumber(ARGV[1]), tonumber(ARGV[2])
local unknown, absent, terms = {}, {}, {}
local function differs(id)
  local at = standing(id)
  local waits, runs = call('HGET', waiting, id), call('HGET', running, id)
  if at == 'prioritized' then
    if runs then return 'put back', settledMs, runs end
    if not waits then return 'unknown', settledMs end
    if not call('ZSCORE', ages, id) then return 'enter', settledMs, waits end
  elseif at == 'active' then
    if waits then return 'run', settledMs, waits end
  elseif not at and (waits or runs) then
    local isReserved = waits and not call('ZSCORE', ages, id)
    if isReserved and now - cjson.decode(waits).queuedMs < ${RESERVED_MS} then return nil end
    local key = 'caravan:{' .. id .. '}:job'
    local isOpen = call('HEXISTS', key, 'status') == 1 and call('HEXISTS', key, 'ending') == 0
    return isOpen and 'revive' or 'forget', isReserved and 0 or settledMs, waits or runs, runs
  end
end
local function mend(id, what, job, runs)
  if what == 'unknown' then
    table.insert(unknown, id)
  elseif what == 'run' then
    run(job, now, '')
  elseif what == 'forget' then
    forget(id, 0)
  else
    if what == 'revive' and not revive(job) then
      table.insert(absent, id)
      table.insert(terms, call('HGET', 'caravan:{' .. id .. '}:job', 'terms'))
    end
    if what == 'put back' or runs then
      refund(job, job.tokens)
      putBack(job, job.tokens, job.outputTokens, job.preemptions)
    else
      enter(job)
    end
  end
end
for i = 3, #ARGV do
  local id = ARGV[i]
  local what, needMs, text, runs = differs(id)
  local sinceMs = what and (call('HGET', odd, id) or now)
  if not what or now - tonumber(sinceMs) >= needMs then
    call('HDEL', odd, id)
    if what then mend(id, what, text and cjson.decode(text), runs) end
  else
    call('HSETNX', odd, id, string.format('%.0f', now))
  end
end
return {unknown, absent, terms}`);

/** ARGV id. @returns where BullMQ has the job, or empty when it has none of that id that has not ended. */
export const standingScript = script(`return standing(ARGV[1]) or ''`);

/**
 * ARGV now, how long an engine may be late with the jobs that it runs, how many.
 * @returns ids of jobs whose deadline has passed and that nobody ends.
 */
export const overdueScript = script(`
local ids = {}
local late = tonumber(ARGV[1]) - tonumber(ARGV[2])
for _, id in ipairs(call('ZRANGEBYSCORE', deadlines, '-inf', ARGV[1], 'LIMIT', 0, ARGV[3])) do
  local isLate = tonumber(call('ZSCORE', deadlines, id)) <= late
  if isLate or call('HEXISTS', running, id) == 0 then table.insert(ids, id) end
end
return ids`);

/** ARGV record of a running job. An engine has written a job down again that Redis had lost. */
export const holdScript = script(`
local job = cjson.decode(ARGV[1])
if call('HEXISTS', waiting, job.id) == 1 or call('HEXISTS', running, job.id) == 1 then return 0 end
reserve(job, ARGV[1])
return run(job, job.sinceMs, job.engine)`);

/** ARGV id, now. Its time is over. */
export const hurryScript = script(`
local id = ARGV[1]
if call('HEXISTS', waiting, id) == 1 or call('HEXISTS', running, id) == 1 then call('ZADD', deadlines, ARGV[2], id) end`);
