-- Invariant: a session waits in the queue or is leased to one worker, never both; each claim gives
-- it an epoch above all earlier ones. Sessions whose lease ran out go back to their old place, unless
-- Redis was away lately: then their workers renew first. `claims` and `attempts` are counted since the
-- log last grew; attempt.lua counts the latter. A worker gets sessions of its model only, until their
-- choices take all its free slots (the last one's may take more, else a large one might never run), and
-- none that it refuses. A record that is no hash is removed: it must not hold up the others.
-- KEYS: queue, leases, contact
-- ARGV: 1 worker id, 2 free slots, 3 lease ms, 4 live ttl s, 5 session key prefix,
--       6 model ('': any), 7 prefix of the models' work bells, 8 most sessions to look at,
--       9 longest silence ms, 10 ms without one that workers need to renew their leases,
--       11… ids that are left to other workers
-- Returns {still waiting, ms until the next lease can be taken (-1: none), {id, lease, choices}, …}
local time = redis.call('TIME')
local now = time[1] * 1000 + time[2] / 1000
local micros = time[1] * 1000000 + time[2]

local function ring(model)
  local bell = ARGV[7] .. model
  if redis.call('LLEN', bell) == 0 then redis.call('LPUSH', bell, '1') end
  redis.call('EXPIRE', bell, ARGV[4])
end

local pause = 0  -- ms until leases that ran out may be taken; nobody ever renewed: at once
local contact = redis.call('HMGET', KEYS[3], 'since', 'last')
if contact[2] then
  local silent = math.abs(now - contact[2]) > tonumber(ARGV[9])
  pause = math.max(0, (silent and now or tonumber(contact[1])) + ARGV[10] - now)
end

local expired = pause == 0 and redis.call('ZRANGEBYSCORE', KEYS[2], '-inf', now, 'LIMIT', 0, 128) or {}
for _, id in ipairs(expired) do
  local key = ARGV[5] .. id
  local record = redis.pcall('HMGET', key, 'status', 'enqueued', 'model')
  if record.err then redis.call('DEL', key) end
  redis.call('ZREM', KEYS[2], id)
  if record[1] == 'running' then
    redis.call('HSET', key, 'status', 'queued', 'lease', '', 'waiting', string.format('%.3f', now))
    redis.call('ZADD', KEYS[1], tonumber(record[2]) or now, id)
    ring(record[3] or '')
  end
end

local refused = {}
for i = 11, #ARGV do refused[ARGV[i]] = true end

local claimed, ours = {}, 0
local free = tonumber(ARGV[2])
for _, id in ipairs(redis.call('ZRANGE', KEYS[1], 0, ARGV[8] - 1)) do
  local key = ARGV[5] .. id
  local record = redis.pcall('HMGET', key, 'status', 'model', 'epoch', 'last', 'tried_at',
    'choices')
  if record.err then redis.call('DEL', key) end
  local fits = ARGV[6] == '' or record[2] == ARGV[6]
  if record[1] ~= 'queued' then
    redis.call('ZREM', KEYS[1], id)
  elseif fits and free <= 0 then
    ours = 1
    break
  elseif fits and refused[id] then
    ours = 1
  elseif fits then
    redis.call('ZREM', KEYS[1], id)
    local epoch = math.max((tonumber(record[3]) or 0) + 1, micros)
    local lease = ARGV[1] .. ':' .. string.format('%.0f', epoch)
    redis.call('HSET', key, 'status', 'running', 'lease', lease,
      'epoch', string.format('%.0f', epoch), 'started', time[1])
    if record[4] ~= record[5] then  -- it got further since: this is no poison
      redis.call('HSET', key, 'attempts', 0, 'claims', 0, 'tried_at', record[4])
    end
    redis.pcall('HINCRBY', key, 'claims', 1)
    redis.call('ZADD', KEYS[2], string.format('%.3f', now + ARGV[3]), id)
    local choices = math.max(1, math.min(64, tonumber(record[6]) or 1))
    free = free - choices
    claimed[#claimed + 1] = {id, lease, choices}
  end
end
for _, key in ipairs({KEYS[1], KEYS[2]}) do redis.call('EXPIRE', key, ARGV[4]) end

local waiting = redis.call('ZCARD', KEYS[1])
if ours > 0 then ring(ARGV[6]) end
local next_expiry = -1
local first = redis.call('ZRANGE', KEYS[2], 0, 0, 'WITHSCORES')
if first[2] then next_expiry = math.max(0, math.ceil(math.max(first[2] - now, pause))) end
return {waiting, next_expiry, unpack(claimed)}
