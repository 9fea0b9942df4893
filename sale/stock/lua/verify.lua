-- verify.lua: marks this Redis as verified for a campaign, or as recovering.
--
-- Guarantee: the script changes the marks only if the head is still the one that was compared with
-- PostgreSQL (number and chain hash, INV-8); purchase.lua and peek.lua compare the marks of API
-- processes. If only the chain was compared, a recovering mark that a recovery has set, for damaged
-- stock or members, stays until the recovery ends.
--
-- ARGV   number and chain hash that were compared · nonce · '' or why it is recovering ·
--        '1' if stock and members were compared too, so that any recovering mark is removed
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
