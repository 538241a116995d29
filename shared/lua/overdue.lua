-- Invariant: changes nothing; names sessions that may have waited too long for a worker, which
-- cancel.lua then judges one by one.
-- KEYS: queue, leases
-- ARGV: 1 timeout ms, 2 how many
-- Returns {id…}: queued so long ago, or whose lease ran out so long ago.
local time = redis.call('TIME')
local before = string.format('%.3f', time[1] * 1000 + time[2] / 1000 - ARGV[1])
local ids = redis.call('ZRANGEBYSCORE', KEYS[2], '-inf', before, 'LIMIT', 0, ARGV[2])
for _, id in ipairs(redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', before, 'LIMIT', 0, ARGV[2])) do
  ids[#ids + 1] = id
end
return ids
