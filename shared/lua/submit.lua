-- Invariant: a session exists with its record, request, event 0 and queue place, or not at all;
-- submitting it again with the same owner and digest answers alike, and only says that somebody
-- watches it, where it has not ended.
-- KEYS: session, events, request, job, watch, queue, work bell
-- ARGV: 1 id, 2 owner, 3 digest, 4 model, 5 fingerprint, 6 choices, 7 queue bound, 8 live ttl s,
--       9 watch ttl ms (0: none), 10 include usage, 11 request, 12 job, 13 event 0,
--       14 what it says as a response ('': it is none)
-- Returns {outcome, created s}; outcome: created | attached | conflict | foreign | full
local known = redis.call('HMGET', KEYS[1], 'owner', 'digest', 'created', 'status')
if known[3] then
  if known[1] ~= ARGV[2] then return {'foreign', '0'} end
  if known[2] ~= ARGV[3] then return {'conflict', known[3]} end
  local lives = known[4] == 'queued' or known[4] == 'running'
  if lives and tonumber(ARGV[9]) > 0 then redis.call('SET', KEYS[5], '1', 'PX', ARGV[9]) end
  return {'attached', known[3]}
end
if redis.call('ZCARD', KEYS[6]) >= tonumber(ARGV[7]) then return {'full', '0'} end

local time = redis.call('TIME')
local enqueued = string.format('%.3f', time[1] * 1000 + time[2] / 1000)
redis.call('HSET', KEYS[1], 'owner', ARGV[2], 'digest', ARGV[3], 'model', ARGV[4],
  'fingerprint', ARGV[5], 'choices', ARGV[6], 'created', time[1], 'enqueued', enqueued,
  'status', 'queued', 'last', '0', 'lease', '', 'epoch', '0', 'attempts', '0',
  'include_usage', ARGV[10])
if ARGV[14] ~= '' then redis.call('HSET', KEYS[1], 'response', ARGV[14]) end
redis.call('SET', KEYS[3], ARGV[11], 'EX', ARGV[8])
redis.call('SET', KEYS[4], ARGV[12], 'EX', ARGV[8])
redis.call('DEL', KEYS[2])
redis.call('XADD', KEYS[2], '1-0', 'e', ARGV[13])
if tonumber(ARGV[9]) > 0 then redis.call('SET', KEYS[5], '1', 'PX', ARGV[9]) end
redis.call('ZADD', KEYS[6], enqueued, ARGV[1])
for _, key in ipairs({KEYS[1], KEYS[2], KEYS[6]}) do redis.call('EXPIRE', key, ARGV[8]) end
if redis.call('LLEN', KEYS[7]) == 0 then redis.call('LPUSH', KEYS[7], '1') end
redis.call('EXPIRE', KEYS[7], ARGV[8])
return {'created', time[1]}
