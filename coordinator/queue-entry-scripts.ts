/**
 * The scripts by which a job comes into a queue: room is made for it, BullMQ is given it, it can be chosen. The three
 * commands are sent together, one behind the other; where there is no room the later ones find nothing to do.
 */
import { createFunction } from './journal-scripts.js';
import { script } from './queue-order-scripts.js';

/**
 * ARGV record, then limits, each empty for none: waiting jobs, waiting tokens, the tenant's jobs and waiting tokens, its
 * requests a minute; the version of the promises that the record reckons with, and from when on promised jobs need the
 * engines for themselves, each empty for none; then what the journal is told of the job, if it is. KEYS beside the usual:
 * the tenant's requests of this minute, the job of the journal. BullMQ's command that adds the job is on its way already:
 * where the job is refused it finds one that it knows, and does nothing; `enter` comes last and takes that away.
 * @returns {reserved or known, 1 if the journal did not know it} or {full, which limit, what stands} or {raced}.
 */
export const reserveScript = script(`${createFunction}
local job = cjson.decode(ARGV[1])
local function refuse(...)
  local key = bullKeyOf(job.id)
  if call('EXISTS', key) == 0 then
    call('HSET', key, 'refused', '1')
    call('EXPIRE', key, 60)
  end
  return {...}
end
local function write() return ARGV[9] and create(KEYS[22], unpack(ARGV, 9)) or 0 end
if call('HEXISTS', waiting, job.id) == 1 or call('HEXISTS', running, job.id) == 1 then return {'known', write()} end
local stands = {
  number(call('HGET', state, 'jobs')) + 1,
  number(call('HGET', state, 'tokens')) + job.tokens,
  number(call('HGET', tenants, job.tenant .. '/jobs')) + 1,
  number(call('HGET', tenants, job.tenant .. '/tokens')) + job.tokens,
  number(call('GET', KEYS[21])) + 1,
}
for i = 1, 5 do
  if ARGV[i + 1] ~= '' and stands[i] > tonumber(ARGV[i + 1]) then
    return refuse('full', i, string.format('%.0f', stands[i]))
  end
end
if ARGV[7] ~= '' and number(call('HGET', state, 'version')) ~= tonumber(ARGV[7]) then return refuse('raced') end
if ARGV[6] ~= '' then
  call('INCR', KEYS[21])
  call('EXPIRE', KEYS[21], 120)
end
if ARGV[8] ~= '' then
  -- Without a version others may have promised meanwhile: the earlier time is the safe one.
  local stands = call('HGET', state, 'pressedFrom')
  if ARGV[7] ~= '' or not stands or tonumber(ARGV[8]) < tonumber(stands) then
    call('HSET', state, 'pressedFrom', ARGV[8])
  end
end
reserve(job, ARGV[1])
return {'reserved', write()}`);

/** ARGV id. The job was added to BullMQ: it can be chosen. @returns 1 if it waits. */
export const enterScript = script(`
local text = call('HGET', waiting, ARGV[1])
if not text then
  call('HDEL', bullKeyOf(ARGV[1]), 'refused')
  return 0
end
local job = cjson.decode(text)
local at = standing(job.id)
if at == 'active' then return 0 end
if not at then revive(job) end
enter(job)
call('PUBLISH', wakeOf(), '')
return 1`);
