-- Invariant: the holder of a lease gives the session back to its old place in the queue; nobody
-- else can.
-- KEYS: session, queue, leases
-- ARGV: 1 id, 2 lease, 3 live ttl s, 4 attempts to forget (1: no fault of the session's),
--       5 prefix of the models' work bells
-- Returns 1 given back, 0 not the holder's.
local record = redis.call('HMGET', KEYS[1], 'lease', 'enqueued', 'model')
if record[1] ~= ARGV[2] then return 0 end
redis.call('ZREM', KEYS[3], ARGV[1])  -- frees memory: Redis lets the rest through when it is full
local time = redis.call('TIME')
redis.call('HSET', KEYS[1], 'status', 'queued', 'lease', '',
  'waiting', string.format('%.3f', time[1] * 1000 + time[2] / 1000))
redis.call('HINCRBY', KEYS[1], 'attempts', 0 - ARGV[4])  -- Redis before 7.2 takes no "-0"
redis.call('ZADD', KEYS[2], record[2], ARGV[1])
redis.call('EXPIRE', KEYS[2], ARGV[3])
local bell = ARGV[5] .. (record[3] or '')
if redis.call('LLEN', bell) == 0 then redis.call('LPUSH', bell, '1') end
redis.call('EXPIRE', bell, ARGV[3])
return 1
