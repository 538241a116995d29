-- Invariant: what a key uses in a minute, and how many sessions it has at once, never exceeds its
-- limits by what is admitted here; what is refused costs nothing. The same request sent again at once
-- is admitted once; later its id is a new session's.
-- A level falls evenly, by the whole limit in a minute: it is what was used and is not forgotten yet.
-- KEYS: levels, live sessions of the key
-- ARGV: 1 session id, 2 tokens, 3 requests a minute, 4 tokens a minute, 5 sessions at once (0: no
--       limit), 6 live ttl s, 7 s for which an id is the same request's
-- Returns {ok | known | requests | tokens | sessions, s until it is worth another try}
local time = redis.call('TIME')
local now = time[1] + time[2] / 1000000
local since = redis.call('ZSCORE', KEYS[2], ARGV[1])
if since and now - since < tonumber(ARGV[7]) then return {'known', 0} end
local stored = redis.call('HMGET', KEYS[1], 'at', 'requests', 'tokens')
local elapsed = math.max(0, now - tonumber(stored[1] or now))
local names, costs, levels = {'requests', 'tokens'}, {1, tonumber(ARGV[2])}, {}
for i = 1, 2 do
  local limit = tonumber(ARGV[i + 2])
  levels[i] = math.max(0, tonumber(stored[i + 1] or 0) - elapsed * limit / 60)
  local over = levels[i] + costs[i] - limit
  if limit > 0 and over > 0 then return {names[i], math.ceil(over * 60 / limit)} end
end
local sessions = tonumber(ARGV[5])
if sessions == 0 then  -- nobody counts them: what is old is of no use
  redis.call('ZREMRANGEBYSCORE', KEYS[2], '-inf', now - ARGV[7])
elseif not since and redis.call('ZCARD', KEYS[2]) >= sessions then return {'sessions', 1} end
redis.call('HSET', KEYS[1], 'at', string.format('%.6f', now),
  'requests', levels[1] + costs[1], 'tokens', levels[2] + costs[2])
redis.call('EXPIRE', KEYS[1], 120)
redis.call('ZADD', KEYS[2], string.format('%.3f', now), ARGV[1])
redis.call('EXPIRE', KEYS[2], ARGV[6])
return {'ok', 0}
