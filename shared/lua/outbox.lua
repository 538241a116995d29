-- Invariant: an ended session stays in the outbox until somebody says that its row is written; who
-- takes it and dies has only delayed it.
-- KEYS: outbox
-- ARGV: 1 how many, 2 s until what is taken now may be taken again
-- Returns {now s, id…}
local now = redis.call('TIME')[1]
local ids = redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', now, 'LIMIT', 0, ARGV[1])
for _, id in ipairs(ids) do redis.call('ZADD', KEYS[1], 'XX', now + ARGV[2], id) end
return {tonumber(now), unpack(ids)}
