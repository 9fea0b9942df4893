-- sync_revoked.lua: brings a campaign's set of revoked members up to a revision of the roster.
--
-- Guarantee: INV-9. The set holds exactly the members who were not active at roster_rev: the script
-- applies a step only to the revision from which it was computed, and a campaign whose first load is
-- not complete has no roster_rev and sells nothing. A first load begins with an empty set and has a
-- name (head.roster_load): the script refuses further steps of a load that was overtaken.
--
-- ARGV   from revision (-1: first load, no head.roster_rev) · to revision (-1: more of it follows) ·
--        name of the load ('' for none) · '1' for its first step ·
--        then for each member: '+' revoked or '-' active · number
-- Reply  {0, to revision} · {STALE, revision it is at, -1 for none} · {MISSING}
-- Idempotency  by the revision. Cost: linear in the members.

local at = redis.call('HMGET', HEAD, 'seq', 'roster_rev', 'roster_load')
if not at[1] then
  return { MISSING }
end
local rev = tonumber(at[2]) or -1
local begins = ARGV[4] == '1'
if rev ~= tonumber(ARGV[1]) or (rev < 0 and not begins and (at[3] or '') ~= ARGV[3]) then
  return { STALE, rev }
end
if begins then
  redis.call('UNLINK', REVOKED)
  redis.call('HSET', HEAD, 'roster_load', ARGV[3])
end
for i = 5, #ARGV, 2 do
  redis.call(ARGV[i] == '+' and 'SADD' or 'SREM', REVOKED, ARGV[i + 1])
end
if tonumber(ARGV[2]) >= 0 then
  redis.call('HSET', HEAD, 'roster_rev', ARGV[2])
  redis.call('HDEL', HEAD, 'roster_load')
end
return { OK, tonumber(ARGV[2]) }
