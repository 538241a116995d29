-- Invariant: only the holder of a session's lease prolongs it; a lost lease never comes back. Each call
-- says that Redis is there, and notes since when it has been without a longer silence.
-- KEYS: leases, contact
-- ARGV: 1 lease ms, 2 live ttl s, 3 session prefix, 4 events prefix, 5 request prefix, 6 job prefix,
--       7 longest silence ms, then id, lease for each session
-- Returns the ids whose lease is lost.
local time = redis.call('TIME')
local now = time[1] * 1000 + time[2] / 1000
local expiry = string.format('%.3f', now + ARGV[1])
local lost = {}
-- Uses no memory, and Redis, when full, lets a script that has begun to write go on: a lease must not
-- run out because memory has.
redis.call('EXPIRE', KEYS[1], ARGV[2])
local last = tonumber(redis.call('HGET', KEYS[2], 'last'))
if not last or math.abs(now - last) > tonumber(ARGV[7]) then
  redis.call('HSET', KEYS[2], 'since', string.format('%.3f', now))
end
redis.call('HSET', KEYS[2], 'last', string.format('%.3f', now))
redis.call('EXPIRE', KEYS[2], ARGV[2])
for i = 8, #ARGV, 2 do
  local id, key = ARGV[i], ARGV[3] .. ARGV[i]
  local record = redis.pcall('HMGET', key, 'lease', 'status')
  if record[1] == ARGV[i + 1] and record[2] == 'running' then
    redis.call('ZADD', KEYS[1], expiry, id)
    if redis.call('TTL', key) * 2 < tonumber(ARGV[2]) then
      redis.call('EXPIRE', key, ARGV[2])
      for prefix = 4, 6 do redis.call('EXPIRE', ARGV[prefix] .. id, ARGV[2]) end
    end
  else
    lost[#lost + 1] = id
  end
end
if redis.call('EXISTS', KEYS[1]) == 1 then redis.call('EXPIRE', KEYS[1], ARGV[2]) end
return lost
