-- peek.lua: what a campaign would answer now, without a purchase and without a write.
--
-- Guarantee: says of state and stock what purchase.lua would say in this very moment, on a Redis
-- that was verified. It lets the batcher refuse a thousand askers of a sold-out campaign with one
-- small call, and no stale answer (INV-8).
--
-- ARGV   incarnation that this process has attended and event number that it has seen · nonce ·
--        showing numbers …
-- Reply  {0, now ms, seq, epoch, state, opens_at ms or 0, roster revision, number of the event
--        that gave the configuration, left of each showing …}
--        or {code}: MISSING UNVERIFIED UNATTENDED STALE BROKEN
-- Idempotency  reads only. Cost: constant.

local head = read_head()
if not head then
  return { MISSING }
end
local refusal = check_trusted(head, ARGV[3], ARGV[1], tonumber(ARGV[2]))
if refusal then
  return { refusal }
end
apply_clock(head, {})
local reply = { OK, head.now, head.seq, head.epoch, head.recovering and 'recovering' or head.state,
  head.opens_at or 0, head.roster_rev or -1, head.config_seq }
for i = 4, #ARGV do
  local left = tonumber(redis.call('HGET', STOCK, 'r' .. ARGV[i]))
  if not left then
    return { BROKEN }
  end
  reply[i + 5] = left
end
return reply
