-- Invariant: a session's last events, its terminal event and its end are one step, taken once by the
-- holder of its lease; nobody sees the end without the text.
-- KEYS: session, events, request, job, watch, cancel, leases, outbox
-- ARGV: 1 id, 2 lease, 3 event bell, 4 status, 5 kept s, 6 first index, 7 usage,
--       8 to be archived (1) or not (0), 9 most bytes a ring carries, 10… events
-- A lost log is begun again only to say that the session failed: somebody may wait for its end.
-- Returns 1 done (now or before), -1 fenced off, -2 log lost or a gap.
local record = redis.call('HMGET', KEYS[1], 'lease', 'last', 'ended_by')
if record[3] == ARGV[2] then return 1 end
if record[1] ~= ARGV[2] then return -1 end
local last, first = tonumber(record[2]), tonumber(ARGV[6])
local before = last
if first > last + 1 then return -2 end
if redis.call('TYPE', KEYS[2]).ok ~= 'stream' then
  if ARGV[4] ~= 'failed' then return -2 end
  redis.call('DEL', KEYS[2])
end
redis.call('ZREM', KEYS[7], ARGV[1])  -- first: a full Redis lets the rest through, and an end frees memory
for n = last + 1, first + #ARGV - 10 do
  redis.call('XADD', KEYS[2], (n + 1) .. '-0', 'e', ARGV[10 + n - first])
  last = n
end
local now = redis.call('TIME')[1]
redis.call('HSET', KEYS[1], 'last', last, 'status', ARGV[4], 'lease', '', 'ended_by', ARGV[2],
  'usage', ARGV[7], 'ended', now)
redis.call('DEL', KEYS[3], KEYS[4], KEYS[5], KEYS[6])
redis.call('EXPIRE', KEYS[1], ARGV[5])
redis.call('EXPIRE', KEYS[2], ARGV[5])
if ARGV[8] == '1' then  -- what nobody took while its session was kept is of no use any more
  redis.call('ZADD', KEYS[8], now, ARGV[1])
  redis.call('ZREMRANGEBYSCORE', KEYS[8], '-inf', now - ARGV[5])
  redis.call('EXPIRE', KEYS[8], ARGV[5])
end
local ring = table.concat(ARGV, '\n', 11 + before - first)  -- as in append.lua
ring = #ring <= tonumber(ARGV[9]) and '\n' .. ring or ''
redis.call('PUBLISH', ARGV[3], (before + 1) .. ring)
return 1
