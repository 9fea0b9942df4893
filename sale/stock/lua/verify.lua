-- verify.lua: marks this Redis as verified for a campaign, or as recovering.
--
-- Guarantee: the mark is set only on the very head that was compared (number and chain hash) with
-- PostgreSQL (INV-8); the marks of live processes are asked by purchase.lua and peek.lua. Where only
-- the chain was compared, a recovering mark that somebody else has set, for damaged stock or members,
-- stays: recovery lifts it.
--
-- ARGV   number and chain hash that were compared · nonce · '' or why it is recovering ·
--        '1' where stock and members were compared too, so that every mark may go
-- Reply  {0, event number, '' or 'recovering' (it still is)} · {MISSING} ·
--        {STALE} (the head has moved meanwhile: compare again)
-- Idempotency  by what it writes. Cost: constant.

local head = read_head()
if not head then
  return { MISSING }
end
if head.seq ~= tonumber(ARGV[1]) or head.chain ~= ARGV[2] then
  return { STALE }
end
local run_id, replid = identity()
local others = head.recovering and redis.call('HGET', HEAD, 'recovering_by') ~= 'verify'
if ARGV[4] ~= '' then
  if not others then
    redis.call('HSET', HEAD, 'recovering', ARGV[4], 'recovering_by', 'verify')
  end
  return { OK, head.seq, 'recovering' }
end
redis.call('HSET', HEAD, 'nonce', ARGV[3], 'run_id', run_id, 'replid', replid)
if others and ARGV[5] ~= '1' then
  return { OK, head.seq, 'recovering' }
end
redis.call('HDEL', HEAD, 'recovering', 'recovering_by')
return { OK, head.seq, '' }
