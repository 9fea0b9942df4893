-- verify.lua: marks this Redis as verified for a campaign, or as recovering.
--
-- Guarantee: the mark is set only on the very head that was compared (number and chain hash) with
-- PostgreSQL and with what the live processes have seen (INV-8).
--
-- ARGV   number and chain hash that were compared · nonce · '' or why it is recovering
-- Reply  {0, event number} · {STALE} (the head has moved meanwhile: compare again) · {MISSING}
-- Idempotency  by what it writes. Cost about 10 µs.

local head = read_head()
if not head then
  return { MISSING }
end
if head.seq ~= tonumber(ARGV[1]) or head.chain ~= ARGV[2] then
  return { STALE }
end
local run_id, replid = identity()
if ARGV[4] ~= '' then
  redis.call('HSET', HEAD, 'recovering', ARGV[4])
else
  redis.call('HSET', HEAD, 'nonce', ARGV[3], 'run_id', run_id, 'replid', replid)
  redis.call('HDEL', HEAD, 'recovering')
end
return { OK, head.seq }
