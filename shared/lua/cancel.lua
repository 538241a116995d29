-- Invariant: a queued session is cancelled at once and can never start; a running one is flagged for
-- its worker; an ended one is left as it is.
-- KEYS: session, events, request, job, watch, cancel, queue
-- ARGV: 1 id, 2 owner, 3 event bell, 4 reason, 5 live ttl s, 6 kept s, 7 terminal event, 8 usage
-- Returns missing | cancelling | the status it ended with
local record = redis.call('HMGET', KEYS[1], 'owner', 'status', 'last')
if not record[2] or record[1] ~= ARGV[2] then return 'missing' end
if record[2] == 'running' then
  redis.call('SET', KEYS[6], ARGV[4], 'EX', ARGV[5], 'NX')
  return 'cancelling'
end
if record[2] ~= 'queued' then return record[2] end
local index = tonumber(record[3]) + 1
redis.call('XADD', KEYS[2], 'NOMKSTREAM', (index + 1) .. '-0', 'e', ARGV[7])
redis.call('ZREM', KEYS[7], ARGV[1])
redis.call('HSET', KEYS[1], 'last', index, 'status', 'cancelled', 'ended_by', 'cancel',
  'usage', ARGV[8], 'ended', redis.call('TIME')[1])
redis.call('DEL', KEYS[3], KEYS[4], KEYS[5], KEYS[6])
redis.call('EXPIRE', KEYS[1], ARGV[6])
redis.call('EXPIRE', KEYS[2], ARGV[6])
redis.call('PUBLISH', ARGV[3], ARGV[1])
return 'cancelled'
