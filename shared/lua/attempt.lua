-- Invariant: a run of a session counts as an attempt once, from when its worker says that the engine
-- begins; only the holder of the lease can say so.
-- KEYS: session
-- ARGV: 1 lease
-- Returns 1 counted, now or before, 0 not the holder's.
local record = redis.call('HMGET', KEYS[1], 'lease', 'tried')
if record[1] ~= ARGV[1] then return 0 end
if record[2] ~= ARGV[1] then
  redis.pcall('HINCRBY', KEYS[1], 'attempts', 1)
  redis.call('HSET', KEYS[1], 'tried', ARGV[1])
end
return 1
