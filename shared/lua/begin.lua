-- Invariant: a session keeps the media and the engine that its first tokens came from; it stays exact
-- only as long as each worker that continues it has an engine alike and continues exactly.
-- KEYS: session
-- ARGV: 1 lease, 2 engine fingerprint, 3 exact continuation (1) or not (0), 4 media hashes,
--       5 tokens of the prompt
-- Returns 1 go on, 0 not the holder's, -1 the media are others now.
local record = redis.call('HMGET', KEYS[1], 'lease', 'last', 'engine', 'media')
if record[1] ~= ARGV[1] then return 0 end
if record[2] == '0' or not record[3] then  -- nothing generated yet: nothing to differ from
  redis.call('HSET', KEYS[1], 'engine', ARGV[2], 'media', ARGV[4], 'exact', '1',
    'prompt_tokens', ARGV[5])
  return 1
end
if record[4] ~= ARGV[4] then return -1 end
redis.call('HINCRBY', KEYS[1], 'takeovers', 1)
if record[3] ~= ARGV[2] or ARGV[3] ~= '1' then redis.call('HSET', KEYS[1], 'exact', '0') end
return 1
