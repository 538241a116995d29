-- Invariant: only a session that has ended is deleted, by its owner, and as a whole; a note says for a
-- while which one it was, so that whoever copies it meanwhile drops the copy.
-- KEYS: session, events, watch, outbox, note
-- ARGV: 1 id, 2 owner, 3 seconds to keep the note
-- Returns missing | queued | running | deleted
local record = redis.call('HMGET', KEYS[1], 'owner', 'status', 'enqueued')
if not record[2] or record[1] ~= ARGV[2] then return 'missing' end
if record[2] == 'queued' or record[2] == 'running' then return record[2] end
redis.call('SET', KEYS[5], record[3], 'EX', ARGV[3])
redis.call('DEL', KEYS[1], KEYS[2], KEYS[3])
redis.call('ZREM', KEYS[4], ARGV[1])
return 'deleted'
