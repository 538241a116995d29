-- Invariant: the leases of a worker that is subscribed to its lifeline are left alone. Those of another
-- one run out now: all else is as if they had run out by themselves, and a worker that lives renews them.
-- KEYS: leases
-- ARGV: 1 worker id, 2 its lifeline's channel, 3 session prefix, 4 prefix of the models' work bells,
--       5 live ttl s
-- Returns how many leases ran out.
if redis.call('PUBSUB', 'NUMSUB', ARGV[2])[2] > 0 then return 0 end
-- Uses no memory: a full Redis lets a script that has begun to write go on.
redis.call('EXPIRE', KEYS[1], ARGV[5])
local time = redis.call('TIME')
local now = string.format('%.3f', time[1] * 1000 + time[2] / 1000)
local mine, count, models = ARGV[1] .. ':', 0, {}
for _, id in ipairs(redis.call('ZRANGEBYSCORE', KEYS[1], '(' .. now, '+inf')) do
  local record = redis.pcall('HMGET', ARGV[3] .. id, 'lease', 'model')
  if string.sub(record[1] or '', 1, #mine) == mine then
    redis.call('ZADD', KEYS[1], 'XX', now, id)
    models[record[2] or ''] = true
    count = count + 1
  end
end
for model in pairs(models) do
  local bell = ARGV[4] .. model
  if redis.call('LLEN', bell) == 0 then redis.call('LPUSH', bell, '1') end
  redis.call('EXPIRE', bell, ARGV[5])
end
return count
