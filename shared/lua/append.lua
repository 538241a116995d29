-- Invariant: a session's log runs 0, 1, 2, … and only the holder of its lease writes to it. The same
-- events sent again (a lost reply) are accepted once; one session's refusal does not touch another.
-- Each ring says from which index on a log has grown, and with what, unless that is too much.
-- KEYS: session, events for each session
-- ARGV: 1 prefix of the event bells, 2 most bytes a ring carries,
--       then for each session: id, lease, first index, count, events…
-- Returns per session its last index, or -1 fenced off, -2 log lost or a gap, -3 refused by Redis.
local results = {}
local at = 3
for i = 1, #KEYS, 2 do
  local id, lease, first, count = ARGV[at], ARGV[at + 1], tonumber(ARGV[at + 2]), tonumber(ARGV[at + 3])
  local record = redis.pcall('HMGET', KEYS[i], 'lease', 'last')  -- no hash: nobody's
  local last = tonumber(record[2] or -1) or -1
  local before = last
  local result = first + count - 1
  if record[1] ~= lease then
    result = -1
  elseif first > last + 1 then
    result = -2
  else
    for n = last + 1, first + count - 1 do
      local entry = redis.pcall('XADD', KEYS[i + 1], 'NOMKSTREAM', (n + 1) .. '-0',
        'e', ARGV[at + 4 + n - first])
      if not entry then result = -2 break end
      if entry.err then result = string.find(entry.err, 'WRONGTYPE') and -2 or -3 break end
      last = n
    end
    redis.call('HSET', KEYS[i], 'last', last)
    if last > before then
      local ring = table.concat(ARGV, '\n', at + 5 + before - first, at + 4 + last - first)
      ring = #ring <= tonumber(ARGV[2]) and '\n' .. ring or ''
      redis.call('PUBLISH', ARGV[1] .. id, (before + 1) .. ring)
    end
  end
  results[#results + 1] = result
  at = at + 4 + count
end
return results
