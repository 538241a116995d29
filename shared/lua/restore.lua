-- Invariant: only the newest holder of a session writes its copy back, and only over nothing, over
-- what is older than its claim, or over what was begun anew under its id since Redis lost it; an ended
-- session stays ended, also when it was deleted.
-- KEYS: session, events, request, job, watch, leases, queue, note of a deleted session
-- ARGV: 1 id, 2 lease, 3 epoch, 4 owner, 5 digest, 6 lease ms, 7 live ttl s, 8 watch ttl ms (0: none),
--       9 request, 10 job, 11 when it was queued, 12 how many field names and values of the record
--       follow, then these, then all events from index 0 on
-- Returns 1 the session is whole and ours, 0 it is another's.
if tonumber(redis.call('GET', KEYS[8])) == tonumber(ARGV[11]) then return 0 end
local record = redis.call('HMGET', KEYS[1], 'lease', 'status', 'epoch', 'owner', 'digest', 'enqueued')
local ours = record[2] == 'running' and record[1] == ARGV[2]
if record[2] and not ours then
  local lives = record[2] == 'queued' or record[2] == 'running'
  local same = record[4] == ARGV[4] and record[5] == ARGV[5]
  local later = (tonumber(record[6]) or 0) - ARGV[11]  -- above 0: clients have seen ours before
  local newer = later == 0 and tonumber(record[3]) < tonumber(ARGV[3])
  if not (lives and same and (later > 0 or newer)) then return 0 end
end
if not ours then
  redis.call('DEL', KEYS[1], KEYS[2])
  for i = 13, 12 + ARGV[12], 2 do redis.call('HSET', KEYS[1], ARGV[i], ARGV[i + 1]) end
  redis.call('HSET', KEYS[1], 'status', 'running', 'lease', ARGV[2], 'epoch', ARGV[3])
  redis.call('ZREM', KEYS[7], ARGV[1])
end
local newest = redis.call('XREVRANGE', KEYS[2], '+', '-', 'COUNT', 1)[1]
local last = newest and tonumber(string.match(newest[1], '^(%d+)')) - 1 or -1
for n = last + 1, #ARGV - 13 - ARGV[12] do
  redis.call('XADD', KEYS[2], (n + 1) .. '-0', 'e', ARGV[13 + ARGV[12] + n])
  last = n
end
redis.call('HSET', KEYS[1], 'last', last)
redis.call('SET', KEYS[3], ARGV[9], 'EX', ARGV[7])
redis.call('SET', KEYS[4], ARGV[10], 'EX', ARGV[7])
if tonumber(ARGV[8]) > 0 then redis.call('SET', KEYS[5], '1', 'PX', ARGV[8], 'NX') end
local time = redis.call('TIME')
redis.call('ZADD', KEYS[6], string.format('%.3f', time[1] * 1000 + time[2] / 1000 + ARGV[6]), ARGV[1])
for _, key in ipairs({KEYS[1], KEYS[2], KEYS[6]}) do redis.call('EXPIRE', key, ARGV[7]) end
return 1
