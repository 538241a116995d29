-- Invariant: the holder of a lease gives the session back to its old place in the queue; nobody
-- else can. The run that ends so counts as an attempt if it is to blame, and else does not.
-- KEYS: session, queue, leases
-- ARGV: 1 id, 2 lease, 3 live ttl s, 4 no fault of the session's (1) or perhaps (0),
--       5 prefix of the models' work bells, 6 it waits since now (1), or since when it did before (0)
-- Returns 1 given back, 0 not the holder's.
local record = redis.call('HMGET', KEYS[1], 'lease', 'enqueued', 'model', 'tried', 'waiting')
if record[1] ~= ARGV[2] then return 0 end
redis.call('ZREM', KEYS[3], ARGV[1])  -- frees memory: Redis lets the rest through when it is full
local time = redis.call('TIME')
local waiting = string.format('%.3f', time[1] * 1000 + time[2] / 1000)
if ARGV[6] == '0' then waiting = record[5] or record[2] end
redis.call('HSET', KEYS[1], 'status', 'queued', 'lease', '', 'waiting', waiting)
local counted, blameless = record[4] == ARGV[2], ARGV[4] == '1'
if blameless then redis.pcall('HINCRBY', KEYS[1], 'claims', -1) end
if counted == blameless then redis.pcall('HINCRBY', KEYS[1], 'attempts', counted and -1 or 1) end
redis.call('ZADD', KEYS[2], record[2], ARGV[1])
redis.call('EXPIRE', KEYS[2], ARGV[3])
local bell = ARGV[5] .. (record[3] or '')
if redis.call('LLEN', bell) == 0 then redis.call('LPUSH', bell, '1') end
redis.call('EXPIRE', bell, ARGV[3])
return 1
