-- sync_cards.lua: lets a campaign's set of revoked cards follow the roster.
--
-- Guarantee: INV-9. The set holds exactly the cards that were not active at roster_rev: a step is
-- taken only from the revision it was computed from, and a campaign whose first load is not
-- complete has no roster_rev and sells nothing.
--
-- ARGV   from revision (-1: first load, '' head.roster_rev) · to revision (-1: more of it follows) ·
--        then for each card: '+' revoked or '-' active · card
-- Reply  {0, to revision} · {STALE, revision it is at} · {MISSING}
-- Idempotency  by the revision. Cost about 1 µs a card.

local at = redis.call('HMGET', HEAD, 'seq', 'roster_rev')
if not at[1] then
  return { MISSING }
end
local rev = tonumber(at[2]) or -1
if rev ~= tonumber(ARGV[1]) then
  return { STALE, rev }
end
for i = 3, #ARGV, 2 do
  redis.call(ARGV[i] == '+' and 'SADD' or 'SREM', REVOKED, ARGV[i + 1])
end
if tonumber(ARGV[2]) >= 0 then
  redis.call('HSET', HEAD, 'roster_rev', ARGV[2])
end
return { OK, tonumber(ARGV[2]) }
