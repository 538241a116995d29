-- Invariant: a queued session is cancelled at once and can never start; a running one is flagged for
-- its worker; an ended one is left as it is; a watched one is never cancelled as abandoned.
-- One whose worker is dead (its lease ran out) counts as queued.
-- KEYS: session, events, request, job, watch, cancel, queue, outbox, leases
-- ARGV: 1 id, 2 owner, 3 event bell, 4 reason, 5 live ttl s, 6 kept s, 7 terminal event, 8 usage,
--       9 to be archived (1) or not (0), 10 abandoned (1): whoever the owner, unless watched
-- Returns missing | watched | cancelling | dequeued (this call cancelled it) | the status it ended with
local record = redis.call('HMGET', KEYS[1], 'owner', 'status', 'last')
if not record[2] or (ARGV[10] ~= '1' and record[1] ~= ARGV[2]) then return 'missing' end
if ARGV[10] == '1' and redis.call('EXISTS', KEYS[5]) == 1 then return 'watched' end
local time = redis.call('TIME')
local now = time[1]
if record[2] == 'running' then
  local expiry = redis.call('ZSCORE', KEYS[9], ARGV[1])
  if expiry and tonumber(expiry) > time[1] * 1000 + time[2] / 1000 then
    redis.call('SET', KEYS[6], ARGV[4], 'EX', ARGV[5], 'NX')
    return 'cancelling'
  end
  redis.call('ZREM', KEYS[9], ARGV[1])
elseif record[2] ~= 'queued' then
  return record[2]
end
local index = tonumber(record[3]) + 1
redis.call('XADD', KEYS[2], 'NOMKSTREAM', (index + 1) .. '-0', 'e', ARGV[7])
redis.call('ZREM', KEYS[7], ARGV[1])
redis.call('HSET', KEYS[1], 'last', index, 'status', 'cancelled', 'ended_by', 'cancel',
  'lease', '',  'usage', ARGV[8], 'ended', now)
redis.call('DEL', KEYS[3], KEYS[4], KEYS[5], KEYS[6])
redis.call('EXPIRE', KEYS[1], ARGV[6])
redis.call('EXPIRE', KEYS[2], ARGV[6])
if ARGV[9] == '1' then  -- as in finish.lua
  redis.call('ZADD', KEYS[8], now, ARGV[1])
  redis.call('ZREMRANGEBYSCORE', KEYS[8], '-inf', now - ARGV[6])
  redis.call('EXPIRE', KEYS[8], ARGV[6])
end
redis.call('PUBLISH', ARGV[3], index .. '\n' .. ARGV[7])
return 'dequeued'
