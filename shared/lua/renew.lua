-- Invariant: only the holder of a session's lease prolongs it; a lost lease never comes back.
-- KEYS: leases
-- ARGV: 1 lease ms, 2 live ttl s, 3 session prefix, 4 events prefix, 5 request prefix, 6 job prefix,
--       then id, lease for each session
-- Returns the ids whose lease is lost.
local time = redis.call('TIME')
local expiry = string.format('%.3f', time[1] * 1000 + time[2] / 1000 + ARGV[1])
local lost = {}
-- Uses no memory, and Redis, when full, lets a script that has begun to write go on: a lease must not
-- run out because memory has.
redis.call('EXPIRE', KEYS[1], ARGV[2])
for i = 7, #ARGV, 2 do
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
