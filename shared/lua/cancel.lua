-- Invariant: a waiting session is ended at once and can never start; a running one is flagged for
-- its worker; an ended one is left as it is; a watched one is never cancelled as abandoned, and only
-- one that no worker took in time ends as overdue.
-- One whose worker is dead (its lease ran out) counts as waiting.
-- KEYS: session, events, request, job, watch, cancel, queue, outbox, leases
-- ARGV: 1 id, 2 owner, 3 event bell, 4 reason: requested | abandoned | overdue, 5 live ttl s,
--       6 kept s, 7 terminal event, 8 usage, 9 to be archived (1) or not (0),
--       10 last index that the usage counts, 11 overdue after ms
-- Returns missing | watched | waiting | uncounted | cancelling | dequeued (this call ended it) |
--         the status it ended with
local record = redis.call('HMGET', KEYS[1], 'owner', 'status', 'last', 'waiting', 'enqueued')
local reason = ARGV[4]
if not record[2] or (reason == 'requested' and record[1] ~= ARGV[2]) then return 'missing' end
if reason == 'abandoned' and redis.call('EXISTS', KEYS[5]) == 1 then return 'watched' end
local time = redis.call('TIME')
local now = time[1] * 1000 + time[2] / 1000
local since = tonumber(record[4] or record[5])
if record[2] == 'running' then
  since = tonumber(redis.call('ZSCORE', KEYS[9], ARGV[1]) or now)
  if since > now then
    if reason == 'overdue' then return 'waiting' end
    redis.call('SET', KEYS[6], reason, 'EX', ARGV[5], 'NX')
    return 'cancelling'
  end
elseif record[2] ~= 'queued' then
  return record[2]
end
if reason == 'overdue' and since + ARGV[11] > now then return 'waiting' end
if record[3] ~= ARGV[10] then return 'uncounted' end
local status = reason == 'overdue' and 'failed' or 'cancelled'
local index = tonumber(record[3]) + 1
redis.call('ZREM', KEYS[7], ARGV[1])
redis.call('ZREM', KEYS[9], ARGV[1])
redis.call('XADD', KEYS[2], 'NOMKSTREAM', (index + 1) .. '-0', 'e', ARGV[7])
redis.call('HSET', KEYS[1], 'last', index, 'status', status, 'ended_by', 'cancel',
  'lease', '',  'usage', ARGV[8], 'ended', time[1])
redis.call('DEL', KEYS[3], KEYS[4], KEYS[5], KEYS[6])
redis.call('EXPIRE', KEYS[1], ARGV[6])
redis.call('EXPIRE', KEYS[2], ARGV[6])
if ARGV[9] == '1' then  -- as in finish.lua
  redis.call('ZADD', KEYS[8], time[1], ARGV[1])
  redis.call('ZREMRANGEBYSCORE', KEYS[8], '-inf', time[1] - ARGV[6])
  redis.call('EXPIRE', KEYS[8], ARGV[6])
end
redis.call('PUBLISH', ARGV[3], index .. '\n' .. ARGV[7])
return 'dequeued'
